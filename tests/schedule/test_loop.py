"""The loop on a simulated device: one step ahead, exact, and nothing lost."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import numpy as np
import pytest

from overlap.cache.pages import Ints
from overlap.errors import DeadlineExceeded, EngineDead, InternalError, QueueFull, RequestError
from overlap.loop import Loop
from overlap.observe.timeline import NoTimeline
from overlap.schedule.plan import StepPlan
from overlap.schedule.planner import Planner
from overlap.schedule.request import Request
from overlap.schedule.settled import Settled
from overlap.streams.stream import Mark
from overlap.testing import EchoModel, SimDevice, SimRunner, SimTimeline
from overlap.testing.echo import SimFlight
from overlap.turns import Rest

MODEL = EchoModel()


@dataclass
class Readers:
    """Collects what the loop tells, and holds it to what it promised."""

    answers: dict[int, list[int]] = field(default_factory=dict)
    ends: dict[int, str] = field(default_factory=dict)
    failures: dict[int, BaseException] = field(default_factory=dict)
    on_settled: Callable[[], None] = lambda: None

    def tell_settled(self, settled: Settled) -> None:
        for key, token in zip(settled.keys.tolist(), settled.tokens.tolist(), strict=True):
            assert key not in self.ends, f"request {key} got a token after its end"
            assert key not in self.failures
            self.answers.setdefault(key, []).append(token)
        for end in settled.ends:
            assert end.key not in self.ends, f"request {end.key} ended twice"
            self.ends[end.key] = end.reason
        self.on_settled()

    def tell_failed(self, key: int, front: int, failure: BaseException) -> None:
        assert key not in self.ends
        self.failures[key] = failure


@dataclass
class Rig:
    """A planner, a simulated device and a loop."""

    max_rows: int = 4
    num_pages: int = 64
    token_budget: int = 64
    prefill_chunk: int = 64
    cost: float = 4.0
    costs: dict[str, float] = field(default_factory=dict)
    overlap: bool = True
    fault: Callable[[StepPlan], None] | None = None
    max_waiting: int = 2**31
    step_limit_s: float = 60.0
    rest: Rest | None = None

    def __post_init__(self) -> None:
        self.device = SimDevice(self.cost)
        self.planner = Planner(
            max_rows=self.max_rows,
            num_pages=self.num_pages,
            token_budget=self.token_budget,
            prefill_chunk=self.prefill_chunk,
            context=1024,
            max_waiting=self.max_waiting,
        )
        self.runner = SimRunner(self.device.stream("compute"), MODEL, num_pages=self.num_pages, fault=self.fault)
        self.readers = Readers()
        timeline = SimTimeline(self.device, self.costs)
        self.loop = Loop(
            self.planner,
            self.runner,
            self.readers,
            timeline=timeline,
            overlap=self.overlap,
            step_limit_s=self.step_limit_s,
            rest=self.rest,
        )

    async def serve(self, *requests: Request) -> None:
        for request in requests:
            self.loop.submit(request)
        self.loop.when_idle(self.loop.close)
        await self.loop.run()
        self.planner.check_idle()


def request(key: int, prompt: list[int], limit: int, **more: object) -> Request:
    return Request(key=key, front=0, prompt=np.array(prompt, dtype=np.int32), limit=limit, **more)  # type: ignore[arg-type]


async def test_the_device_never_waits_for_a_host_that_is_faster_than_a_step() -> None:
    rig = Rig(cost=4.0, costs={"plan": 1.0, "launch": 0.5, "settle": 2.0})
    await rig.serve(request(0, [1, 2, 3], 50))
    assert len(rig.runner.plans) == 50
    assert rig.device.bubble("compute") == 0
    first_plan_and_launch, last_settle = 1.5, 2.0
    assert rig.device.now == pytest.approx(first_plan_and_launch + 50 * 4.0 + last_settle)


async def test_without_overlap_the_device_waits_for_the_host_at_every_step() -> None:
    rig = Rig(cost=4.0, costs={"plan": 1.0, "launch": 0.5, "settle": 2.0}, overlap=False)
    await rig.serve(request(0, [1, 2, 3], 50))
    assert rig.device.bubble("compute") == pytest.approx(49 * 3.5)


async def test_a_host_slower_than_a_step_costs_only_the_difference() -> None:
    rig = Rig(cost=2.0, costs={"plan": 1.0, "launch": 0.5, "settle": 2.0})
    await rig.serve(request(0, [1, 2, 3], 50))
    assert rig.device.bubble("compute") / 48 == pytest.approx(1.5, rel=0.05)


class Verbs(NoTimeline):
    """Notes which verb of which step comes when."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def span(self, verb: str, plan: StepPlan | None = None) -> AbstractContextManager[None]:
        if plan is not None:
            self.said.append(f"{verb} {plan.number}")
        return super().span(verb, plan)


async def verbs_of(*requests: Request, overlap: bool = True) -> list[str]:
    rig = Rig(overlap=overlap)
    verbs = Verbs()
    rig.loop.watch(verbs)
    await rig.serve(*requests)
    return verbs.said


async def test_a_step_is_told_behind_the_next_launch_and_before_the_loop_waits_again() -> None:
    assert await verbs_of(request(0, [1, 2, 3], 4)) == [
        "launch 1", "launch 2", "land 1", "settle 1", "launch 3", "tell 1", "land 2", "settle 2", "launch 4", "tell 2",
        "land 3", "settle 3", "tell 3", "land 4", "settle 4", "tell 4",
    ]  # fmt: skip
    assert await verbs_of(request(0, [1, 2, 3], 2), overlap=False) == [
        "launch 1", "land 1", "settle 1", "launch 2", "tell 1", "land 2", "settle 2", "tell 2",
    ]  # fmt: skip


async def test_a_step_is_told_in_front_of_a_launch_with_a_prompt_which_may_take_long() -> None:
    said = await verbs_of(request(0, [1], 3), request(1, [5] * 200, 1))
    with_prompt = [number for number in range(2, 9) if f"launch {number}" in said][:3]  # 200 tokens in steps of 64
    for number in with_prompt[1:]:
        assert said.index(f"tell {number - 2}") < said.index(f"launch {number}")


async def test_what_had_come_is_told_though_the_loop_fails_before_the_next_launch() -> None:
    rig, plan, told = Rig(), Planner.plan, list[int]()

    def fails(planner: Planner, lane: int = 0) -> StepPlan | None:
        if planner.statistics().settled_steps == 3:
            raise InternalError("it was to fail here")
        return plan(planner, lane)

    rig.readers.on_settled = lambda: told.append(len(rig.readers.answers[0]))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(InternalError, match="was to fail"):
        patch.setattr(Planner, "plan", fails)
        rig.loop.submit(request(0, [1, 2, 3], 9))
        await rig.loop.run()
    assert told == [1, 2, 3]


async def test_readers_are_told_of_a_rest_only_while_a_step_runs_that_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    rest, said, wait = Rest(), dict[int, tuple[bool, float]](), SimFlight.wait_landed
    rig = Rig(rest=rest)

    async def wait_landed(flight: SimFlight) -> Ints:
        said[flight.plan.number] = flight.plan.again, rest.until - time.perf_counter()
        return await wait(flight)

    monkeypatch.setattr(SimFlight, "wait_landed", wait_landed)
    rig.readers.on_settled = lambda: told.append(rest.until)
    told: list[float] = []
    await rig.serve(request(0, [1, 2, 3], 9), request(1, [4] * 100, 3))
    assert {again for again, _ in said.values()} == {False, True}
    for again, left in said.values():
        assert (left > 0) == again
        assert left < 4.0, "it never rests for longer than the step before took"
    assert set(told) == {0.0}, "with its own work to do it rests no more"


async def test_readers_are_asked_for_the_interpreter_while_steps_with_prompts_are_launched_and_not_longer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rest, wanted = Rest(), dict[int, tuple[bool, bool]]()
    rig = Rig(rest=rest)
    launch = rig.runner.launch

    def launched(plan: StepPlan) -> SimFlight:
        wanted[plan.number] = plan.num_rows > plan.num_decode, rest.wanted
        if len(wanted) == 3:
            raise ValueError("a launch that fails")
        return launch(plan)

    monkeypatch.setattr(rig.runner, "launch", launched)
    rig.readers.on_settled = lambda: wanted.update({-1: (False, rest.wanted)})
    await rig.serve(request(0, [1, 2, 3], 9), request(1, [4] * 100, 3))
    assert {asked for _, asked in wanted.values()} == {False, True}
    assert all(reads == asked for reads, asked in wanted.values())
    assert not rest.wanted


async def test_no_step_is_launched_for_rows_that_are_known_to_end_by_length() -> None:
    rig = Rig()
    await rig.serve(request(0, [1, 2, 3], 5), request(1, [4], 5))
    assert len(rig.runner.plans) == 5


async def test_a_row_that_ends_by_a_stop_token_is_launched_once_more_and_its_token_is_dropped() -> None:
    answer = MODEL.answer([1, 2, 3], 20)
    stop = answer[6]
    first = answer.index(stop)
    rig = Rig()
    await rig.serve(request(0, [1, 2, 3], 20, stop_ids=(stop,)))
    assert rig.readers.answers[0] == answer[: first + 1]
    assert rig.readers.ends[0] == "stop"
    assert len(rig.runner.plans) == first + 2


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("seed", range(40))
async def test_every_answer_is_what_it_would_have_been_alone(seed: int, overlap: bool) -> None:
    draw = random.Random(seed)
    budget = draw.choice([9, 16, 40, 200])
    rig = Rig(
        max_rows=draw.choice([1, 3, 8]),
        num_pages=draw.choice([8, 12, 40]),
        token_budget=budget,
        prefill_chunk=draw.choice([1, 5, 16, budget]),
        overlap=overlap,
    )
    requests, expected = [], {}
    for key in range(draw.randint(1, 25)):
        prompt = [draw.randrange(97) for _ in range(draw.randint(1, 70))]
        limit = draw.randint(1, 8 * 16 - len(prompt))
        stops = tuple(draw.sample(range(97), draw.choice([0, 0, 1, 3])))
        sampled = draw.random() < 0.5
        more = {"temperature": 1.0, "seed": key * 7} if sampled else {}
        requests.append(request(key, prompt, limit, stop_ids=stops, **more))
        expected[key] = MODEL.answer(prompt, limit, stop_ids=stops, seed=key * 7 if sampled else 0)
    await rig.serve(*requests)
    assert rig.readers.answers == expected
    assert all(
        rig.readers.ends[key] == ("stop" if answer[-1] in requests[key].stop_ids else "length")
        for key, answer in expected.items()
    )


@pytest.mark.parametrize("seed", range(40))
async def test_arrivals_aborts_and_failed_steps_at_any_moment_lose_nothing(seed: int) -> None:
    draw = random.Random(1000 + seed)

    def fault(plan: StepPlan) -> None:
        if draw.random() < 0.03:
            raise MemoryError(f"step {plan.number}")

    rig = Rig(
        max_rows=draw.choice([2, 5]), num_pages=draw.choice([8, 14]), token_budget=32, prefill_chunk=11, fault=fault
    )
    submitted: dict[int, tuple[list[int], int]] = {}
    aborted: dict[int, int] = {}

    def happen() -> None:
        rig.planner.check()
        if len(submitted) < 40 and draw.random() < 0.5:
            key = len(submitted)
            prompt = [draw.randrange(97) for _ in range(draw.randint(1, 60))]
            submitted[key] = (prompt, draw.randint(1, 60))
            rig.loop.submit(request(key, *submitted[key]))
        if submitted and draw.random() < 0.25:
            key = draw.choice(list(submitted))
            if rig.loop.end(key):
                aborted[key] = len(rig.readers.answers.get(key, []))
            else:
                assert key in rig.readers.ends or key in rig.readers.failures or key in aborted

    async def storm() -> None:
        while len(submitted) < 40:
            happen()
            await asyncio.sleep(0)
        rig.loop.when_idle(rig.loop.close)

    rig.readers.on_settled = happen
    await asyncio.gather(rig.loop.run(), storm())
    rig.planner.check_idle()
    figures = rig.planner.statistics()
    assert (figures.running, figures.waiting, figures.draining) == (0, 0, 0)
    assert figures.free_pages + figures.cached_pages == rig.num_pages
    for key, (prompt, limit) in submitted.items():
        alone, got = MODEL.answer(prompt, limit), rig.readers.answers.get(key, [])
        assert sum([key in rig.readers.ends, key in rig.readers.failures, key in aborted]) == 1
        if key in rig.readers.ends:
            assert got == alone
        else:
            assert got == alone[: len(got)]
        if key in rig.readers.failures:
            assert isinstance(rig.readers.failures[key], MemoryError)
        if key in aborted:
            assert len(got) == aborted[key], "a token came after the abort"


async def test_pressure_preempts_the_youngest_and_changes_no_answer() -> None:
    rig = Rig(max_rows=4, num_pages=8)
    prompts = [[key + 1] * 10 for key in range(4)]
    await rig.serve(*(request(key, prompt, 100) for key, prompt in enumerate(prompts)))
    assert rig.planner.statistics().preemptions > 0
    assert rig.readers.answers == {key: MODEL.answer(prompt, 100) for key, prompt in enumerate(prompts)}
    finished = list(rig.readers.ends)
    assert finished[0] == 0, "the oldest is never preempted"


async def test_a_request_that_can_never_fit_is_refused_with_the_numbers() -> None:
    rig = Rig(num_pages=8)
    await rig.serve(request(0, [1] * 100, 50), request(1, [], 5), request(2, [1] * 100, 28))
    assert isinstance(rig.readers.failures[0], RequestError)
    assert "100 tokens and asks for up to 50 more; the engine holds 128" in str(rig.readers.failures[0])
    assert "empty" in str(rig.readers.failures[1])
    assert len(rig.readers.answers[2]) == 28


async def test_a_failed_step_ends_its_requests_and_the_next_ones_go_on() -> None:
    def fault(plan: StepPlan) -> None:
        if plan.number == 3:
            raise MemoryError("out of pages")

    rig = Rig(fault=fault)
    await rig.serve(request(0, [1, 2], 10))
    assert isinstance(rig.readers.failures[0], MemoryError)
    again = Rig(fault=fault)
    again.loop.submit(request(0, [1, 2], 2))
    await again.serve(request(1, [5] * 63, 8))
    assert 0 in again.readers.ends
    assert 1 in again.readers.failures


async def test_a_device_that_does_not_come_back_ends_the_loop_with_the_cause() -> None:
    def fault(plan: StepPlan) -> None:
        raise RuntimeError("an illegal memory access")

    rig = Rig(fault=fault)
    rig.runner.usable = lambda: False  # type: ignore[method-assign]
    with pytest.raises(EngineDead, match="illegal memory access"):
        await rig.serve(request(0, [1, 2], 10))


async def test_a_step_is_settled_once_and_in_order() -> None:
    rig = Rig()
    rig.loop.submit(request(0, [1], 3))
    plan = rig.planner.plan()
    assert plan is not None
    second = rig.planner.plan()
    assert second is not None
    with pytest.raises(InternalError, match="step 2 was settled after step 0"):
        rig.planner.settle(second, np.array([1], dtype=np.int32))


async def test_a_steady_step_plans_the_same_row_columns_again() -> None:
    rig = Rig(max_rows=3)
    await rig.serve(*(request(key, [key] * 5, 40) for key in range(3)))
    steady = [plan for plan in rig.runner.plans if plan.num_decode == 3]
    assert len({id(plan.slots) for plan in steady}) == 1
    assert sum(len(plan.page_ids) for plan in steady) <= 3 * 3


# ── steps that cannot be launched ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("overlap", [True, False])
async def test_nothing_is_planned_behind_a_step_that_could_not_be_launched(overlap: bool) -> None:
    rig = Rig(max_rows=4, overlap=overlap, prefill_chunk=8)
    launch = rig.runner.launch

    def launch_most(plan: StepPlan) -> SimFlight:
        if plan.number == 4:
            for key in (2, 3):  # they come while the step is in the air, or would be
                rig.loop.submit(request(key, [key] * 20, 10))
            raise MemoryError("no room for the plan")
        return launch(plan)

    rig.runner.launch = launch_most  # type: ignore[method-assign]
    await rig.serve(request(0, [7] * 3, 10), request(1, [8] * 30, 5))
    assert set(rig.readers.failures) == {0, 1}, "both were in that step"
    assert rig.readers.answers[2] == MODEL.answer([2] * 20, 10)
    assert rig.readers.answers[3] == MODEL.answer([3] * 20, 10)
    assert rig.loop.statistics().failed_steps == 1
    assert rig.planner.statistics().planned_steps == rig.loop.statistics().steps + 1


async def test_a_request_that_is_ended_while_another_is_told_of_a_failure_is_told_nothing() -> None:
    def fault(plan: StepPlan) -> None:
        raise MemoryError(f"step {plan.number}")

    rig = Rig(fault=fault, overlap=False)
    told: list[int] = []

    def tell_failed(key: int, front: int, failure: BaseException) -> None:
        told.append(key)
        rig.loop.end(1 - key)

    rig.readers.tell_failed = tell_failed  # type: ignore[method-assign]
    await rig.serve(request(0, [1], 5), request(1, [2], 5))
    assert told == [0]


# ── deadlines ────────────────────────────────────────────────────────────────────────────────────────────────────────


def events_at(now: list[float]) -> None:
    """Let timers go by `now`."""
    asyncio.get_running_loop().time = lambda: now[0]  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("phase", "life"),
    [("before admission", "waiting"), ("prefilling", "running"), ("decoding", "running"), ("preempted", "waiting")],
)
@pytest.mark.parametrize("overlap", [True, False])
async def test_a_deadline_ends_a_request_in_each_phase(phase: str, life: str, overlap: bool) -> None:
    rig, now = Rig(max_rows=1, prefill_chunk=8, overlap=overlap), [0.0]
    events_at(now)
    readers = rig.readers
    hurried = request(0, [5] * 80, 100, deadline=time.monotonic() + 50)
    other = request(1, [6] * 20, 20, priority=1)

    def pass_deadline() -> None:
        if phase == "preempted" and len(readers.answers.get(0, [])) == 3 and not hurried.made:
            rig.loop.submit(other)
        reached = {
            "before admission": 1 in readers.answers,
            "prefilling": hurried.chunked >= 24,
            "decoding": len(readers.answers.get(0, [])) == 7,
            "preempted": 1 in readers.answers,
        }
        if reached[phase]:
            now[0] = 100.0

    readers.on_settled = pass_deadline
    await rig.serve(*{"before admission": [hurried, other], "preempted": [hurried]}.get(phase, [hurried]))
    failure = readers.failures.pop(0)
    assert isinstance(failure, DeadlineExceeded)
    assert str(failure) == f"The request had not ended by its deadline; it was {life}."
    assert readers.failures == {}
    got = readers.answers.get(0, [])
    assert got == MODEL.answer([5] * 80, 100)[: len(got)]
    assert (len(got) > 0) == (phase in ("decoding", "preempted"))
    if phase in ("before admission", "preempted"):
        assert readers.answers[1] == MODEL.answer([6] * 20, 20)
    assert rig.loop.statistics().expired == 1


async def test_a_deadline_that_had_passed_before_the_request_came_ends_it() -> None:
    rig = Rig()
    await rig.serve(request(0, [5], 100, deadline=time.monotonic() - 1), request(1, [6], 10))
    assert isinstance(rig.readers.failures[0], DeadlineExceeded)
    assert rig.readers.answers[1] == MODEL.answer([6], 10)


async def test_a_request_that_ends_before_its_deadline_leaves_no_timer() -> None:
    rig = Rig()
    requests = [request(key, [key], 5, deadline=time.monotonic() + 1000) for key in range(3)]

    def end_one() -> None:
        rig.loop.end(1)

    rig.readers.on_settled = end_one
    await rig.serve(*requests)
    assert set(rig.readers.ends) == {0, 2}
    assert not rig.readers.failures
    assert not rig.loop._deadlines


# ── the queue's bound, and drain ─────────────────────────────────────────────────────────────────────────────────────


async def test_who_finds_the_queue_full_is_told_the_numbers_and_may_come_again() -> None:
    rig = Rig(max_rows=1, max_waiting=2)
    again: list[int] = []

    def come_again() -> None:
        if not again:
            again.append(3)
            rig.loop.submit(request(4, [4], 5))  # one of the two was admitted

    rig.readers.on_settled = come_again
    await rig.serve(*(request(key, [key], 5) for key in range(4)))
    assert set(rig.readers.ends) == {0, 1, 4}
    for key in (2, 3):
        assert isinstance(rig.readers.failures[key], QueueFull)
        assert "2 requests wait already, and max_waiting is 2" in str(rig.readers.failures[key])


async def test_a_preempted_request_finds_its_place_in_a_full_queue() -> None:
    rig = Rig(max_rows=1, max_waiting=1)

    def press() -> None:
        if len(rig.readers.answers.get(0, [])) == 3 and rig.planner.request(1) is None:
            rig.loop.submit(request(1, [1], 5, priority=1))

    rig.readers.on_settled = press
    await rig.serve(request(0, [9] * 10, 10))
    assert rig.planner.statistics().preemptions == 1
    assert rig.readers.answers == {0: MODEL.answer([9] * 10, 10), 1: MODEL.answer([1], 5)}


async def test_idle_is_told_once_nobody_runs_and_nothing_is_in_the_air() -> None:
    rig = Rig()
    stop = MODEL.answer([3], 9)[4]
    told: list[tuple[int, int, int]] = []

    def look() -> None:
        figures = rig.planner.statistics()
        told.append((figures.running, figures.draining, figures.planned_steps - figures.settled_steps))
        rig.loop.close()

    rig.loop.submit(request(0, [3], 50, stop_ids=(stop,)))  # its last step is in the air when it ends
    rig.loop.when_idle(look)
    await rig.loop.run()
    assert told == [(0, 0, 0)]
    assert 0 in rig.readers.ends


@pytest.mark.parametrize("overlap", [True, False])
async def test_a_loop_that_is_closed_with_a_step_in_the_air_lets_it_land(overlap: bool) -> None:
    rig = Rig(overlap=overlap)

    def close() -> None:
        if len(rig.readers.answers[0]) == 5:
            for key in (0, 1):
                rig.loop.end(key)
            rig.loop.close()

    rig.readers.on_settled = close
    for key in (0, 1):
        rig.loop.submit(request(key, [key], 50))
    await rig.loop.run()
    rig.planner.check_idle()
    figures = rig.planner.statistics()
    assert figures.planned_steps == figures.settled_steps
    assert len(rig.readers.answers[0]) == 5


# ── the watchdog ─────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_step_that_does_not_land_is_reported_once_and_all_is_well_when_it_has(
    caplog: pytest.LogCaptureFixture,
) -> None:
    rig, gate = Rig(step_limit_s=0.001), asyncio.Event()
    stream = rig.device.streams["compute"]
    wait_reached = stream.wait_reached

    async def wait_for_the_gate(mark: Mark) -> None:
        await gate.wait()
        await wait_reached(mark)

    stream.wait_reached = wait_for_the_gate  # type: ignore[method-assign]
    assert rig.loop.late() is None
    with caplog.at_level(logging.WARNING, "overlap"):
        serving = asyncio.create_task(rig.serve(request(0, [1, 2, 3], 5), request(1, [4], 5)))
        while not caplog.messages:
            await asyncio.sleep(0.001)
        late = rig.loop.late()
        assert late is not None
        assert late.startswith("Step 1 (2 rows, 4 tokens) has not landed for ")
        assert late.endswith(" and step_limit is 0.001 s. The device may hang.")
        await asyncio.sleep(0.02)  # the watchdog looks again, many times
        assert rig.loop.statistics().late_steps == 1
        gate.set()
        await serving
    assert rig.loop.late() is None
    assert sum(message.startswith("Step 1 ") for message in caplog.messages) == 1
    assert rig.readers.answers == {0: MODEL.answer([1, 2, 3], 5), 1: MODEL.answer([4], 5)}


async def test_deadlines_go_on_while_a_step_does_not_land() -> None:
    rig, gate = Rig(step_limit_s=0.001), asyncio.Event()
    stream = rig.device.streams["compute"]
    wait_reached = stream.wait_reached

    async def wait_for_the_gate(mark: Mark) -> None:
        await gate.wait()
        await wait_reached(mark)

    stream.wait_reached = wait_for_the_gate  # type: ignore[method-assign]
    serving = asyncio.create_task(rig.serve(request(0, [1], 5, deadline=time.monotonic() + 0.001)))
    while 0 not in rig.readers.failures:
        await asyncio.sleep(0.001)
    gate.set()
    await serving
    assert isinstance(rig.readers.failures[0], DeadlineExceeded)
    assert rig.readers.answers == {}
