"""Tokenizer: from a tokenizer.json, from the real GGUF, and from a SentencePiece vocabulary."""

from __future__ import annotations

import itertools
import json
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gguf
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from overlap.errors import ModelError, RequestError
from overlap.text import Tokenizer
from overlap.text.gguf_vocabulary import PRE_TOKENIZERS

TEXT = "Hello, world! I'll say: naïve café,\n\n\t 東京 🙂 don't… <|im_start|>user\nhi<|im_end|>\n  x  "


@pytest.fixture(scope="module")
def fields(smollm2_path: Path) -> dict[str, Any]:
    reader = gguf.GGUFReader(smollm2_path)
    return {name: field.contents() for name, field in reader.fields.items() if name.startswith("tokenizer.")}


def spm_fields(**changes: Any) -> dict[str, Any]:
    """Return a SentencePiece vocabulary: three marked tokens, all bytes, letters, and words with random scores."""
    rng = random.Random(0)
    words = {"".join(rng.choices("▁abcd", k=rng.randrange(2, 6))) for _ in range(300)}
    # As SentencePiece trains: each piece is the joint of two others, and scores fall as pieces come later.
    pieces = ["▁", "a", "b", "c", "d", "é"]
    for word in sorted(words, key=lambda word: (len(word), rng.random())):
        if any(word[:cut] in pieces and word[cut:] in pieces for cut in range(1, len(word))):
            pieces.append(word)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, "<tool>"]
    types = [2, 3, 3, *[6] * 256, *[1] * len(pieces), 4]
    scores = [0.0] * 259 + [-float(n) for n in rng.sample(range(len(pieces)), len(pieces))] + [0.0]
    given = {
        "model": "llama", "tokens": tokens, "token_type": types, "scores": scores,
        "bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0, **changes,
    }  # fmt: skip
    return {f"tokenizer.ggml.{name}": value for name, value in given.items()}


def sentencepiece_slowly(fields: dict[str, Any], text: str) -> list[int]:
    """Join the best-scored neighbours (the leftmost on a tie) for as long as a joint token exists."""
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    ids = {token: index for index, token in enumerate(tokens)}
    normal = {token for token, kind in zip(tokens, types, strict=True) if kind == 1}
    parts = list("▁" + text.replace(" ", "▁"))
    while True:
        joints = [
            (-fields["tokenizer.ggml.scores"][ids[a + b]], at)
            for at, (a, b) in enumerate(itertools.pairwise(parts))
            if a + b in normal
        ]
        if not joints:
            break
        at = min(joints)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return [
        token for part in parts for token in ([ids[part]] if part in normal else [3 + byte for byte in part.encode()])
    ]


def test_the_ggufs_tokenizer_cuts_text_as_smollm2s_own_does(fields: dict[str, Any]) -> None:
    """The rules of SmolLM2's tokenizer.json, on the vocabulary of the file."""
    names = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    reference = tokenizers.Tokenizer(models.BPE({name: index for index, name in enumerate(names)}, merges))
    reference.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    reference.add_special_tokens(names[:17])
    tokenizer = Tokenizer.from_gguf(fields)
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(rng.choices(["a", " ", "'s", "1", "23", "½", "\n", "é", "🙂", "<|im_end|>", ".", TEXT], k=20))
        ids = tokenizer.encode(text)
        assert ids == reference.encode(text).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_each_digit_is_a_token_of_its_own_and_each_marker_one_token(fields: dict[str, Any]) -> None:
    tokenizer = Tokenizer.from_gguf(fields)
    assert [tokenizer.decode([token]) for token in tokenizer.encode("in 1984")] == ["in", " ", "1", "9", "8", "4"]
    assert tokenizer.encode("<|im_start|>") == [1]
    assert tokenizer.encode("<|im_end|>") == [2]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.eos_token_ids) == ("<|im_start|>", "<|im_end|>", (2,))
    assert tokenizer.vocab_size == 49152
    assert tokenizer.encode("") == []


def test_many_threads_may_encode_at_once(fields: dict[str, Any]) -> None:
    tokenizer = Tokenizer.from_gguf(fields)
    texts = [f"{TEXT} {n}" * 20 for n in range(40)]
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(tokenizer.encode, texts)) == [tokenizer.encode(text) for text in texts]


def test_half_a_surrogate_pair_is_refused_with_its_place(fields: dict[str, Any]) -> None:
    tokenizer = Tokenizer.from_gguf(fields)
    with pytest.raises(RequestError, match=r"'\\ud800', at position 2"):
        tokenizer.encode("ab\ud800")
    with pytest.raises(RequestError, match="must be text, a str, not 3"):
        tokenizer.encode(3)  # type: ignore[arg-type]


def test_an_unknown_pre_tokenizer_is_refused_with_the_known_ones(fields: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=r"'smolm'.* Did you mean 'smollm'.*gpt-2, phi-2, smollm"):
        Tokenizer.from_gguf({**fields, "tokenizer.ggml.pre": "smolm"})
    with pytest.raises(ModelError, match="'t5'"):
        Tokenizer.from_gguf({**fields, "tokenizer.ggml.model": "t5"})


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"tokens": None}, "no tokenizer.ggml.tokens"),
        ({"merges": ["ab"]}, "can not be built"),
        ({"merges": ["qq zz"]}, "can not be built"),
        ({"token_type": [1]}, "49152 tokens but 1 token types"),
        ({"bos_token_id": 10**6}, "bos_token_id is 1000000"),
    ],
)
def test_broken_fields_are_refused(fields: dict[str, Any], changes: dict[str, Any], told: str) -> None:
    broken = {f"tokenizer.ggml.{name}": value for name, value in changes.items()}
    with pytest.raises(ModelError, match=told):
        Tokenizer.from_gguf({**fields, **broken})


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_each_known_pre_tokenizer_gives_text_back(name: str) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    given = {"model": "gpt2", "pre": name, "tokens": [*alphabet, "ab", "<s>"], "merges": ["a b"],
             "token_type": [1] * 257 + [3], "bos_token_id": 257}  # fmt: skip
    tokenizer = Tokenizer.from_gguf({f"tokenizer.ggml.{key}": value for key, value in given.items()})
    text = "I'LL take 12345 cabs,\r\n\n  two  naïve 東京 🙂!?/ ok"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert (ids[0] == 257) == PRE_TOKENIZERS[name].add_bos
    assert tokenizer.encode(text, special=False) == [token for token in ids if token != 257]
    assert tokenizer.encode("<s>" + text) == [257, *tokenizer.encode(text, special=False)], "BOS is not put twice"


def test_digits_are_grouped_as_the_pre_tokenizer_says() -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, "11", "111", "1111"]
    for name, expected in (("gpt-2", ["1111"]), ("smollm", ["1"] * 4), ("qwen2", ["1"] * 4), ("llama3", ["111", "1"])):
        given = {"model": "gpt2", "pre": name, "tokens": tokens, "merges": ["1 1", "11 1", "11 11"]}
        tokenizer = Tokenizer.from_gguf({f"tokenizer.ggml.{key}": value for key, value in given.items()})
        assert [tokens[token] for token in tokenizer.encode("1111")] == expected, name


def test_a_sentencepiece_vocabulary_is_joined_by_its_scores() -> None:
    fields = spm_fields()
    tokenizer = Tokenizer.from_gguf(fields)
    rng = random.Random(1)
    for _ in range(500):
        text = "".join(rng.choices("abcdé 東", weights=[6, 6, 6, 6, 1, 4, 1], k=rng.randrange(1, 30)))
        ids = tokenizer.encode(text, special=False)
        assert ids == sentencepiece_slowly(fields, text), text
        assert tokenizer.decode(ids) == text
    assert tokenizer.encode("a")[0] == 1, "BOS unless the file says no"
    assert Tokenizer.from_gguf(spm_fields(add_bos_token=False)).encode("a")[0] != 1
    assert Tokenizer.from_gguf(spm_fields(add_eos_token=True)).encode("a")[-1] == 2
    bare = Tokenizer.from_gguf(spm_fields(add_space_prefix=False))
    assert bare.decode(bare.encode("a b")) == "a b"
    assert tokenizer.encode("<tool>", special=False) == [tokenizer.vocab_size - 1]


def test_a_tokenizer_json_follows_its_config(tiny_llama_dir: Path) -> None:
    path = tiny_llama_dir / "tokenizer.json"
    config = json.loads((tiny_llama_dir / "tokenizer_config.json").read_text())
    tokenizer = Tokenizer.from_json_file(path, config=config)
    assert (tokenizer.bos_token, tokenizer.eos_token_ids, tokenizer.pad_token) == (
        "<|im_start|>",
        (2,),
        "<|endoftext|>",
    )
    plain = tokenizer.encode(TEXT)
    framed = {**config, "bos_token": {"content": "<|im_start|>"}, "add_bos_token": True, "add_eos_token": True}
    assert Tokenizer.from_json_file(path, config=framed).encode(TEXT) == [1, *plain, 2]
    assert Tokenizer.from_json_file(path, config=framed).encode(TEXT, special=False) == plain
    assert Tokenizer.from_json_file(path).eos_token_ids == ()
    with pytest.raises(ModelError, match="has no token '<none>'"):
        Tokenizer.from_json_file(path, config={"bos_token": "<none>", "add_bos_token": True})
    with pytest.raises(ModelError, match="must be a string"):
        Tokenizer.from_json_file(path, config={"bos_token": 3})


def test_a_tokenizer_json_that_cuts_or_pads_does_neither_here(tiny_llama_dir: Path, tmp_path: Path) -> None:
    model = tokenizers.Tokenizer.from_file(str(tiny_llama_dir / "tokenizer.json"))
    plain = model.encode(TEXT).ids
    model.enable_truncation(4)
    model.enable_padding(length=500)
    model.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.from_json_file(tmp_path / "tokenizer.json").encode(TEXT) == plain


def test_a_missing_or_broken_tokenizer_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no tokenizer at"):
        Tokenizer.from_json_file(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(ModelError, match=r"tokenizer.json' can not be read"):
        Tokenizer.from_json_file(tmp_path / "tokenizer.json")
