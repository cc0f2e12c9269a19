"""How an engine begins and ends when several tasks, threads and processes have a hand in it."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from overlap import AsyncEngine, EngineClosed, EngineDead, ModelError, SamplingParams, StructuredOutput
from overlap.pending import Pending

OPTIONS: dict[str, Any] = {"device": "cpu", "dtype": "float32", "kv_cache": 4096, "max_rows": 8}


async def text_of(engine: AsyncEngine, prompt: Any = "The", **params: Any) -> str:
    output = None
    async for output in engine.generate(prompt, SamplingParams(**{"max_tokens": 3, "ignore_eos": True, **params})):
        pass
    assert output is not None
    return output.text


# ── beginning ────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_tasks_that_start_one_engine_at_once_all_find_it_open(tiny_llama_dir: Path) -> None:
    engine = AsyncEngine(tiny_llama_dir, **OPTIONS)
    await asyncio.gather(engine.start(), engine.start(), engine.start())
    assert engine.health().ok
    assert await text_of(engine)
    await engine.aclose()


async def test_event_loops_of_several_threads_may_start_one_engine_at_once(tiny_llama_dir: Path) -> None:
    engine = AsyncEngine(tiny_llama_dir, **OPTIONS)
    await asyncio.gather(*(asyncio.to_thread(asyncio.run, engine.start()) for _ in range(3)))
    assert engine.health().ok
    await engine.aclose()


async def test_a_start_that_fails_is_told_to_all_who_wait_for_it(tmp_path: Path) -> None:
    engine = AsyncEngine(tmp_path / "nowhere.gguf", device="cpu")
    told = await asyncio.gather(engine.start(), engine.start(), return_exceptions=True)
    assert [type(error) for error in told] == [ModelError, ModelError]


async def test_who_stops_waiting_for_the_start_leaves_the_engine_to_the_others(tiny_llama_dir: Path) -> None:
    engine = AsyncEngine(tiny_llama_dir, **OPTIONS)
    impatient, patient = asyncio.create_task(engine.start()), asyncio.create_task(engine.start())
    await asyncio.sleep(0.001)
    impatient.cancel()
    with pytest.raises(asyncio.CancelledError):
        await impatient
    await patient
    assert await text_of(engine)
    await engine.aclose()


async def test_an_engine_that_nobody_waits_for_any_more_is_closed(tiny_llama_dir: Path) -> None:
    engine = AsyncEngine(tiny_llama_dir, **OPTIONS)
    starting = [asyncio.create_task(engine.start()) for _ in range(2)]
    await asyncio.sleep(0.001)
    for task in starting:
        task.cancel()
    await asyncio.gather(*starting, return_exceptions=True)
    with pytest.raises(EngineClosed, match="was closed"):
        await engine.start()
    await engine.aclose()


async def test_who_waits_for_the_start_of_an_engine_that_is_closed_hears_of_it(tiny_llama_dir: Path) -> None:
    engine = AsyncEngine(tiny_llama_dir, **OPTIONS)
    starting = asyncio.create_task(engine.start())
    await asyncio.sleep(0.001)
    await engine.aclose()
    with pytest.raises(EngineClosed, match="was closed"):
        await starting


# ── ending ───────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_who_drains_an_engine_that_is_closed_meanwhile_waits_no_more(tiny_llama_dir: Path) -> None:
    async with AsyncEngine(tiny_llama_dir, **OPTIONS) as engine:
        reader = asyncio.create_task(text_of(engine, max_tokens=500))
        while not engine.statistics().running:
            await asyncio.sleep(0.001)
        draining = asyncio.create_task(engine.aclose(drain=True))
        while not engine.health().draining:
            await asyncio.sleep(0.001)
        async with asyncio.timeout(20):
            await engine.aclose()
            await draining
            with pytest.raises(EngineClosed, match="was closed"):
                await reader


async def test_who_drains_an_engine_that_dies_meanwhile_waits_no_more(tiny_llama_dir: Path) -> None:
    async with AsyncEngine(tiny_llama_dir, **OPTIONS) as engine:
        reader = asyncio.create_task(text_of(engine, max_tokens=500))
        while not engine.statistics().running:
            await asyncio.sleep(0.001)

        def die(*_: object) -> None:
            raise ZeroDivisionError("a bug")

        draining = asyncio.create_task(engine.aclose(drain=True))
        engine._core._planner.plan = die  # type: ignore[union-attr, method-assign]
        async with asyncio.timeout(20):
            await draining
            with pytest.raises(EngineDead, match="a bug"):
                await reader


async def test_what_is_asked_of_a_loop_that_is_about_to_end_fails_with_it(tiny_llama_dir: Path) -> None:
    async with AsyncEngine(tiny_llama_dir, **OPTIONS) as engine:
        core = engine._core
        _, loop = core.parts
        core._post(time.sleep, 0.1)  # behind that, the loop finds all of these at once
        core._post(loop.close)
        for future in (core.idle(), core.drain()):
            with pytest.raises(EngineClosed, match="has ended"):
                await asyncio.wait_for(asyncio.wrap_future(future), 10)


def test_a_pending_future_is_completed_once_by_whoever_takes_it() -> None:
    pending = Pending()
    taken, cancelled, left = (Future[int]() for _ in range(3))
    for future in (taken, cancelled, left):
        pending.add(future)
    cancelled.cancel()
    assert pending.take(taken)
    assert not pending.take(taken)
    taken.set_result(1)
    pending.fail(lambda: EngineClosed("It has ended."))
    assert taken.result() == 1
    assert cancelled.cancelled()
    with pytest.raises(EngineClosed, match="It has ended"):
        left.result(timeout=0)
    assert not pending.take(left)


async def test_who_waits_for_a_form_when_the_engine_is_closed_hears_of_it_and_is_not_cancelled(
    tiny_llama_dir: Path,
) -> None:
    form = StructuredOutput.regex("[ab]+")
    go_on = threading.Event()
    async with AsyncEngine(tiny_llama_dir, **OPTIONS) as engine:
        assert await text_of(engine, structured=form, ignore_eos=False)
        masks = engine._core._masks
        assert masks is not None
        masks._compiler.submit(go_on.wait)  # a form that takes long
        readers = [asyncio.create_task(text_of(engine, structured=form)) for _ in range(3)]
        await asyncio.sleep(0.05)
        readers[0].cancel()
        with pytest.raises(asyncio.CancelledError):
            await readers[0]
        await engine.aclose()
        go_on.set()
        for reader in readers[1:]:
            with pytest.raises(EngineClosed, match="was closed"):
                await reader
        with pytest.raises(EngineClosed, match="was closed"):
            masks.compile(form)


async def test_a_long_text_for_an_engine_that_was_closed_is_refused_like_a_short_one(tiny_llama_dir: Path) -> None:
    async with AsyncEngine(tiny_llama_dir, **OPTIONS) as engine:
        assert len(await engine.encode("Paris " * 1000)) >= 1000
    with pytest.raises(EngineClosed, match="was closed"):
        await engine.encode("Paris " * 1000)


# ── other processes ──────────────────────────────────────────────────────────────────────────────────────────────────

FORK = """
import asyncio, os, sys, threading, time
from overlap import AsyncEngine, EngineClosed, SamplingParams

def refused(awaitable):
    try:
        asyncio.run(asyncio.wait_for(awaitable, 5))
    except EngineClosed as error:
        assert f"opened in process {parent}" in str(error), error
        assert f"this is process {os.getpid()}" in str(error), error
        return
    raise AssertionError("nothing was refused")

async def read(engine):
    async for output in engine.generate("The", SamplingParams(max_tokens=3, ignore_eos=True)):
        pass
    return output.text

parent = os.getpid()
engine = AsyncEngine(sys.argv[1], device="cpu", dtype="float32", kv_cache=4096, max_rows=8)
loop = asyncio.new_event_loop()
loop.run_until_complete(engine.start())
begun = engine.generate("The", SamplingParams(max_tokens=400, ignore_eos=True))
loop.run_until_complete(anext(begun))
held = threading.Lock() if sys.argv[2] == "free" else engine._core._lock
with held:  # as another thread may do at this moment
    child = os.fork()
if child == 0:
    began = time.monotonic()
    if held is engine._core._lock:
        held.acquire(blocking=False)
    refused(read(engine))
    refused(anext(begun))
    refused(engine.start())
    refused(engine.abort("mine"))
    refused(engine.clear_cache())
    refused(engine.encode("long " * 1000))
    assert "open an engine in this process" in engine.health().reason
    asyncio.run(asyncio.wait_for(engine.aclose(drain=True), 5))
    del engine
    assert time.monotonic() - began < 5
    sys.exit(7)
began = time.monotonic()
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
assert time.monotonic() - began < 8, "the child's end took long"
assert loop.run_until_complete(read(engine))
loop.run_until_complete(engine.aclose())
print("well")
"""


@pytest.mark.parametrize("lock", ["free", "held"])
def test_the_copy_of_an_engine_in_a_forked_process_says_so_and_holds_up_nothing(
    tiny_llama_dir: Path, lock: str
) -> None:
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORK, str(tiny_llama_dir), lock]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "well\n", "")


async def test_an_engine_that_has_ended_leaves_nothing_to_do_at_exit(tiny_llama_dir: Path) -> None:
    engine = AsyncEngine(tiny_llama_dir, **OPTIONS)
    await engine.start()
    at_exit = weakref.ref(engine._core._leave)
    await engine.aclose()
    del engine
    gc.collect()
    assert at_exit() is None
