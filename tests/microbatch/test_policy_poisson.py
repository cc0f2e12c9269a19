"""The policy in the real loop and planner, on a made-up GPU: long prompts over running answers, and many at once.

Its two lanes slow each other down, and its host takes time to plan and to launch, so that it may be late.
"""

from __future__ import annotations

import asyncio
import copy
import random
import statistics
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import pytest

from overlap.cache.pages import Ints
from overlap.calibrate import Cell, cells_of
from overlap.loop import Loop
from overlap.microbatch.cost import CostModel, Nominal
from overlap.microbatch.policy import SplitPolicy
from overlap.schedule.plan import SIDE, StepPlan
from overlap.schedule.planner import Planner
from overlap.schedule.request import Request
from overlap.schedule.settled import Settled
from overlap.schedule.split import Always, Route, Splitter
from overlap.streams.stream import Busy

ROWS, BUDGET, PROMPT, RATE, SECONDS = 48, 1024, 1024, 30.0, 1.0
SHARES = (24, 40, 56)
NOMINAL = Nominal(weights_s=1e-4, kv_token_s=8e-9, token_s=7e-7, step_s=5e-4)
BLOCKS: Final = 4
"""In which a step with prompts is launched."""


@dataclass(frozen=True)
class Truth:
    """What steps take on the device, and verbs on the host."""

    step_s: float
    row_s: float
    kv_s: float
    prompt_s: float
    token_s: float
    mixed: float
    slower: dict[int, tuple[float, float]]
    """How many times as long a prompt step and a decode step take beside each other, by SMs of the decode rows' own."""
    plan_s: float
    launch_s: float
    """Of decode rows."""
    launch_prompts_s: float
    settle_s: float
    attend_s: float = 0.0
    """To let a prompt token attend to one token."""

    def step(self, plan: StepPlan) -> float:
        context = int(plan.starts[: plan.num_decode].sum())
        decode_s = self.step_s + plan.num_decode * self.row_s + context * self.kv_s if plan.num_decode else 0.0
        prompt_s = self.prompt_s + len(plan.prompt) * self.token_s if len(plan.prompt) else 0.0
        counts = plan.counts[plan.num_decode :].astype(float)
        prompt_s += float((counts * (plan.starts[plan.num_decode :] + counts / 2)).sum()) * self.attend_s
        return self.together(decode_s, prompt_s)

    def together(self, decode_s: float, prompt_s: float) -> float:
        """What a step takes of decode rows and prompts that take so long alone; 0 where it has none."""
        return (decode_s + prompt_s) * (self.mixed if decode_s and prompt_s else 1.0)


def like_an_h100(seed: int) -> Truth:
    """Ways that differ by a few percent: where lanes bring little, and where they bring something."""
    draw = random.Random(seed).uniform
    slower = {
        share: ((132 / (132 - share)) ** draw(0.7, 1.3) * draw(1, 1.2), (132 / share) ** draw(0.3, 0.8))
        for share in SHARES
    }
    host = draw(0.2, 1.2)
    return Truth(
        draw(0.8, 1.8) * 1e-3, draw(4, 16) * 1e-6, draw(0.5, 4) * 4e-9, draw(0.5, 2) * 1e-3, draw(5, 9) * 1e-6,
        draw(0.85, 1.15), {0: (draw(1.3, 2.1), draw(1.1, 2.6)), **slower},
        3e-4 * host, 3e-4 * host, draw(1, 6) * 1e-3, 3e-4 * host,
    )  # fmt: skip


@dataclass(slots=True)
class Item:
    """Some work of a lane."""

    left_s: float
    start: float = -1.0
    end: float = -1.0


class Gpu:
    """Two lanes that slow each other down while both have work."""

    def __init__(self, slower: dict[int, tuple[float, float]]) -> None:
        self.now = 0.0
        """The host's time; the device's is behind it."""
        self.share = 0
        self._slower = slower
        self._time = 0.0
        self._queues: tuple[deque[Item], deque[Item]] = (deque(), deque())

    def launch(self, lane: int, seconds: float) -> Item:
        self.run_until(self.now)
        self._queues[lane].append(item := Item(seconds))
        return item

    def run_until(self, time: float) -> None:
        while self._time < time:
            self._run(time)

    def wait(self, item: Item) -> None:
        self.run_until(self.now)
        while item.end < 0:
            self._run(self._time + 1.0)
        self.now = max(self.now, item.end)

    def _run(self, until: float) -> None:
        """Go on to the next end, or to `until`."""
        main, side = self._queues
        prompts, rows = self._slower[self.share] if main and side else (1.0, 1.0)
        heads = [(queue, slower) for queue, slower in ((main, rows), (side, prompts)) if queue]
        took_s = min([until - self._time, *(queue[0].left_s * slower for queue, slower in heads)])
        for queue, slower in heads:
            head = queue[0]
            head.start = self._time if head.start < 0 else head.start
            head.left_s -= took_s / slower
            if head.left_s <= 1e-12:
                queue.popleft().end = self._time + took_s
        self._time += took_s


class Flight:
    """A step on that device."""

    def __init__(self, load: Load, plan: StepPlan) -> None:
        self.plan = plan
        self._load = load
        self._num_blocks = self.blocks_left = BLOCKS if len(plan.prompt) else 1
        self._seconds = load.truth.step(plan) * load.noise.lognormvariate(0, 0.04)
        self._items: list[Item] = []
        while self.blocks_left and plan.lane != SIDE:
            self.launch_block()

    def launch_block(self) -> None:
        truth, gpu = self._load.truth, self._load.gpu
        gpu.now += truth.launch_prompts_s / BLOCKS if len(self.plan.prompt) else truth.launch_s
        self._items.append(gpu.launch(self.plan.lane, self._seconds / self._num_blocks))
        self.blocks_left -= 1

    @property
    def landed(self) -> bool:
        self._load.gpu.run_until(self._load.gpu.now)
        return not self.blocks_left and 0 <= self._items[-1].end <= self._load.gpu.now

    async def wait_landed(self) -> Ints:
        self._load.gpu.wait(self._items[-1])
        return np.full(len(self.plan.emits), 7, dtype=np.int32)

    def scored(self) -> None:
        return None

    def busy(self) -> Busy:
        start, end = self._items[0].start, self._items[-1].end
        before = self._load.ended.get(self.plan.lane, start)
        self._load.ended[self.plan.lane] = end
        return Busy("lane", start, end, start - before)


class Load:
    """One run of the load; it is what the loop asks and tells."""

    def __init__(self, truth: Truth, splitter: Splitter | None, seed: int) -> None:
        self.truth, self.gpu, self.noise = truth, Gpu(truth.slower), random.Random(seed)
        self.ended: dict[int, float] = {}
        self.plans: list[StepPlan] = []
        self.planner = Planner(
            max_rows=64, num_pages=4096, token_budget=BUDGET, prefill_chunk=BUDGET, context=4096, prefix_cache=False,
            splitter=splitter,
        )  # fmt: skip
        self.loop = Loop(self.planner, self, self, timeline=self)
        self._last: dict[int, float] = {}
        self._between: list[float] = []
        self._began = -1.0
        self._moments: deque[float] = deque([0.0])
        while (at := self._moments[-1] + self.noise.expovariate(RATE)) < SECONDS:
            self._moments.append(at)
        self._num_prompts = self._to_come = len(self._moments)

    def run(self) -> tuple[float, float]:
        """Return the tokens a second, and the seconds between two tokens that one in a hundred exceeds."""
        for key in range(ROWS):
            self.loop.submit(Request(key=key, front=0, prompt=np.full(48, 5, dtype=np.int32), limit=4000))
        asyncio.run(self.loop.run())
        total = len(self._between) + self._num_prompts * PROMPT
        return total / (self.gpu.now - self._began), sorted(self._between)[len(self._between) * 99 // 100]

    def launch(self, plan: StepPlan) -> Flight:
        self.plans.append(plan)
        if plan.lane == SIDE:
            self.gpu.share = plan.share
        return Flight(self, plan)

    def usable(self) -> bool:
        return True

    @contextmanager
    def span(self, verb: str, plan: StepPlan | None = None) -> Iterator[None]:
        self.gpu.now += {"plan": self.truth.plan_s, "settle": self.truth.settle_s}.get(verb, 0.0)
        while self._began >= 0 and self._moments and self._began + self._moments[0] <= self.gpu.now:
            self._moments.popleft()
            key, prompt = ROWS + len(self._moments), np.full(PROMPT, 5, dtype=np.int32)
            self.loop.submit(Request(key=key, front=0, prompt=prompt, limit=1))
        yield

    def ran(self, plan: StepPlan, busy: Busy, bubble: float) -> None:
        """Nothing to do."""

    def tell_failed(self, key: int, front: int, failure: BaseException) -> None:
        raise failure

    def tell_settled(self, settled: Settled) -> None:
        for key in settled.keys.tolist():
            if key < ROWS and self._began >= 0:
                self._between.append(self.gpu.now - self._last[key])
            self._last[key] = self.gpu.now
            self._to_come -= key >= ROWS
        if self._began < 0 and len(self._last) == ROWS:
            self._began = self.gpu.now
        if not self._to_come:
            for key in range(ROWS):
                self.loop.end(key)
            self.loop.close()


FIXED: tuple[Splitter | None, ...] = (
    None, Always("serial"), Always("lanes"), *(Always("lanes", share=share) for share in SHARES),
)  # fmt: skip


def learned(truth: Truth, seed: int, loads: int = 5) -> SplitPolicy:
    chosen = SplitPolicy(CostModel(NOMINAL), token_budget=BUDGET, shares=SHARES)
    for number in range(loads):
        Load(truth, chosen, 1000 * seed + number).run()
    return chosen


def means(truth: Truth, splitter: Splitter | None, seed: int) -> tuple[float, float]:
    """Return the means of three loads: one says it to 2% only, and the best of six ways would be the luckiest."""
    runs = [Load(truth, splitter, 7919 * seed + number).run() for number in range(3)]
    return statistics.mean(rate for rate, _ in runs), statistics.mean(between_s for _, between_s in runs)


@pytest.mark.parametrize("seed", range(8))
def test_under_long_prompts_it_is_within_two_percent_of_the_best_fixed_choice(seed: int) -> None:
    truth = like_an_h100(seed)
    fixed = [means(truth, each, seed) for each in FIXED]
    chosen = learned(truth, seed)
    rate, between_s = means(truth, chosen, seed)
    assert rate >= 0.98 * max(each for each, _ in fixed), (truth, rate, fixed, chosen.explain())
    assert between_s <= 1.02 * fixed[0][1], (truth, between_s, fixed, chosen.explain())


def test_a_prompt_as_long_as_the_budget_is_read_in_one_step_where_no_decode_rows_share_it() -> None:
    truth = like_an_h100(0)
    for splitter in (Always("serial"), Always("lanes"), learned(truth, 0)):
        load = Load(truth, splitter, 0)
        load.run()
        whole = [len(plan.prompt) for plan in load.plans if len(plan.prompt) and plan.slots[0] >= ROWS]
        assert whole == [PROMPT] * len(whole), whole


class Offline(Load):
    """Many requests at once: rows that decode come and go all the while. First steps of a kind are held up."""

    def __init__(self, truth: Truth, splitter: Splitter | None, seed: int, met: Counter[tuple[int, ...]]) -> None:
        super().__init__(truth, splitter, seed)
        self.planner = Planner(
            max_rows=256, num_pages=40_000, token_budget=8192, prefill_chunk=8192, context=2048, prefix_cache=False,
            splitter=splitter,
        )  # fmt: skip
        self.loop = Loop(self.planner, self, self)
        self.met = met
        draw = random.Random(0)
        self.lengths = [(1024, draw.randint(64, 192)) for _ in range(384)]
        self._left = len(self.lengths)

    def rate(self) -> float:
        """Return the tokens a second."""
        for key, (tokens, limit) in enumerate(self.lengths):
            self.loop.submit(Request(key=key, front=0, prompt=np.full(tokens, 5, dtype=np.int32), limit=limit))
        asyncio.run(self.loop.run())
        return sum(map(sum, self.lengths)) / self.gpu.now

    def launch(self, plan: StepPlan) -> Flight:
        if plan.lane == SIDE:
            self.gpu.share = plan.share
        return HeldUpFlight(self, plan)

    def tell_settled(self, settled: Settled) -> None:
        self._left -= len(settled.ends)
        if not self._left:
            asyncio.get_running_loop().call_soon(self.loop.close)


class HeldUpFlight(Flight):
    """The first ones of a kind take 8 ms longer, and say that they are not typical."""

    def __init__(self, load: Offline, plan: StepPlan) -> None:
        kind = plan.lane, plan.share, len(plan.prompt) // 1024, plan.num_decode // 32
        load.met[kind] += 1
        self._first = load.met[kind] <= 2
        self._held_s = 8e-3 if self._first else 0.0
        super().__init__(load, plan)

    def launch_block(self) -> None:
        self._seconds += self._held_s
        self._held_s = 0.0
        super().launch_block()

    def busy(self) -> Busy:
        return super().busy()._replace(typical=not self._first)


def with_small_kernels(seed: int) -> Truth:
    """Both lanes leave each other room, with SMs shared out or not."""
    draw = random.Random(seed).uniform
    slower = {
        share: ((132 / (132 - share)) ** draw(0.7, 1.3) * draw(1, 1.2), (132 / share) ** draw(0.3, 0.8))
        for share in SHARES
    }
    return Truth(
        draw(3, 8) * 1e-4, draw(3, 8) * 1e-6, draw(4, 8) * 1e-9, 1e-3, draw(1.2, 3) * 1e-6, draw(0.85, 1.15),
        {0: (draw(1.05, 1.6), draw(1.1, 2.2)), **slower}, 1.2e-4, 1e-4, draw(1, 4) * 1e-3, 1.2e-4,
    )  # fmt: skip


def offline_rate(truth: Truth, splitter: Splitter | None, met: Counter[tuple[int, ...]]) -> float:
    return statistics.mean(Offline(truth, splitter, seed, met).rate() for seed in (6, 7, 8))


@pytest.mark.slow
def test_of_many_requests_at_once_it_has_learned_the_best_way_after_some_loads() -> None:
    """Of 24 devices the mean is 1.025 of the best fixed way, the worst 0.996; it was 1.010 and 0.945."""
    shares = []
    for seed in (1, 2, 9, 16, 18, 23):
        truth = with_small_kernels(seed)
        met: Counter[tuple[int, ...]] = Counter()
        for splitter in FIXED:
            Offline(truth, splitter, 0, met).rate()
        fixed = [offline_rate(truth, splitter, met) for splitter in FIXED]
        chosen = SplitPolicy(CostModel(NOMINAL), token_budget=8192, shares=SHARES)
        for number in range(6):
            Offline(truth, chosen, number, met).rate()
        shares.append(offline_rate(truth, chosen, met) / max(fixed))
    assert statistics.mean(shares) > 1.0, shares
    assert min(shares) > 0.98, shares


def like_smollm2_on_an_h200(factor: float) -> Truth:
    """What steps were measured to take there, with rows that cost `factor` times as much."""
    slower = {0: (1.72, 1.57), 24: (1.4, 3.2), 40: (1.65, 1.6), 56: (2.1, 1.25)}
    return Truth(0.45e-3, 3e-6 * factor, 6.2e-9, 0.6e-3, 0.94e-6, 1.12, slower, 1e-4, 1.2e-4, 4e-3, 1e-4)


@pytest.mark.parametrize("factor", [0.8, 1.2])
def test_after_a_calibration_it_knows_the_best_way_from_the_first_load_on(factor: float) -> None:
    """A job too short to find out has no time for that; a few chunks each way tell it before."""
    truth, met = like_smollm2_on_an_h200(factor), Counter[tuple[int, ...]]()
    for splitter in FIXED:
        Offline(truth, splitter, 0, met).rate()
    best = max(offline_rate(truth, splitter, met) for splitter in FIXED)
    chosen = SplitPolicy(CostModel(NOMINAL), token_budget=8192, shares=SHARES, patience=256)
    for route in sorted(chosen.routes, key=lambda route: route[0] != "serial"):
        chosen.hold(route)
        part = Offline(truth, chosen, 99, met)
        part.lengths = part.lengths[:72]
        part._left = len(part.lengths)
        part.rate()
    chosen.end()
    Offline(
        truth, copy.deepcopy(chosen), 0, met
    ).rate()  # first steps of a kind are held up, as they were for the others
    shares = [Offline(truth, chosen, number, met).rate() / best for number in range(4)]
    assert min(shares) > 0.97, (shares, chosen.explain())
    assert statistics.mean(shares) > 0.98, (shares, chosen.explain())


class Few(Offline):
    """80 requests, 64 at once, of a model whose prompts take long."""

    def __init__(
        self, truth: Truth, splitter: Splitter | None, seed: int, met: Counter[tuple[int, ...]], prompt: int = 1024
    ) -> None:
        super().__init__(truth, splitter, seed, met)
        self.planner = Planner(
            max_rows=64, num_pages=40_000, token_budget=8192, prefill_chunk=8192, context=16_384, prefix_cache=False,
            splitter=splitter,
        )  # fmt: skip
        self.loop = Loop(self.planner, self, self)
        draw = random.Random(0)
        self.lengths = [(prompt, draw.randint(80, 112)) for _ in range(80 if prompt == 1024 else 16)]
        self._left = len(self.lengths)


LIKE_8B = Truth(
    8.2e-3, 3e-5, 2.7e-8, 2e-3, 2.2e-5, 0.93, {0: (1.5, 2.6), 24: (1.35, 4.4), 40: (1.7, 2.6), 56: (2.3, 2.0)},
    1e-4, 1e-4, 4e-3, 1e-4, attend_s=1.5e-9,
)  # fmt: skip
"""Of the ways there mixed steps are the best, as on an H200."""


def test_what_was_measured_with_long_prompts_is_not_held_against_a_way_that_then_meets_short_ones() -> None:
    """A prompt of 8,192 tokens takes a third longer to read than eight of 1,024."""
    nominal, met = Nominal(1e-2, 2.7e-8, 4e-5, 5e-4, attend_s=2.7e-9), Counter[tuple[int, ...]]()
    for splitter in FIXED:
        Few(LIKE_8B, splitter, 0, met).rate()
    best = max(Few(LIKE_8B, splitter, 6, met).rate() for splitter in FIXED)
    chosen = SplitPolicy(CostModel(nominal), token_budget=8192, shares=SHARES, patience=256)
    for route in sorted(chosen.routes, key=lambda route: route[0] != "serial"):
        chosen.hold(route)
        Few(LIKE_8B, chosen, 99, met, 8192).rate()
    chosen.end()
    assert chosen.calibrated
    shares = [Few(LIKE_8B, chosen, number, met).rate() / best for number in range(4)]
    assert min(shares) > 0.97, (shares, chosen.explain())


class LikeMeasured(Truth):
    """What an 8B model was measured to take on an H200, in which prompts carry most of what decode rows need: reading
    the weights. `mixed` is the share of a decode step that a mixed one takes beyond its prompts."""

    def together(self, decode_s: float, prompt_s: float) -> float:
        return prompt_s + decode_s * (self.mixed if prompt_s else 1.0)


OVER_LONG_CONTEXTS = {0: (1.16, 5.9), 24: (1.31, 4.2), 40: (1.5, 2.45), 56: (1.77, 1.83)}
"""How lanes held each other up there while decode rows read a thousand tokens each, and..."""
OVER_SHORT_CONTEXTS = {0: (1.16, 5.9), 24: (1.34, 3.2), 40: (1.53, 2.2), 56: (1.81, 1.7)}
"""...next to nothing."""


class Calibrating(Few):
    """What a calibration runs of a size, one way: rows decode on, and chunks come two at a time until some are known.

    The loop is closed by what it is told; `first` is the first key of a prompt of these chunks.
    """

    first: Final = 1000

    def __init__(self, truth: Truth, chosen: SplitPolicy, seed: int, cell: Cell, route: Route) -> None:
        super().__init__(truth, chosen, seed, Counter())
        self.chosen, self.cell, self.route = chosen, cell, route
        self.lengths = [(cell.context, 4000)] * cell.rows
        self.steps = self.sent = self.read = 0
        self.before: int | None = None

    def tell_settled(self, settled: Settled) -> None:
        self.read += sum(key >= self.first for key in settled.keys.tolist())
        self.steps += len(settled.keys) >= self.cell.rows
        if self.before is None and self.steps >= 8:
            self.chosen.hold(self.route)
            self.before = self.chosen.samples(self.route)
            self.send()
        if self.before is None:
            return
        per_chunk = self.cell.tokens // self.cell.prompt
        enough = self.chosen.samples(self.route) >= self.before + 3 or self.sent >= 12 * per_chunk
        if not enough and self.sent - self.read <= per_chunk:
            self.send()
        if enough and self.sent == self.read:
            for key in range(self.cell.rows):
                self.loop.end(key)
            asyncio.get_running_loop().call_soon(self.loop.close)

    def send(self) -> None:
        for _ in range(self.cell.tokens // self.cell.prompt):
            prompt = np.full(self.cell.prompt, 5, dtype=np.int32)
            self.loop.submit(Request(key=self.first + self.sent, front=0, prompt=prompt, limit=1))
            self.sent += 1


class FewOfManyLengths(Few):
    """The bench's: short answers among them let prompts in one by one, and the last ones decide when it ends."""

    def __init__(self, truth: Truth, splitter: Splitter | None, seed: int, met: Counter[tuple[int, ...]]) -> None:
        super().__init__(truth, splitter, seed, met)
        draw = random.Random(0)
        self.lengths = [(1024, draw.randint(48, 144)) for _ in range(80)]


@pytest.mark.parametrize("seed", range(3))
def test_a_calibration_of_its_own_sizes_tells_a_large_model_what_a_load_takes_to_its_last_answer(seed: int) -> None:
    """It lost 3% to 5%, on an H200 and here: calibrated over short contexts, with decode steps that counted in full
    while the last prompts were read, and small chunks taken for large ones. Of 32 such loads the mean is 0.999 now."""
    nominal = Nominal(5.35e-3, 4.4e-8, 4e-5, 5e-4, attend_s=1.3e-9)
    truth = LikeMeasured(
        4.75e-3, 5e-6, 4.6e-8, 5e-4, 2.2e-5, 0.45, OVER_LONG_CONTEXTS, 1e-4, 1e-4, 4e-3, 1e-4, attend_s=1e-9
    )  # fmt: skip
    met = Counter[tuple[int, ...]]()
    for splitter in FIXED:
        FewOfManyLengths(truth, splitter, 0, met).rate()
    best = max(
        statistics.mean(FewOfManyLengths(truth, splitter, number, met).rate() for number in (6, 7))
        for splitter in FIXED
    )  # fmt: skip
    chosen = SplitPolicy(CostModel(nominal), token_budget=8192, shares=SHARES, patience=256)
    for cell in cells_of(max_rows=64, token_budget=8192, kv_tokens=640_000, context=16_384):
        here = truth if cell.context > 100 else replace(truth, slower=OVER_SHORT_CONTEXTS)
        for route in sorted(chosen.routes, key=lambda route: route[0] != "serial"):
            chosen.hold(("serial", 0))
            Calibrating(here, chosen, 17 + seed, cell, route).rate()
    chosen.end()
    FewOfManyLengths(truth, copy.deepcopy(chosen), 50, met).rate()
    shares = [FewOfManyLengths(truth, chosen, 100 * number + seed, met).rate() / best for number in range(4)]
    assert min(shares) > 0.96, (shares, chosen.explain())
    assert statistics.mean(shares) > 0.98, (shares, chosen.explain())
