"""Pace: drafting goes on where it brings more tokens a second, and is tried again where it did not."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import numpy as np
import pytest

from overlap.schedule.pace import LEAST, PRICE, Pace
from overlap.schedule.planner import Planner
from overlap.schedule.request import Request

WIDTH = 5


def share_of_wide(pace: Pace, steps: int, rows: int, seconds: float, emitted: float) -> float:
    """Let steps run, plain ones in 1 second a step; return which share of them was wide."""
    wide = 0
    for _ in range(steps):
        if pace.choose(rows, (WIDTH,)) > 1:
            wide += 1
            pace.note_emitted(emitted)
            pace.note_time(rows, WIDTH, seconds)
        else:
            pace.note_time(rows, 1, 1.0)
    return wide / steps


class Text:
    """What rows draft well or badly, in stretches: each draft is right with a chance that changes now and then."""

    def __init__(self, seed: int, rows: int, chances: tuple[float, ...], drafts: int) -> None:
        self._random, self._chances, self._drafts = random.Random(seed), chances, drafts
        self._rows = [self._random.choice(chances) for _ in range(rows)]

    def run(self) -> float:
        """Return what a wide step brings, in tokens a row."""
        brought = 0
        for row, chance in enumerate(self._rows):
            brought += 1
            while brought and self._random.random() < chance:
                brought += 1
                if self._random.random() < 1 / self._drafts:
                    break
            if self._random.random() < 0.03:
                self._rows[row] = self._random.choice(self._chances)
        return brought / len(self._rows)


@pytest.mark.parametrize("chances", [(0.95, 0.9, 0.5), (0.9, 0.3), (0.5, 0.3), (0.2, 0.05)], ids=str)
@pytest.mark.parametrize(("rows", "cost"), [(1, 1.7), (2, 1.6), (8, 1.8), (64, 2.2)])
def test_no_luck_with_a_few_runs_makes_it_lose_to_the_better_of_the_two_ways(
    rows: int, cost: float, chances: tuple[float, ...]
) -> None:
    """Tokens a second over all of 3,000 steps, beside the same text with drafts in each step and in none."""
    found, always = [], []
    for seed in range(8):
        pace, noise = Pace(), random.Random(seed)
        text, same = Text(seed, rows, chances, 6), Text(seed, rows, chances, 6)
        tokens, seconds, behind = 0.0, 0.0, False
        for _ in range(3000):
            took = noise.uniform(0.95, 1.15)
            wide = pace.choose(rows, (WIDTH,)) > 1
            if wide and behind:  # a step behind a plain one has no drafts to verify
                brought = text.run()
                pace.note_emitted(brought)
            else:
                brought = 1.0
            took *= cost if wide else 1.0
            pace.note_time(rows, WIDTH if wide else 1, took)
            tokens, seconds, behind = tokens + brought, seconds + took, wide
        found.append(tokens / seconds)
        always.append(sum(same.run() for _ in range(3000)) / (3000 * 1.05 * cost))
    best = max(sum(always) / 8, 1 / 1.05)
    assert sum(found) / 8 > 0.97 * best


@pytest.mark.parametrize(("seconds", "emitted", "pays"), [(1.2, 2.5, True), (3.0, 2.5, False), (1.1, 1.0, False)])
def test_whatever_brings_more_tokens_a_second_goes_on(seconds: float, emitted: float, pays: bool) -> None:
    pace = Pace()
    share_of_wide(pace, 400, 8, seconds, emitted)
    share = share_of_wide(pace, 4000, 8, seconds, emitted)
    assert (share > 0.5) == pays
    lost = 1 - min(emitted / seconds, seconds / emitted)
    assert 0 < (1 - share if pays else share) * lost <= PRICE, "the other way is tried, and that costs little"


def test_other_numbers_of_rows_are_judged_by_what_their_own_steps_take_and_a_change_is_noticed() -> None:
    pace = Pace()
    share_of_wide(pace, 100, 2, 1.1, 3.0)
    share_of_wide(pace, 100, 64, 4.0, 3.0)
    assert share_of_wide(pace, 100, 2, 1.1, 3.0) > 0.9
    assert share_of_wide(pace, 100, 64, 4.0, 3.0) < 0.1
    share_of_wide(pace, 5000, 64, 1.1, 3.0)  # wide steps have become cheap
    assert share_of_wide(pace, 100, 64, 1.1, 3.0) > 0.8
    brings, few, many = pace.explain()
    assert brings == "speculation: a row and step of 4 drafts brings 3.00 tokens"
    told = "speculation: 4 drafts for up to 2 rows, where a step takes 1.10 with 4 drafts times as long as one without"
    assert few == told
    assert "4 drafts for up to 64 rows" in many


def test_what_drafts_bring_at_one_number_of_rows_is_known_at_another() -> None:
    pace = Pace()
    share_of_wide(pace, 50, 1, 1.5, 1.1)  # a hard text: off
    share_of_wide(pace, 50, 8, 1.5, 1.1)
    assert share_of_wide(pace, 30, 1, 1.5, 1.1) == 0.0
    share_of_wide(pace, 5000, 8, 1.5, 4.0)  # an easy one, at other rows
    assert share_of_wide(pace, 30, 1, 1.5, 4.0) > 0.8


def test_a_few_slow_steps_without_their_graphs_do_not_decide() -> None:
    pace = Pace()
    for width, seconds in ((WIDTH, (9.0, 50.0, 1.2, 1.2, 1.2, 1.2)), (1, (9.0, 1.0, 1.0, 1.0, 1.0, 1.0))):
        for one in seconds:
            assert pace.choose(4, (WIDTH,)) == width
            if width > 1:
                pace.note_emitted(2.5)
            pace.note_time(4, width, one)
    assert pace.choose(4, (WIDTH,)) == WIDTH


def test_a_trial_that_is_lost_again_and_again_becomes_rare() -> None:
    pace = Pace()
    wide = [step for step in range(8000) if share_of_wide(pace, 1, 8, 2.0, 1.2)]
    gaps = [after - before for before, after in itertools.pairwise(wide) if after > before + LEAST]
    assert min(gaps[1:]) > 1.9 * gaps[0], "it waits twice as long for the second"


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


@pytest.mark.parametrize("chance", [0.3, 0.55, 0.7, 0.82, 0.93])
def test_of_several_numbers_of_drafts_the_one_that_brings_the_most_goes_on(chance: float) -> None:
    """What it takes at one row is as on an H200. The chance of the later drafts differs from the first ones'."""
    costs, draw = {1: 1.0, 4: 1.62, 8: 2.0, 16: 2.42}, random.Random(1)

    def run(width: int) -> int:
        brought = 1
        while brought < width and draw.random() < chance + 0.02 * (brought > 2):
            brought += 1
        return brought

    rates = {width: sum(run(width) for _ in range(4000)) / 4000 / cost for width, cost in costs.items()}
    pace, tokens, seconds, chosen = Pace(), 0.0, 0.0, Counter[int]()
    for step in range(6000):
        width = pace.choose(1, (16, 8, 4))
        brought = run(width)
        if width > 1:
            pace.note_emitted(brought, float(brought == width))
        took = costs[width] * draw.uniform(0.95, 1.1)
        pace.note_time(1, width, took)
        if step > 500:
            tokens, seconds = tokens + brought, seconds + took
            chosen[width] += 1
    assert tokens / seconds / max(rates.values()) * 1.025 > 0.965, (rates, chosen)


def test_a_text_that_gets_easier_gets_more_drafts_and_fewer_when_it_gets_harder_again() -> None:
    pace, costs, found = Pace(), {1: 1.0, 4: 1.62, 8: 2.0, 16: 2.42}, list[int]()
    for chance in (0.3, 0.95, 0.3):
        chosen, draw = Counter[int](), random.Random(3)
        for step in range(5000):
            width = pace.choose(1, (16, 8, 4))
            brought = 1
            while brought < width and draw.random() < chance:
                brought += 1
            if width > 1:
                pace.note_emitted(brought, float(brought == width))
            pace.note_time(1, width, costs[width])
            chosen[width] += step > 4500
        found.append(chosen.most_common(1)[0][0])
    assert found == [1, 16, 1]


def test_it_explains_itself_while_a_width_has_not_been_measured_yet() -> None:
    pace = Pace()
    share_of_wide(pace, 40, 8, 1.2, 2.5)
    assert pace.choose(5, (9, WIDTH)) == 9
    assert any("drafts for up to 8 rows" in line for line in pace.explain())
