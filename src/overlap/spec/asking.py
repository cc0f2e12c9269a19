"""The part of an engine that makes texts to train on."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from typing import Any, Protocol

from overlap.messages import ChatMessage, Output, Prompt, SamplingParams


class Asked(Protocol):
    """What of AsyncEngine is used; its docstrings say what each is."""

    @property
    def chat_template(self) -> str | None:
        """The Jinja text of the model's chat template."""

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of a text."""

    async def encode_chat(
        self,
        messages: Sequence[ChatMessage],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Return the token ids of chat messages."""

    def generate_batch(
        self,
        prompts: Iterable[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool | None = None,
    ) -> AsyncIterator[Output]:
        """Yield the last Output of each prompt as it completes."""


async def encode_question(engine: Asked, question: str) -> list[int]:
    """Return the ids of a user's message in the chat template, or of plain text where there is no template."""
    if engine.chat_template is None:
        return await engine.encode(question)
    return await engine.encode_chat([{"role": "user", "content": question}])
