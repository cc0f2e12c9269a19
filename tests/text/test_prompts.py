"""PromptEncoder: what becomes token ids, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from overlap.errors import EngineClosed, RequestError
from overlap.text import ChatTemplate, Tokenizer
from overlap.text.prompts import PromptEncoder

TEMPLATE = "{% for message in messages %}<|im_start|>{{ message['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer(tiny_llama_dir: Path) -> Tokenizer:
    return Tokenizer.from_json_file(tiny_llama_dir / "tokenizer.json")


@pytest.fixture
def encoder(tokenizer: Tokenizer) -> Iterator[PromptEncoder]:
    """One for a model that knows fewer tokens than its tokenizer has: the one for "The" is the first unknown one."""
    vocab_size = max(tokenizer.encode("The"))
    encoder = PromptEncoder("small", vocab_size, tokenizer, ChatTemplate(TEMPLATE))
    yield encoder
    encoder.close()


@pytest.mark.parametrize(
    "prompt",
    ["The", "a The", "a " * 1500 + "The", [{"role": "user", "content": "The"}]],
    ids=["first", "last", "long", "chat"],
)
async def test_a_token_that_the_model_does_not_know_is_refused_by_name_in_any_kind_of_prompt(
    encoder: PromptEncoder, tokenizer: Tokenizer, prompt: Any
) -> None:
    with pytest.raises(RequestError, match=r"the token '.*' \(id \d+\), but the model knows ids from 0 to \d+ only"):
        await encoder.encode(prompt)
    with pytest.raises(RequestError, match="A token id is an integer from 0 to"):
        await encoder.encode(tokenizer.encode("The"))


async def test_what_the_model_knows_is_encoded(encoder: PromptEncoder, tokenizer: Tokenizer) -> None:
    assert (await encoder.encode("a b")).tolist() == tokenizer.encode("a b")
    assert (await encoder.encode("")).tolist() == []
    assert (await encoder.encode([{"role": "user", "content": "a"}])).tolist() == tokenizer.encode("<|im_start|>a")


@pytest.mark.parametrize("text", [5, None, b"text", ["a"], b"long " * 1000], ids=type)
async def test_what_is_no_text_is_refused_and_shown(encoder: PromptEncoder, text: Any) -> None:
    with pytest.raises(RequestError, match=r"What is encoded must be text, a str, not (5|None|b'|\['a'\])"):
        await encoder.encode_text(text, special=True)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ("abc", "from a list, as `encode` returns it, not from 'abc'"),
        (b"abc", "not from b'abc'"),
        (None, "not from None"),
        (5, "not from 5"),
        (np.array(5), "not from array"),
        ([1.5], r"A token id is an integer from 0 to \d+, not 1\.5"),
        ([5, None], r"A token id is an integer from 0 to \d+, not None"),
        ([True], "not True"),
        (["5"], "not '5'"),
        ([-1], "not -1"),
        ([10**9], "not 1000000000"),
        (np.array([[5]]), r"not \[5\]"),
    ],
    ids=repr,
)
def test_what_is_no_list_of_token_ids_is_refused_and_shown(encoder: PromptEncoder, ids: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        encoder.decode(ids, skip_special_tokens=False)


async def test_ids_may_be_a_list_a_tuple_or_numpys(encoder: PromptEncoder, tokenizer: Tokenizer) -> None:
    ids, kinds = tokenizer.encode("a b"), (list, tuple, np.array, lambda ids: list(np.array(ids)))
    for make in kinds:
        given: Any = make(ids)
        assert (await encoder.encode(given)).tolist() == ids
        assert encoder.decode(given, skip_special_tokens=False) == "a b"


async def test_a_closed_encoder_says_so_where_it_needs_its_thread(encoder: PromptEncoder) -> None:
    encoder.close()
    with pytest.raises(EngineClosed, match="was closed"):
        await encoder.encode("a " * 1500)
    with pytest.raises(EngineClosed, match="was closed"):
        await encoder.encode([{"role": "user", "content": "a"}])
    assert len(await encoder.encode("a b"))
