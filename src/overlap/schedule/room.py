"""Room: pages for answers as they grow, and who is preempted when there are none.

When no page is left, the youngest request of the lowest priority is preempted: it gives up slot and pages, waits again
at its place in the queue, and runs its prompt and its answer so far once more (what the prefix cache still has of them
is spared). The oldest of the highest priority is never preempted for another, so it always ends: there is no deadlock
at any number of pages that holds one request. A request that waits preempts only those of a lower priority. Noise is
keyed by absolute position, so a preempted answer goes on as it would have.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from overlap.cache.pages import Ints
from overlap.schedule.decoding import Decoding
from overlap.schedule.desk import Desk
from overlap.schedule.drafting import Drafting
from overlap.schedule.life import Change, Life
from overlap.schedule.request import Request
from overlap.schedule.slots import Slots, Update


class Room:
    """Gives pages to decode rows. The planner's."""

    def __init__(
        self,
        slots: Slots,
        desk: Desk,
        drafting: Drafting,
        decoding: Decoding,
        *,
        context: int,
        leave: Callable[[Request], None],
    ) -> None:
        """`leave` takes slot and pages from a running request."""
        self._slots, self._store, self._desk, self._queue = slots, slots.store, desk, desk.queue
        self._drafting, self._decoding = drafting, decoding
        self._context = context
        self._leave = leave
        self.preemptions = 0
        self.pressed = 0
        """Of them, those for a request of a higher priority that waited."""

    def short(self, slots: Ints, starts: Ints) -> Ints:
        """Return those of `slots` that have no page yet for what they may write from `starts` on."""
        return slots[self._slots.room[slots] < self._drafting.needed(starts, self._context)]

    def suffices(self, slots: Ints) -> bool:
        """Return whether there are pages for the next step of each of `slots`, so that nobody has to be preempted."""
        return len(self.short(slots, self._slots.next[slots])) <= self._store.num_available

    def extend(self, slots: Ints) -> Update:
        """Give each of `slots` one page more."""
        if self._queue.shared:
            for slot in slots.tolist():
                if (owner := self._slots.owners[slot]) is not None:
                    self._queue.charge(owner.fairness_key, 1)
        return self._slots.extend(slots)

    def grow(self, slots: Ints, updates: list[Update]) -> Ints:
        """Give each decode row room for this token and the one it emits, with a drafter for all that it may write to;
        return the rows that have it."""
        at = self._slots
        short = self.short(slots, at.next[slots])
        if len(short) <= self._store.num_available:
            if len(short):
                updates.append(self.extend(short))
            return slots
        stalled = []
        for slot in short.tolist():
            if not at.reading[slot]:
                continue  # preempted for an older one a moment ago
            if self._store.num_available or self._make(slot):
                updates.append(self.extend(np.array([slot], dtype=np.int32)))
            else:
                stalled.append(slot)
        if not self._decoding.leaving and not stalled:
            return slots
        if self._decoding.leaving:  # somebody was preempted
            updates[:] = [update for update in updates if at.reading[update[0]].all()]
            self._decoding.refresh()
            slots = slots[np.isin(slots, self._decoding.slots)]  # a row whose mask has come meanwhile has no room yet
        return slots[~np.isin(slots, stalled)] if stalled else slots

    def make_for_pressing(self) -> None:
        """Preempt one of a lower priority, if there is one, for a request that was not admitted for want of room."""
        pressing = self._desk.pressing()
        at = self._slots
        if pressing is not None and at.num_running and at.lowest_priority < pressing.priority:
            self._preempt(self._last_in_rank())
            self.pressed += 1

    def _make(self, slot: int) -> bool:
        """See to it that a page comes free for `slot`; return whether one is free now."""
        if not self._store.num_fences:
            self._preempt(self._last_in_rank())
        return self._store.num_available > 0 and bool(self._slots.reading[slot])

    def _last_in_rank(self) -> Request:
        """Return the youngest of the lowest priority of those that run."""
        running = (r for r in self._slots.owners if r is not None and r.life is Life.RUNNING)
        return min(running, key=lambda r: (r.priority, -r.key))

    def _preempt(self, request: Request) -> None:
        slot = request.slot
        tokens, made = self._slots.tokens(slot), int(self._slots.made[slot])
        self._leave(request)
        request.change(Change.PREEMPT)
        request.prompt, request.made, request.chunked, request.slot = tokens, request.made + made, 0, -1
        self._queue.put(request)
        self.preemptions += 1
