"""What only a GPU can answer about two lanes: that they run at once, on their SMs, and change no token."""

from __future__ import annotations

import asyncio
import gc
import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from overlap import AsyncEngine, RequestAborted, SamplingParams
from overlap.microbatch.policy import SplitPolicy
from overlap.observe.trace import Trace
from overlap.schedule.plan import MAIN, SIDE, StepPlan
from overlap.schedule.split import Always, Choice, Outlook, Splitter
from overlap.streams import green
from overlap.streams.green import NoShares, default_shares, splits
from overlap.streams.stream import Busy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:Synchronization debug mode"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SMALL = {  # the head size and grouping of SmolLM2-135M
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536,
    "num_hidden_layers": 12, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 512,
    "max_position_embeddings": 20480, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "eos_token_id": 511,
}  # fmt: skip
OPTIONS: dict[str, Any] = {
    "device": "cuda", "load_format": "dummy", "max_rows": 16, "token_budget": 512, "kv_cache": 16384,
}  # fmt: skip


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("small")
    (path / "config.json").write_text(json.dumps(SMALL))
    return path


@pytest.fixture(scope="module")
def shares() -> tuple[int, ...]:
    """The shares of this device; skips where its SMs cannot be shared out."""
    try:
        return default_shares(splits(0).num_sms)
    except NoShares as why:
        pytest.skip(f"no SM shares here: {why}")


class Turning(Always):
    """A splitter that chooses two lanes, with another share each time."""

    def __init__(self, shares: tuple[int, ...], seed: int = 0) -> None:
        super().__init__("lanes")
        self.shares = shares  # type: ignore[misc]
        self._draw = random.Random(seed)

    def choose(self, outlook: Outlook) -> Choice:
        return Choice("lanes", self._draw.choice([64, 300, 2**20]), self._draw.choice((0, *self.shares)))


async def split_by(engine: AsyncEngine, splitter: Splitter) -> None:
    """Let another splitter decide from now on."""
    lanes = engine._core.parts[0]._lanes
    await asyncio.wrap_future(engine._core.call(partial(setattr, lanes, "splitter", splitter)))


async def tokens(engine: AsyncEngine, prompt: list[int], params: SamplingParams, **more: Any) -> list[int]:
    seen: list[int] = []
    async for output in engine.generate(prompt, params, **more):
        seen = output.token_ids
    return seen


# ── answers ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def work(seed: int) -> list[tuple[list[int], SamplingParams]]:
    draw = random.Random(seed)
    shared = [draw.randrange(3, 511) for _ in range(80)]
    asked = []
    for number in range(16):
        prompt = shared[: draw.choice([0, 16, 80])] + [draw.randrange(3, 511) for _ in range(draw.choice([3, 90, 700]))]
        temperature = draw.choice([0, 1.0])
        asked.append(
            (
                prompt,
                SamplingParams(
                    max_tokens=draw.choice([20, 120]), temperature=temperature, top_p=0.9, seed=number, ignore_eos=True
                ),
            )
        )
    return asked


async def answers(engine: AsyncEngine, asked: list[tuple[list[int], SamplingParams]]) -> list[list[int]]:
    """Answer all, each sent a little after the one before."""

    async def one(number: int) -> list[int]:
        await asyncio.sleep(0.004 * number)
        return await tokens(engine, *asked[number])

    return list(await asyncio.gather(*(one(number) for number in range(len(asked)))))


async def test_in_float32_no_way_to_share_the_device_changes_a_token(small: Path, shares: tuple[int, ...]) -> None:
    asked = work(1)
    options = {**OPTIONS, "dtype": "float32"}
    async with AsyncEngine(small, lanes="mixed", **options) as engine:
        expected = await answers(engine, asked)
        assert engine.statistics().side_steps == 0
    for decode_sms in (None, *shares):
        async with AsyncEngine(small, lanes="streams", decode_sms=decode_sms, **options) as engine:
            for _ in range(2):  # the second time most steps are captured
                assert await answers(engine, asked) == expected, decode_sms
            assert engine.statistics().side_steps > 0
            if decode_sms is not None:
                assert f"SM shares, decode rows + prompts: {decode_sms} + " in engine.explain()
                assert engine.statistics().lane_choices[f"lanes sm:{decode_sms}"] > 0
                assert engine.statistics().sm_shares == 1
    async with AsyncEngine(small, lanes="auto", **options) as engine:
        assert engine.statistics().sm_shares == len(shares)
        await split_by(engine, Turning(shares))
        for _ in range(3):
            assert await answers(engine, asked) == expected
        assert sum(name.startswith("lanes sm:") for name in engine.statistics().lane_choices) == len(shares)
        assert engine.statistics().graphs["capture_failures"] == 0, engine.explain()
        print("\n" + engine.explain())


async def test_in_bfloat16_shares_run_whole_graphs_and_pieces_of_their_own(
    small: Path, shares: tuple[int, ...]
) -> None:
    asked = work(2)
    async with AsyncEngine(small, lanes="streams", decode_sms=shares[-1], **OPTIONS) as engine:
        for _ in range(4):
            found = await answers(engine, asked)
        explained = engine.explain()
        print("\n" + explained)
        assert [len(one) for one in found] == [params.max_tokens for _, params in asked]
        graphs = engine.statistics().graphs
        assert graphs["capture_failures"] == 0
        assert graphs["full_replays"] > 50
        assert graphs["piecewise_replays"] > 5
        assert f"sm:{shares[-1]}: graphs of whole greedy decode steps" in explained or (
            f"sm:{shares[-1]}: graphs of whole sampled decode steps" in explained
        )
        assert f"side lane: sm:{shares[-1]}: graphs of pieces" in explained


class Watch(Trace):
    """A trace that keeps the lane and the share of each step that ran, too."""

    def __init__(self) -> None:
        super().__init__("lanes")
        self.steps: list[tuple[StepPlan, Busy]] = []

    def ran(self, plan: StepPlan, busy: Busy, bubble: float) -> None:
        super().ran(plan, busy, bubble)
        self.steps.append((plan, busy))


@pytest.mark.parametrize("shared", [False, True], ids=["all SMs", "some SMs"])
async def test_decode_steps_go_on_while_a_long_prompt_is_read(
    small: Path, shares: tuple[int, ...], shared: bool
) -> None:
    options = {**OPTIONS, "token_budget": 8192, "kv_cache": 131072, "lanes": "streams"}
    if shared:
        options["decode_sms"] = shares[0]
    params = SamplingParams(max_tokens=15000, temperature=0, ignore_eos=True)
    once = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)
    draw = random.Random(0)
    async with AsyncEngine(small, prefix_cache=False, **options) as engine:
        running = [asyncio.create_task(tokens(engine, [5 + n, 6, 7], params)) for n in range(4)]
        await asyncio.sleep(0.5)
        for _ in range(3):  # what is built for such steps is built
            await tokens(engine, [draw.randrange(3, 511) for _ in range(16000)], once)
        watch = Watch()
        await asyncio.wrap_future(engine._core.watch(watch))
        await tokens(engine, [draw.randrange(3, 511) for _ in range(16000)], once)
        await asyncio.wrap_future(engine._core.unwatch(watch))
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
    side = [(plan, busy) for plan, busy in watch.steps if plan.lane == SIDE]
    main = [busy for plan, busy in watch.steps if plan.lane == MAIN]
    plan, longest = max(side, key=lambda one: one[1].end - one[1].start)
    inside = [busy for busy in main if longest.start < busy.start and busy.end < longest.end]
    print(
        f"\n{len(plan.prompt)} prompt tokens in {1e3 * (longest.end - longest.start):.2f} ms; beside them "
        f"{len(inside)} decode steps, the longest {1e3 * max(busy.end - busy.start for busy in inside):.2f} ms"
    )
    assert len(inside) >= 3
    assert {plan.share for plan, _ in side} == {shares[0] if shared else 0}


async def test_nothing_between_plan_and_launch_waits_for_the_device_in_two_lanes(
    small: Path, shares: tuple[int, ...]
) -> None:
    async with AsyncEngine(small, lanes="auto", **OPTIONS) as engine:
        runner: Any = engine._core._runner
        launch = runner.launch

        def watched(call: Any, *arguments: Any) -> Any:
            torch.cuda.set_sync_debug_mode("error")
            try:
                return call(*arguments)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        def launched(plan: StepPlan) -> Any:
            flight = watched(launch, plan)
            block = type(flight).launch_block

            class Watched(type(flight)):  # type: ignore[misc]
                __slots__ = ()

                def launch_block(self) -> None:
                    watched(block, self)

            flight.__class__ = Watched
            return flight

        runner.launch = launched
        await split_by(engine, Turning(shares))
        for seed in (3, 4):
            found = await answers(engine, work(seed))  # a step that waits fails, and its requests with it
            assert [len(one) for one in found] == [params.max_tokens for _, params in work(seed)]
        assert engine.statistics().failed_steps == 0
        assert engine.statistics().side_steps > 10
        assert engine.statistics().graphs["captures"] > 4


async def test_requests_that_are_aborted_in_either_lane_leave_nothing_and_disturb_nobody(
    small: Path, shares: tuple[int, ...]
) -> None:
    asked, draw = work(5), random.Random(5)
    options = {**OPTIONS, "dtype": "float32", "kv_cache": 6000}
    async with AsyncEngine(small, lanes="mixed", prefix_cache=False, **options) as engine:
        alone = [await tokens(engine, *one) for one in asked]
    async with AsyncEngine(small, lanes="auto", **options) as engine:
        await split_by(engine, Turning(shares, 1))

        async def one(number: int) -> None:
            await asyncio.sleep(draw.random() * 0.5)
            which, leaves = number % len(asked), draw.random() < 0.4
            wait = draw.choice([0.0, 0.002, 0.01])  # some are still read in the side lane, some have begun to answer
            reading = asyncio.create_task(tokens(engine, *asked[which], request_id=f"r{number}"))
            if leaves:
                await asyncio.sleep(wait)
                await engine.abort(f"r{number}")
            try:
                assert await reading == alone[which]
            except RequestAborted:
                assert leaves

        await asyncio.gather(*(one(number) for number in range(60)))
        await asyncio.wrap_future(engine._core.idle())
        await asyncio.wrap_future(engine._core.call(engine._core.parts[0].check_idle))
        assert engine.statistics().side_steps > 0
        assert engine.statistics().failed_steps == 0


# ── what is left behind ──────────────────────────────────────────────────────────────────────────────────────────────


def mib_in_use() -> float:
    gc.collect()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return (total - free) / 2**20


@pytest.mark.alone
async def test_two_lanes_with_shares_give_all_their_memory_back(small: Path, shares: tuple[int, ...]) -> None:
    levels = []
    for _ in range(4):
        async with AsyncEngine(small, lanes="auto", **OPTIONS) as engine:
            await split_by(engine, Turning(shares))
            for _ in range(2):
                await answers(engine, work(6))
            pool = engine.statistics().graphs["pool_bytes"]
            assert pool > 0
        levels.append(mib_in_use())
    print(f"\npools {pool / 2**20:.0f} MiB; MiB in use after each engine: {[round(level) for level in levels]}")
    assert max(levels[1:]) - levels[0] < 100


async def test_two_engines_with_shares_run_at_once(small: Path, shares: tuple[int, ...]) -> None:
    asked = work(7)
    options = {**OPTIONS, "dtype": "float32", "lanes": "streams", "decode_sms": shares[0]}
    async with AsyncEngine(small, **options) as first, AsyncEngine(small, **options) as second:
        one, other = await asyncio.gather(answers(first, asked), answers(second, asked))
    assert one == other


@contextmanager
def without_green_contexts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def none(device: int) -> Any:
        raise NoShares("cuGreenCtxCreate: CUDA_ERROR_NOT_SUPPORTED")

    with monkeypatch.context() as patch:
        patch.setattr(green, "splits", none)
        yield


async def test_without_green_contexts_the_lanes_compete_and_it_is_said(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = work(8)
    with without_green_contexts(monkeypatch):
        for options in ({"lanes": "streams", "decode_sms": 24}, {"lanes": "auto"}):
            async with AsyncEngine(small, **options, **OPTIONS) as engine:
                found = await answers(engine, asked)
                assert [len(one) for one in found] == [params.max_tokens for _, params in asked]
                assert "lanes: no SM shares: cuGreenCtxCreate: CUDA_ERROR_NOT_SUPPORTED" in engine.explain()
                assert engine.statistics().sm_shares == 0
                if options["lanes"] == "streams":
                    assert engine.statistics().side_steps > 0


async def test_a_calibration_measures_each_way_at_each_share(
    small: Path, tmp_path: Path, shares: tuple[int, ...]
) -> None:
    async with AsyncEngine(small, lanes="auto", cache_dir=str(tmp_path), **OPTIONS) as engine:
        await engine.calibrate(progress=False)
        policy = engine._core.parts[0].splitter
        assert isinstance(policy, SplitPolicy)
        assert policy.shares == shares
        assert all(policy.samples(route) >= 3 for route in policy.routes), engine.explain()
        assert engine.statistics().running == 0
