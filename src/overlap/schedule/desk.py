"""The desk: who waits, and who gets a slot and pages next.

A request is admitted, in the queue's order, when a slot is free and there are pages for its whole prompt, beside what
the prefix cache has of it, and a spare one for each request that runs. Who comes first and does not fit holds back all
behind it, so a large request is never passed by small ones for ever.

A prompt whose next page is being computed for another at this moment waits for it, and so for all that the two share:
many requests with one prefix compute it once, however many chunks it takes. A request that finds no room asks for some
of those with a lower priority (`pressing`).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final

from overlap.cache.pages import PAGE
from overlap.cache.store import Hit, PageStore
from overlap.errors import QueueFull
from overlap.observe.metrics import SECONDS, Histogram
from overlap.schedule.forms import may_enter
from overlap.schedule.life import Life
from overlap.schedule.plan import STRIP, STRIPS
from overlap.schedule.queue import Queue
from overlap.schedule.request import Request
from overlap.schedule.slots import Slots, Update

if TYPE_CHECKING:
    from overlap.cache.tree import Node


class Desk:
    """Admits requests to slots. Holds the queue."""

    def __init__(self, slots: Slots, store: PageStore, *, max_waiting: int) -> None:
        self.queue: Final = Queue()
        self._slots = slots
        self._store = store
        self._max_waiting = max_waiting
        self._coming: Counter[tuple[str, int, bytes]] = Counter()  # the next page of each prompt being computed
        self._blocked: tuple[int, int, int] | None = None  # (key, available pages, running) of who did not fit
        self._pressing: Request | None = None
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.queue_seconds: Final = Histogram(SECONDS)
        """How long requests waited for their first slot."""

    def submit(self, request: Request) -> None:
        """Queue a new request; raises QueueFull if too many wait."""
        if len(self.queue) >= self._max_waiting:
            raise QueueFull(
                f"{len(self.queue)} requests wait already, and max_waiting is {self._max_waiting}. "
                "Send it again later, or open the engine with a higher max_waiting."
            )
        self.queue.join(request)
        request.queued_at = time.monotonic()

    def pressing(self) -> Request | None:
        """Return who comes next and found no room at the last plan, with nothing about to come free. Asked once."""
        request, self._pressing = self._pressing, None
        if request is None or request.life is not Life.WAITING or self._store.num_fences:
            return None
        return request

    @property
    def is_stuck(self) -> bool:
        """Whether nothing can be done for who comes next: there is no room, nothing has come free, and nobody is
        preempted for it. False if nobody waits."""
        request = self.queue.first() if len(self.queue) else None
        if request is None or not self._slots.num_running or self._slots.lowest_priority < request.priority:
            return False
        return not self._slots.free or self._is_blocked(request)

    def _is_blocked(self, request: Request) -> bool:
        """Whether a request did not fit before, and cannot fit now: no more is available, and no fewer run."""
        key, available, running = self._blocked or (-1, 0, 0)
        return request.key == key and self._store.num_available <= available and self._slots.num_running >= running

    def admit(
        self, budget_for: Callable[[Request], int], strips: int | None = None
    ) -> Iterator[tuple[Request, Update]]:
        """Give slots and pages to those whose turn it is, while slots and pages last.

        `budget_for` says how many prompt tokens the step has for one, beside those that go first. With `strips` the
        prompts fit into so many strips together, unless the first does not alone.
        """
        needed, admitted = 0, False
        while (request := self.queue.first()) is not None and budget_for(request) > 0:
            if not self._slots.free:
                self._pressing = request
                return
            if self._is_blocked(request):
                self._pressing = request
                return
            # a token is scored by what is computed one position before it, so that has to be run
            hit = self._store.find(request.prompt, request.salt, request.scored - 1 if request.scoring else None)
            wanted = self._slots.pages_at_first(len(request.prompt)) - len(hit.pages)
            if wanted + self._slots.num_running > self._store.num_available:
                self._store.release(hit.node)
                self._blocked = request.key, self._store.num_available, self._slots.num_running
                self._pressing = request
                return
            if self._is_coming(request, hit) or not may_enter(request):
                self._store.release(hit.node)
                return
            needed += -((len(hit.pages) * PAGE - len(request.prompt)) // STRIP)
            if strips is not None and needed > strips:
                if admitted or strips < STRIPS[-1]:
                    self._store.release(hit.node)
                    return
                strips = None  # it is long: others may come with it
            admitted = True
            self.queue.pop_first()
            self.queue.charge(request.fairness_key, wanted)
            update = self._slots.take(request, hit)
            self._note(request, hit)
            yield request, update

    def _note(self, request: Request, hit: Hit) -> None:
        self.prompt_tokens += len(request.prompt)
        self.cached_tokens += request.chunked
        if request.cached is None:  # later stays may hit what the request computed itself
            request.cached = request.chunked
            self.queue_seconds.observe(time.monotonic() - request.queued_at)
        self._expect(request, hit.node, len(hit.pages))

    def _is_coming(self, request: Request, hit: Hit) -> bool:
        """Whether the next page of this prompt is being computed for another right now."""
        if request.scoring:  # it runs that page itself
            return False
        page = _next_page(request, hit.node, len(hit.pages)) if self._coming else None
        return page is not None and self._coming[page] > 0

    def note_shared(self, request: Request, num_full: int) -> None:
        """The first `num_full` pages of a running request's prompt are in the tree: the next one is being computed."""
        self.note_left(request)
        self._expect(request, request.node, num_full)

    def note_left(self, request: Request) -> None:
        """Nothing more will come of a request's prompt."""
        self._blocked = None  # whoever comes next may find more of its prompt now
        if request.coming is not None:
            self._coming[request.coming] -= 1
            if not self._coming[request.coming]:
                del self._coming[request.coming]
            request.coming = None

    def _expect(self, request: Request, node: Node | None, num_full: int) -> None:
        request.coming = _next_page(request, node, num_full) if self._store.keeps_prefixes else None
        if request.coming is not None:
            self._coming[request.coming] += 1

    @property
    def waits_for_mask(self) -> bool:
        """Whether who comes next was preempted a moment ago, and its mask is still being made."""
        request = self.queue.first() if len(self.queue) else None
        return request is not None and not may_enter(request)

    @property
    def expects_nothing(self) -> bool:
        """Whether no page is on its way. For checks."""
        return not self._coming


def _next_page(request: Request, node: Node | None, num_full: int) -> tuple[str, int, bytes] | None:
    """Name the full page of a prompt behind its first `num_full`, which end at `node`; None if there is none to share.

    The node stands for all that comes before the page. Whoever computes the page holds the node, so its id stays its.
    """
    start = num_full * PAGE
    if len(request.prompt) <= start + PAGE:
        return None
    return request.salt, id(node), request.prompt[start : start + PAGE].tobytes()
