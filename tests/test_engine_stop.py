"""Requests that end because of what happens elsewhere: aborts at any time, finalizers, event loops that are gone."""

from __future__ import annotations

import asyncio
import gc
import random
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from overlap import AsyncEngine, Generation, RequestAborted, SamplingParams, StructuredOutput
from overlap.schedule.request import Request

OPTIONS: dict[str, Any] = {"device": "cpu", "dtype": "float32", "kv_cache": 4096, "max_rows": 1}
LONG = SamplingParams(max_tokens=400, ignore_eos=True)


@pytest.fixture
async def engine(tiny_llama_dir: Path) -> AsyncIterator[AsyncEngine]:
    async with AsyncEngine(tiny_llama_dir, **OPTIONS) as engine:
        yield engine
        await idle(engine)


async def idle(engine: AsyncEngine) -> None:
    """Wait until nothing runs, and hold the engine to its accounts."""
    await asyncio.wait_for(asyncio.wrap_future(engine._core.idle()), 20)
    await asyncio.sleep(0)  # what finalizers left is done
    gc.collect()
    engine._requests.forget_dropped()  # as the next request does for event loops that are gone
    assert not engine._requests.entries
    assert not engine._requests.dropped
    await asyncio.wrap_future(engine._core.call(engine._core.parts[0].check_idle))


async def until_waiting(engine: AsyncEngine, number: int) -> None:
    while engine.statistics().waiting != number:
        await asyncio.sleep(0.001)


# ── aborts ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", ["text", "form"])
async def test_an_abort_while_the_prompt_is_encoded_or_the_form_compiled_holds(engine: AsyncEngine, kind: str) -> None:
    go_on = threading.Event()
    masks, prompts = engine._core._masks, engine._prompts
    assert masks is not None
    assert prompts is not None
    (prompts._thread if kind == "text" else masks._compiler).submit(go_on.wait)  # its thread has much to do
    form = StructuredOutput.regex("[ab]+") if kind == "form" else None
    prompt = "a b " * 1000 if kind == "text" else "a"
    answer = engine.generate(prompt, SamplingParams(structured=form), request_id="mine")
    reader = asyncio.ensure_future(anext(answer))
    await asyncio.sleep(0.01)
    assert await engine.abort("mine")
    assert not await engine.abort("mine")
    go_on.set()
    with pytest.raises(RequestAborted, match="'mine' was aborted"):
        await reader
    await idle(engine)
    assert engine.statistics().tokens_in == 0


async def test_an_abort_from_another_thread_just_before_the_request_is_submitted_holds(engine: AsyncEngine) -> None:
    submit = engine._core.submit

    def abort_first(request: Request) -> None:
        def abort() -> None:
            assert asyncio.run(engine.abort("mine"))

        other = threading.Thread(target=abort)
        other.start()
        other.join()
        submit(request)

    engine._core.submit = abort_first  # type: ignore[method-assign]
    with pytest.raises(RequestAborted, match="'mine' was aborted"):
        await anext(engine.generate("a", LONG, request_id="mine"))
    await idle(engine)
    assert engine.statistics().tokens_out < 100


async def test_an_answer_that_has_ended_leaves_the_next_one_of_its_id_alone(engine: AsyncEngine) -> None:
    first: Generation | None = engine.generate("a", SamplingParams(max_tokens=2, ignore_eos=True), request_id="mine")
    assert first is not None
    async for _ in first:
        pass
    second = engine.generate("a", LONG, request_id="mine")
    await anext(second)
    first = None
    gc.collect()
    await asyncio.sleep(0)
    assert await engine.abort("mine")
    with pytest.raises(RequestAborted):
        await anext(second)


# ── finalizers ───────────────────────────────────────────────────────────────────────────────────────────────────────


def in_a_thread_that_holds_the_locks(engine: AsyncEngine, held: list[Any]) -> None:
    """Let go of the last reference to something where a finalizer may find it: in the middle of anything."""
    [front] = engine._fronts.values()
    locks = engine._lock, engine._core._lock, front._lock
    del engine

    def let_go() -> None:
        with locks[0], locks[1], locks[2]:
            held.clear()
            gc.collect()

    thread = threading.Thread(target=let_go, daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive(), "the finalizer waits for a lock that its own thread holds"


async def test_a_finalizer_takes_no_lock_and_ends_the_request_all_the_same(engine: AsyncEngine) -> None:
    held = [engine.generate("a", LONG)]
    await anext(held[0])
    in_a_thread_that_holds_the_locks(engine, held)
    await idle(engine)
    assert engine.statistics().tokens_out < 100


async def test_a_coroutine_that_is_never_ended_takes_no_lock_in_its_finalizer(engine: AsyncEngine) -> None:
    begun = anext(engine.generate("a", LONG, request_id="mine")).__await__()
    begun.send(None)
    held = [begun]
    del begun
    in_a_thread_that_holds_the_locks(engine, held)
    await idle(engine)
    assert engine.statistics().tokens_out < 100


async def test_an_engine_left_open_takes_no_lock_in_its_finalizer(tiny_llama_dir: Path) -> None:
    held = [AsyncEngine(tiny_llama_dir, **OPTIONS)]
    await held[0].start()
    await anext(held[0].generate("a", LONG))
    await asyncio.sleep(0)
    stopped = held[0]._core.stopped
    with pytest.warns(ResourceWarning, match="unclosed engine"):
        in_a_thread_that_holds_the_locks(held[0], held)
    await asyncio.wait_for(asyncio.wrap_future(stopped), 20)


# ── event loops that are gone ────────────────────────────────────────────────────────────────────────────────────────


def abandon(engine: AsyncEngine, prompts: list[list[int]], *, waiting: int) -> list[object]:
    """Begin requests on an event loop that is then closed; return what keeps their readers from being finalized."""
    loop = asyncio.new_event_loop()
    answers = [engine.generate(prompt, SamplingParams(max_tokens=100, ignore_eos=True)) for prompt in prompts]
    tasks = [loop.create_task(anext(answer)) for answer in answers]
    loop.run_until_complete(until_waiting(engine, waiting))
    loop.close()
    return [answers, tasks]


def long_prompts(number: int) -> list[list[int]]:
    draw = random.Random(1)
    return [[draw.randrange(3, 500) for _ in range(400)] for _ in range(number)]


async def one_more(engine: AsyncEngine) -> None:
    """Answer a request on an event loop of its own."""

    async def read() -> None:
        async for _ in engine.generate("b", SamplingParams(max_tokens=1, ignore_eos=True)):
            pass

    await asyncio.to_thread(asyncio.run, asyncio.wait_for(read(), 20))


async def test_requests_that_wait_for_a_closed_event_loop_end_when_the_next_one_comes(engine: AsyncEngine) -> None:
    async with engine.generate("a", LONG) as first:
        await anext(first)
        kept = await asyncio.to_thread(abandon, engine, long_prompts(2), waiting=2)
        more = asyncio.create_task(one_more(engine))
        await until_waiting(engine, 1)
    await more
    assert engine.statistics().tokens_in < 450, "their prompts were run"
    del kept


async def test_with_the_first_token_for_a_closed_event_loop_all_its_requests_end(engine: AsyncEngine) -> None:
    kept = await asyncio.to_thread(abandon, engine, [[5, 6, 7], *long_prompts(3)], waiting=3)
    await asyncio.wait_for(asyncio.wrap_future(engine._core.idle()), 20)
    assert engine.statistics().tokens_in < 700, "more prompts were run than the one that was begun"
    await one_more(engine)
    assert not engine._requests.entries, "their ids are still in use"
    del kept
