"""Builds the `tokenizers.Tokenizer` that a GGUF's `tokenizer.ggml.*` fields describe.

Two kinds: `gpt2` (byte-level BPE, with a pre-tokenizer known by name) and `llama` (SentencePiece BPE). GGUF names a
pre-tokenizer only; its rules are in each model's own tokenizer.json, from which the table here was written. The names
are llama.cpp's (`convert_hf_to_gguf.py`); those whose rules we do not know exactly are not in the table, and a file
that names one is refused: a nearly right tokenizer gives quietly worse answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from overlap.errors import ModelError, nearest

_UNKNOWN, _CONTROL, _USER_DEFINED, _NORMAL = 2, 3, 4, 1
"""Token types of GGUF, which are SentencePiece's."""

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DIGIT = r"\p{N}"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PreTokenizer:
    """How text is cut before BPE: by each pattern in turn, what matches and what lies between both staying pieces."""

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    """Whether a piece that is a token as a whole is taken as that, whatever the merges say."""
    add_bos: bool = False
    """Whether BOS is put first where the file does not say."""
    nfc: bool = False


_LLAMA3_RULES = PreTokenizer(patterns=(_LLAMA3,), ignore_merges=True, add_bos=True)
_DIGITS_RULES = PreTokenizer(patterns=(_DIGIT, _GPT2))

PRE_TOKENIZERS: Final[Mapping[str, PreTokenizer]] = {
    "gpt-2": PreTokenizer(patterns=(_GPT2,)),
    "phi-2": PreTokenizer(patterns=(_GPT2,)),
    "smollm": _DIGITS_RULES,
    "starcoder": _DIGITS_RULES,
    "refact": _DIGITS_RULES,
    "llama-bpe": _LLAMA3_RULES,
    "llama3": _LLAMA3_RULES,
    "llama-v3": _LLAMA3_RULES,
    "qwen2": PreTokenizer(patterns=(_QWEN2,), nfc=True),
    "tekken": PreTokenizer(patterns=(_TEKKEN,), ignore_merges=True, add_bos=True),
}
"""The pre-tokenizers of `gpt2` vocabularies, by `tokenizer.ggml.pre`."""


def build_tokenizer(fields: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """Return the tokenizer that `fields` describe (keys as in the file, lists as Python lists).

    Raises ModelError for missing or inconsistent fields, and for a kind or a pre-tokenizer that is not known.
    """
    kind = _required(fields, "model")
    if kind not in {"gpt2", "llama"}:
        raise ModelError(f"The GGUF's tokenizer.ggml.model is {kind!r}; overlap knows 'gpt2' and 'llama'.")
    tokens: Sequence[str] = _required(fields, "tokens")
    types: Sequence[int] = fields.get("tokenizer.ggml.token_type") or [_NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise ModelError(f"The GGUF has {len(tokens)} tokens but {len(types)} token types. Fetch or convert it again.")
    try:
        if kind == "gpt2":
            tokenizer, add_bos = _byte_level(fields, tokens)
        else:
            tokenizer, add_bos = _sentencepiece(fields, tokens, types)
    except (ModelError, MemoryError):
        raise
    except Exception as error:  # `tokenizers` raises bare Exceptions, and broken fields any other
        raise ModelError(f"The GGUF's tokenizer can not be built: {error}. Fetch or convert it again.") from error
    _add_marked(tokenizer, tokens, types)
    bos = fields.get("tokenizer.ggml.add_bos_token", add_bos) and token_of(fields, "bos")
    eos = fields.get("tokenizer.ggml.add_eos_token", False) and token_of(fields, "eos")
    frame(tokenizer, bos or None, eos or None)
    return tokenizer


def _required(fields: Mapping[str, Any], name: str) -> Any:
    value = fields.get(f"tokenizer.ggml.{name}")
    if not value:
        raise ModelError(f"The GGUF has no tokenizer.ggml.{name}. Use a file that holds its tokenizer.")
    return value


def token_of(fields: Mapping[str, Any], role: str) -> str | None:
    """Return the token of `role` ("bos", "eos", "unknown", ...), or None if the file names none."""
    token_id = fields.get(f"tokenizer.ggml.{role}_token_id")
    if token_id is None:
        return None
    tokens: Sequence[str] = fields["tokenizer.ggml.tokens"]
    if not 0 <= token_id < len(tokens):
        raise ModelError(f"The GGUF's {role}_token_id is {token_id}, but it has {len(tokens)} tokens.")
    return str(tokens[token_id])


def frame(tokenizer: tokenizers.Tokenizer, bos: str | None, eos: str | None) -> None:
    """Let `tokenizer` put `bos` before and `eos` behind each text; None puts nothing."""
    template = [*([bos] if bos else []), "$A", *([eos] if eos else [])]
    special = [(token, tokenizer.token_to_id(token)) for token in dict.fromkeys((bos, eos)) if token]
    if special:
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    else:
        tokenizer.post_processor = None


def _add_marked(tokenizer: tokenizers.Tokenizer, tokens: Sequence[str], types: Sequence[int]) -> None:
    """Make control and user-defined tokens whole: text that holds one encodes to its id."""
    marked = [(token, kind) for token, kind in zip(tokens, types, strict=True) if kind in {_CONTROL, _USER_DEFINED}]
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=kind == _CONTROL) for token, kind in marked])


def _byte_level(fields: Mapping[str, Any], tokens: Sequence[str]) -> tuple[tokenizers.Tokenizer, bool]:
    name = str(fields.get("tokenizer.ggml.pre"))
    if name not in PRE_TOKENIZERS:
        raise ModelError(
            f"The GGUF's pre-tokenizer (tokenizer.ggml.pre) is {name!r}, whose rules overlap does not know."
            f"{nearest(name, PRE_TOKENIZERS)} Known ones: {', '.join(PRE_TOKENIZERS)}. "
            "Use the model's Hugging Face directory, which holds its tokenizer.json."
        )
    rules = PRE_TOKENIZERS[name]
    # A merge is "left right"; neither is empty, so the first space that can divide is the second character.
    cuts = [(merge, merge.index(" ", 1)) for merge in _required(fields, "merges")]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = [(merge[:cut], merge[cut + 1 :]) for merge, cut in cuts]
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, merges, ignore_merges=rules.ignore_merges))
    if rules.nfc:
        tokenizer.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in rules.patterns]
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, last])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, rules.add_bos


def _sentencepiece(
    fields: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]
) -> tuple[tokenizers.Tokenizer, bool]:
    scores: Sequence[float] = _required(fields, "scores")
    if len(scores) != len(tokens):
        raise ModelError(f"The GGUF has {len(tokens)} tokens but {len(scores)} scores. Fetch or convert it again.")
    unknown = token_of(fields, "unknown")
    if unknown is None:
        unknown = next((token for token, kind in zip(tokens, types, strict=True) if kind == _UNKNOWN), None)
    model = models.BPE(
        {token: index for index, token in enumerate(tokens)},
        merges_of_scores(tokens, types, scores),
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = tokenizers.Tokenizer(model)
    prefix = fields.get("tokenizer.ggml.add_space_prefix", True)
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces] if prefix else [spaces])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return tokenizer, True


def merges_of_scores(tokens: Sequence[str], types: Sequence[int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Return the merges that make BPE choose as SentencePiece does: the pair whose joint token scores best, first.

    The order is that of `transformers`' converter (`generate_merges`). Only normal tokens are merged.
    """
    normal = {token for token, kind in zip(tokens, types, strict=True) if kind == _NORMAL}
    merges = [
        (score, cut, token)
        for token, score in zip(tokens, scores, strict=True)
        if token in normal
        for cut in range(1, len(token))
        if token[:cut] in normal and token[cut:] in normal
    ]
    merges.sort(key=lambda merge: (merge[0], merge[1], len(merge[2]) - merge[1]), reverse=True)
    return [(token[:cut], token[cut:]) for _, cut, token in merges]
