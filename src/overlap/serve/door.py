"""Door: all that the endpoint asks of an engine, wherever the engine runs.

An AsyncEngine is a Door to itself. A front in a process of its own has a Door whose other end is a socket. Handlers
know nothing else, so the same endpoint serves both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from overlap.messages import ChatMessage, Output, Prompt, SamplingParams

if TYPE_CHECKING:
    from overlap.engine import Health
    from overlap.text.tokenizer import Tokenizer


class Outputs(Protocol):
    """One answer as it comes. `aclose` before its end aborts the request; after it, it does nothing."""

    def __aiter__(self) -> Outputs:
        """Return itself."""

    async def __anext__(self) -> Output:
        """Return what is new. Raises the errors that `Door.generate` names."""

    async def aclose(self) -> None:
        """End the request if it still runs, and let go of it."""


class Door(Protocol):
    """What stands for an engine in front of the HTTP routes. Tokenizing and templates run on this side of it."""

    @property
    def model_name(self) -> str:
        """The model as it was asked for."""

    @property
    def context(self) -> int:
        """The most tokens of one request, prompt and answer together."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer. Raises RequestError for a model that came without one."""

    @property
    def chat_template(self) -> str | None:
        """The Jinja text of the model's chat template, from which its way to write tool calls is told."""

    def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        deadline: float | None = None,
        fairness_key: str = "",
        cache_salt: str = "",
        whole: bool = False,
    ) -> Outputs:
        """Return the answer to `prompt`, with `whole` as one Output. Nothing happens before it is iterated.

        Iterating raises RequestError (and QueueFull, DeadlineExceeded, RequestAborted, RequestFailed), EngineClosed
        and EngineDead, as `AsyncEngine.generate` does.
        """

    async def abort(self, request_id: str) -> bool:
        """End a request now; False if there is none of this id."""

    def health(self) -> Health:
        """Whether requests can be answered; if not, why."""

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the tokens of `text`. Long texts are encoded on another thread. Raises RequestError."""

    async def encode_chat(
        self,
        messages: Sequence[ChatMessage],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Return the tokens of `messages` in the model's chat template. Raises RequestError."""

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Return the text of `ids`. Raises RequestError for ids that are no tokens, and without a tokenizer."""

    def statistics(self) -> Any:
        """Return the engine's figures (`engine.Statistics`), as of the last that is known of them."""
