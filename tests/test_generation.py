"""Generation: the ways to read one answer."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from overlap import AsyncEngine, EngineClosed, Generation, Output, RequestAborted, RequestError, SamplingParams

OPTIONS: dict[str, Any] = {"device": "cpu", "dtype": "float32", "kv_cache": 4096, "max_rows": 4}
SHORT = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
LONG = SamplingParams(max_tokens=400, ignore_eos=True)


@pytest.fixture
async def engine(tiny_llama_dir: Path) -> AsyncIterator[AsyncEngine]:
    async with AsyncEngine(tiny_llama_dir, **OPTIONS) as engine:
        yield engine


async def test_awaiting_an_answer_brings_its_last_output(engine: AsyncEngine) -> None:
    streamed = [output async for output in engine.generate("The quick", SHORT)][-1]
    answer = engine.generate("The quick", SHORT)
    output: Output = await answer
    assert (output.text, output.token_ids, output.finish_reason) == (streamed.text, streamed.token_ids, "length")
    assert output.text_delta == output.text, "it was not read in pieces"
    assert await answer is output, "it stays"
    assert not engine._requests.entries


async def test_an_answer_that_was_begun_can_be_awaited_for_the_rest(engine: AsyncEngine) -> None:
    answer = engine.generate("The quick", SHORT)
    await anext(answer)
    output = await answer
    assert output.usage.completion_tokens == 12
    assert output.text == (await engine.generate("The quick", SHORT)).text


async def test_awaiting_an_answer_raises_what_iterating_raises(engine: AsyncEngine) -> None:
    with pytest.raises(RequestError, match="prompt is empty"):
        await engine.generate("")
    reading = asyncio.ensure_future(engine.generate("The", LONG, request_id="mine"))
    while not engine.statistics().running:
        await asyncio.sleep(0.001)
    await engine.abort("mine")
    with pytest.raises(RequestAborted):
        await reading
    stopped = engine.generate("The", LONG)
    await anext(stopped)
    await stopped.aclose()
    with pytest.raises(RuntimeError, match="was stopped before its answer was whole"):
        await stopped


async def test_cancelling_who_awaits_an_answer_stops_it(engine: AsyncEngine) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await engine.generate("The", LONG)
    await asyncio.wait_for(asyncio.wrap_future(engine._core.idle()), 10)
    assert not engine._requests.entries


async def test_a_plain_loop_over_an_answer_says_how_it_is_read(engine: AsyncEngine) -> None:
    with pytest.raises(TypeError, match=r"`async for output in generation`.*`await generation`"):
        for _ in engine.generate("The", SHORT):
            pass


async def test_an_abort_of_an_answer_that_has_come_and_was_not_read_is_all_that_is_seen(engine: AsyncEngine) -> None:
    for elsewhere in (False, True):
        answer = engine.generate("The", SHORT, request_id="mine")
        await anext(answer)
        while engine.statistics().running:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.01)
        aborting = engine.abort("mine")
        if elsewhere:
            thread = threading.Thread(target=asyncio.run, args=(aborting,))
            thread.start()
            time.sleep(0.1)  # noqa: ASYNC251 - this event loop has not heard of it when the answer is read
        else:
            assert await aborting
        with pytest.raises(RequestAborted, match="'mine' was aborted"):
            await answer
        if elsewhere:
            await asyncio.to_thread(thread.join)


async def test_an_id_is_free_once_the_last_output_of_its_request_is_read(engine: AsyncEngine) -> None:
    answer = engine.generate("The", SHORT, request_id="mine")
    async for output in answer:
        if output.finished:
            break
    assert not await engine.abort("mine")
    again = await engine.generate("The", SHORT, request_id="mine")
    assert await answer is output
    assert again.text == output.text


async def test_an_answer_is_read_on_the_event_loop_that_began_it_and_on_no_other(engine: AsyncEngine) -> None:
    answer = engine.generate("The", SHORT)
    first = await anext(answer)
    for _ in range(2):
        with pytest.raises(RequestError, match=f"{first.request_id!r} was begun on another event loop"):
            await asyncio.to_thread(asyncio.run, anext(answer))
    output = await answer
    assert output.usage.completion_tokens == 12
    assert await asyncio.to_thread(asyncio.run, _read(answer)) is output, "what is there may be had anywhere"


async def test_nobody_waits_for_news_on_an_event_loop_that_was_forked(
    engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = engine.generate("The", LONG)
    await anext(answer)
    with monkeypatch.context() as patched:
        patched.setattr(engine._core, "_process", 1)
        with pytest.raises(EngineClosed, match="was opened in process 1, and this is process"):
            await answer


async def _read(answer: Generation) -> Output:
    return await answer


async def test_one_that_another_task_closes_while_it_is_read_ends_for_its_reader_and_for_the_engine(
    engine: AsyncEngine,
) -> None:
    params = SamplingParams(max_tokens=200, ignore_eos=True)
    for moment in ("encoding", "waiting"):
        generation = engine.generate([5, 6, 7] if moment == "waiting" else "a text " * 60, params, whole=True)
        reading = asyncio.create_task(_count(generation))
        await asyncio.sleep(0 if moment == "encoding" else 0.02)
        await generation.aclose()
        async with asyncio.timeout(10):
            assert await reading == 0
        await asyncio.wrap_future(engine._core.idle())
        assert not engine._requests.entries


async def test_one_that_another_threads_event_loop_closes_ends_for_its_reader(engine: AsyncEngine) -> None:
    generation = engine.generate([5, 6, 7], LONG, whole=True)
    reading = asyncio.create_task(_count(generation))
    while not engine.statistics().running:
        await asyncio.sleep(0.001)
    await asyncio.to_thread(asyncio.run, generation.aclose())
    async with asyncio.timeout(10):
        assert await reading == 0
    await asyncio.wrap_future(engine._core.idle())
    assert not engine._requests.entries


async def _count(generation: Generation) -> int:
    return len([output async for output in generation])
