from __future__ import annotations

from dataclasses import replace

import numpy as np

from overlap.cache.pages import Ints
from overlap.graphs.buckets import row_buckets
from overlap.graphs.policy import GIVE_UP, PATIENCE, Decision, Policy, Shape, decode_kind
from overlap.schedule.plan import Admission, StepPlan

NOTHING = Decision(None, None)
ADMISSION = Admission(slot=0, start=0, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seed=0)
FEW_ROWS = 16


def plan(rows: int, *, prompt: int = 0, sampled: int = 0, truncated: bool = False, admits: bool = False) -> StepPlan:
    """So many decode rows, and a prompt chunk if `prompt`."""

    def column(values: list[int]) -> Ints:
        return np.array(values, dtype=np.int32)

    counts = [1] * rows + [prompt] * bool(prompt)
    return StepPlan(
        number=1,
        slots=column(list(range(len(counts)))),
        counts=column(counts),
        starts=column([9] * len(counts)),
        num_decode=rows,
        prompt=column([5] * prompt),
        emits=column(list(range(rows))),
        sampled=column(list(range(sampled))),
        truncated=truncated,
        admissions=(ADMISSION,) * admits,
        page_slots=column([]),
        page_indices=column([]),
        page_ids=column([]),
        chunk_pages=column([]),
    )


def test_the_kind_of_a_decode_step_is_what_its_rows_ask_for_at_most() -> None:
    assert decode_kind(plan(3)) == "greedy"
    assert decode_kind(plan(3, sampled=1)) == "sampled"
    assert decode_kind(plan(3, sampled=2, truncated=True)) == "truncated"
    assert decode_kind(replace(plan(3, sampled=2, truncated=True), shaped=True)) == "shaped"
    assert decode_kind(replace(plan(3), logprobs=True)) is None
    assert decode_kind(plan(3, prompt=4)) is None
    assert decode_kind(plan(3, admits=True)) is None


def test_a_step_that_no_graph_holds_whole_is_counted_with_what_it_asks_for() -> None:
    held = replace(plan(3), masked=(1,), masks=(np.zeros(4, dtype=np.int32),))
    assert decode_kind(held) is None
    policy = Policy((1, 2, 4), (4,))
    for step in (held, replace(plan(3), logprobs=True), held, plan(3)):
        policy.decide(step)
    reason = "rows are held to a form (structured output)"
    assert policy.not_whole == {reason: 2, "log-probabilities are told": 1}
    assert any(f"decode steps not as one graph: 2: {reason}" in line for line in policy.explain())


def test_a_size_is_captured_at_its_second_use_and_then_replayed() -> None:
    policy = Policy((1, 2, 4), ())
    shape = Shape("greedy", 4)
    assert policy.decide(plan(3)) == NOTHING
    assert policy.decide(plan(4)) == Decision(shape, shape)
    policy.captured(shape)
    assert policy.decide(plan(3)) == Decision(None, shape)
    assert any("1: first use of its size" in line for line in policy.explain())


def test_a_larger_graph_serves_meanwhile_and_only_within_twice_the_size() -> None:
    policy = Policy((1, 2, 4, 8), ())
    large = Shape("greedy", 8)
    policy.captured(large)
    assert [policy.decide(plan(4)) for _ in range(PATIENCE - 1)] == [Decision(None, large)] * (PATIENCE - 1)
    assert policy.decide(plan(4)) == Decision(Shape("greedy", 4), Shape("greedy", 4))
    assert policy.decide(plan(2)) == NOTHING


def test_a_wide_step_of_few_rows_and_one_of_many_never_run_each_others_graph() -> None:
    """Their rows have other numbers of positions: see `schedule.plan.widths_for`."""
    policy = Policy((), (), {8: (8, FEW_ROWS), 5: (8, FEW_ROWS, 24, 32)})
    few, many = Shape("wide greedy", FEW_ROWS, 8), Shape("wide greedy", 24, 5)
    policy.captured(many)
    assert policy.decide(replace(plan(FEW_ROWS - 2), width=8)) == NOTHING
    assert policy.decide(replace(plan(FEW_ROWS + 1), width=5)) == Decision(None, many)
    policy.captured(few)
    assert policy.decide(replace(plan(FEW_ROWS - 2), width=8)) == Decision(None, few)
    assert all(FEW_ROWS in row_buckets(most) for most in (FEW_ROWS, 64, 256))


def test_a_wide_step_of_another_width_than_its_graphs_has_none_and_it_is_said() -> None:
    """No plan should be one. If it was, the graph would bring other rows' tokens."""
    policy = Policy((), (), {8: (8, FEW_ROWS)})
    for size in (8, FEW_ROWS):
        policy.captured(Shape("wide greedy", size, 8))
    assert policy.decide(replace(plan(7), width=8)) == Decision(None, Shape("wide greedy", 8, 8))
    assert policy.decide(replace(plan(7), width=5)) == NOTHING
    assert sum(policy.not_whole.values()) == 1
    assert any("another number of drafts" in line for line in policy.explain())


def test_greedy_rows_may_run_in_a_graph_that_samples_but_not_the_other_way() -> None:
    policy = Policy((1, 2), ())
    policy.captured(Shape("sampled", 2))
    assert policy.decide(plan(2)).run == Shape("sampled", 2)
    policy = Policy((1, 2), ())
    policy.captured(Shape("greedy", 2))
    assert policy.decide(plan(2, sampled=1)) == NOTHING
    policy.captured(Shape("sampled", 2))
    assert policy.decide(plan(2, sampled=1, truncated=True)) == NOTHING


def test_steps_with_prompts_run_in_pieces_by_their_tokens() -> None:
    policy = Policy((1, 2, 4), (16, 32, 100))
    shape = Shape("pieces", 32)
    assert policy.decide(plan(3, prompt=20)) == NOTHING
    assert policy.decide(plan(1, prompt=29)) == Decision(shape, shape)
    policy.captured(shape)
    assert policy.decide(plan(1, prompt=29)).run == shape
    assert policy.decide(plan(1, prompt=100)) == NOTHING
    assert policy.decide(plan(1, prompt=40)) == NOTHING
    explained = "\n".join(policy.explain())
    assert "larger than any graph" in explained
    assert "padding would be more than twice the size" in explained


def test_a_prompt_of_a_few_tokens_runs_in_the_smallest_pieces_however_much_padding_that_is() -> None:
    policy = Policy((1, 2, 4), (16, 32))
    small = Shape("pieces", 16)
    assert [policy.decide(plan(0, prompt=1)) for _ in range(2)] == [NOTHING, Decision(small, small)]
    policy.captured(small)
    assert [policy.decide(plan(rows, prompt=6)).run for rows in (0, 1)] == [small, small]


def test_decode_steps_without_graphs_of_their_own_run_in_pieces() -> None:
    policy = Policy((), (1, 2, 4))
    policy.captured(Shape("pieces", 4))
    assert policy.decide(plan(3, sampled=1)).run == Shape("pieces", 4)


def test_what_failed_stays_eager_and_after_some_failures_no_more_of_its_kind_is_tried() -> None:
    policy = Policy((1, 2, 4, 8), ())
    for size in (1, 2, 4)[:GIVE_UP]:
        assert policy.decide(plan(size)) == NOTHING
        assert policy.decide(plan(size)).capture == Shape("greedy", size)
        policy.lost(Shape("greedy", size), "OutOfMemoryError: no room")
        assert policy.decide(plan(size)) == NOTHING
    assert policy.next_idle() == Shape("sampled", 8), "another kind may fare better"
    assert [policy.decide(plan(8)) for _ in range(3)] == [NOTHING] * 3
    explained = "\n".join(policy.explain())
    assert "no graph of 2 greedy rows: OutOfMemoryError: no room" in explained
    assert "its capture failed" in explained


def test_pieces_run_a_decode_step_whose_own_graph_failed_or_is_still_to_come() -> None:
    policy = Policy((8,), (16,))
    assert [policy.decide(plan(8)).capture for _ in range(2)] == [None, Shape("greedy", 8)]
    policy.lost(Shape("greedy", 8), "no")
    assert [policy.decide(plan(8)).capture for _ in range(2)] == [None, Shape("pieces", 16)]
    policy.captured(Shape("pieces", 16))
    assert policy.decide(plan(8)).run == Shape("pieces", 16)
    assert policy.decide(plan(8, sampled=1)) == Decision(None, Shape("pieces", 16))


def test_idle_moments_capture_what_was_missed_and_then_the_largest_first() -> None:
    policy = Policy((1, 2, 4), (16, 32))
    policy.decide(plan(2))
    order = []
    while (shape := policy.next_idle()) is not None:
        policy.captured(shape)
        order.append(str(shape))
    assert order == [
        "2 greedy rows", "4 sampled rows", "2 sampled rows", "1 sampled rows", "4 greedy rows", "1 greedy rows",
        "32 tokens in pieces", "16 tokens in pieces",
    ]  # fmt: skip
    policy.decide(plan(1, sampled=1, truncated=True))
    assert policy.next_idle() == Shape("truncated", 1)


def test_a_graph_that_was_lost_is_not_chosen_again() -> None:
    policy = Policy((1, 2), ())
    policy.captured(Shape("greedy", 2))
    policy.lost(Shape("greedy", 2), "CaptureError: cuGraphLaunch")
    assert policy.decide(plan(2)) == NOTHING
