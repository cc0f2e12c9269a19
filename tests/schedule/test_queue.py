"""The queue against an oracle of plain lists, which looks at everybody who waits each time it is asked."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest

from overlap.errors import InternalError
from overlap.schedule.life import Change, Life
from overlap.schedule.queue import Queue
from overlap.schedule.request import Request


def request(key: int, priority: int = 0, fairness_key: str = "") -> Request:
    prompt = np.ones(1 + key % 5, dtype=np.int32)
    return Request(key=key, front=0, prompt=prompt, limit=1 + key % 7, priority=priority, fairness_key=fairness_key)


@dataclass
class Oracle:
    """The queue's rules, with no regard to speed."""

    waiting: list[Request] = field(default_factory=list)
    members: Counter[str] = field(default_factory=Counter)
    had: Counter[str] = field(default_factory=Counter)
    """What each fairness key has had; never forgotten while anybody is there."""
    served_last: int = 0

    def first(self) -> Request | None:
        if not self.waiting:
            return None
        return min(self.waiting, key=lambda one: (-one.priority, self.had[one.fairness_key], one.key))

    def join(self, new: Request) -> None:
        key = new.fairness_key
        if not self.members[key]:
            self.had[key] = max(self.had[key], self.served_last)
        self.members[key] += 1
        self.waiting.append(new)

    def pop(self, first: Request) -> None:
        self.waiting.remove(first)
        self.served_last = max(self.served_last, self.had[first.fairness_key])

    def leave(self, ended: Request) -> None:
        self.members[ended.fairness_key] -= 1
        if not any(self.members.values()):
            self.had.clear()
            self.served_last = 0


@dataclass
class Pair:
    """A queue and its oracle, that are told the same and must say the same."""

    queue: Queue = field(default_factory=Queue)
    oracle: Oracle = field(default_factory=Oracle)
    running: list[Request] = field(default_factory=list)
    met: Counter[str] = field(default_factory=Counter)

    def join(self, new: Request) -> None:
        self.queue.join(new)
        self.oracle.join(new)

    def admit(self, pages: int) -> None:
        expected = self.oracle.first()
        if expected is None:
            with pytest.raises(InternalError, match="nobody waits"):
                self.queue.pop_first()
            return
        first = self.queue.pop_first()
        assert first is expected
        self.oracle.pop(first)
        first.change(Change.ADMIT)
        self.running.append(first)
        self.charge(first.fairness_key, pages)

    def charge(self, key: str, pages: int) -> None:
        self.queue.charge(key, pages)
        self.oracle.had[key] += pages

    def preempt(self, one: Request) -> None:
        self.met["preempted"] += 1
        self.running.remove(one)
        one.change(Change.PREEMPT)
        one.prompt, one.made = np.append(one.prompt, one.prompt[:1]), min(one.made + 1, one.limit - 1)
        self.queue.put(one)
        self.oracle.waiting.append(one)

    def end(self, one: Request) -> None:
        """End a request, as the planner does."""
        if one.life is Life.WAITING:
            self.met["ended while waiting"] += 1
            self.oracle.waiting.remove(one)
            one.change(Change.END)
            self.queue.remove(one)
        else:
            self.running.remove(one)
            one.change(Change.END)
        self.queue.leave(one)
        self.oracle.leave(one)
        if not any(self.oracle.members.values()):
            self.met["all gone"] += 1

    def compare(self) -> None:
        assert len(self.queue) == len(self.oracle.waiting)
        assert self.queue.first() is self.oracle.first()
        assert self.queue.prompt_tokens == sum(len(one.prompt) for one in self.oracle.waiting)
        assert self.queue.answer_tokens == sum(one.limit - one.made for one in self.oracle.waiting)
        assert self.queue.shared == (sum(count > 0 for count in self.oracle.members.values()) > 1)


def walk(seed: int, steps: int = 250) -> Counter[str]:
    """Let a queue and its oracle live through the same random load; return what they met."""
    draw = random.Random(seed)
    pair, keys = Pair(), [f"key {i}" for i in range(draw.choice([1, 2, 5, 30]))]
    priorities = draw.choice([[0], [0, 1], [-3, 0, 0, 7]])
    odds = {"join": draw.choice([2, 5]), "admit": 3, "charge": 2, "preempt": draw.choice([0, 1, 2]), "end": 3}
    look = draw.choice([1.0, 0.1])  # asking drops what has ended: it must not matter when
    for number in range(steps):
        everybody = [*pair.oracle.waiting, *pair.running]
        match draw.choices(list(odds), list(odds.values()))[0]:
            case "join":
                pair.join(request(number, draw.choice(priorities), draw.choice(keys)))
            case "admit":
                pair.admit(draw.randint(1, 6))
            case "charge" if pair.running:
                pair.charge(draw.choice(pair.running).fairness_key, draw.randint(1, 3))
            case "preempt" if pair.running:
                pair.preempt(draw.choice(pair.running))
            case "end" if everybody:
                pair.end(draw.choice(everybody))
        if draw.random() < 0.01:
            for one in [*pair.oracle.waiting, *pair.running]:
                pair.end(one)
        if draw.random() < look:
            pair.compare()
    while pair.oracle.waiting:
        pair.admit(draw.randint(1, 6))
    return pair.met


@pytest.mark.parametrize("seed", range(200))
def test_the_queue_says_who_comes_next_as_the_oracle_does(seed: int) -> None:
    walk(seed)


def test_the_walks_meet_every_case_that_is_hard() -> None:
    met = sum((walk(seed) for seed in range(1000, 1040)), Counter[str]())
    for case in ("preempted", "ended while waiting", "all gone"):
        assert met[case] > 50, f"{case}: {met[case]}"


def test_a_key_that_comes_back_is_lifted_to_who_was_served_last() -> None:
    pair = Pair()
    for key in range(5):
        pair.join(request(key, 0, "busy"))
        pair.admit(10)
    pair.join(request(5, 0, "busy"))
    pair.join(request(6, 0, "late"))  # starts at 40, where the last of "busy" was served, not at 0
    pair.admit(10)
    assert pair.running[-1].key == 6
    pair.join(request(7, 0, "late"))
    pair.admit(1)
    assert pair.running[-1].key == 5, "both keys have had 50, and the older request comes first"


def test_a_key_owes_what_it_had_when_it_comes_back() -> None:
    pair = Pair()
    pair.join(request(0, 0, "steady"))
    pair.admit(1)
    pair.join(request(1, 0, "greedy"))
    pair.admit(100)
    pair.end(pair.running[-1])
    pair.join(request(2, 0, "greedy"))
    pair.join(request(3, 0, "steady"))
    pair.admit(1)
    assert pair.running[-1].key == 3


def test_what_a_key_had_before_everybody_left_does_not_hold_it_back() -> None:
    pair = Pair()
    for key in range(3):
        pair.join(request(key, 0, "back"))
    pair.admit(100)
    pair.compare()
    for one in [*pair.running, *pair.oracle.waiting]:  # two of them while they wait, at 100 pages
        pair.end(one)
    pair.join(request(3, 0, "back"))
    pair.join(request(4, 0, "new"))
    pair.admit(1)
    assert pair.running[-1].key == 3


def num_entries(queue: Queue) -> int:
    """Count what a queue keeps."""
    classes = queue._classes.values()
    heaps = sum(len(heap) + 1 for one in classes for heap in one.requests.values())
    return (
        heaps
        + sum(len(one.turns) + 1 for one in classes)
        + len(queue._priorities)
        + len(queue._had)
        + len(queue._members)
    )


@pytest.mark.parametrize("many", ["requests", "keys", "priorities"])
def test_ten_thousand_cancels_behind_one_who_waits_leave_nothing_behind(many: str) -> None:
    pair = Pair()
    pair.join(request(0, 10_000_000, "first"))
    most = 0
    for key in range(1, 10_001):
        priority, fairness_key = key if many == "priorities" else 0, str(key) if many == "keys" else ""
        new = request(key, priority, fairness_key)
        pair.join(new)
        pair.end(new)
        most = max(most, num_entries(pair.queue))
    assert most < 500
    pair.compare()


def test_ten_thousand_who_wait_and_are_cancelled_at_once_are_forgotten() -> None:
    draw = random.Random(0)
    pair = Pair()
    for key in range(10_000):
        pair.join(request(key, draw.randrange(3), str(draw.randrange(500))))
    for one in list(reversed(pair.oracle.waiting)):
        if one.key:
            pair.end(one)
    assert num_entries(pair.queue) < 500
    pair.compare()


def test_of_very_many_who_left_those_who_owe_the_most_are_remembered() -> None:
    pair = Pair()
    pair.join(request(0, 0, "steady"))
    pair.admit(1)
    for key in range(1, 4001):  # each owes more than the one before
        pair.join(request(key, 1, f"debtor {key}"))
        pair.queue.charge(f"debtor {key}", key)
        pair.end(pair.oracle.waiting[-1])
        assert num_entries(pair.queue) < 3000
    pair.join(request(5000, 0, "debtor 4000"))
    pair.join(request(5001, 0, "debtor 1"))
    pair.join(request(5002, 0, "new"))
    order = []
    for _ in range(3):
        first = pair.queue.pop_first()
        first.change(Change.ADMIT)
        order.append(first.key)
    assert order == [5001, 5002, 5000], "little debts were forgiven, the largest were not"
