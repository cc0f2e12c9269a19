"""The planner against an oracle that works each step out again from plain lists, under random loads.

The oracle keeps no counters that could run out of step: which pages and slots are free, who decodes and who waits
follow from the list of requests and of fences each time they are asked for. Its rules are the planner's, in words:

- Rows that decode come first, in the order in which their prompts were through. Each takes one token of the budget.
- A row needs room for this token and for the one that it emits. A row that finds no page stalls; when nothing waits
  behind a fence either, the youngest request of the lowest priority that runs is preempted first.
- Requests are admitted while a slot is free, the step has budget left, and there are pages for the prompt, one token
  more, and one page for each request that runs: of the highest priority those whose fairness key has had least, of
  those the oldest.
- Whoever is next and found no slot or no pages at the last plan has the youngest of the lowest priority preempted, if
  that is lower than its own and nothing waits behind a fence.
- A key has had the pages that its requests took when they were admitted, and while there are several keys those that
  they grew by. One that was away starts no lower than the key served last stood.
- Prompt chunks share the rest of the budget in order of admission.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from dataclasses import dataclass, field

import numpy as np
import pytest

from overlap.cache.pages import PAGE, Ints
from overlap.schedule.life import Life
from overlap.schedule.plan import StepPlan, broken_rules
from overlap.schedule.planner import Planner
from overlap.schedule.request import Request

VOCABULARY = 50


@dataclass(eq=False)
class Stay:
    """One stay of a request in a slot, from its admission to its end or preemption."""

    prompt: list[int]
    pages: int
    chunked: int = 0
    planned: int = 0
    """New tokens that were planned in this stay."""
    number: int = 0
    """Which admission this was."""
    turn: int = 0
    """Which prompt to be through this one was, counted over all stays."""

    @property
    def prefilling(self) -> bool:
        return self.chunked < len(self.prompt)

    @property
    def next(self) -> int:
        return len(self.prompt) + self.planned - 1


@dataclass(eq=False)
class Answer:
    """A request, as the oracle sees it."""

    key: int
    prompt: list[int]
    limit: int
    stop_ids: tuple[int, ...]
    temperature: float
    top_k: int
    priority: int
    fairness_key: str
    tokens: list[int] = field(default_factory=list)
    """What was settled."""
    before: int = 0
    """How many of `tokens` were settled before this stay."""
    stay: Stay | None = None


@dataclass
class Step:
    """A step in plain values, with keys where a plan has slots."""

    number: int
    rows: list[tuple[int, int, int]]
    """(key, start, count)"""
    num_decode: int
    emits: list[int]
    sampled: list[int]
    truncated: bool
    prompt: list[int]
    admissions: list[tuple[int, int, float, int]]
    """(key, start, temperature, top_k)"""


@dataclass
class Oracle:
    """Plans and settles as the planner should, with no regard to speed."""

    max_rows: int
    num_pages: int
    token_budget: int
    prefill_chunk: int
    answers: list[Answer] = field(default_factory=list)
    """Those that have not ended, in order of arrival."""
    fences: list[tuple[int, int]] = field(default_factory=list)
    """(step, pages) of each slot that was given up."""
    flights: deque[list[tuple[Answer, Stay]]] = field(default_factory=deque)
    """Who emits in each step that was planned and not settled."""
    planned: int = 0
    settled: int = 0
    turns: int = 0
    admitted: int = 0
    had: Counter[str] = field(default_factory=Counter)
    served_last: int = 0
    pressing: Answer | None = None
    """Who found no room at the last plan."""
    seen: Counter[str] = field(default_factory=Counter)

    def running(self) -> list[tuple[Answer, Stay]]:
        return [(answer, answer.stay) for answer in self.answers if answer.stay is not None]

    def fenced(self) -> list[int]:
        return [pages for step, pages in self.fences if step > self.settled]

    def free_pages(self) -> int:
        return self.num_pages - sum(stay.pages for _, stay in self.running()) - sum(self.fenced())

    def free_slots(self) -> int:
        return self.max_rows - len(self.running()) - len(self.fenced())

    def join(self, answer: Answer) -> None:
        key = answer.fairness_key
        if key not in {other.fairness_key for other in self.answers}:
            self.had[key] = max(self.had[key], self.served_last)
        self.answers.append(answer)

    def leave(self, answer: Answer) -> None:
        if answer.stay is not None:
            self.fences.append((self.planned, answer.stay.pages))
            answer.stay = None

    def end(self, key: int) -> bool:
        ending = [answer for answer in self.answers if answer.key == key]
        for answer in ending:
            self.seen["ended while draining is due" if answer.stay and self.flights else "ended"] += 1
            self.leave(answer)
            self.answers.remove(answer)
        if not self.answers:
            self.had.clear()
            self.served_last = 0
        return bool(ending)

    def last_in_rank(self) -> Answer:
        return min((answer for answer, _ in self.running()), key=lambda answer: (answer.priority, -answer.key))

    def preempt(self, answer: Answer) -> None:
        answer.before = len(answer.tokens)
        self.leave(answer)
        self.seen["preempted"] += 1

    def preempt_for_pressing(self) -> None:
        pressing, self.pressing = self.pressing, None
        waits = pressing in self.answers and pressing is not None and pressing.stay is None
        if pressing is not None and waits and self.running() and not self.fenced():
            last = self.last_in_rank()
            if last.priority < pressing.priority:
                self.seen["pressed"] += 1
                self.preempt(last)

    def decoding(self) -> list[tuple[Answer, Stay]]:
        through = [(answer, stay) for answer, stay in self.running() if not stay.prefilling]
        going_on = [(a, stay) for a, stay in through if stay.planned < a.limit - a.before]
        return sorted(going_on, key=lambda pair: pair[1].turn)

    def grow(self) -> list[tuple[Answer, Stay]]:
        stalled = []
        for answer, stay in self.decoding():
            if answer.stay is not stay or stay.pages * PAGE >= stay.next + 2:
                continue
            if not self.free_pages() and not self.fenced():
                last = self.last_in_rank()
                self.seen["preempted, not the youngest"] += last.key < max(other.key for other, _ in self.running())
                self.preempt(last)
            if answer.stay is stay and self.free_pages():
                stay.pages += 1
                if len({other.fairness_key for other in self.answers}) > 1:
                    self.had[answer.fairness_key] += 1
            else:
                stalled.append(answer)
        self.seen["stalled"] += len(stalled)
        return [(answer, stay) for answer, stay in self.decoding() if answer not in stalled]

    def first(self) -> Answer | None:
        waiting = [answer for answer in self.answers if answer.stay is None]
        rank = lambda answer: (-answer.priority, self.had[answer.fairness_key], answer.key)  # noqa: E731
        return min(waiting, key=rank, default=None)

    def reads(self, prompt: list[int], chunked: int = 0) -> int:
        return min(self.prefill_chunk, len(prompt) - chunked)

    def admit(self, budget: int) -> None:
        while (first := self.first()) is not None:
            as_pressing = [stay for answer, stay in self.prefilling() if answer.priority >= first.priority]
            if budget <= sum(self.reads(stay.prompt, stay.chunked) for stay in as_pressing):
                return
            self.seen["passed one that is read"] += len(as_pressing) < len(self.prefilling())
            waiting = [answer for answer in self.answers if answer.stay is None]
            prompt = first.prompt + first.tokens
            pages = -(-(len(prompt) + 1) // PAGE)
            if not self.free_slots() or pages + len(self.running()) > self.free_pages():
                self.pressing = first
                break
            self.seen["passed an older one"] += first.key > min(answer.key for answer in waiting)
            self.served_last = max(self.served_last, self.had[first.fairness_key])
            self.had[first.fairness_key] += pages
            self.admitted += 1
            first.stay = Stay(prompt, pages, number=self.admitted)

    def prefilling(self) -> list[tuple[Answer, Stay]]:
        return sorted(
            [(answer, stay) for answer, stay in self.running() if stay.prefilling],
            key=lambda pair: (-pair[0].priority, pair[1].number),
        )

    def plan(self) -> Step | None:
        self.preempt_for_pressing()
        budget = self.token_budget - len(self.decoding())
        decode = self.grow()
        self.admit(budget)
        admitted: list[Answer] = []  # told to the device with their first chunk
        rows = [(answer.key, stay.next, 1) for answer, stay in decode]
        emitting, emits, prompt = list(decode), list(range(len(decode))), []
        for answer, stay in self.prefilling():
            count = min(budget, self.prefill_chunk, len(stay.prompt) - stay.chunked)
            if count <= 0:
                break
            budget -= count
            if not stay.chunked:
                admitted.append(answer)
            rows.append((answer.key, stay.chunked, count))
            prompt += stay.prompt[stay.chunked : stay.chunked + count]
            stay.chunked += count
            if not stay.prefilling:
                self.turns += 1
                stay.turn = self.turns
                emitting.append((answer, stay))
                emits.append(len(rows) - 1)
        if not rows:
            return None
        for _, stay in emitting:
            stay.planned += 1
        self.planned += 1
        self.flights.append(emitting)
        return Step(
            number=self.planned,
            rows=rows,
            num_decode=len(decode),
            emits=emits,
            sampled=[i for i, (answer, _) in enumerate(emitting) if answer.temperature > 0],
            truncated=any(answer.temperature > 0 and answer.top_k > 0 for answer, _ in emitting),
            prompt=prompt,
            admissions=[(answer.key, 0, answer.temperature, answer.top_k) for answer in admitted],
        )

    def settle(self, tokens: list[int]) -> tuple[list[tuple[int, int]], list[tuple[int, str, int | None]]]:
        """Return the (key, token)s that are told and the (key, reason, stop id)s of those that end."""
        told: list[tuple[int, int]] = []
        ends: list[tuple[int, str, int | None]] = []
        for (answer, stay), token in zip(self.flights.popleft(), tokens, strict=True):
            if answer.stay is not stay:
                self.seen["dropped"] += 1
                continue
            answer.tokens.append(token)
            told.append((answer.key, token))
            if token in answer.stop_ids:
                ends.append((answer.key, "stop", token))
            elif len(answer.tokens) == answer.limit:
                ends.append((answer.key, "length", None))
        for key, reason, _ in ends:
            self.seen[reason] += 1
            self.end(key)
        self.settled += 1
        return told, ends


@dataclass
class Pair:
    """A planner and its oracle, that are told the same and must say the same."""

    planner: Planner
    oracle: Oracle
    prompts: tuple[int, ...]
    """The longest prompts to draw, in tokens."""
    limits: tuple[int, ...]
    """The highest limits to draw."""
    alike: bool
    """Whether all are as long as can be drawn, so that many need a page at the same step."""
    priorities: tuple[int, ...]
    fairness_keys: tuple[str, ...]
    requests: list[Request] = field(default_factory=list)
    flights: deque[tuple[StepPlan, list[int]]] = field(default_factory=deque)
    """Each plan in the air, and the keys in it."""
    table: dict[int, dict[int, int]] = field(default_factory=dict)
    """The page table as the device has it: slot, index, page."""

    @classmethod
    def drawn(cls, draw: random.Random) -> Pair:
        max_rows, num_pages = draw.choice([1, 3, 4, 8]), draw.choice([4, 5, 6, 8, 10, 40])
        budget = max_rows + draw.choice([1, 4, 20, 100])
        chunk = draw.choice([1, 7, 16, budget])
        context = draw.choice([40, 1024])
        prompts, limits = draw.choice([(3, 12, 30, 90), (3, 14, 30)]), draw.choice([(1, 20, 90), (90,)])
        if draw.random() < 0.3:  # short of pages and of budget
            max_rows, num_pages, budget, chunk = draw.choice([(4, 8, 5, 5), (6, 9, 7, 3), (8, 12, 9, 9)])
            context, prompts, limits = 1024, (3, 3, 30, 80), (60,)
        planner = Planner(
            max_rows=max_rows,
            num_pages=num_pages,
            token_budget=budget,
            prefill_chunk=chunk,
            context=context,
            prefix_cache=False,
        )
        return cls(
            planner,
            Oracle(max_rows, num_pages, budget, chunk),
            prompts,
            limits,
            alike=draw.random() < 0.3,
            priorities=draw.choice([(0,), (0, 1), (-1, 0, 0, 5)]),
            fairness_keys=draw.choice([("",), ("a", "b"), ("a", "a", "a", "b", "c")]),
        )

    def submit(self, draw: random.Random) -> None:
        key, room = len(self.requests), self.planner.context
        longest = min(room - 1, draw.choice(self.prompts))
        length = longest if self.alike else draw.randint(1, longest)
        highest = min(room - length, draw.choice(self.limits))
        limit = highest if self.alike else draw.randint(1, highest)
        prompt = [draw.randrange(VOCABULARY) for _ in range(length)]
        stop_ids = tuple(draw.sample(range(VOCABULARY), draw.choice([0, 0, 1, 3])))
        temperature, top_k = draw.choice([0.0, 0.7]), draw.choice([0, 5])
        priority, fairness_key = draw.choice(self.priorities), draw.choice(self.fairness_keys)
        request = Request(
            key=key,
            front=key % 3,
            prompt=np.array(prompt, dtype=np.int32),
            limit=limit,
            stop_ids=stop_ids,
            temperature=temperature,
            top_k=top_k,
            priority=priority,
            fairness_key=fairness_key,
        )
        self.requests.append(request)
        self.planner.submit(request)
        self.oracle.join(Answer(key, prompt, limit, stop_ids, temperature, top_k, priority, fairness_key))

    def end(self, key: int) -> None:
        assert self.planner.end(key) == self.oracle.end(key)

    def plan(self) -> bool:
        """Plan a step on both sides; return whether there was one."""
        plan, expected = self.planner.plan(), self.oracle.plan()
        assert (plan is None) == (expected is None)
        if plan is None:
            return False
        key_of = {request.slot: request.key for request in self.requests if request.life is Life.RUNNING}
        keys = [key_of[slot] for slot in plan.slots.tolist()]
        step = Step(
            number=plan.number,
            rows=list(zip(keys, plan.starts.tolist(), plan.counts.tolist(), strict=True)),
            num_decode=plan.num_decode,
            emits=plan.emits.tolist(),
            sampled=plan.sampled.tolist(),
            truncated=plan.truncated,
            prompt=plan.prompt.tolist(),
            admissions=[(key_of[a.slot], a.start, a.temperature, a.top_k) for a in plan.admissions],
        )
        assert step == expected
        assert broken_rules(plan) == []
        assert set(plan.page_slots.tolist()) <= set(key_of), "a page goes to a slot that nobody owns"
        self.apply_pages(plan)
        self.flights.append((plan, keys))
        return True

    def apply_pages(self, plan: StepPlan) -> None:
        """Keep the table as the device would, and look whether each row finds its pages there, and nobody else's."""
        for admission in plan.admissions:
            self.table[admission.slot] = {}
        for slot, index, page in zip(plan.page_slots, plan.page_indices, plan.page_ids, strict=True):
            self.table[int(slot)][int(index)] = int(page)
        held: list[int] = []
        of_chunks: list[int] = []
        for row, (slot, end) in enumerate(zip(plan.slots.tolist(), (plan.starts + plan.counts).tolist(), strict=True)):
            pages = [self.table[slot][index] for index in range(-(-end // PAGE))]
            held += pages
            of_chunks += pages if row >= plan.num_decode else []
        assert len(set(held)) == len(held), "two rows share a page"
        assert plan.chunk_pages.tolist() == of_chunks

    def settle(self, draw: random.Random) -> None:
        plan, _ = self.flights.popleft()
        tokens: Ints = np.array([draw.randrange(VOCABULARY) for _ in plan.emits], dtype=np.int32)
        settled = self.planner.settle(plan, tokens)
        told, ends = self.oracle.settle(tokens.tolist())
        assert list(zip(settled.keys.tolist(), settled.tokens.tolist(), strict=True)) == told
        assert [(end.key, end.reason, end.stop_id) for end in settled.ends] == ends
        assert settled.fronts.tolist() == [key % 3 for key, _ in told]

    def fail(self) -> None:
        """Let the oldest flight fail: whoever still reads from it ends."""
        plan, keys = self.flights.popleft()
        reading = [(a.key, a.key % 3) for a, _ in self.oracle.running() if a.key in keys]
        concerned = self.planner.keys_in(plan)
        assert sorted(concerned) == sorted(reading)
        for key, _ in concerned:
            self.end(key)
        self.planner.pass_step(plan)
        self.oracle.flights.popleft()
        self.oracle.settled += 1

    def compare(self) -> None:
        self.planner.check()
        figures, oracle = self.planner.statistics(), self.oracle
        assert figures.free_pages == oracle.free_pages()
        assert figures.fenced_pages == sum(oracle.fenced())
        assert figures.draining == len(oracle.fenced())
        assert figures.running == len(oracle.running())
        assert figures.waiting == len(oracle.answers) - len(oracle.running())
        assert figures.preemptions == oracle.seen["preempted"]


def walk(seed: int) -> Counter[str]:
    """Let a planner and the oracle live through the same random load; return what the oracle met."""
    draw = random.Random(seed)
    pair = Pair.drawn(draw)
    most, ahead = draw.randint(1, 30), draw.choice([1, 2, 2, 3])
    odds = {"submit": draw.choice([1, 4]), "end": draw.choice([0, 1]), "fail": draw.choice([0, 0.2]), "go on": 12}
    while len(pair.requests) < most or pair.planner.has_work or pair.flights:
        match draw.choices(list(odds), list(odds.values()))[0]:
            case "submit" if len(pair.requests) < most:
                pair.submit(draw)
            case "end" if pair.requests:
                pair.end(draw.randrange(len(pair.requests)))
            case "fail" if pair.flights:
                pair.fail()
            case _:
                planned = len(pair.flights) < ahead and pair.plan()
                if not planned and not pair.flights:
                    assert not pair.planner.has_work, "requests wait, and nothing is planned or in the air"
                if pair.flights and (not planned or len(pair.flights) == ahead):
                    pair.settle(draw)
        pair.compare()
    assert pair.oracle.free_pages() == pair.oracle.num_pages
    assert all(request.life is Life.GONE for request in pair.requests)
    return pair.oracle.seen


@pytest.mark.parametrize("seed", range(301))
def test_the_planner_plans_and_settles_as_the_oracle_does(seed: int) -> None:
    walk(seed)


def test_the_walks_meet_every_case_that_is_hard() -> None:
    met = sum((walk(seed) for seed in range(1000, 1120)), Counter[str]())
    cases = (
        "preempted",
        "pressed",
        "preempted, not the youngest",
        "passed an older one",
        "stalled",
        "dropped",
        "passed one that is read",
    )
    for case in (*cases, "stop", "length", "ended while draining is due", "ended"):
        assert met[case] > 5, f"{case}: {met[case]}"
