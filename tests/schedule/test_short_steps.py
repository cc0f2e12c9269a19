"""Short prompts beside decode rows that verify drafts: a step of their own, in turn with those rows."""

from __future__ import annotations

import numpy as np

from overlap.schedule.plan import REFUSED, STRIP, STRIPS, StepPlan, strips_of
from overlap.schedule.planner import Planner
from overlap.schedule.request import Request

DRAFTS = 3


def planner() -> Planner:
    return Planner(
        max_rows=40, num_pages=900, token_budget=4096, prefill_chunk=4096, context=2048, drafts=DRAFTS,
        drafts_ahead=DRAFTS, drafts_with_prompts=False, strips=True,
    )  # fmt: skip


def request(key: int, tokens: int) -> Request:
    return Request(key=key, front=0, prompt=np.arange(tokens, dtype=np.int32) + 100 * key, limit=200)


def step(own: Planner) -> StepPlan:
    """Plan a step and let it land: a token each, and no draft is right."""
    plan = own.plan()
    assert plan is not None
    row = [7, *[REFUSED] * (plan.width - 1)]
    landed = row * plan.num_decode + [7] * (len(plan.emits) - plan.num_decode)
    own.settle(plan, np.array(landed, dtype=np.int32))
    return plan


def decoding(own: Planner, rows: int) -> None:
    for key in range(rows):
        own.submit(request(key, 5))
    while step(own).num_decode < rows:
        pass


def test_a_short_prompt_is_read_alone_and_drafts_and_the_decode_rows_keep_theirs_for_the_step_behind() -> None:
    own = planner()
    decoding(own, 2)
    own.submit(request(9, 40))
    read, behind = step(own), step(own)
    assert (read.num_decode, read.counts.tolist(), read.drafts) == (0, [40], True)
    assert (behind.num_decode, behind.width) == (3, 1 + DRAFTS)


def test_prompts_that_keep_coming_and_decode_rows_take_turns() -> None:
    own = planner()
    decoding(own, 3)
    kinds = []
    for key in range(20, 30):
        own.submit(request(key, 20))
        kinds.append(step(own).num_decode > 0)
    assert kinds == [False, True] * 5


def test_no_more_prompts_are_read_at_once_than_fit_into_a_short_step() -> None:
    own = planner()
    decoding(own, 2)
    for key in range(10, 20):
        own.submit(request(key, 3 * STRIP))
    plans = [step(own) for _ in range(4)]
    assert [plan.num_decode for plan in plans] == [0, 7, 0, 12]
    assert strips_of(plans[0].counts) == strips_of(plans[2].counts) == 15 <= STRIPS[-1]


def test_a_long_prompt_runs_beside_the_decode_rows_with_all_that_wait() -> None:
    own = planner()
    decoding(own, 2)
    for key, tokens in ((10, 600), (11, 20), (12, 20)):
        own.submit(request(key, tokens))
    plan = step(own)
    assert (plan.num_decode, plan.counts[2:].tolist()) == (2, [600, 20, 20])


def test_many_prompts_that_wait_are_read_in_one_large_step() -> None:
    own = planner()
    decoding(own, 2)
    for key in range(10, 40):
        own.submit(request(key, 3 * STRIP))
    plan = step(own)
    assert (plan.num_decode, len(plan.prompt)) == (2, 30 * 3 * STRIP)


def test_what_no_graph_holds_is_no_short_step() -> None:
    own = planner()
    decoding(own, 2)
    own.submit(Request(key=9, front=0, prompt=np.arange(40, dtype=np.int32), limit=9, logprobs=True))
    read = own.plan()
    assert read is not None
    assert (read.num_decode, read.drafts) == (2, False), "beside the rows, and nothing is drafted kernel by kernel"


def test_rows_that_verify_nothing_share_a_short_step_with_prompts() -> None:
    own = planner()
    decoding(own, 2)
    own._drafting.width = lambda num_decode, budget: 1  # type: ignore[method-assign]
    own.submit(request(9, 40))
    read = step(own)
    assert (read.num_decode, read.width, read.drafts) == (2, 1, False)
