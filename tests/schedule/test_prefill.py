"""Which prompts a step reads, and that what it tells the device is of its own rows."""

from __future__ import annotations

import random
from collections import deque

import numpy as np
import pytest

from overlap.schedule.plan import StepPlan, broken_rules
from overlap.schedule.planner import Planner
from overlap.schedule.request import Request
from overlap.schedule.split import Always


def planner(**more: object) -> Planner:
    asked: dict[str, object] = {
        "max_rows": 8, "num_pages": 400, "token_budget": 64, "prefill_chunk": 64, "context": 4096,
    }  # fmt: skip
    return Planner(**(asked | more))  # type: ignore[arg-type]


def request(key: int, tokens: int, limit: int = 20, **more: object) -> Request:
    prompt = np.arange(tokens, dtype=np.int32) + 1000 * key
    return Request(key=key, front=0, prompt=prompt, limit=limit, **more)  # type: ignore[arg-type]


def step(own: Planner) -> StepPlan:
    """Plan a step and let it land."""
    plan = own.plan()
    assert plan is not None
    assert not broken_rules(plan)
    words = None if plan.scores is None else np.zeros((len(plan.scores), 32), dtype=np.int32)
    own.settle(plan, np.full(len(plan.emits), 7, dtype=np.int32), words)
    return plan


def keys(own: Planner, plan: StepPlan) -> list[int]:
    return own._slots.keys[plan.slots].tolist()  # type: ignore[no-any-return]


def test_a_prompt_of_a_higher_priority_does_not_wait_for_the_rest_of_a_long_one() -> None:
    own = planner()
    own.submit(request(0, 2000))
    step(own)
    own.submit(request(1, 30, priority=5))
    own.submit(request(2, 30))
    plan = own.plan()
    assert plan is not None
    assert keys(own, plan) == [1, 0]
    assert plan.counts.tolist() == [30, 34]


def test_those_of_a_higher_priority_bring_in_no_others_that_no_step_would_read() -> None:
    own = planner(max_rows=40, num_pages=1400, token_budget=80, prefill_chunk=16)
    for key in range(100):
        own.submit(request(key, 320))
    for key in range(100, 120):
        own.submit(request(key, 8, 2, priority=1))
        step(own)
    unread = [slot for slot in np.flatnonzero(own._slots.reading) if not own._slots.next[slot]]
    assert len(unread) <= 5, "a step's worth of chunks at most"


def test_what_a_chunk_leaves_of_a_step_goes_to_other_prompts() -> None:
    own = planner(prefill_chunk=16)
    for key in range(5):
        own.submit(request(key, 200))
    plan = step(own)
    assert (keys(own, plan), plan.counts.tolist()) == ([0, 1, 2, 3], [16] * 4)


def test_who_is_admitted_has_a_row_in_that_step_though_only_so_many_scores_fit_into_one() -> None:
    own = planner(token_budget=4096, prefill_chunk=4096)
    for key in range(3):
        own.submit(request(key, 600, scores=600))
    admitted = [len(step(own).admissions) for _ in range(4)]
    assert sum(admitted) == 3
    assert max(admitted) < 3, "the second one had to wait for its row"


@pytest.mark.parametrize("way", ["serial", "strips"])
def test_decode_rows_that_sit_out_for_prompts_are_given_no_page_in_that_step(way: str) -> None:
    """A step that fails ends its own rows. Others would go on without the page that it should have told them of."""
    sat_out = 0
    for seed in range(30):
        chance = random.Random(seed)
        more: dict[str, object] = {"splitter": Always("serial")}
        if way == "strips":
            more = {"drafts": 3, "drafts_ahead": 3, "drafts_with_prompts": False, "strips": True}
        own = planner(num_pages=chance.choice([30, 60, 400]), context=400, **more)
        for key in range(24):
            own.submit(request(key, chance.randint(1, 60), chance.randint(1, 90)))
        flights: deque[StepPlan] = deque()
        while own.has_work:
            plan = own.plan()
            if plan is not None:
                assert not broken_rules(plan), (seed, broken_rules(plan))
                sat_out += not plan.num_decode and len(own._decoding) > 0
                flights.append(plan)
            if flights and (plan is None or len(flights) == 2):
                flight = flights.popleft()
                row = [7] + [-1] * (flight.width - 1)
                landed = row * flight.num_decode + [7] * (len(flight.emits) - flight.num_decode)
                own.settle(flight, np.array(landed, dtype=np.int32))
        own.check_idle()
    assert sat_out > 50


@pytest.mark.parametrize("scarce", ["slots", "pages"])
def test_while_others_wait_and_nothing_comes_free_steps_repeat(scarce: str) -> None:
    own = planner(max_rows=4) if scarce == "slots" else planner(num_pages=30)
    for key in range(4):
        own.submit(request(key, 8, 300))
    while step(own).num_decode < 4:
        pass
    own.submit(request(4, 450 if scarce == "pages" else 8))
    step(own)
    assert sum(step(own).again for _ in range(20)) >= 18
    own.end(2)
    if scarce == "slots":
        assert any(4 in keys(own, step(own)) for _ in range(3))
    own.submit(request(5, 8, priority=1))
    assert any(5 in keys(own, step(own)) for _ in range(4)), "a higher priority does not wait"


def test_one_request_with_many_stop_ids_costs_nothing_once_it_and_all_beside_it_have_ended() -> None:
    own = planner()
    own.submit(request(0, 5, 3, stop_ids=tuple(range(100, 300))))
    while own.has_work:
        step(own)
    own.submit(request(1, 5, 3, stop_ids=(1, 2)))
    step(own)
    assert own._slots.stops.shape[1] == 2
