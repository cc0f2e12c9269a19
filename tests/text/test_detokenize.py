"""Detokenizer: what comes token by token is what `decode` gives of all of them."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers

from overlap.errors import ModelError
from overlap.text import Tokenizer

EMOJI = "👩‍🚀🙂é東\u0301"


def spm_tokenizer(*, strip: bool = True) -> Tokenizer:
    """Return a small SentencePiece-like tokenizer: 256 bytes, pieces with and without ▁, a special, a user token."""
    names = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "▁▁",
        "a",
        "▁b",
        "é",
        "c▁",
        "\ufffd",
    ]
    model = models.BPE({name: n for n, name in enumerate(names)}, [], byte_fallback=True, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strip else steps)
    tokenizer.add_tokens([AddedToken(name, special=True) for name in ("<unk>", "<s>", "</s>")])
    tokenizer.add_tokens(["<tool call>"])
    return Tokenizer(tokenizer, bos_token="<s>", eos_tokens=["</s>"])


@pytest.fixture(scope="module", params=["byte-level", "spm", "spm without strip"])
def tokenizer(request: pytest.FixtureRequest, tiny_llama_dir: Path) -> Tokenizer:
    if request.param == "byte-level":
        model = tokenizers.Tokenizer.from_file(str(tiny_llama_dir / "tokenizer.json"))
        model.add_tokens(["<tool call>", "▁é"])  # characters outside of the byte alphabet
        return Tokenizer(model)
    return spm_tokenizer(strip=request.param == "spm")


def random_ids(rng: random.Random, tokenizer: Tokenizer) -> list[int]:
    """Mix any tokens, parts of characters, and ids that no token has."""
    ids: list[int] = []
    while len(ids) < 40:
        emoji = tokenizer.encode("".join(rng.choices(EMOJI, k=2)), special=False)
        start = rng.randrange(len(emoji))
        ids += rng.choice(
            [
                [rng.randrange(tokenizer.vocab_size)],
                emoji,
                emoji[start:],
                emoji[:start],
                [rng.choice([0, 1, 2, tokenizer.vocab_size - 1, tokenizer.vocab_size, 10**9, -1])],
            ]
        )
    return ids


@pytest.mark.parametrize("skip", [True, False])
def test_pushes_and_flush_together_are_what_decode_gives(tokenizer: Tokenizer, skip: bool) -> None:
    for seed in range(1500):
        ids = random_ids(random.Random(seed), tokenizer)
        detokenizer = tokenizer.detokenizer(skip_special_tokens=skip)
        text = "".join([detokenizer.push(token) for token in ids])
        assert text + detokenizer.flush() == tokenizer.decode(ids, skip), (seed, ids)


@pytest.mark.parametrize("skip", [True, False])
def test_text_of_whole_characters_never_shows_a_broken_one(tokenizer: Tokenizer, skip: bool) -> None:
    for seed in range(300):
        rng = random.Random(seed)
        text = "".join(rng.choices(EMOJI + " ab", k=20))
        detokenizer = tokenizer.detokenizer([tokenizer.vocab_size - 1], skip_special_tokens=skip)
        pieces = [detokenizer.push(token) for token in tokenizer.encode(text, special=False)]
        assert "\ufffd" not in "".join(pieces)
        assert "".join(pieces) + detokenizer.flush() == text


def test_the_answer_goes_on_where_the_prompts_text_ends(tokenizer: Tokenizer) -> None:
    for seed in range(300):
        rng = random.Random(seed)
        prompt, answer = ("".join(rng.choices("ab é", k=8)) for _ in range(2))
        prompt_ids, ids = (tokenizer.encode(text, special=False) for text in ("a" + prompt + "a", " " + answer))
        detokenizer = tokenizer.detokenizer(prompt_ids)
        text = "".join([detokenizer.push(token) for token in ids]) + detokenizer.flush()
        assert text == tokenizer.decode(prompt_ids + ids)[len(tokenizer.decode(prompt_ids)) :]


def test_the_first_words_space_is_stripped_only_where_nothing_is_before_it() -> None:
    tokenizer = spm_tokenizer()
    [word] = (token for token in range(tokenizer.vocab_size) if tokenizer.decode([1, 261, token]) == "a b")
    assert tokenizer.detokenizer([]).push(word) == "b"
    assert tokenizer.detokenizer([1]).push(word) == "b", "BOS is not part of the text"
    assert tokenizer.detokenizer([1], skip_special_tokens=False).push(word) == " b"
    assert tokenizer.detokenizer([261]).push(word) == " b"


def test_half_a_character_at_the_prompts_end_stays_there(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("🙂", special=False)
    detokenizer = tokenizer.detokenizer(ids[:2])
    text = "".join([detokenizer.push(token) for token in ids[2:]]) + detokenizer.flush()
    assert text == tokenizer.decode(ids[2:])


def test_the_real_vocabulary_decodes_the_same(smollm2_path: Path) -> None:
    import gguf

    reader = gguf.GGUFReader(smollm2_path)
    fields = {name: field.contents() for name, field in reader.fields.items() if name.startswith("tokenizer.")}
    tokenizer = Tokenizer.from_gguf(fields)
    for seed in range(100):
        rng = random.Random(seed)
        ids = [rng.randrange(tokenizer.vocab_size) for _ in range(300)] + random_ids(rng, tokenizer)
        for skip in (True, False):
            detokenizer = tokenizer.detokenizer(skip_special_tokens=skip)
            assert "".join([detokenizer.push(n) for n in ids]) + detokenizer.flush() == tokenizer.decode(ids, skip)


def test_a_decoder_that_can_not_be_streamed_is_refused() -> None:
    model = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    with pytest.raises(ModelError, match="decoder is missing"):
        Tokenizer(model)
    model.decoder = decoders.WordPiece()
    with pytest.raises(ModelError, match="decoder is WordPiece"):
        Tokenizer(model)
    strip = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 1)]
    model.decoder = decoders.Sequence(strip)
    with pytest.raises(ModelError, match="strips the end"):
        Tokenizer(model)


@pytest.mark.parametrize("shown", [False, True])
def test_what_is_remembered_of_tokens_changes_no_text(tokenizer: Tokenizer, shown: bool) -> None:
    rng = random.Random(7)
    for _ in range(100):
        ids = random_ids(rng, tokenizer)
        for _ in range(2):  # nothing of the first reading may show in the second
            detokenizer = tokenizer.detokenizer(skip_special_tokens=not shown)
            text = "".join(detokenizer.push(token) for token in ids) + detokenizer.flush()
            assert text == tokenizer.decode(ids, skip_special_tokens=not shown)


def test_a_token_that_is_text_by_itself_ends_half_a_character_in_front_of_it(tokenizer: Tokenizer) -> None:
    (a,) = tokenizer.encode("a", special=False)
    half = tokenizer.encode("🙂", special=False)[:-1]
    detokenizer = tokenizer.detokenizer([a])
    assert detokenizer.push(a) == "a"
    held = "".join(detokenizer.push(token) for token in half)
    assert held + detokenizer.push(a) == tokenizer.decode([a, *half, a])[1:]
    assert detokenizer.push(a) == "a"
