"""What an engine leaves behind on a GPU: nothing, however it ends."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from overlap import AsyncEngine, RequestFailed, SamplingParams

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
PARAMS = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)


def mib_in_use() -> float:
    gc.collect()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return (total - free) / 2**20


async def answer(engine: AsyncEngine, prompt: Any = "The capital of France is") -> list[int]:
    async for out in engine.generate(prompt, PARAMS):
        pass
    return out.token_ids


async def normally(model: Path) -> None:
    async with AsyncEngine(model, device="cuda", kv_cache="1GiB") as engine:
        assert len(await answer(engine)) == 12


async def by_an_error_of_the_host(model: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        async with AsyncEngine(model, device="cuda", kv_cache="1GiB") as engine:
            await anext(engine.generate("Once", PARAMS))
            raise ZeroDivisionError


async def by_a_failed_step(model: Path) -> None:
    async with AsyncEngine(model, device="cuda", kv_cache="1GiB") as engine:
        runner: Any = engine._core._loop._runner  # type: ignore[union-attr]
        launch = runner.launch
        failed: list[Any] = []

        def fail_once(plan: Any) -> Any:
            if plan.number == 4 and not failed:
                failed.append(plan)
                raise torch.OutOfMemoryError("no memory, says the test")
            return launch(plan)

        runner.launch = fail_once
        with pytest.raises(RequestFailed, match="says the test"):
            await answer(engine)
        assert len(await answer(engine)) == 12, "the engine goes on"


async def by_a_cancelled_task(model: Path) -> None:
    async with AsyncEngine(model, device="cuda", kv_cache="1GiB") as engine:
        task = asyncio.create_task(answer(engine))
        await anext(engine.generate("Twice", PARAMS))
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@pytest.mark.alone
async def test_twenty_engines_one_after_the_other_give_all_their_memory_back(smollm2_path: Path) -> None:
    await normally(smollm2_path)
    first, levels = mib_in_use(), []
    for _ in range(5):
        for way in (normally, by_an_error_of_the_host, by_a_failed_step, by_a_cancelled_task):
            await way(smollm2_path)
            levels.append(mib_in_use())
    print(f"\nMiB in use: {first:.0f} after the first engine, then {min(levels):.0f} to {max(levels):.0f}")
    assert max(levels) - first < 100, levels


CTRL_C = """
import asyncio, os, signal, sys, threading, torch
from overlap import AsyncEngine, SamplingParams

async def main(interrupt):
    async with AsyncEngine(sys.argv[1], device="cuda", kv_cache="1GiB") as engine:
        async for out in engine.generate("Count:", SamplingParams(max_tokens=400 if interrupt else 8, ignore_eos=True)):
            if interrupt and len(out.token_ids) >= 5:  # an Output may bring several
                interrupt = False
                os.kill(os.getpid(), signal.SIGINT)

def used():
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return (total - free) / 2**20

asyncio.run(main(False))
first = used()
for _ in range(3):
    try:
        asyncio.run(main(True))
    except KeyboardInterrupt:
        print("stopped")
print("grew", round(used() - first), [t.name for t in threading.enumerate()])
"""


@pytest.mark.alone
def test_ctrl_c_leaves_no_memory_and_no_thread(smollm2_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", CTRL_C, str(smollm2_path)], capture_output=True, text=True, timeout=120, check=False
    )
    assert run.stdout.count("stopped") == 3, run.stderr
    grew = int(run.stdout.split("grew ")[1].split()[0])
    assert grew < 100, run.stdout
    assert "overlap-" not in run.stdout.split("grew ")[1], run.stdout


BREAK = """
import asyncio, sys, torch
from overlap import AsyncEngine, EngineDead, SamplingParams

async def main():
    engine = AsyncEngine(sys.argv[1], device="cuda", kv_cache="1GiB")
    await engine.start()
    runner = engine._core._loop._runner
    launch = runner.launch
    def broken(plan):
        if plan.number == 5:
            torch.zeros(4, device="cuda")[torch.tensor([9], device="cuda")]  # a device-side assertion
        return launch(plan)
    runner.launch = broken
    async def ask(n):
        async for out in engine.generate([5] * n, SamplingParams(max_tokens=50, ignore_eos=True)): pass
    outcomes = await asyncio.gather(*(ask(n) for n in range(1, 9)), return_exceptions=True)
    print([type(outcome).__name__ for outcome in outcomes], engine.health())
    try:
        await ask(1)
    except EngineDead as dead:
        print("later:", type(dead).__name__)

asyncio.run(main())
"""


def test_a_device_that_breaks_ends_every_waiter_with_the_cause(smollm2_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", BREAK, str(smollm2_path)], capture_output=True, text=True, timeout=120, check=False
    )
    assert "RequestFailed" in run.stdout or "EngineDead" in run.stdout, run.stdout + run.stderr[-2000:]
    assert "Health(ok=False" in run.stdout, run.stdout + run.stderr[-2000:]
    assert "later: EngineDead" in run.stdout, run.stdout


async def test_a_warm_prefix_cache_and_bf16(smollm2_path: Path) -> None:
    """What differs is counted: a warm prompt runs fewer rows, and a product may round otherwise."""
    params = SamplingParams(max_tokens=48, temperature=0, ignore_eos=True)
    prompts = [[(37 * i + 11 * j) % 4000 + 20 for j in range(180 + 13 * i)] for i in range(16)]

    async def answers(engine: AsyncEngine) -> list[list[int]]:
        found = []
        for prompt in prompts:
            async for out in engine.generate(prompt, params):
                pass
            found.append(out.token_ids)
        return found

    async with AsyncEngine(smollm2_path, device="cuda", kv_cache=65536) as engine:
        cold, warm, again = await answers(engine), await answers(engine), await answers(engine)
        assert engine.statistics().hit_rate > 0.6
    async with AsyncEngine(smollm2_path, device="cuda", dtype="float32", kv_cache=16384) as engine:
        exact = await answers(engine), await answers(engine)
    assert warm == again, "warm answers are the same each time"
    same = sum(a == b for a, b in zip(cold, warm, strict=True))
    same_fp32 = sum(a == b for a, b in zip(*exact, strict=True))
    print(f"\ncold and warm: {same} of 16 greedy answers the same in bf16, {same_fp32} of 16 in fp32")
    assert same_fp32 == 16
