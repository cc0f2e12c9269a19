"""Who waits, and who comes next.

The highest priority first. Among requests of one priority, the fairness key that has had the least; of one key, the
oldest (a preempted request is older than whoever came after it, so it comes first again).

What a key has had is counted in pages of KV: those that its requests took when they were admitted, and one more for
each 16 tokens that they grew by. So prompts and answers weigh the same, a prefix hit costs nothing, and a key with long
answers falls behind while they grow. A key that comes back after a pause starts where the key served last stands:
what it did not use it has not saved up, and what it owes it still owes. (Start-time fair queueing, Goyal et al. 1996,
with the virtual token counter of "Fairness in Serving Large Language Models", Sheng et al. 2024, as the cost.)
"""

from __future__ import annotations

import heapq
from bisect import insort
from dataclasses import dataclass, field

from overlap.errors import InternalError
from overlap.schedule.life import Life
from overlap.schedule.request import Request

_MANY = 1024
"""Keys that are remembered for what they owe alone, before those that owe the least are forgotten."""


@dataclass(slots=True)
class _Class:
    """The waiting requests of one priority."""

    requests: dict[str, list[tuple[int, Request]]] = field(default_factory=dict)
    """A heap for each fairness key, oldest first. May hold requests that have ended."""
    turns: list[tuple[int, int, str]] = field(default_factory=list)
    """A heap of (pages the key had when it was put here, its oldest request, key). One entry for each key."""


class Queue:
    """The waiting requests. All operations cost O(log n), whatever the number of keys."""

    def __init__(self) -> None:
        self._classes: dict[int, _Class] = {}
        self._priorities: list[int] = []  # ascending
        self._num_waiting = 0
        self.prompt_tokens = 0
        """Of all that wait."""
        self.answer_tokens = 0
        """At most, of all that wait."""
        self._num_ended = 0  # requests that ended while waiting, and are still in a heap
        self._had: dict[str, int] = {}
        self._members: dict[str, int] = {}
        self._served_last = 0

    def __len__(self) -> int:
        return self._num_waiting

    @property
    def shared(self) -> bool:
        """Whether more than one fairness key has requests: only then does `charge` matter."""
        return len(self._members) > 1

    def join(self, request: Request) -> None:
        """Take in a new request, at its place."""
        key = request.fairness_key
        if key not in self._members:
            self._had[key] = max(self._had.get(key, 0), self._served_last)
        self._members[key] = self._members.get(key, 0) + 1
        self.put(request)

    def put(self, request: Request) -> None:
        """Let a request wait, at its place. One that was preempted comes back this way."""
        of_priority = self._classes.get(request.priority)
        if of_priority is None:
            of_priority = self._classes[request.priority] = _Class()
            insort(self._priorities, request.priority)
        key = request.fairness_key
        heap = of_priority.requests.get(key)
        if heap is None:
            heap = of_priority.requests[key] = []
            heapq.heappush(of_priority.turns, (self._had[key], request.key, key))
        heapq.heappush(heap, (request.key, request))
        self._count(request, 1)
        if len(heap) > 1 and heap[0][1] is request:  # preempted, and older than its key's oldest so far
            of_priority.turns = [(had, request.key if k == key else at, k) for had, at, k in of_priority.turns]
            heapq.heapify(of_priority.turns)

    def first(self) -> Request | None:
        """Return who comes next, or None if nobody waits."""
        while self._priorities:
            of_priority = self._classes[self._priorities[-1]]
            while of_priority.turns:
                had, oldest, key = of_priority.turns[0]
                heap = of_priority.requests[key]
                while heap and heap[0][1].life is not Life.WAITING:
                    heapq.heappop(heap)
                    self._num_ended -= 1
                if not heap:
                    del of_priority.requests[key]
                    heapq.heappop(of_priority.turns)
                elif (had, oldest) != (self._had[key], heap[0][0]):  # it has had more since, or its oldest has gone
                    heapq.heapreplace(of_priority.turns, (self._had[key], heap[0][0], key))
                else:
                    return heap[0][1]
            del self._classes[self._priorities.pop()]
        return None

    def pop_first(self) -> Request:
        """Take the first request out: it is admitted."""
        request = self.first()
        if request is None:
            raise InternalError("nobody waits")
        heapq.heappop(self._classes[request.priority].requests[request.fairness_key])
        self._count(request, -1)
        self._served_last = max(self._served_last, self._had[request.fairness_key])
        return request

    def remove(self, request: Request) -> None:
        """Note that a waiting request has ended (its life says so). It is dropped when its turn comes."""
        self._count(request, -1)
        self._num_ended += 1
        if self._num_ended > self._num_waiting + 64:
            self._sweep()

    def _count(self, request: Request, one: int) -> None:
        self._num_waiting += one
        self.prompt_tokens += one * len(request.prompt)
        self.answer_tokens += one * (request.limit - request.made)

    def charge(self, key: str, pages: int) -> None:
        """Count pages that a request of this key took."""
        if key in self._had:
            self._had[key] += pages

    def leave(self, request: Request) -> None:
        """Note that a request has ended, wherever it was."""
        key = request.fairness_key
        self._members[key] -= 1
        if self._members[key]:
            return
        del self._members[key]
        if not self._members:
            self._had.clear()
            self._served_last = 0
            self._sweep()
        elif self._had[key] <= self._served_last:
            del self._had[key]
        elif len(self._had) > len(self._members) + _MANY:
            self._forgive()

    def _forgive(self) -> None:
        """Forget who has no request and owes nothing by now, and of those who do, all but the half that owes most."""
        away = sorted((key for key in self._had if key not in self._members), key=self._had.__getitem__)
        owing = sum(self._had[key] > self._served_last for key in away)
        for key in away[: len(away) - min(owing, _MANY // 2)]:
            del self._had[key]
        self._sweep()

    def _sweep(self) -> None:
        """Drop all that has ended, with the turns of keys that wait no more: those say what a key once had."""
        for priority, of_priority in list(self._classes.items()):
            waiting = {key: _waiting(heap) for key, heap in of_priority.requests.items()}
            of_priority.requests = {key: heap for key, heap in waiting.items() if heap}
            of_priority.turns = [(self._had[key], heap[0][0], key) for key, heap in of_priority.requests.items()]
            heapq.heapify(of_priority.turns)
            if not of_priority.requests:
                del self._classes[priority]
        self._priorities = sorted(self._classes)
        self._num_ended = 0


def _waiting(heap: list[tuple[int, Request]]) -> list[tuple[int, Request]]:
    """Return a heap of those in `heap` that still wait."""
    waiting = [entry for entry in heap if entry[1].life is Life.WAITING]
    heapq.heapify(waiting)
    return waiting
