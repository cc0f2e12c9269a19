"""`engine.trace` on a real engine: what it writes, and that nothing is kept when it is off."""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import suppress
from pathlib import Path

import pytest

from overlap import AsyncEngine, ConfigError, OverlapError, SamplingParams

PARAMS = SamplingParams(max_tokens=30, temperature=0, ignore_eos=True)


async def test_a_trace_shows_every_step_on_the_host_and_on_the_device(tiny_llama_dir: Path, tmp_path: Path) -> None:
    async with AsyncEngine(tiny_llama_dir, device="cpu", dtype="float32", kv_cache=4096) as engine:
        plain = [out async for out in engine.generate("The quick", PARAMS)][-1].token_ids
        steps = engine.statistics().steps
        async with engine.trace(tmp_path / "run.json"):
            traced = [out async for out in engine.generate("The quick", PARAMS)][-1].token_ids
        with engine.trace(tmp_path / "run.svg"):
            async for _ in engine.generate("The quick", PARAMS):
                pass
        figures = engine.statistics()
    assert traced == plain
    events = json.loads((tmp_path / "run.json").read_text())["traceEvents"]
    names = [event["name"] for event in events if event["ph"] == "X"]
    for verb in ("plan", "launch", "land", "settle"):
        assert sum(verb in name for name in names) >= 30, names
    assert (tmp_path / "run.svg").read_text().startswith("<svg")
    assert figures.steps > steps
    assert figures.busy_s > 0
    assert figures.bubble_s >= 0


async def test_a_trace_of_an_unknown_kind_is_refused(tiny_llama_dir: Path) -> None:
    async with AsyncEngine(tiny_llama_dir, device="cpu", dtype="float32", kv_cache=4096) as engine:
        with pytest.raises(ConfigError, match=r"run\.gif"):
            engine.trace("run.gif")


@pytest.mark.parametrize("turns", range(4))
async def test_a_trace_is_written_although_its_task_is_cancelled_while_it_leaves(
    tiny_llama_dir: Path, tmp_path: Path, turns: int
) -> None:
    async with AsyncEngine(tiny_llama_dir, device="cpu", dtype="float32", kv_cache=4096) as engine:
        leaving = asyncio.Event()

        async def use() -> None:
            async with engine.trace(tmp_path / "run.json"):
                await engine.generate("The quick", PARAMS)
                leaving.set()

        using = asyncio.create_task(use())
        await leaving.wait()
        for _ in range(turns):
            await asyncio.sleep(0)
        using.cancel()
        with suppress(asyncio.CancelledError):
            await using
        async with engine.trace(tmp_path / "next.json"):
            await engine.generate("The quick", PARAMS)
    assert json.loads((tmp_path / "run.json").read_text())["traceEvents"]


async def test_a_trace_that_nobody_waits_for_any_more_while_it_begins_is_over(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.json"

    async def use(engine: AsyncEngine) -> None:
        async with engine.trace(path):
            raise AssertionError("it did not begin")

    async with AsyncEngine(tiny_llama_dir, device="cpu", dtype="float32", kv_cache=4096) as engine:
        engine._core._post(time.sleep, 0.1)  # as a long step
        beginning = asyncio.create_task(use(engine))
        await asyncio.sleep(0)
        beginning.cancel()
        with pytest.raises(asyncio.CancelledError):
            await beginning
        with monkeypatch.context() as patched:
            patched.setattr("overlap.observe.trace.PATIENCE_S", 0.02)
            engine._core._post(time.sleep, 0.2)
            with pytest.raises(OverlapError, match=r"not answered for 0\.02 s.* try again"):
                await use(engine)
            with pytest.raises(OverlapError, match=r"not answered for 0\.02 s.* try again"), engine.trace(path):
                pass
        assert not path.exists()
        async with engine.trace(path):
            for _ in range(2):  # who is refused does not end it either
                with pytest.raises(ConfigError, match="is being recorded"):
                    await use(engine)
        assert path.exists()
