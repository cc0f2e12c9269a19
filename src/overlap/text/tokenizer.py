"""Tokenizer: text to token ids and back, from a tokenizer.json or from a GGUF's own vocabulary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import tokenizers

from overlap.errors import ModelError, RequestError
from overlap.text.detokenize import Detokenizer, Pieces
from overlap.text.gguf_vocabulary import build_tokenizer, frame, token_of


class Tokenizer:
    """A model's tokenizer. Immutable once made, so any number of threads may use it at once.

    Encoding a long text takes milliseconds: do it off the engine's loop. `tokenizers` lets go of the GIL meanwhile.
    """

    def __init__(
        self,
        model: tokenizers.Tokenizer,
        *,
        bos_token: str | None = None,
        eos_tokens: Sequence[str] = (),
        unk_token: str | None = None,
        pad_token: str | None = None,
    ) -> None:
        # A tokenizer.json may carry how its author trained; cutting or padding a prompt is never meant here.
        model.no_truncation()
        model.no_padding()
        self._model = model
        self.bos_token = bos_token
        self.eos_token = eos_tokens[0] if eos_tokens else None
        self.unk_token = unk_token
        self.pad_token = pad_token
        self.bos_token_id = None if bos_token is None else model.token_to_id(bos_token)
        ids = (model.token_to_id(token) for token in dict.fromkeys(eos_tokens))
        self.eos_token_ids = tuple(token_id for token_id in ids if token_id is not None)
        """The tokens that the tokenizer says end an answer; a model's configuration may name more."""
        added = model.get_added_tokens_decoder()
        self.vocab_size = max([model.get_vocab_size() - 1, *added]) + 1
        """One more than the highest token id. The model's own vocabulary may be larger (padded)."""
        self._pieces = Pieces(model, self.vocab_size)
        self._adds_bos = self.bos_token_id is not None and model.encode("").ids[:1] == [self.bos_token_id]

    @classmethod
    def from_json_file(cls, path: str | PathLike[str], *, config: Mapping[str, Any] | None = None) -> Tokenizer:
        """Read a `tokenizer.json`. `config` is the content of the `tokenizer_config.json` beside it.

        `config` names the special tokens; where it says `add_bos_token` or `add_eos_token`, that is followed, else
        what the tokenizer.json says. Raises ModelError for a file that is missing or broken.
        """
        path = Path(path)
        if not path.is_file():
            raise ModelError(f"There is no tokenizer at {str(path)!r}. A model's directory needs its tokenizer.json.")
        try:
            model = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # `tokenizers` raises bare Exceptions
            raise ModelError(f"The tokenizer {str(path)!r} can not be read: {error}. Fetch it again.") from error
        config = config or {}
        bos, eos = _configured(config, "bos_token"), _configured(config, "eos_token")
        if "add_bos_token" in config or "add_eos_token" in config:
            for name, token in (("add_bos_token", bos), ("add_eos_token", eos)):
                if config.get(name) and token is not None and model.token_to_id(token) is None:
                    raise ModelError(f"tokenizer_config.json sets {name}, but {str(path)!r} has no token {token!r}.")
            frame(model, bos if config.get("add_bos_token") else None, eos if config.get("add_eos_token") else None)
        return cls(
            model,
            bos_token=bos,
            eos_tokens=() if eos is None else (eos,),
            unk_token=_configured(config, "unk_token"),
            pad_token=_configured(config, "pad_token"),
        )

    @classmethod
    def from_gguf(cls, fields: Mapping[str, Any]) -> Tokenizer:
        """Build the tokenizer that a GGUF's `tokenizer.ggml.*` fields describe (lists as Python lists).

        Raises ModelError for missing or inconsistent fields, and for a kind or a pre-tokenizer that is not known.
        """
        model = build_tokenizer(fields)
        ends = [token_of(fields, role) for role in ("eos", "eot", "eom")]
        return cls(
            model,
            bos_token=token_of(fields, "bos"),
            eos_tokens=[token for token in ends if token is not None],
            unk_token=token_of(fields, "unknown"),
            pad_token=token_of(fields, "padding"),
        )

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Return the token ids of `text`. Special tokens written in the text become their own ids.

        `special` adds BOS (and EOS) if the model's configuration says so, and BOS only where the text does not begin
        with it. The text of a chat template has all that it needs: encode it with `special=False`.
        Raises RequestError for what is no text, or holds half of a surrogate pair.
        """
        if not isinstance(text, str):
            raise RequestError(f"What is encoded must be text, a str, not {text!r:.80}.")
        try:
            ids = self._model.encode(text, add_special_tokens=special).ids
        except TypeError as error:
            bad = next((at for at, character in enumerate(text) if "\ud800" <= character <= "\udfff"), None)
            if bad is None:
                raise
            raise RequestError(
                f"The text has half of a surrogate pair, {text[bad]!r}, at position {bad}; no model can read that. "
                "Remove it, or decode the text's source with errors='replace'."
            ) from error
        if special and self._adds_bos and ids[1:2] == [self.bos_token_id]:
            del ids[0]
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of `ids`. Broken characters become U+FFFD; ids that no token has add nothing."""
        size = self.vocab_size
        return self._model.decode(
            [token_id for token_id in ids if 0 <= token_id < size], skip_special_tokens=skip_special_tokens
        )

    def token_bytes(self) -> list[bytes]:
        """Return what each token adds to a text, by token id; nothing for an id that no token has."""
        pieces = (self._pieces.look_up(token_id) for token_id in range(self.vocab_size))
        return [
            piece if isinstance(piece, bytes) else bytes([piece]) if isinstance(piece, int) else piece.encode()
            for piece in pieces
        ]

    @property
    def special_ids(self) -> frozenset[int]:
        """The tokens that are marks for the model, and no text of their own."""
        return self._pieces.special

    def detokenizer(self, prompt_ids: Sequence[int] = (), *, skip_special_tokens: bool = True) -> Detokenizer:
        """Return what turns the answer to `prompt_ids` into text token by token."""
        return Detokenizer(self._pieces, prompt_ids, skip_special_tokens=skip_special_tokens)


def _configured(config: Mapping[str, Any], name: str) -> str | None:
    """Return a special token of a tokenizer_config.json, where it is a string or an object with its content."""
    value = config.get(name)
    token = value.get("content") if isinstance(value, Mapping) else value
    if token is not None and not isinstance(token, str):
        raise ModelError(f"tokenizer_config.json's {name} is {value!r}; it must be a string.")
    return token
