"""What `generate` and `generate_batch` refuse, and what they take."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from overlap import AsyncEngine, RequestError, SamplingParams

OPTIONS: dict[str, Any] = {"device": "cpu", "dtype": "float32", "kv_cache": 4096, "max_rows": 4}
SHORT = SamplingParams(max_tokens=2, ignore_eos=True)


@pytest.fixture
async def engine(tiny_llama_dir: Path) -> AsyncIterator[AsyncEngine]:
    async with AsyncEngine(tiny_llama_dir, **OPTIONS) as engine:
        yield engine


@pytest.mark.parametrize("params", [{"max_tokens": 3}, {}, "greedy", 0, False, [], SamplingParams], ids=repr)
async def test_params_that_are_no_sampling_params_are_refused(engine: AsyncEngine, params: Any) -> None:
    with pytest.raises(RequestError, match=r"params must be SamplingParams, as in .*, or None, not "):
        engine.generate("hi", params)
    if params != []:
        for given in (params, [params]):
            with pytest.raises(RequestError, match=r"params must be SamplingParams, as in .*, or None, not "):
                await anext(engine.generate_batch(["hi"], given))


async def test_more_least_tokens_than_there_is_room_for_are_refused_and_harm_nobody(engine: AsyncEngine) -> None:
    beside = engine.generate([5, 6, 7], SamplingParams(max_tokens=200, ignore_eos=True))
    await anext(beside)
    room = engine.context - 3
    for least in (room + 1, 2**31 - 1, 2**31, 2**70):
        with pytest.raises(
            RequestError, match=rf"min_tokens is {least}, and behind this prompt of 3 tokens .* {room}\."
        ):
            await engine.generate([5, 6, 8], SamplingParams(min_tokens=least))
    assert len((await beside).token_ids) == 200
    assert engine.statistics().failed_steps == 0


async def test_a_request_id_and_whole_of_a_wrong_kind_are_refused(engine: AsyncEngine) -> None:
    wrong: Any
    for wrong in (7, b"mine", ""):
        with pytest.raises(RequestError, match=f"request_id must be a string .*, not {wrong!r}"):
            engine.generate("hi", request_id=wrong)
    for wrong in ("no", 1, None):
        with pytest.raises(RequestError, match=f"whole must be True or False, not {wrong!r}"):
            engine.generate("hi", whole=wrong)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("Hello", "list of prompts, not 'Hello'. Put a single prompt into a list"),
        (b"Hello", "list of prompts, not b'Hello'"),
        (None, "list of prompts, not None"),
        (3, "list of prompts, not 3"),
        ({"role": "user", "content": "hi"}, "list of prompts, not {'role': 'user'"),
        ([{"role": "user", "content": "hi"}], "not of chat messages. Put a single prompt into a list"),
        ([5, 6, 7], "not of token ids. Put a single prompt into a list"),
        (np.array([5, 6, 7]), "not of token ids. Put a single prompt into a list"),
    ],
    ids=repr,
)
async def test_a_batch_that_is_a_single_prompt_or_none_is_refused(
    engine: AsyncEngine, prompts: Any, message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        await anext(engine.generate_batch(prompts, SHORT))


async def test_what_cannot_be_encoded_or_decoded_is_refused(engine: AsyncEngine) -> None:
    wrong: Any
    for wrong in (5, None):
        with pytest.raises(RequestError, match=f"must be text, a str, not {wrong}"):
            await engine.encode(wrong)
    for wrong in ("abc", None, [1.5], [None]):
        with pytest.raises(RequestError, match=r"Token ids are decoded from a list|A token id is an integer"):
            engine.decode(wrong)
    assert engine.decode(await engine.encode("hi")) == "hi"


async def test_a_batch_takes_any_iterable_of_prompts_of_every_kind(engine: AsyncEngine) -> None:
    prompts: list[Any] = ["hi", [5, 6], np.array([5, 6]), [{"role": "user", "content": "hi"}]]
    indices = [output.index async for output in engine.generate_batch((one for one in prompts), SHORT, progress=False)]
    assert sorted(indices) == [0, 1, 2, 3]
    assert [output async for output in engine.generate_batch([], SHORT, progress=False)] == []


async def test_a_batch_does_not_overrun_its_own_queue(tiny_llama_dir: Path) -> None:
    async with AsyncEngine(tiny_llama_dir, **OPTIONS, max_waiting=2) as engine:
        indices = [output.index async for output in engine.generate_batch(["hi"] * 9, SHORT, progress=False)]
    assert sorted(indices) == list(range(9))


async def test_an_engine_shows_its_model_and_state(tiny_llama_dir: Path) -> None:
    engine = AsyncEngine(tiny_llama_dir, **OPTIONS)
    assert repr(engine) == f"<AsyncEngine of {str(tiny_llama_dir)!r}: not started>"
    await engine.start()
    assert repr(engine).endswith(": serving>")
    await engine.aclose()
    assert repr(engine).endswith(": closed>")
