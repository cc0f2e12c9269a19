"""Two lanes on the simulated device: prompts are read beside decode steps, and no answer changes."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import pytest

from overlap.cache.pages import Ints
from overlap.errors import RequestError
from overlap.loop import Loop
from overlap.microbatch.cost import FIRM, CostModel, Nominal
from overlap.microbatch.policy import SplitPolicy
from overlap.observe.timeline import NoTimeline
from overlap.schedule.plan import MAIN, SIDE, StepPlan
from overlap.schedule.planner import Planner
from overlap.schedule.request import Request
from overlap.schedule.settled import Settled
from overlap.schedule.split import Always, Choice, Outlook, Splitter
from overlap.testing import EchoModel, SimDevice, SimRunner, SimTimeline

MODEL = EchoModel(longest=20000)


class Drawn(Always):
    """A splitter that chooses at random."""

    def __init__(self, draw: random.Random) -> None:
        super().__init__("mixed")
        self._draw = draw

    def choose(self, outlook: Outlook) -> Choice:
        assert outlook.num_decode >= 0
        assert outlook.prefill_tokens > 0
        mode = self._draw.choice(["mixed", "serial", "lanes", "lanes"])
        share = self._draw.choice([0, 24, 40]) if mode == "lanes" else 0
        return Choice(mode, self._draw.choice([1, 7, 40, 1000]), share)  # type: ignore[arg-type]


@dataclass
class Rig:
    """A planner, a simulated device with two streams, and a loop."""

    splitter: Splitter | None
    max_rows: int = 8
    num_pages: int = 400
    token_budget: int = 64
    cost: Callable[[str, int], float] = lambda work, tokens: 1.0
    costs: dict[str, float] = field(default_factory=dict)
    fault: Callable[[StepPlan], None] | None = None
    overlap: bool = True
    side_blocks: int = 1
    block_cost: float = 0.0
    context: int = 4096
    chunk: int | None = None

    def __post_init__(self) -> None:
        self.answers: dict[int, list[int]] = {}
        self.scores: dict[int, list[int]] = {}
        self.ends: dict[int, str] = {}
        self.failures: dict[int, BaseException] = {}
        self.on_settled: Callable[[], None] = lambda: None
        self.device = SimDevice(self.cost)
        self.planner = Planner(
            max_rows=self.max_rows,
            num_pages=self.num_pages,
            token_budget=self.token_budget,
            prefill_chunk=self.chunk or self.token_budget,
            context=self.context,
            splitter=self.splitter,
        )
        self.runner = SimRunner(
            self.device.stream("main"),
            MODEL,
            num_pages=self.num_pages,
            fault=self.fault,
            side=self.device.stream("side"),
            side_blocks=self.side_blocks,
            spend=lambda: self.device.spend(self.block_cost),
        )
        self.loop = Loop(
            self.planner, self.runner, self, timeline=SimTimeline(self.device, self.costs), overlap=self.overlap
        )

    def tell_settled(self, settled: Settled) -> None:
        for scored in settled.scored:
            assert scored.key not in self.answers, "a score came behind the first token"
            told = self.scores.setdefault(scored.key, [])
            assert scored.start == 1 + len(told)
            told += scored.words[:, 0].tolist()
        for key, token in zip(settled.keys.tolist(), settled.tokens.tolist(), strict=True):
            assert key not in self.ends, f"request {key} got a token after its end"
            assert key not in self.failures
            self.answers.setdefault(key, []).append(token)
        for end in settled.ends:
            self.ends[end.key] = end.reason
        self.on_settled()

    def tell_failed(self, key: int, front: int, failure: BaseException) -> None:
        assert key not in self.ends
        self.failures[key] = failure

    async def serve(self, *requests: Request) -> None:
        for one in requests:
            self.loop.submit(one)
        self.loop.when_idle(self.loop.close)
        await self.loop.run()
        self.planner.check_idle()

    def of_lane(self, lane: int) -> list[StepPlan]:
        return [plan for plan in self.runner.plans if plan.lane == lane]


def request(key: int, prompt: list[int], limit: int, **more: object) -> Request:
    return Request(key=key, front=0, prompt=np.array(prompt, dtype=np.int32), limit=limit, **more)  # type: ignore[arg-type]


def step_cost(work: str, tokens: int) -> float:
    return 64.0 if work == "prompts" else 4.0


async def test_what_a_decode_step_brought_is_told_before_a_prompt_is_launched_beside_the_next() -> None:
    said: list[tuple[str, int, int]] = []

    class Verbs(NoTimeline):
        def span(self, verb: str, plan: StepPlan | None = None) -> AbstractContextManager[None]:
            if plan is not None:
                said.append((verb, plan.number, plan.lane))
            return super().span(verb, plan)

    rig = Rig(Always("lanes"), cost=step_cost, side_blocks=8, block_cost=3.0)
    rig.loop.watch(Verbs())
    await rig.serve(request(0, [1, 2, 3], 200), request(1, [5] * 640, 4))
    beside, untold = 0, set[int]()
    for verb, number, lane in said:
        if verb == "settle":
            untold.add(number)
        elif verb == "tell":
            untold.remove(number)
        elif verb == "launch" and lane == SIDE:
            beside += 1
            assert not untold, f"a block of step {number} was launched while {untold} had not been told"
    assert beside > 8
    assert not untold


async def test_decode_steps_keep_their_pace_while_a_long_prompt_is_read() -> None:
    alone = Rig(Always("lanes"), cost=step_cost)
    await alone.serve(request(0, [1, 2, 3], 200))
    pace = alone.device.now
    rig = Rig(Always("lanes"), cost=step_cost)
    ends: list[float] = []
    rig.on_settled = lambda: ends.append(rig.device.now) if 0 in rig.ends and not ends else None
    await rig.serve(request(0, [1, 2, 3], 200), request(1, [5] * 640, 4))
    assert rig.answers[0] == alone.answers[0]
    assert rig.answers[1] == MODEL.answer([5] * 640, 4)
    assert ends[0] <= pace * 1.25, "the first step reads the long prompt's first chunk too; no other one waits for it"
    assert len(rig.of_lane(SIDE)) >= 9
    assert all(plan.num_decode == plan.num_rows for plan in rig.of_lane(MAIN)[1:])


async def test_one_lane_hides_behind_the_other_and_neither_idles_while_it_has_work() -> None:
    rig = Rig(Always("lanes"), cost=lambda work, tokens: 8.0, costs={"plan": 0.5, "launch": 0.5, "settle": 1.0})
    # 16 requests of one chunk each, one after the other beside 40 decode steps
    await rig.serve(request(0, [1], 40), *(request(key, [key] * 64, 1) for key in range(1, 17)))
    assert rig.device.hidden("side", behind="main") > 0.9
    assert rig.device.bubble("main") == 0
    assert rig.device.bubble("side") == 0


async def test_a_prompt_goes_out_block_by_block_while_a_decode_step_runs_and_neither_lane_waits() -> None:
    # by one block for each decode step, half of the side lane's time would pass idle
    costs = {"plan": 0.2, "launch": 0.1, "settle": 0.2}
    rig = Rig(
        Always("lanes"), cost=lambda work, tokens: 2.0 if work == "prompts" else 4.0, costs=costs, side_blocks=8,
        block_cost=0.5,
    )  # fmt: skip
    await rig.serve(request(0, [1], 60), *(request(key, [key] * 64, 1) for key in range(1, 9)))
    assert rig.answers[0] == MODEL.answer([1], 60)
    assert rig.device.bubble("main") == 0
    prompts = rig.device.streams["side"].spans
    steps = [prompts[at : at + 8] for at in range(0, len(prompts), 8)]
    assert len(steps) == 8
    assert all(one.end == other.start for step in steps for one, other in pairwise(step))


async def test_the_main_lane_is_planned_before_a_prompt_that_has_landed_is_settled() -> None:
    def cost(work: str, tokens: int) -> float:
        return 15.0 if work == "prompts" else 5.0

    # both settled one after the other, plan and launch behind them take longer than a decode step
    rig = Rig(Always("lanes"), cost=cost, costs={"plan": 0.5, "launch": 0.5, "settle": 2.2})
    await rig.serve(request(0, [1], 90), *(request(key, [key] * 64, 1) for key in range(1, 17)))
    assert rig.answers[0] == MODEL.answer([1], 90)
    assert rig.device.bubble("main") == 0


async def test_decode_steps_go_on_beside_a_prompt_without_overlap_too() -> None:
    rig = Rig(Always("lanes"), cost=step_cost, overlap=False)
    await rig.serve(request(0, [1, 2, 3], 200), request(1, [5] * 640, 4))
    assert rig.answers[0] == MODEL.answer([1, 2, 3], 200)
    assert rig.device.bubble("main") == 0


async def test_a_prompt_that_is_slow_to_launch_holds_a_decode_step_up_by_a_block_at_most() -> None:
    # the host is too slow for both: each decode step is behind by what one block takes it
    rig = Rig(Always("lanes"), cost=lambda work, tokens: 1.0, side_blocks=16, block_cost=3.0)
    await rig.serve(request(0, [1], 60), request(1, [2] * 64, 1))
    rows = rig.device.streams["main"].spans
    assert max(other.start - one.end for one, other in pairwise(rows)) <= 3.0
    assert len(rig.answers[1]) == 1


async def test_a_chunk_in_the_side_lane_waits_for_the_chunk_before_it_in_the_main_lane() -> None:
    modes = iter(["mixed"] * 3)

    class Late(Always):
        def choose(self, outlook: Outlook) -> Choice:
            return Choice(next(modes, "lanes"), 16)  # type: ignore[arg-type]

    rig = Rig(Late("mixed"), cost=lambda work, tokens: 4.0)
    await rig.serve(request(0, [1, 2], 60), request(1, [3] * 300, 3))
    assert rig.answers[1] == MODEL.answer([3] * 300, 3)
    first = rig.of_lane(SIDE)[0]
    assert first.follows > 0
    assert first.follows < first.number
    assert rig.of_lane(SIDE)[-1].follows == 0


async def test_prompts_and_decode_rows_take_turns_when_told_to() -> None:
    rig = Rig(Always("serial"))
    await rig.serve(request(0, [1, 2, 3], 30), request(1, [5] * 200, 4))
    assert rig.answers[1] == MODEL.answer([5] * 200, 4)
    mixed = [plan for plan in rig.runner.plans if 0 < plan.num_decode < plan.num_rows]
    assert not mixed


async def test_a_share_holds_for_both_lanes_while_both_run_and_for_neither_alone() -> None:
    def cost(work: str, tokens: int) -> float:
        return {"rows": 4.0, "rows sm:24": 6.0, "prompts sm:24": 48.0}[work]

    rig = Rig(Always("lanes", share=24), cost=cost)
    await rig.serve(request(0, [1, 2, 3], 200), request(1, [5] * 640, 4))
    assert rig.answers[1] == MODEL.answer([5] * 640, 4)
    assert {plan.share for plan in rig.of_lane(SIDE)} == {24}
    assert {plan.share for plan in rig.of_lane(MAIN) if plan.beside} == {24}
    assert {plan.share for plan in rig.of_lane(MAIN) if not plan.beside} == {0}
    assert rig.device.hidden("side", behind="main") > 0.9
    assert rig.planner.lane_choices["lanes sm:24"] > 0


async def test_the_share_may_change_from_step_to_step_and_each_lane_keeps_its_order() -> None:
    turns = iter(range(1000))

    class Turning(Always):
        def choose(self, outlook: Outlook) -> Choice:
            return Choice("lanes", 16, (0, 24, 40, 56)[next(turns) % 4])

    rig = Rig(Turning("lanes"), cost=lambda work, tokens: 2.0)
    await rig.serve(request(0, [1, 2], 90), request(1, [3] * 300, 3))
    assert rig.answers == {0: MODEL.answer([1, 2], 90), 1: MODEL.answer([3] * 300, 3)}
    assert {plan.share for plan in rig.of_lane(SIDE)} == {0, 24, 40, 56}
    for name in ("main", "side"):
        spans = rig.device.streams[name].spans
        assert all(one.end <= other.start for one, other in pairwise(spans))


class Listening(Always):
    """Mixes prompts and decode rows, and keeps what it is told."""

    def __init__(self, told: list[Outlook]) -> None:
        super().__init__("mixed")
        self._told = told

    def choose(self, outlook: Outlook) -> Choice:
        self._told.append(outlook)
        return super().choose(outlook)


async def test_the_splitter_is_told_of_all_prompts_that_wait_and_of_how_much_their_answers_will_bring() -> None:
    told: list[Outlook] = []
    stop = MODEL.answer([2] * 8, 4)[-1]
    rig = Rig(Listening(told), max_rows=2, num_pages=60, token_budget=16)
    short = [request(1 + key, [2] * 8, 40, stop_ids=(stop,)) for key in range(12)]  # they end at 4 of 40 tokens
    one = request(99, [2] * 8, 1)  # says nothing of how long answers are
    await rig.serve(request(0, [1, 2], 120), *short, one)
    assert max(outlook.prefill_tokens for outlook in told) > 10 * 8, "most of them wait for a slot"
    first = told[0]
    assert first.owed < 0.2 * 12 * 40 / first.prefill_tokens, "one has ended by then, at a tenth of what it might have"


async def test_decode_steps_save_what_slots_are_waited_for_and_all_they_do_while_requests_keep_coming() -> None:
    told: list[Outlook] = []
    rig = Rig(Listening(told), max_rows=4, num_pages=200, token_budget=16)
    await rig.serve(*(request(key, [2] * 16, 20 + 10 * (key % 3)) for key in range(20)))
    assert all(outlook.saved < 1 for outlook in told), "all came at once: more are not expected"
    many, few = (min(told, key=lambda outlook: abs(outlook.prefill_tokens - tokens)) for tokens in (16 * 12, 16))
    assert many.prefill_tokens * many.saved == pytest.approx(12 / 4 * 30, rel=0.3), "twelve answers, four at a time"
    assert few.prefill_tokens * few.saved < 20, "the last one decides when it ends"
    assert max(outlook.ready_tokens for outlook in told) <= 4 * 16, "of the prompts that have a slot"
    assert all(0 < outlook.left <= 40 and 20 <= outlook.answer <= 40 for outlook in told)

    told.clear()
    rig = Rig(Listening(told), max_rows=24, num_pages=14, token_budget=32)
    await rig.serve(*(request(key, [2] * 16, 20 + 10 * (key % 3)) for key in range(20)))
    many = min(told, key=lambda outlook: abs(outlook.prefill_tokens - 16 * 12))
    assert many.num_decode < 8
    assert many.prefill_tokens * many.saved > 40, "slots are free, and pages are not"
    assert many.ready_tokens < 8 * 16

    told.clear()
    rig = Rig(Listening(told), max_rows=4, num_pages=200, token_budget=16)
    coming = iter(range(1, 9))

    def one_more() -> None:
        if len(rig.answers[0]) % 20 == 0 and (key := next(coming, None)) is not None:
            rig.loop.submit(request(key, [2] * 40, 20))

    rig.on_settled = one_more
    await rig.serve(request(0, [1, 2], 300))
    assert len(rig.answers) == 9
    assert [outlook for outlook in told if outlook.saved < float("inf")] == []


async def test_while_prompts_wait_for_a_slot_nothing_is_asked_and_decode_rows_have_the_device_to_themselves() -> None:
    rig = Rig(Always("lanes", share=24), max_rows=2, num_pages=60, token_budget=64)
    await rig.serve(request(0, [1, 2], 90), request(1, [3] * 20, 60), request(2, [5] * 20, 60))
    waits = [plan for plan in rig.of_lane(MAIN) if plan.num_decode == 2]
    assert len(waits) > 50
    assert sum(plan.beside or plan.share > 0 for plan in waits) <= 4, "but for steps at which one is read or lands"


def test_prompts_whose_reading_is_in_the_air_are_told_of_as_rows_to_come() -> None:
    planner = Planner(
        max_rows=4, num_pages=60, token_budget=64, prefill_chunk=64, context=256, splitter=Always("lanes")
    )  # fmt: skip
    planner.submit(request(0, [1, 2], 90))
    first = planner.plan()
    assert first is not None
    planner.settle(first, np.array([7], dtype=np.int32))
    for key in (1, 2, 3):
        planner.submit(request(key, [3] * 60, 9))
    assert planner.plan() is not None
    told = planner._prefill.outlook()
    assert (told.number, told.tokens) == (3, 180)
    assert planner.plan(SIDE) is not None
    told = planner._prefill.outlook()
    assert (told.number, told.tokens, told.answers) == (3, 120, 26)


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("seed", range(30))
async def test_every_answer_is_what_it_would_have_been_alone_in_any_lane(seed: int, overlap: bool) -> None:
    draw = random.Random(seed)
    rig = Rig(
        draw.choice([Always("lanes"), Drawn(draw)]),
        max_rows=draw.choice([2, 3, 8]),
        num_pages=draw.choice([9, 14, 60]),
        token_budget=draw.choice([10, 16, 40, 200]),
        cost=lambda work, tokens: draw.choice([1.0, 1.0, 20.0]),
        overlap=overlap,
        side_blocks=draw.choice([1, 4]),
    )
    requests, expected, expected_scores = [], {}, {}
    shared = [draw.randrange(97) for _ in range(48)]
    for key in range(draw.randint(1, 25)):
        prompt = shared[: draw.choice([0, 0, 16, 40])] + [draw.randrange(97) for _ in range(draw.randint(1, 60))]
        limit = draw.randint(1, 9 * 16 - len(prompt))
        stops = tuple(draw.sample(range(97), draw.choice([0, 0, 1, 3])))
        scores = len(prompt) if key % 3 == 0 else 0
        more = {"stop_ids": stops, "priority": draw.choice([0, 0, 1]), "scores": scores}
        requests.append(request(key, prompt, limit, **more))
        expected[key] = MODEL.answer(prompt, limit, stop_ids=stops)
        if scores > 1:
            expected_scores[key] = MODEL.scores(prompt)
    await rig.serve(*requests)
    assert rig.answers == expected
    assert rig.scores == expected_scores


@pytest.mark.parametrize("seed", range(30))
async def test_arrivals_aborts_and_failed_steps_in_either_lane_lose_nothing(seed: int) -> None:
    draw = random.Random(1000 + seed)

    def fault(plan: StepPlan) -> None:
        if draw.random() < 0.03:
            raise MemoryError(f"step {plan.number}")

    rig = Rig(
        draw.choice([Always("lanes"), Drawn(draw)]),
        max_rows=draw.choice([2, 5]),
        num_pages=draw.choice([9, 14, 40]),
        token_budget=32,
        fault=fault,
        cost=lambda work, tokens: draw.choice([1.0, 2.0, 30.0]),
        side_blocks=draw.choice([1, 4]),
    )
    submitted: dict[int, tuple[list[int], int]] = {}
    aborted: dict[int, int] = {}

    def happen() -> None:
        rig.planner.check()
        if len(submitted) < 40 and draw.random() < 0.5:
            key = len(submitted)
            prompt = [draw.randrange(97) for _ in range(draw.randint(1, 80))]
            submitted[key] = (prompt, draw.randint(1, 60))
            rig.loop.submit(request(key, *submitted[key]))
        if submitted and draw.random() < 0.25:
            key = draw.choice(list(submitted))
            if rig.loop.end(key):
                aborted[key] = len(rig.answers.get(key, []))

    async def storm() -> None:
        while len(submitted) < 40:
            happen()
            await asyncio.sleep(0)
        rig.loop.when_idle(rig.loop.close)

    rig.on_settled = happen
    await asyncio.gather(rig.loop.run(), storm())
    rig.planner.check_idle()
    for key, (prompt, limit) in submitted.items():
        alone, got = MODEL.answer(prompt, limit), rig.answers.get(key, [])
        assert sum([key in rig.ends, key in rig.failures, key in aborted]) == 1
        assert got == (alone if key in rig.ends else alone[: len(got)])
        if key in aborted:
            assert len(got) == aborted[key], "a token came after the abort"


async def test_a_preempted_prompt_is_scored_from_where_it_was_and_takes_what_is_before_that_from_the_cache() -> None:
    rig = Rig(None, num_pages=9, token_budget=16)
    prompt = [(7 * at) % 97 for at in range(110)]
    scored = request(0, prompt, 5, scores=len(prompt))

    def press() -> None:
        if len(rig.scores.get(0, [])) == 48 and 1 not in rig.answers:
            rig.on_settled = lambda: None
            rig.loop.submit(request(1, [3] * 50, 4, priority=5))

    rig.on_settled = press
    await rig.serve(scored)
    assert rig.planner.statistics().preemptions == 1
    assert 0 < scored.num_hit < 6  # each score is told once, and what says the next one is run again
    assert rig.scores[0] == MODEL.scores(prompt)
    assert rig.answers == {0: MODEL.answer(prompt, 5), 1: MODEL.answer([3] * 50, 4)}


async def test_once_something_else_than_two_lanes_was_chosen_nobody_chooses_before_the_side_lane_is_empty() -> None:
    class Wavering(Always):
        """Chooses two lanes twice, then mixed twice, and so on."""

        def __init__(self) -> None:
            super().__init__("lanes")
            self.asked: list[tuple[bool, str]] = []

        def choose(self, outlook: Outlook) -> Choice:
            mode = "mixed" if len(self.asked) % 4 > 1 else "lanes"
            self.asked.append((outlook.side_busy, mode))
            return Choice(mode, 64)  # type: ignore[arg-type]

    splitter = Wavering()
    rig = Rig(splitter, cost=step_cost)
    await rig.serve(request(0, [1, 2, 3], 400), *(request(key, [key] * 64, 2) for key in range(1, 30)))
    behind = [after for before, after in pairwise(splitter.asked) if before == (True, "mixed")]
    assert behind
    assert not any(busy for busy, _ in behind)
    mixed = [plan for plan in rig.of_lane(MAIN) if 0 < plan.num_decode < plan.num_rows]
    assert len(mixed) >= len(behind)
    assert {plan.way for plan in mixed} == {"mixed"}
    assert rig.planner.lane_choices == Counter(plan.way for plan in rig.runner.plans if plan.way)


async def test_a_policy_that_knows_nothing_learns_each_way_though_prompts_always_wait_and_chunks_take_long() -> None:
    def cost(work: str, tokens: int) -> float:
        if work.startswith("prompts"):
            return 0.320 * tokens / 256
        return 0.010 + 0.260 * max(0, tokens - 8) / 256

    nominal = Nominal(weights_s=5e-3, kv_token_s=1e-8, token_s=1e-3, step_s=5e-4)
    policy = SplitPolicy(CostModel(nominal), token_budget=264, target_itl_s=0.030)
    rig = Rig(policy, cost=cost, max_rows=16, num_pages=20000, token_budget=264)
    prompts = iter(range(100, 160))
    waiting = set[int]()

    def more() -> None:
        waiting.difference_update(rig.ends)
        while len(waiting) < 2 and (key := next(prompts, None)) is not None:
            waiting.add(key)
            rig.loop.submit(request(key, [key] * 1024, 1))

    rig.on_settled = more
    more()
    await rig.serve(*(request(key, [1, 2, key], 2500) for key in range(8)))
    assert all(policy.samples(route) >= FIRM for route in policy.routes), policy.explain()


async def test_while_a_prompt_of_16384_tokens_is_read_running_answers_go_on_at_their_own_pace() -> None:
    """A chunk takes as long as 16 decode steps."""

    def cost(work: str, tokens: int) -> float:
        return 20.0 * tokens / 1024 if work == "prompts" else 10.0  # one of eight blocks

    rig = Rig(Always("lanes"), cost=cost, num_pages=3000, token_budget=1024, side_blocks=8, context=20000)
    await rig.serve(*(request(key, [1, 2, key], 400) for key in range(4)), request(9, [7] * 16384, 2))
    assert rig.answers[9] == MODEL.answer([7] * 16384, 2)
    reading = rig.device.streams["side"].spans
    first, last = reading[0].start, reading[-1].end
    assert last - first > 15 * 160.0
    steps = [span for span in rig.device.streams["main"].spans if first <= span.start < last]
    assert len(steps) * 10.0 > 0.95 * (last - first), "hardly a step waits for the prompt"


class Unmade:
    """A form that allows nothing behind its first token, as soon as that is said."""

    look = staticmethod(lambda: None)

    def __init__(self) -> None:
        self.mask: Ints = np.zeros(1, dtype=np.int32)
        self.ready = True
        self.failure: RequestError | None = None

    def take(self, tokens: Sequence[int], drafts: Sequence[int] = ()) -> None:
        self.ready = False


async def test_a_slot_that_changes_hands_between_two_lanes_plans_is_not_taken_for_the_row_before() -> None:
    """A form fails when the main lane was planned; the side lane's plan gives its slot to the next prompt."""
    rig = Rig(Always("lanes", prefill_tokens=16), max_rows=3, token_budget=19, chunk=5)
    form = Unmade()
    plan, given = rig.planner.plan, list[int]()

    def planned(lane: int = MAIN) -> StepPlan | None:
        found = plan(lane)
        lanes = rig.planner._lanes
        if lane == MAIN and found is None and len(lanes.side.flying) == 1 and not lanes.main.flying:
            given.append(lane)
            form.failure, form.ready = RequestError("no token may come next"), True
            asyncio.get_running_loop().call_soon(rig.loop.look)
        return found

    rig.planner.plan = planned  # type: ignore[method-assign]
    prompts = {0: [1, 2], 1: [3, 4, 5], 2: list(range(90)), 3: [7] * 40, 4: list(range(50, 90))}
    limits = {0: 30, 1: 4, 2: 6, 3: 6, 4: 6}
    await rig.serve(*(request(key, prompts[key], limits[key], matcher=None if key else form) for key in prompts))
    assert given, "the moment came"
    assert set(rig.failures) == {0}
    for key in range(1, 5):
        assert rig.answers[key] == MODEL.answer(prompts[key], limits[key])
