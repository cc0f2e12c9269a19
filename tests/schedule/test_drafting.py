"""How wide steps with a drafter are, and what is counted of their drafts."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

from overlap.errors import InternalError
from overlap.schedule.drafting import MOST_LATE, Drafting
from overlap.schedule.pace import Pace
from overlap.schedule.plan import REFUSED, UNUSED


def test_without_a_drafter_steps_are_plain_and_a_row_needs_its_token_and_the_next() -> None:
    drafting = Drafting(0, 0, None)
    assert not drafting
    assert drafting.width(7, 100) == 1
    assert drafting.needed(np.array([5, 99], np.int32), 100).tolist() == [7, 101]


def test_a_step_is_wide_while_all_its_positions_fit_into_the_budget() -> None:
    drafting = Drafting(3, 0, None)
    assert drafting.width(0, 100) == 1
    assert [drafting.width(rows, 21) for rows in (1, 5, 6)] == [4, 4, 1], "24 of 21 tokens do not fit"


def test_a_step_with_prompts_is_wide_where_it_drafts_or_has_drafts_to_verify() -> None:
    drafting = Drafting(3, 3, None)
    assert drafting.drafts(1, 1, 0, 1), "a prompt alone has no rows that could be wide"
    assert not drafting.drafts(2, 1, 2, 1)
    assert drafting.beside_prompts(4) == 4
    quiet = Drafting(3, 3, None, with_prompts=False)
    assert not quiet.drafts(1, 1, 0, 1)
    assert quiet.beside_prompts(4) == 1, "nothing was drafted in the step before"
    assert quiet.drafts(2, 4, 2)
    assert quiet.beside_prompts(4) == 4
    assert not quiet.drafts(3, 4, 2, 1)
    assert quiet.beside_prompts(4) == 1
    assert not Drafting(0, 0, None).drafts(1, 1, 0, 1)


def test_the_pace_hears_what_a_step_brings_that_has_no_drafts_since_prompts_came_in_between() -> None:
    for with_prompts, heard in ((False, [1.0, None]), (True, [None, None])):
        pace = Pace()
        told: list[float | None] = []

        def note_emitted(tokens: float | None, full: float | None = None, told: list[Any] = told) -> None:
            told.append(tokens)

        pace.note_emitted = note_emitted  # type: ignore[method-assign]
        drafting = Drafting(3, 3, pace, with_prompts=with_prompts)
        drafting.drafts(1, 1, 2, 1)
        drafting.drafts(2, 4, 2)
        drafting.drafts(3, 1, 2)
        drafting.drafts(4, 4, 2)  # behind a plain step: going to and fro is no fault of a wide step's
        for number in (2, 4):
            drafting.note_runs(np.array([[8, UNUSED, UNUSED, UNUSED]] * 2), 2, number)
        assert told == heard


def test_a_row_may_write_to_all_drafts_and_to_what_the_drafter_reads_ahead_but_not_past_the_context() -> None:
    starts = np.array([10, 97], np.int32)
    assert Drafting(3, 0, None).needed(starts, 100).tolist() == [15, 100]
    assert Drafting(3, 3, None).needed(starts, 100).tolist() == [17, 100]


def test_drafts_are_counted_by_their_place_in_a_run() -> None:
    drafting, noted = Drafting(3, 0, None), 0
    runs = [[8, 9, REFUSED, UNUSED], [8, 9, 7, 6], [8, REFUSED, REFUSED, UNUSED], [8, UNUSED, UNUSED, UNUSED]]
    for times in (1, 2, 2 + MOST_LATE, 5 + 2 * MOST_LATE):  # counted when many have gathered, or somebody asks
        while noted < times:
            drafting.note_runs(np.array(runs), 8)
            noted += 1
        counts = drafting.counts()
        assert counts.drafted == (2 + 3 + 2) * times
        assert counts.tried_at.tolist() == [3 * times, 2 * times, times]
        assert counts.accepted_at.tolist() == [2 * times, times, times]


@pytest.mark.parametrize("ahead", [0, 3])
def test_the_pace_hears_of_runs_with_drafts_and_of_those_without_only_from_a_drafter_that_makes_none_ahead(
    ahead: int,
) -> None:
    pace = Pace()
    heard: list[float | None] = []

    def note_emitted(tokens: float | None, full: float | None = None) -> None:
        heard.append(tokens)

    pace.note_emitted = note_emitted  # type: ignore[method-assign]
    drafting = Drafting(3, ahead, pace)
    assert drafting.paced
    drafting.note_runs(np.array([[8, UNUSED, UNUSED, UNUSED]] * 2), 2)
    drafting.note_runs(np.array([[8, 9, 7, REFUSED], [8, REFUSED, UNUSED, UNUSED]]), 4)
    drafting.note_runs(np.empty((0, 4), np.int32), 0)
    assert heard == [None if ahead else 1.0, 2.0]


@pytest.mark.parametrize(("drafts", "ahead"), [(16, 0), (-1, 0), (3, 4)])
def test_a_row_that_would_outgrow_a_page_in_one_step_is_refused(drafts: int, ahead: int) -> None:
    with pytest.raises(InternalError, match="outgrow a page"):
        Drafting(drafts, ahead, None)


def test_drafts_of_steps_that_verify_fewer_are_counted_at_their_places() -> None:
    drafting = Drafting(3, 0, None, ((1, 3), (16, 2), (99, 1)))
    assert [drafting.width(rows, 999) for rows in (1, 2, 16, 17, 200)] == [4, 3, 3, 2, 2]
    for _ in range(3):
        drafting.note_runs(np.array([[8, 9, 7, REFUSED]]), 3)
        drafting.note_runs(np.array([[8, 9], [8, REFUSED]]), 3)
    counts = drafting.counts()
    assert counts.drafted == 3 * (3 + 2)
    assert counts.tried_at.tolist() == [9, 3, 3]
    assert counts.accepted_at.tolist() == [6, 3, 0]


def test_whoever_asks_for_counts_meanwhile_changes_none() -> None:
    drafting, stop = Drafting(7, 7, None, ((16, 7), (99, 4))), threading.Event()

    def ask() -> None:
        while not stop.is_set():
            drafting.counts()

    reader = threading.Thread(target=ask)
    reader.start()
    runs, noted = [np.full((4, width), 5, np.int32) for width in (8, 5)], 0
    for step in range(20_000):
        some = runs[step // 50 % 2]
        drafting.note_runs(some, some.size)
        noted += 4 * (some.shape[1] - 1)
    stop.set()
    reader.join()
    assert drafting.counts().drafted == noted
