"""What clients get: the objects of the OpenAI API, field by field.

Clients break on a missing `role` in the first delta, on a missing `index`, and on a usage chunk that nobody asked for,
so each shape is written out here once and checked in the tests against the types of the `openai` package.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Generic, Literal, Protocol, TypeAlias, TypeVar

import msgspec
from msgspec import UNSET, UnsetType

from overlap.messages import Output, TokenLogprob, Usage
from overlap.serve.logprobs import ChatLogprobs, PromptTable, TextLogprobs

Reason: TypeAlias = Literal["stop", "length", "tool_calls"]
"""Why an answer ended, in the words that clients know."""


class CachedTokens(msgspec.Struct, frozen=True):
    """Where prompt tokens came from."""

    cached_tokens: int


class UsageObject(msgspec.Struct, frozen=True):
    """What a request cost, in tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


def total_usage(usages: Mapping[int, Usage], n: int) -> UsageObject:
    """Add up what the answers of one request cost, `n` of them to each prompt. A prompt counts once."""
    if len(usages) == 1:  # nearly always, and streams may ask for it with each token
        (one,) = usages.values()
        return UsageObject(one.prompt_tokens, one.completion_tokens, one.total_tokens, CachedTokens(one.cached_tokens))
    first = {index // n: usage for index, usage in sorted(usages.items(), reverse=True)}
    prompt = sum(usage.prompt_tokens for usage in first.values())
    cached = sum(usage.cached_tokens for usage in first.values())
    completion = sum(usage.completion_tokens for usage in usages.values())
    return UsageObject(prompt, completion, prompt + completion, CachedTokens(cached))


class FunctionDelta(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What is new in a function call."""

    name: str | UnsetType = UNSET
    arguments: str | UnsetType = UNSET


class ToolCallDelta(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What is new in a tool call: the first one has all but the arguments, the others have arguments."""

    index: int
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET
    function: FunctionDelta


class Delta(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What is new in a chat message. The last one is empty."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: tuple[ToolCallDelta, ...] | UnsetType = UNSET


class ChatChunkChoice(msgspec.Struct, frozen=True, kw_only=True):
    """A choice in a chat chunk."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: Reason | None = None
    token_ids: tuple[int, ...] | UnsetType = UNSET


class FunctionCall(msgspec.Struct, frozen=True, kw_only=True):
    """A function call, its arguments as JSON text."""

    name: str
    arguments: str


class ToolCall(msgspec.Struct, frozen=True, kw_only=True):
    """A tool call of a whole message."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """A whole chat message."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    reasoning_content: str | UnsetType = UNSET
    tool_calls: tuple[ToolCall, ...] | UnsetType = UNSET


class ChatChoice(msgspec.Struct, frozen=True, kw_only=True):
    """A choice in a whole chat answer."""

    index: int
    message: Message
    logprobs: ChatLogprobs | None = None
    finish_reason: Reason | None
    token_ids: tuple[int, ...] | UnsetType = UNSET


class TextChoice(msgspec.Struct, frozen=True, kw_only=True):
    """A choice in a completion, whole or chunk."""

    index: int
    text: str
    logprobs: TextLogprobs | None = None
    finish_reason: Reason | None = None
    token_ids: tuple[int, ...] | UnsetType = UNSET
    prompt_logprobs: PromptTable | UnsetType = UNSET


Choice: TypeAlias = ChatChunkChoice | ChatChoice | TextChoice


AnyChoice = TypeVar("AnyChoice", bound=Choice)


class Answer(msgspec.Struct, Generic[AnyChoice], frozen=True, kw_only=True):
    """A whole answer, or one chunk of it."""

    id: str
    object: str
    created: int
    model: str
    choices: tuple[AnyChoice, ...]
    usage: UsageObject | UnsetType | None = UNSET
    prompt_token_ids: tuple[int, ...] | UnsetType = UNSET
    prompt_logprobs: PromptTable | UnsetType = UNSET


class AnswerShape(Protocol):
    """One choice of an answer: turns what the engine says into what the client gets."""

    def opening(self) -> list[Choice]:
        """What a stream begins with."""

    def chunks(self, output: Output) -> list[Choice]:
        """What is new, for a stream; the last has the finish reason."""

    def plain(self, output: Output) -> str | None:
        """What is new, if that is text and nothing else: then `chunks` need not be asked. Else None."""

    def choice(self, text: str) -> Choice:
        """What `chunks` makes of plain text."""

    def whole(self, output: Output) -> Choice:
        """The answer in one piece, from its last Output."""


class Progress:
    """How much of an answer has been told."""

    def __init__(self) -> None:
        self._tokens = 0
        self._logprobs = 0

    def tokens(self, output: Output) -> list[int]:
        """Return the tokens that are new."""
        new = output.token_ids[self._tokens :]
        self._tokens += len(new)
        return new

    def logprobs(self, output: Output) -> list[TokenLogprob]:
        """Return the log-probabilities that are new; none if they were not asked for."""
        new = (output.logprobs or [])[self._logprobs :]
        self._logprobs += len(new)
        return new


ID_PREFIXES: Final = {"chat": "chatcmpl-", "text": "cmpl-"}
OBJECTS: Final = {"chat": "chat.completion", "text": "text_completion"}
CHUNK_OBJECTS: Final = {"chat": "chat.completion.chunk", "text": "text_completion"}
Kind: TypeAlias = Literal["chat", "text"]
