"""Two lanes on a CPU: they really run at the same time, and change no answer."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from overlap import AsyncEngine, RequestAborted, SamplingParams
from overlap.flight import TorchFlight
from overlap.schedule.plan import SIDE, StepPlan

OPTIONS: dict[str, Any] = {"device": "cpu", "dtype": "float32", "max_rows": 6, "kv_cache": 2048, "token_budget": 48}
PARAMS = SamplingParams(max_tokens=60, temperature=0, ignore_eos=True)


async def tokens(engine: AsyncEngine, prompt: list[int], params: SamplingParams = PARAMS) -> list[int]:
    seen: list[int] = []
    async for output in engine.generate(prompt, params):
        seen = output.token_ids
    return seen


async def test_a_decode_step_and_a_prompt_run_at_the_same_time(tiny_llama_dir: Path) -> None:
    async with AsyncEngine(tiny_llama_dir, lanes="streams", **OPTIONS) as engine:
        runner: Any = engine._core._loop._runner  # type: ignore[union-attr]
        reads, both = threading.Event(), threading.Barrier(2)
        met: dict[int, int] = {}

        def attend_in(lane: int, run: Callable[..., Any]) -> Callable[..., Any]:
            def attend(*args: Any) -> Any:
                if lane not in met and (lane == 1 or reads.is_set()):
                    reads.set()
                    both.wait(60)  # where one has to end before the other begins this fails the step
                    met[lane] = threading.get_ident()
                return run(*args)

            return attend

        for lane in (0, 1):
            attention = runner._lanes[lane]._attention
            attention.attend = attend_in(lane, attention.attend)
        short = asyncio.create_task(tokens(engine, [5, 6, 7]))
        await asyncio.sleep(0.05)
        await tokens(engine, list(range(3, 200)), SamplingParams(max_tokens=2, temperature=0, ignore_eos=True))
        await short
        assert set(met) == {0, 1}
        assert met[0] != met[1], "each lane has a thread of its own"
        assert engine.statistics().side_steps > 0


@pytest.mark.parametrize("lanes", ["streams", "auto", "serial"])
async def test_answers_do_not_change_while_requests_come_go_and_are_aborted_in_either_lane(
    tiny_llama_dir: Path, lanes: str
) -> None:
    draw = random.Random(7)
    shared = [draw.randrange(3, 512) for _ in range(40)]
    prompts = [
        shared[: draw.choice([0, 20, 40])] + [draw.randrange(3, 512) for _ in range(draw.choice([2, 30, 150]))]
        for _ in range(12)
    ]
    asked = [
        SamplingParams(max_tokens=40, temperature=draw.choice([0, 1.0]), top_p=0.9, seed=n, ignore_eos=True)
        for n in range(12)
    ]
    async with AsyncEngine(tiny_llama_dir, prefix_cache=False, **OPTIONS) as engine:
        alone = [await tokens(engine, prompt, params) for prompt, params in zip(prompts, asked, strict=True)]
    target = {"target_itl_ms": 3.0} if lanes == "auto" else {}
    async with AsyncEngine(tiny_llama_dir, lanes=lanes, **target, **{**OPTIONS, "kv_cache": 640}) as engine:

        async def one(n: int) -> None:
            await asyncio.sleep(draw.random() * 0.2)
            which, leaves = n % 12, draw.random() < 0.3
            seen: list[int] = []
            try:
                async for output in engine.generate(prompts[which], asked[which], request_id=f"r{n}"):
                    seen = output.token_ids
                    assert seen == alone[which][: len(seen)]
                    if leaves and len(seen) > 5:
                        await engine.abort(f"r{n}")
                assert seen == alone[which]
            except RequestAborted:
                assert leaves

        await asyncio.gather(*(one(n) for n in range(30)))
        await asyncio.wrap_future(engine._core.idle())
        await asyncio.wrap_future(engine._core.call(engine._core.parts[0].check_idle))
        assert (engine.statistics().side_steps > 0) >= (lanes == "streams")
        assert "lanes" in engine.explain()


async def test_what_steps_have_taken_is_kept_for_the_next_engine(tiny_llama_dir: Path, tmp_path: Path) -> None:
    options = {**OPTIONS, "target_itl_ms": 5.0, "cache_dir": tmp_path}
    for said in ("nothing was measured before", "sizes of steps were measured before"):
        async with AsyncEngine(tiny_llama_dir, **options) as engine:
            assert said in engine.explain()
            await asyncio.gather(tokens(engine, [5, 6, 7]), tokens(engine, list(range(3, 150))))


async def test_a_prompt_is_launched_in_as_many_blocks_as_it_pauses_and_nothing_is_left_behind_the_last(
    tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One in front of the layers, one for every few of them, and one behind them where a token is asked for."""
    made, wait, found = TorchFlight.__init__, TorchFlight.wait_landed, list[tuple[bool, int, object]]()
    planned: dict[int, int] = {}

    def make(flight: TorchFlight, plan: StepPlan, *rest: Any) -> None:
        made(flight, plan, *rest)
        planned[plan.number] = flight.blocks_left

    async def wait_landed(flight: TorchFlight) -> Any:
        landed = await wait(flight)
        if flight.plan.lane == SIDE:
            blocks = planned[flight.plan.number]
            found.append((len(flight.plan.emits) > 0, blocks, next(flight._blocks, "nothing")))
        return landed

    monkeypatch.setattr(TorchFlight, "__init__", make)
    monkeypatch.setattr(TorchFlight, "wait_landed", wait_landed)
    async with AsyncEngine(tiny_llama_dir, lanes="streams", **OPTIONS) as engine:
        short = asyncio.create_task(tokens(engine, [5, 6, 7]))
        await asyncio.sleep(0.05)
        await tokens(engine, list(range(3, 100)), SamplingParams(max_tokens=2, temperature=0, ignore_eos=True))
        await short
    assert set(found) == {(False, 2, "nothing"), (True, 3, "nothing")}
