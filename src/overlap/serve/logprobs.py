"""Log-probabilities in the two shapes that the OpenAI API has for them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Final, TypeAlias

import msgspec
from msgspec import UNSET, UnsetType

from overlap.errors import RequestError
from overlap.messages import Output, TokenLogprob

Decode = Callable[[Sequence[int]], str]
LEAST: Final = -9999.0
"""What stands for minus infinity, which JSON has no word for; the value that vLLM sends."""


class TopLogprob(msgspec.Struct, frozen=True, kw_only=True):
    """A token that might have come."""

    token: str
    logprob: float
    bytes: tuple[int, ...]


class ChatLogprob(msgspec.Struct, frozen=True, kw_only=True):
    """A token of a chat answer."""

    token: str
    logprob: float
    bytes: tuple[int, ...]
    top_logprobs: tuple[TopLogprob, ...]


class ChatLogprobs(msgspec.Struct, frozen=True, kw_only=True):
    """The tokens of a chat answer, or of one chunk of it."""

    content: tuple[ChatLogprob, ...]
    refusal: None = None


class TextLogprobs(msgspec.Struct, frozen=True, kw_only=True):
    """The tokens of a completion, or of one chunk of it, in columns."""

    tokens: tuple[str, ...]
    token_logprobs: tuple[float | None, ...]
    top_logprobs: tuple[dict[str, float] | None, ...]
    text_offset: tuple[int, ...]


class TableLogprob(msgspec.Struct, frozen=True, kw_only=True):
    """A token of vLLM's table of a prompt."""

    logprob: float
    rank: int | None
    """1 for the most likely token; None for one that is not among those that were asked for."""
    decoded_token: str


PromptTable: TypeAlias = tuple[dict[str, TableLogprob] | None, ...]
"""Of each token of a prompt, None for the first: by token id, itself first."""


def _text(decode: Decode, token: int) -> str:
    """Return a token's text; none for the ids behind the tokenizer's last, to which a model's vocabulary is padded."""
    try:
        return decode([token])
    except RequestError:
        return ""


def chat_logprobs(entries: Sequence[TokenLogprob], decode: Decode) -> ChatLogprobs:
    """Return `entries` as /v1/chat/completions has them."""

    def top(token: int, logprob: float) -> TopLogprob:
        text = _text(decode, token)
        return TopLogprob(token=text, logprob=max(logprob, LEAST), bytes=tuple(text.encode()))

    told = []
    for entry in entries:
        own = top(entry.token, entry.logprob)
        others = tuple(top(token, logprob) for token, logprob in entry.alternatives)
        told.append(ChatLogprob(token=own.token, logprob=own.logprob, bytes=own.bytes, top_logprobs=others))
    return ChatLogprobs(content=tuple(told))


def text_logprobs(entries: Sequence[TokenLogprob], decode: Decode, offset: int) -> tuple[TextLogprobs, int]:
    """Return `entries` as /v1/completions has them, for text that begins at `offset`, and the offset behind them.

    The dictionary of a token also has the token itself, as in the OpenAI API. Tokens that are parts of one character
    have the same text, U+FFFD; the likelier one stays.
    """
    tokens = tuple(_text(decode, entry.token) for entry in entries)
    offsets = tuple(itertools.accumulate(map(len, tokens), initial=offset))
    told = TextLogprobs(
        tokens=tokens,
        token_logprobs=tuple(max(entry.logprob, LEAST) for entry in entries),
        top_logprobs=tuple(_top(entry, text, decode) for entry, text in zip(entries, tokens, strict=True)),
        text_offset=offsets[:-1],
    )
    return told, offsets[-1]


def prompt_logprobs(
    prompt: Sequence[int], entries: Sequence[TokenLogprob | None], decode: Decode, text: str
) -> TextLogprobs:
    """Return what /v1/completions has of an echoed prompt, whose first token has no log-probability.

    `text` is what is echoed. Tokens that the tokenizer put in front of it are not in it, and begin where it does.
    """
    tokens = tuple(_text(decode, token) for token in prompt)
    offsets = itertools.accumulate(map(len, tokens), initial=min(0, len(text) - len(decode(prompt))))
    pairs = tuple(zip(entries, tokens, strict=True))
    return TextLogprobs(
        tokens=tokens,
        token_logprobs=tuple(None if entry is None else max(entry.logprob, LEAST) for entry in entries),
        top_logprobs=tuple(None if entry is None else _top(entry, own, decode) for entry, own in pairs),
        text_offset=tuple(max(0, offset) for offset in offsets)[:-1],
    )


def prompt_table(output: Output, num: int | None, decode: Decode) -> PromptTable | UnsetType:
    """Return an answer's `prompt_logprobs` as vLLM has them, with `num` alternatives to each token; None for none."""
    if num is None or output.prompt_logprobs is None:
        return UNSET

    def told(token: int, logprob: float, rank: int | None) -> TableLogprob:
        return TableLogprob(logprob=max(logprob, LEAST), rank=rank, decoded_token=_text(decode, token))

    rows: list[dict[str, TableLogprob] | None] = []
    for entry in output.prompt_logprobs:
        if entry is None:
            rows.append(None)
            continue
        ranks = {token: rank for rank, (token, _) in enumerate(entry.alternatives, start=1)}
        row = {str(entry.token): told(entry.token, entry.logprob, ranks.get(entry.token))}
        for token, logprob in entry.alternatives[:num]:
            row.setdefault(str(token), told(token, logprob, ranks[token]))
        rows.append(row)
    return tuple(rows)


def _top(entry: TokenLogprob, text: str, decode: Decode) -> dict[str, float]:
    top: dict[str, float] = {}
    for token, logprob in entry.alternatives:
        top.setdefault(_text(decode, token), max(logprob, LEAST))
    top.setdefault(text, max(entry.logprob, LEAST))
    return top


def joined(first: TextLogprobs, second: TextLogprobs | None) -> TextLogprobs:
    """Return the columns of two, one behind the other."""
    if second is None:
        return first
    return TextLogprobs(
        tokens=first.tokens + second.tokens,
        token_logprobs=first.token_logprobs + second.token_logprobs,
        top_logprobs=first.top_logprobs + second.top_logprobs,
        text_offset=first.text_offset + second.text_offset,
    )
