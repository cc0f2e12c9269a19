"""Text: what a model reads and writes text with, and what it is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from overlap.text.templates import ChatTemplate
from overlap.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from overlap.models.config import ModelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerSource:
    """What the tokenizer is made of.

    For `kind="gguf"`, `fields` holds the file's `tokenizer.*` keys (plain values and lists) and `path` is the GGUF. For
    `kind="json"`, `path` is the `tokenizer.json` and `fields` is the content of `tokenizer_config.json` (empty if
    there is none).
    """

    kind: Literal["gguf", "json"]
    path: Path
    fields: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    def read(self) -> Tokenizer:
        """Make the tokenizer. Raises ModelError for what is missing or broken."""
        if self.kind == "gguf":
            return Tokenizer.from_gguf(self.fields)
        return Tokenizer.from_json_file(self.path, config=self.fields)


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """What turns prompts into tokens and back; both None for random weights made from a configuration alone."""

    tokenizer: Tokenizer | None
    template: ChatTemplate | None

    @classmethod
    def of(cls, source: TokenizerSource | None, chat_template: str | None) -> Text:
        """Make both, with the tokenizer's own special tokens for the template. Raises ModelError as `read` does."""
        if source is None:
            return cls(tokenizer=None, template=None)
        tokenizer = source.read()
        template = ChatTemplate(
            chat_template,
            bos_token=tokenizer.bos_token,
            eos_token=tokenizer.eos_token,
            unk_token=tokenizer.unk_token,
            pad_token=tokenizer.pad_token,
        )
        return cls(tokenizer=tokenizer, template=template)

    def end_ids(self, model: ModelConfig) -> set[int]:
        """Return the tokens that end an answer by themselves, of those that the model has."""
        own = () if self.tokenizer is None else self.tokenizer.eos_token_ids
        return {token for token in (*model.eos_token_ids, *own) if token < model.vocab_size}
