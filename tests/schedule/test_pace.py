"""Pace: drafting goes on where it brings more tokens a second, and is tried again where it did not."""

from __future__ import annotations

import numpy as np
import pytest

from overlap.schedule.pace import EVERY, TRIAL, Pace
from overlap.schedule.planner import Planner
from overlap.schedule.request import Request


def share_of_wide(pace: Pace, steps: int, rows: int, seconds: float, emitted: float) -> float:
    """Let steps run, plain ones in 1 second a step; return which share of them was wide."""
    wide = 0
    for _ in range(steps):
        if pace.choose(rows):
            wide += 1
            pace.note_emitted(emitted)
            pace.note_time(rows, 5, seconds)
        else:
            pace.note_time(rows, 1, 1.0)
    return wide / steps


@pytest.mark.parametrize(("seconds", "emitted", "pays"), [(1.2, 2.5, True), (3.0, 2.5, False), (1.01, 1.0, False)])
def test_whatever_brings_more_tokens_a_second_goes_on(seconds: float, emitted: float, pays: bool) -> None:
    pace = Pace()
    share_of_wide(pace, 50, 8, seconds, emitted)
    share = share_of_wide(pace, 4 * EVERY, 8, seconds, emitted)
    trials = TRIAL / EVERY
    assert share == pytest.approx(1 - trials if pays else trials, abs=trials)


def test_other_numbers_of_rows_are_judged_by_their_own_steps_and_a_change_is_noticed() -> None:
    pace = Pace()
    share_of_wide(pace, 100, 2, 1.1, 3.0)
    share_of_wide(pace, 100, 64, 4.0, 3.0)
    assert share_of_wide(pace, 100, 2, 1.1, 3.0) > 0.9
    assert share_of_wide(pace, 100, 64, 4.0, 3.0) < 0.1
    share_of_wide(pace, 20 * EVERY, 64, 1.1, 3.0)  # the text has become easy
    assert share_of_wide(pace, 100, 64, 1.1, 3.0) > 0.8
    assert "up to 2 rows it brings 3.00 tokens a row and step, and 2.73 times" in pace.explain()[0]


def test_a_few_slow_steps_without_their_graphs_do_not_decide() -> None:
    pace = Pace()
    for width, seconds in ((5, (9.0, 50.0, 1.2, 1.2, 1.2, 1.2)), (1, (9.0, 1.0, 1.0, 1.0, 1.0, 1.0))):
        for one in seconds:
            assert pace.choose(4) == (width > 1)
            pace.note_emitted(2.5)
            pace.note_time(4, width, one)
    assert pace.choose(4)


def test_a_trial_that_is_lost_again_and_again_becomes_rare() -> None:
    pace = Pace()
    share_of_wide(pace, 100, 8, 2.0, 1.2)
    assert share_of_wide(pace, 40 * EVERY, 8, 2.0, 1.2) < 8 * TRIAL / (40 * EVERY)


def test_what_the_device_waited_for_a_step_counts_to_what_it_took() -> None:
    noted: list[tuple[int, int, float]] = []

    class Watched(Pace):
        def note_time(self, num_rows: int, width: int, seconds: float) -> None:
            noted.append((num_rows, width, seconds))

    planner = Planner(
        max_rows=4, num_pages=32, token_budget=64, prefill_chunk=64, context=256, drafts=2, drafts_ahead=1,
        pace=Watched(),
    )  # fmt: skip
    planner.submit(Request(key=1, front=0, prompt=np.full(5, 7, dtype=np.int32), limit=20))
    prompt = planner.plan()
    assert prompt is not None
    planner.settle(prompt, np.array([9], dtype=np.int32))
    step = planner.plan()
    assert step is not None
    planner.note_time(step, 0.5, 0.25)
    assert noted == [(1, step.width, 0.75)]
