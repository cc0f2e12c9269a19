"""Steps that repeat: the plan before taken one position on, and tokens looked at for nothing but ends."""

from __future__ import annotations

import itertools
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from typing import Any

import numpy as np
import pytest

from overlap.schedule.pace import Pace
from overlap.schedule.plan import REFUSED, SIDE, UNUSED, StepPlan, widths_for
from overlap.schedule.planner import Planner
from overlap.schedule.request import Request
from overlap.schedule.settled import Settled
from overlap.schedule.split import Always, Choice, Outlook, Splitter
from overlap.state.packing import USED, capacity, goes_over, pack, pack_again


class Careful(Planner):
    """Never repeats."""

    def _plan_again(self, before: StepPlan) -> StepPlan | None:
        return None


def same(one: Any, other: Any) -> bool:
    """Whether two plans, or what was settled, say the same."""
    leave_out = {"again", "only_front", "masks", "admissions"}
    mine, theirs = (
        [(a.slot, a.start, a.spared is not None and a.spared.tolist()) for a in getattr(each, "admissions", ())]
        for each in (one, other)
    )
    return mine == theirs and all(
        np.array_equal(getattr(one, field.name), getattr(other, field.name))
        for field in fields(one)
        if field.name not in leave_out
    )


class Fickle(Pace):
    """Drafts and does not, in no order."""

    def __init__(self, chance: random.Random) -> None:
        super().__init__()
        self._chance = chance

    def choose(self, num_rows: int, widths: Sequence[int]) -> int:
        return self._chance.choice(widths) if self._chance.random() < 0.8 else 1


def landed(plan: StepPlan, drafts: int, chance: random.Random) -> np.ndarray[Any, np.dtype[np.int32]]:
    """Return what a device might bring for a plan."""
    tokens: list[int] = []
    for _ in range(plan.num_decode):
        tried = chance.randint(0, min(drafts, plan.width - 1)) if plan.width > 1 else 0
        kept = chance.randint(0, tried)
        own = [chance.randrange(400) for _ in range(kept + 1)]
        tokens += [*own, *[REFUSED] * (tried - kept), *[UNUSED] * (plan.width - 1 - tried)]
    tokens += [chance.randrange(400) for _ in range(len(plan.emits) - plan.num_decode)]
    return np.array(tokens, dtype=np.int32)


def run(
    kind: type[Planner], seed: int, drafts: int = 0, splitter: Splitter | None = None
) -> tuple[list[StepPlan], list[Settled]]:
    """Drive a planner through a random load, two steps in the air in each lane; return all that it said."""
    chance = random.Random(seed)
    pages, max_rows = chance.choice([12, 40, 200]), chance.choice([1, 3, 8])
    planner = kind(
        max_rows=max_rows, num_pages=pages, token_budget=64, prefill_chunk=32, context=160,
        drafts=drafts, drafts_ahead=drafts and drafts - 1, pace=Fickle(random.Random(seed)) if drafts else None,
        splitter=splitter,
    )  # fmt: skip
    plans: list[StepPlan] = []
    settled: list[Settled] = []
    flights: deque[StepPlan] = deque()
    side: deque[StepPlan] = deque()
    for step in range(400):
        if chance.random() < 0.04 and step < 300:
            planner.submit(
                Request(
                    key=step,
                    front=chance.choice([0, 0, 1]),
                    prompt=np.array([chance.randrange(9) for _ in range(chance.randint(1, 40))], dtype=np.int32),
                    limit=chance.choice([1, 5, 60, 100]),
                    stop_ids=(7,) if chance.random() < 0.5 else (),
                    temperature=chance.choice([0.0, 0.7]),
                    priority=chance.choice([0, 0, 1]) if splitter is not None else 0,
                )
            )
        if chance.random() < 0.01:
            planner.end(chance.randrange(step + 1))
        plan = planner.plan()
        if plan is not None:
            plans.append(plan)
            flights.append(plan)
        if len(side) < 2 and (side or planner.wants_side) and (prompts := planner.plan(SIDE)) is not None:
            plans.append(prompts)
            side.append(prompts)
        if flights and (plan is None or len(flights) == 2):
            flight = flights.popleft()
            settled.append(planner.settle(flight, landed(flight, drafts, chance)))
        ready = side and not (flights and flights[0].number <= side[0].follows)
        if ready and (not flights or chance.random() < 0.1):  # a prompt takes as long as ten steps
            flight = side.popleft()
            settled.append(planner.settle(flight, landed(flight, drafts, chance)))
        planner.check()
    return plans, settled


@pytest.mark.parametrize("drafts", [0, 3])
def test_steps_that_repeat_are_those_that_would_have_been_planned_anyway(drafts: int) -> None:
    repeated = 0
    for seed in range(24):
        plans, settled = run(Planner, seed, drafts)
        careful_plans, careful_settled = run(Careful, seed, drafts)
        assert len(plans) == len(careful_plans)
        assert all(same(*pair) for pair in zip(plans, careful_plans, strict=True)), seed
        assert all(same(*pair) for pair in zip(settled, careful_settled, strict=True)), seed
        repeated += sum(plan.again for plan in plans)
    assert repeated > (500 if drafts else 2000)


FEW_ROWS = 16
LADDER = ((FEW_ROWS, 7), (99, 4))


def test_a_wide_step_is_as_wide_as_its_rows_are_many_though_pages_did_not_suffice_for_all_of_them() -> None:
    """A graph of so many rows brings so many numbers for each: read as others they would be other rows' tokens."""
    widths: set[tuple[bool, int]] = set()
    short = 0
    for seed in range(10):
        chance = random.Random(seed)
        planner = Planner(
            max_rows=24, num_pages=chance.choice([90, 110, 130]), token_budget=4096, prefill_chunk=4096, context=512,
            drafts=7, drafts_ahead=7, ladder=LADDER,
        )  # fmt: skip
        for key in range(20):
            prompt = np.array([chance.randrange(400) for _ in range(20)], dtype=np.int32)
            planner.submit(Request(key=key, front=0, prompt=prompt, limit=300))
        flights: deque[StepPlan] = deque()
        before = 0
        while planner.has_work:
            plan = planner.plan()
            if plan is not None:
                flights.append(plan)
                if plan.num_decode and plan.width > 1:
                    assert plan.width == widths_for(plan.num_decode, LADDER)[0]
                    widths.add((plan.num_decode <= FEW_ROWS, plan.width))
                    short += plan.num_decode <= FEW_ROWS < before
                    before = plan.num_decode
            if flights and (plan is None or len(flights) == 2):
                flight = flights.popleft()
                planner.settle(flight, landed(flight, 7, chance))
    assert widths == {(True, 8), (False, 5)}
    assert short, "rows that were many were too many for the pages"


class Wandering(Always):
    """Two lanes, with another share of the SMs each time."""

    def __init__(self) -> None:
        super().__init__("lanes")
        self._shares = itertools.cycle((0, 24, 40))

    def choose(self, outlook: Outlook) -> Choice:
        return Choice("lanes", 16, next(self._shares))


@pytest.mark.parametrize(
    "splitter",
    [
        partial(Always, "lanes", prefill_tokens=16),
        partial(Always, "lanes", prefill_tokens=16, share=24),
        Wandering,
    ],
    ids=["no share", "a share", "shares that change"],
)
def test_steps_that_repeat_beside_a_prompt_are_those_that_would_have_been_planned_anyway(
    splitter: Callable[[], Splitter],
) -> None:
    beside = alone = 0
    for seed in range(40):
        plans, settled = run(Planner, seed, splitter=splitter())
        careful = run(Careful, seed, splitter=splitter())
        assert len(plans) == len(careful[0])
        assert all(same(*pair) for pair in zip(plans, careful[0], strict=True)), seed
        assert all(same(*pair) for pair in zip(settled, careful[1], strict=True)), seed
        beside += sum(plan.again and plan.beside for plan in plans)
        alone += sum(plan.again and not plan.beside for plan in plans)
    assert min(beside, alone) > 400, (beside, alone)


def test_a_plan_packed_over_one_of_the_same_rows_is_packed_as_if_alone() -> None:
    packed = 0
    for seed in range(8):
        plans, _ = run(Planner, seed)
        places: list[StepPlan | None] = [None] * 3
        words = np.zeros((3, capacity(8, 64, 208)), dtype=np.int32)
        for number, plan in enumerate(plans):
            before, places[number % 3] = places[number % 3], plan
            if goes_over(plan, before):
                packed += 1
                pack_again(plan, words[number % 3])
                alone = np.zeros_like(words[0])
                pack(plan, alone)
                used = int(alone[USED])
                assert words[number % 3, :used].tolist() == alone[:used].tolist()
            else:
                pack(plan, words[number % 3])
    assert packed > 300
