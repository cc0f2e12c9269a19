"""What clients get: the objects of the OpenAI API, field by field.

Clients break on a missing `role` in the first delta, on a missing `index`, and on a usage chunk that nobody asked for,
so each shape is written out here once and checked in the tests against the types of the `openai` package.
"""

from __future__ import annotations

from typing import Final, Literal, Protocol, TypeAlias

import msgspec
from msgspec import UNSET, UnsetType

from overlap.messages import FinishReason, Output, Usage


class CachedTokens(msgspec.Struct, frozen=True):
    """Where prompt tokens came from."""

    cached_tokens: int


class UsageObject(msgspec.Struct, frozen=True):
    """What a request cost, in tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


def total_usage(usages: list[Usage]) -> UsageObject:
    """Add up what the prompts of one request cost."""
    prompt = sum(usage.prompt_tokens for usage in usages)
    completion = sum(usage.completion_tokens for usage in usages)
    cached = sum(usage.cached_tokens for usage in usages)
    return UsageObject(prompt, completion, prompt + completion, CachedTokens(cached))


class Delta(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What is new in a chat message. The last one is empty."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET


class ChatChunkChoice(msgspec.Struct, frozen=True, kw_only=True):
    """A choice in a chat chunk."""

    index: int
    delta: Delta
    logprobs: None = None
    finish_reason: FinishReason | None = None


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """A whole chat message."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(msgspec.Struct, frozen=True, kw_only=True):
    """A choice in a whole chat answer."""

    index: int
    message: Message
    logprobs: None = None
    finish_reason: FinishReason | None


class TextChoice(msgspec.Struct, frozen=True, kw_only=True):
    """A choice in a completion, whole or chunk."""

    index: int
    text: str
    logprobs: None = None
    finish_reason: FinishReason | None = None


Choice: TypeAlias = ChatChunkChoice | ChatChoice | TextChoice


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """A whole answer, or one chunk of it."""

    id: str
    object: str
    created: int
    model: str
    choices: tuple[Choice, ...]
    usage: UsageObject | UnsetType | None = UNSET


class Shape(Protocol):
    """How one kind of request is answered: the words and the choices that are its own."""

    @property
    def id_prefix(self) -> str:
        """What request ids begin with."""

    @property
    def object(self) -> str:
        """The `object` of a whole answer."""

    @property
    def chunk_object(self) -> str:
        """The `object` of a chunk."""

    def opening(self, index: int) -> tuple[Choice, ...]:
        """What a stream begins with for the answer to prompt `index`."""

    def delta(self, index: int, text: str) -> Choice:
        """Some more text."""

    def ending(self, index: int, reason: FinishReason) -> Choice:
        """Why the text ended."""

    def whole(self, index: int, output: Output) -> Choice:
        """The answer in one piece."""


class ChatShape:
    """/v1/chat/completions."""

    id_prefix: Final = "chatcmpl-"
    object: Final = "chat.completion"
    chunk_object: Final = "chat.completion.chunk"

    def opening(self, index: int) -> tuple[Choice, ...]:
        """Clients learn the role from the first delta."""
        return (ChatChunkChoice(index=index, delta=Delta(role="assistant", content="")),)

    def delta(self, index: int, text: str) -> Choice:
        """Some more text."""
        return ChatChunkChoice(index=index, delta=Delta(content=text))

    def ending(self, index: int, reason: FinishReason) -> Choice:
        """An empty delta."""
        return ChatChunkChoice(index=index, delta=Delta(), finish_reason=reason)

    def whole(self, index: int, output: Output) -> Choice:
        """The answer in one piece."""
        message = Message(content=output.text)
        return ChatChoice(index=index, message=message, finish_reason=output.finish_reason)


class CompletionShape:
    """/v1/completions."""

    id_prefix: Final = "cmpl-"
    object: Final = "text_completion"
    chunk_object: Final = "text_completion"

    def opening(self, index: int) -> tuple[Choice, ...]:  # noqa: ARG002
        """A completion opens with its first text."""
        return ()

    def delta(self, index: int, text: str) -> Choice:
        """Some more text."""
        return TextChoice(index=index, text=text)

    def ending(self, index: int, reason: FinishReason) -> Choice:
        """An empty text."""
        return TextChoice(index=index, text="", finish_reason=reason)

    def whole(self, index: int, output: Output) -> Choice:
        """The answer in one piece."""
        return TextChoice(index=index, text=output.text, finish_reason=output.finish_reason)
