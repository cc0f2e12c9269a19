"""Prompts to token ids: text, ids and chat messages, on a thread where that takes long."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar

import numpy as np

from overlap.cache.pages import Ints
from overlap.errors import EngineClosed, RequestError
from overlap.messages import ChatMessage, Prompt
from overlap.plain import plain_int

if TYPE_CHECKING:
    from overlap.text.templates import ChatTemplate
    from overlap.text.tokenizer import Tokenizer

T = TypeVar("T")

_LONG_TEXT: Final = 2_000  # characters: below, encoding (about 0.2 ms) costs less than a change of thread


class PromptEncoder:
    """Encodes prompts for one model. `close` ends its thread: what needs it raises EngineClosed from then on."""

    def __init__(self, model: str, vocab_size: int, tokenizer: Tokenizer | None, template: ChatTemplate | None) -> None:
        self._model = model
        self._vocab_size = vocab_size
        self._tokenizer = tokenizer
        self._template = template
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="overlap-text")
        self._closed = False

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer. Raises RequestError for random weights that came without one."""
        if self._tokenizer is None:
            raise RequestError(f"{self._model!r} has no tokenizer. Give token ids as the prompt.")
        return self._tokenizer

    @property
    def chat_template(self) -> str | None:
        """The Jinja text of the model's chat template."""
        return None if self._template is None else self._template.source

    def close(self) -> None:
        """Let the thread end, once it has done what it was asked for."""
        self._closed = True
        self._thread.shutdown(wait=False)

    async def encode(self, prompt: Prompt) -> Ints:
        """Return the token ids of any kind of prompt. Raises RequestError for what is none."""
        if isinstance(prompt, str):
            return self._known(await self.encode_text(prompt, special=True))
        parts: Any = prompt.tolist() if hasattr(prompt, "tolist") else prompt  # numpy arrays, tensors
        if isinstance(parts, (bytes, bytearray)) or not isinstance(parts, Sequence):
            raise RequestError(f"A prompt is text, token ids or chat messages, not {type(prompt).__name__}.")
        if parts and all(isinstance(part, Mapping) for part in parts):
            return self._known(await self.encode_chat(parts))
        return np.array(_checked(parts, self._vocab_size), dtype=np.int32)

    def _known(self, ids: list[int]) -> Ints:
        """Return the ids of a text, if the model has rows for them all: a tokenizer may have more tokens than that."""
        tokens = np.array(ids, dtype=np.int32)
        unknown = tokens[tokens >= self._vocab_size]
        if len(unknown):
            first = int(unknown[0])
            name = self.tokenizer.decode([first], skip_special_tokens=False)
            raise RequestError(
                f"The prompt has the token {name!r} (id {first}), but the model knows ids from 0 to "
                f"{self._vocab_size - 1} only. Leave it out, or give the model the tokenizer that it was trained with."
            )
        return tokens

    async def encode_chat(
        self,
        messages: Sequence[ChatMessage],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Return the token ids of `messages` in the model's chat template. Raises RequestError."""
        template = self._template
        if template is None:
            raise RequestError(f"{self._model!r} has no tokenizer. Give token ids as the prompt.")
        render = partial(template.render, messages, tools=tools, add_generation_prompt=add_generation_prompt)
        text = await self._on_thread(render)
        return await self.encode_text(text, special=False)

    async def encode_text(self, text: str, *, special: bool) -> list[int]:
        """Return the token ids of `text`; see `Tokenizer.encode` for `special`. Raises RequestError."""
        tokenizer = self.tokenizer
        if not isinstance(text, str) or len(text) < _LONG_TEXT:  # what is no text is refused there
            return tokenizer.encode(text, special=special)
        return await self._on_thread(partial(tokenizer.encode, text, special=special))

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Return the text of `ids`. Raises RequestError for what is no list of ids, and for ids that no token has."""
        tokenizer = self.tokenizer
        parts: Any = ids.tolist() if hasattr(ids, "tolist") else ids  # numpy arrays, tensors
        if isinstance(parts, (str, bytes, bytearray)) or not isinstance(parts, Sequence):
            raise RequestError(f"Token ids are decoded from a list, as `encode` returns it, not from {ids!r:.80}.")
        return tokenizer.decode(_checked(parts, tokenizer.vocab_size), skip_special_tokens=skip_special_tokens)

    async def _on_thread(self, function: Callable[[], T]) -> T:
        try:
            made = asyncio.get_running_loop().run_in_executor(self._thread, function)
        except RuntimeError:
            if not self._closed:
                raise
            raise EngineClosed("The engine was closed.") from None
        return await made


def _checked(parts: Iterable[object], size: int) -> list[int]:
    """Return token ids as Python's own integers. Raises RequestError for what is none of the `size` that there are."""
    ids = []
    for part in parts:
        token = plain_int(part)
        if token is None or not 0 <= token < size:
            raise RequestError(f"A token id is an integer from 0 to {size - 1}, not {part!r:.80}.")
        ids.append(token)
    return ids
