"""Runs of several tokens a row: where they are cut, and a planner that hears only later how many came.

The planner is driven by a device that keeps what stands at each position of each page. So a page that is given to
another too early, shared too early, or missing where a draft is written shows as a wrong token, whatever caused it.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field

import numpy as np
import pytest

from overlap.cache.pages import PAGE, Ints
from overlap.errors import InternalError
from overlap.schedule.plan import REFUSED, UNUSED, StepPlan, broken_rules
from overlap.schedule.planner import Planner
from overlap.schedule.request import Request
from overlap.schedule.runs import count_drafts, cut_runs, runs_of

JUNK = -7


def slow_cut(run: list[int], stops: list[int], left: int) -> tuple[int, int, bool]:
    tokens = [token for token in run if token >= 0]
    for number, token in enumerate(tokens[:left], start=1):
        if token in stops:
            return len(tokens), number, True
    return len(tokens), min(left, len(tokens)), False


def test_a_run_is_cut_behind_its_first_stop_id_and_at_the_limit() -> None:
    draw = random.Random(0)
    for _ in range(300):
        rows, width = draw.randrange(1, 6), draw.randrange(2, 6)
        runs, stops, left = [], [], []
        for _ in range(rows):
            emitted, drafts = draw.randrange(1, width + 1), draw.randrange(width)
            rest = [REFUSED if place <= drafts else UNUSED for place in range(emitted, width)]
            runs.append([draw.randrange(5) for _ in range(emitted)] + rest)
            stops.append([draw.randrange(-1, 5) for _ in range(2)])
            left.append(draw.randrange(1, 7))
        cut = cut_runs(*(np.array(column, dtype=np.int32) for column in (runs, stops, left)))
        found = list(zip(cut.emitted.tolist(), cut.kept.tolist(), cut.stopped.tolist(), strict=True))
        assert found == [slow_cut(*row) for row in zip(runs, stops, left, strict=True)]


def test_drafts_are_counted_by_what_lands() -> None:
    runs = np.array([[5, 6, REFUSED, UNUSED], [7, UNUSED, UNUSED, UNUSED], [1, 2, 3, 4]], dtype=np.int32)
    counts = count_drafts(runs)
    assert counts.drafted == 2 + 0 + 3
    assert counts.tried_at.tolist() == [2, 2, 1]
    assert counts.accepted_at.tolist() == [2, 1, 1]


@dataclass
class Device:
    """What a step does to memory and to the slots' rows, in plain lists. Answers are a function of (key, position)."""

    vocabulary: int
    ahead: int
    widest: int
    draw: random.Random
    pages: dict[int, list[int]] = field(default_factory=dict)
    """What stands at each position of a page."""
    tables: dict[int, dict[int, int]] = field(default_factory=dict)
    lengths: dict[int, int] = field(default_factory=dict)
    keys: dict[int, int] = field(default_factory=dict)
    context: int = 0

    def token(self, key: int, position: int) -> int:
        return random.Random(key * 7919 + position).randrange(self.vocabulary)

    def write(self, slot: int, position: int, token: int) -> None:
        if position < self.context:
            page = self.tables[slot][position // PAGE]  # a KeyError: a position that nothing was reserved for
            self.pages.setdefault(page, [JUNK] * PAGE)[position % PAGE] = token

    def run(self, plan: StepPlan, planner: Planner, prompts: dict[int, list[int]]) -> Ints:
        for admission in plan.admissions:
            self.tables[admission.slot] = {}
            self.lengths[admission.slot] = admission.start
        for slot, index, page in zip(plan.page_slots, plan.page_indices, plan.page_ids, strict=True):
            self.tables[int(slot)][int(index)] = int(page)
        landed: list[int] = []
        prompt = plan.prompt.tolist()
        for row, slot in enumerate(plan.slots.tolist()):
            key = self.keys[slot]
            text, start, count = prompts[key], self.lengths[slot], int(plan.counts[row])
            if row < plan.num_decode:
                landed += self.decode(plan, row, slot, key, text)
                continue
            assert start == plan.starts[row]
            chunk, prompt = prompt[:count], prompt[count:]
            for place, token in enumerate(chunk):
                self.write(slot, start + place, token)
            self.check(slot, start + count, text, key)
            self.lengths[slot] = start + count
            end = start + count
            assert plan.behind is not None
            assert plan.behind[row - plan.num_decode] == (self.known(key, text, end) if row not in plan.emits else -1)
            if row in plan.emits:
                landed.append(self.known(key, text, end))
            for place in range(self.ahead):
                self.write(slot, end + place, JUNK)
        return np.array(landed, dtype=np.int32)

    def decode(self, plan: StepPlan, row: int, slot: int, key: int, text: list[int]) -> list[int]:
        start = self.lengths[slot]
        assert 0 <= plan.starts[row] - start < self.widest  # only what one flight may not have brought
        drafts = self.draw.randrange(plan.width)
        right = self.draw.randrange(drafts + 1)
        for place in range(plan.width):
            self.write(slot, start + place, self.known(key, text, start + place) if place <= right else JUNK)
        self.check(slot, min(start + 1, self.context), text, key)
        self.lengths[slot] = start + right + 1
        for place in range(self.ahead):
            self.write(slot, start + right + 1 + place, JUNK)
        tokens = [self.known(key, text, start + place + 1) for place in range(right + 1)]
        return tokens + [REFUSED if place <= drafts else UNUSED for place in range(right + 1, plan.width)]

    def known(self, key: int, text: list[int], position: int) -> int:
        return text[position] if position < len(text) else self.token(key, position)

    def check(self, slot: int, end: int, text: list[int], key: int) -> None:
        for position in range(end):
            page = self.tables[slot][position // PAGE]
            assert self.pages[page][position % PAGE] == self.known(key, text, position), (key, position)


@pytest.mark.parametrize("seed", range(12))
def test_a_planner_that_hears_late_how_many_came_reserves_shares_and_frees_rightly(seed: int) -> None:
    draw = random.Random(seed)
    drafts = draw.randrange(1, 8)
    ahead = draw.choice([0, drafts])
    num_pages = draw.choice([12, 24, 60])
    planner = Planner(
        max_rows=draw.choice([1, 3, 6]), num_pages=num_pages, token_budget=draw.choice([24, 64]),
        prefill_chunk=draw.choice([7, 64]), context=draw.choice([150, 160]), drafts=drafts, drafts_ahead=ahead,
        prefix_cache=seed % 4 != 3,
    )  # fmt: skip
    device = Device(vocabulary=40, ahead=ahead, widest=drafts + 1, draw=draw, context=planner.context)
    stem = [draw.randrange(40) for _ in range(40)]
    prompts: dict[int, list[int]] = {}
    limits: dict[int, int] = {}
    stops: dict[int, tuple[int, ...]] = {}
    got: dict[int, list[int]] = {}
    ended: dict[int, str] = {}
    aborted: set[int] = set()
    flights: deque[tuple[StepPlan, Ints]] = deque()
    waiting = list(range(40))
    for _ in range(3000):
        if waiting and draw.random() < 0.2:
            key = waiting.pop(0)
            prompts[key] = stem[: draw.randrange(40)] + [draw.randrange(40) for _ in range(draw.randrange(1, 20))]
            most = planner.context - len(prompts[key])
            limits[key] = draw.choice([1, draw.randrange(1, 60), most]) if most < 60 else draw.randrange(1, most + 1)
            stops[key] = tuple(draw.sample(range(40), draw.randrange(2)))
            got[key] = []
            planner.submit(
                Request(
                    key=key, front=0, prompt=np.array(prompts[key], dtype=np.int32), limit=limits[key],
                    stop_ids=stops[key], priority=draw.randrange(2),
                )
            )  # fmt: skip
        if draw.random() < 0.01 and (running := [key for key in got if key not in ended and key not in aborted]):
            key = draw.choice(running)
            planner.end(key)
            aborted.add(key)
        if len(flights) < 2 and planner.has_work and (plan := planner.plan()) is not None:
            assert not broken_rules(plan)
            for slot in plan.slots.tolist():
                owner = planner._slots.owners[slot]
                assert owner is not None
                device.keys[slot] = owner.key
            for slot in plan.slots[: plan.num_decode].tolist():  # none whose answer surely ends in the air
                in_air = sum(slot in flight.slots[flight.emits] for flight, _ in flights)
                assert len(got[device.keys[slot]]) + in_air < limits[device.keys[slot]]
            flights.append((plan, device.run(plan, planner, prompts)))
            planner.check()
        elif flights:
            plan, landed = flights.popleft()
            assert len(landed) == plan.num_landing
            settled = planner.settle(plan, landed)
            for key, token in zip(settled.keys.tolist(), settled.tokens.tolist(), strict=True):
                assert key not in {*ended, *aborted}
                got[key].append(token)
            for end in settled.ends:
                ended[end.key] = end.reason
            planner.check()
        elif not planner.has_work and not waiting:
            break
    planner.check_idle()
    for key, answer in got.items():
        length = len(prompts[key])
        want = [device.token(key, length + place) for place in range(limits[key])]
        cut = next((place + 1 for place, token in enumerate(want) if token in stops[key]), len(want))
        assert answer == want[: len(answer) if key in aborted else cut]
        assert key in aborted or ended[key] == ("stop" if want[cut - 1] in stops[key] else "length")
    figures = planner.statistics()
    assert figures.drafted_tokens > figures.accepted_tokens > 0


def test_more_drafts_than_a_page_holds_are_refused() -> None:
    with pytest.raises(InternalError, match="would outgrow a page"):
        Planner(max_rows=1, num_pages=4, token_budget=64, prefill_chunk=64, context=64, drafts=PAGE)


def test_runs_lie_in_front_of_the_chunks_first_tokens() -> None:
    planner = Planner(max_rows=2, num_pages=20, token_budget=64, prefill_chunk=64, context=64, drafts=2)
    planner.submit(Request(key=1, front=0, prompt=np.array([1, 2], dtype=np.int32), limit=9))
    first = planner.plan()
    assert first is not None
    assert (first.width, first.num_landing) == (1, 1)
    planner.submit(Request(key=2, front=0, prompt=np.array([3], dtype=np.int32), limit=9))
    second = planner.plan()
    assert second is not None
    assert (second.width, second.num_landing, second.num_tokens) == (3, 4, 4)
    runs, firsts = runs_of(second, np.array([5, 6, REFUSED, 8], dtype=np.int32))
    assert runs.tolist() == [[5, 6, REFUSED], [8, UNUSED, UNUSED]]
    assert firsts.tolist() == [0, 3]
