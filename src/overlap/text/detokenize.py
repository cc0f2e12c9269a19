"""Detokenizer: token ids to text, one at a time, never half a character.

`tokenizers` decodes a list of tokens as a whole; its `DecodeStream` re-decodes a window for each token, holds text back
whenever it ends in U+FFFD (also a true one), gives up with "Invalid prefix encountered" on bytes that never form
characters, and has no end. So the two decoders that models of the Llama family have are done here token by token:

* **Byte-level** (GPT-2's, Llama 3's, SmolLM2's). A token is bytes; the text is those bytes read as UTF-8, broken ones
  replaced by U+FFFD. Python's incremental UTF-8 decoder replaces exactly what Rust's `from_utf8_lossy` replaces
  (the "maximal subpart" rule of the Unicode standard, section 3.9), and holds back at most three bytes.
* **Pieces with byte fallback** (SentencePiece's, Llama 2's). A token is text with "▁" for a space, or one byte
  `<0xE2>`. `tokenizers` turns a *whole run* of byte tokens into text, or, if any byte in it is broken, all of it into
  one U+FFFD a byte. So a run is held back until it ends: what was emitted can not become wrong.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Sequence
from typing import Any

import tokenizers

from overlap.errors import ModelError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def byte_level_alphabet() -> dict[str, int]:
    """Return the byte that each character of a byte-level vocabulary stands for (GPT-2's `bytes_to_unicode`)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


class Pieces:
    """What each token of a vocabulary adds to a text. Shared by all Detokenizers of a tokenizer; safe to share.

    Raises ModelError for a decoder that is neither byte-level nor pieces with byte fallback.
    """

    def __init__(self, model: tokenizers.Tokenizer, size: int) -> None:
        self._model = model
        self.special = frozenset(key for key, token in model.get_added_tokens_decoder().items() if token.special)
        self.alphabet: dict[str, int] | None = None
        self.replacements: list[tuple[str, str]] = []
        self.strip: tuple[str, int] = (" ", 0)
        """The character that is stripped from the start of a text, and how often at most."""
        self._read_decoder(None if model.decoder is None else json.loads(model.decoder.__getstate__()))
        self.table: list[bytes | str | int | None] = [None] * size
        """By token id: bytes (byte-level; empty where no token is), text, or a byte of a run; None until looked up."""
        self.whole: tuple[dict[int, str], dict[int, str]] = ({}, {})
        """By token id, of tokens met so far: their text wherever nothing is held back and nothing stays behind. First
        for answers that show special tokens, then for those that skip them."""

    def _read_decoder(self, decoder: dict[str, Any] | None) -> None:
        steps = [] if decoder is None else decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
        kinds = [step["type"] for step in steps]
        if kinds == ["ByteLevel"]:
            self.alphabet = byte_level_alphabet()
            return
        shape = "".join(
            {"Replace": "r", "ByteFallback": "b", "Fuse": "f", "Strip": "s"}.get(kind, "?") for kind in kinds
        )
        if re.fullmatch("r*bfs?", shape) is None:
            raise ModelError(
                f"The tokenizer's decoder is {' + '.join(kinds) or 'missing'}, which overlap does not know. "
                "Known ones: ByteLevel, and Replace + ByteFallback + Fuse (+ Strip)."
            )
        for step in steps:
            if step["type"] == "Replace":
                if "String" not in step["pattern"]:
                    raise ModelError(f"The tokenizer's decoder replaces by the pattern {step['pattern']!r}; not known.")
                self.replacements.append((step["pattern"]["String"], step["content"]))
            elif step["type"] == "Strip":
                if step["stop"]:
                    raise ModelError("The tokenizer's decoder strips the end of a text, which can not be streamed.")
                self.strip = (step["content"], step["start"])

    def look_up(self, token_id: int) -> bytes | str | int:
        """Return what `token_id` (in range) adds, and remember it; empty for an id that no token has."""
        token = self._model.id_to_token(token_id)
        piece: bytes | str | int
        if self.alphabet is not None:
            try:
                piece = bytes([self.alphabet[character] for character in token or ""])
            except KeyError:  # an added token, written as it is
                piece = (token or "").encode()
        else:
            for old, new in self.replacements:
                token = token and token.replace(old, new)
            byte = _BYTE_TOKEN.fullmatch(token or "")
            piece = b"" if token is None else int(byte[1], 16) if byte else token
        self.table[token_id] = piece
        return piece


class Detokenizer:
    """Turns the token ids of one answer into text as they come.

    All that `push` and then `flush` return, put together, is `tokenizer.decode(ids, skip_special_tokens)`, with one
    difference: where that would strip the space that a SentencePiece model puts before its first word, the space stays
    if the prompt has a token that is part of the text, so that prompt and answer can be put together. Nothing else of
    the prompt matters: half a character at its end is not completed.

    Ids that no token has (a padded vocabulary) add nothing, as in `decode`. Not thread-safe; a push is O(1) amortised.
    """

    __slots__ = ("_even", "_held", "_pieces", "_run", "_size", "_skipped", "_strip", "_table", "_whole")

    def __init__(self, pieces: Pieces, prompt_ids: Sequence[int] = (), *, skip_special_tokens: bool = True) -> None:
        self._pieces = pieces
        self._table = pieces.table
        self._size = len(pieces.table)
        self._skipped = pieces.special if skip_special_tokens else frozenset[int]()
        self._whole = pieces.whole[skip_special_tokens]
        self._run = bytearray()
        self._held = b""  # a byte-level text's last bytes, which may yet become a character
        self._strip = pieces.strip[1]
        if self._strip and any(0 <= key < self._size and key not in self._skipped for key in reversed(prompt_ids)):
            self._strip = 0
        self._even = not self._strip  # nothing is held back or to be stripped: what comes next stands by itself

    def push(self, token_id: int) -> str:
        """Take the answer's next token; return the text that is certain now, which may be empty."""
        if self._even and (text := self._whole.get(token_id)) is not None:
            return text  # nearly all tokens of nearly all answers
        if token_id in self._skipped or not 0 <= token_id < self._size:
            return ""
        piece = self._table[token_id]
        if piece is None:
            piece = self._pieces.look_up(token_id)
        return self._push_bytes(token_id, piece) if self._pieces.alphabet else self._push_piece(token_id, piece)

    def _push_bytes(self, token_id: int, piece: bytes | str | int) -> str:
        assert isinstance(piece, bytes), "a byte-level table has bytes only"
        held = self._held + piece
        text, used = codecs.utf_8_decode(held, "replace", False)
        if self._even and used == len(held):  # nothing before it, nothing left: so it is always this
            self._whole[token_id] = text
        self._held = held[used:]
        self._even = not self._held
        return text

    def _push_piece(self, token_id: int, piece: bytes | str | int) -> str:
        if isinstance(piece, int):
            self._run.append(piece)
            self._even = False
            return ""
        if isinstance(piece, bytes):
            return ""  # no token has this id; `decode` leaves it out before it looks for runs, so the run goes on
        if self._even:
            self._whole[token_id] = piece
            return piece
        text = self._stripped(self._end_run() + piece if self._run else piece)
        self._even = not self._strip
        return text

    def _end_run(self) -> str:
        run, self._run = self._run, bytearray()
        try:
            return run.decode()
        except UnicodeDecodeError:
            return "\ufffd" * len(run)

    def _stripped(self, text: str) -> str:
        while self._strip and text:
            if text[0] != self._pieces.strip[0]:
                self._strip = 0
                break
            text = text[1:]
            self._strip -= 1
        return text

    def flush(self) -> str:
        """End the answer: return the text that was held back, with U+FFFD for a character that never became whole."""
        if self._pieces.alphabet:
            held, self._held = self._held, b""
            return codecs.utf_8_decode(held, "replace", True)[0]
        return self._stripped(self._end_run())
