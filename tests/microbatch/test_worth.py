"""What decode steps beside prompts are worth, against counting and trying."""

from __future__ import annotations

import random
from itertools import product

import pytest

from overlap.microbatch.cost import CostModel, Kind, Nominal
from overlap.microbatch.worth import _price_s, work_of
from overlap.schedule.split import Outlook, Route

NOMINAL = Nominal(weights_s=1e-3, kv_token_s=1e-8, token_s=1e-6, step_s=1e-4)
BUDGET, ROWS, CONTEXT = 2048, 64, 64 * 800
ROUTES: tuple[Route, ...] = (("mixed", 0), ("lanes", 0), ("lanes", 24), ("lanes", 56), ("serial", 0))


def measured(draw: random.Random) -> tuple[CostModel, float, list[tuple[float, float]]]:
    """Return a cost model, what a decode step takes alone, and for each way the steps that pass and the seconds."""
    cost, alone_s = CostModel(NOMINAL), draw.uniform(1e-3, 4e-3)

    def note(kind: Kind, rows: int, context: int, tokens: int, seconds: float, share: int = 0) -> None:
        for _ in range(3):
            cost.note(kind, rows, context, tokens, seconds, share, 0.0)

    note("decode", ROWS, CONTEXT, 0, alone_s)
    prompt_s, room = draw.uniform(5e-3, 2e-2), BUDGET - ROWS
    note("prefill", 0, 0, BUDGET, prompt_s)
    mixed_s = (prompt_s + alone_s) * draw.uniform(0.85, 1.1)
    note("mixed", ROWS, CONTEXT, room, mixed_s)
    ways = [(1.0, prompt_s + alone_s), (BUDGET / room, BUDGET / room * mixed_s)]
    for share in (0, 24, 56):
        beside_s, decode_s = prompt_s * draw.uniform(1.1, 2.5), alone_s * draw.uniform(1.05, 3)
        note("prefill beside", ROWS, CONTEXT, BUDGET, beside_s, share)
        note("decode beside", ROWS, CONTEXT, BUDGET, decode_s, share)
        ways.append((beside_s / decode_s, beside_s))
    return cost, alone_s, ways


def least_s(ways: list[tuple[float, float]], alone_s: float, steps: float) -> float:
    """Return the least time in which a chunk is read and so many steps pass, of all mixes of two ways."""
    found = []
    for (one, one_s), (two, two_s), part in product(ways, ways, [number / 400 for number in range(401)]):
        passed, seconds = part * one + (1 - part) * two, part * one_s + (1 - part) * two_s
        found.append(seconds + max(0.0, steps - passed) * alone_s)
    return min(found)


@pytest.mark.parametrize("seed", range(20))
def test_the_price_of_a_step_is_what_one_more_adds_in_the_best_mix_of_ways(seed: int) -> None:
    draw = random.Random(seed)
    cost, alone_s, ways = measured(draw)
    for steps in (1.5, 3.0, 6.0, 40.0):
        price_s = _price_s(cost, ROUTES, BUDGET, ROWS, CONTEXT, steps)
        assert 0 <= price_s <= alone_s * 1.000001
        width = 0.5
        more_s, less_s = least_s(ways, alone_s, steps + width), least_s(ways, alone_s, steps - width)
        around = [least_s(ways, alone_s, at + width) - least_s(ways, alone_s, at) for at in (steps - width, steps)]
        slopes = [min(around) / width, max(around) / width, (more_s - less_s) / (2 * width)]
        assert min(slopes) - 0.1 * alone_s <= price_s <= max(slopes) + 0.1 * alone_s, (steps, price_s, slopes, ways)
    assert _price_s(cost, ROUTES, BUDGET, ROWS, CONTEXT, 0.5) == 0, "fewer than pass in any way"


@pytest.mark.parametrize("seed", range(6))
def test_steps_count_as_many_as_there_are_rows_for_until_all_prompts_are_read(seed: int) -> None:
    """Against counting each row's steps: running answers have some way to go, the others begin one after the other."""
    draw = random.Random(seed)
    cost, _, _ = measured(draw)
    answer, prompts, prompt = draw.choice((20, 100, 400)), draw.choice((8, 60)), 512
    lefts = [draw.uniform(0, answer) for _ in range(ROWS)]
    tokens, owed = prompts * prompt, sum(lefts) + prompts * answer
    work = work_of(
        Outlook(
            ROWS, CONTEXT, tokens, False, owed=owed / tokens, left=sum(lefts) / ROWS, answer=answer, ready_tokens=prompt
        ),
        ROWS, cost, ROUTES, BUDGET,
    )  # fmt: skip
    for each in (1, 4, 16):  # steps while one prompt is read
        passed = each * prompts
        began = [passed * (number + 0.5) / prompts for number in range(prompts)]
        done = sum(min(left, passed) for left in lefts) + sum(min(answer, passed - begin) for begin in began)
        expected = min(float(each), done / ROWS / prompts)
        assert work._with_all_rows(float(each), prompt) == pytest.approx(expected, rel=0.15, abs=0.05)
    endless = work_of(Outlook(ROWS, CONTEXT, tokens, False), ROWS, cost, ROUTES, BUDGET)
    assert endless._with_all_rows(16.0, prompt) == 16.0
