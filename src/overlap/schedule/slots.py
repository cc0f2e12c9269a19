"""Slots: one entry a slot in each of a few integer columns, and the pages that each slot reads and writes.

What the planner knows of a request that runs is here, so that planning and settling a step are a handful of vectorised
operations however many rows run; Python touches a row only when something changes for it.

Two numbers of a slot must not be mixed up. `next` is the position that the next planned token will have: it runs one
step ahead of the device. `made` counts the tokens that have been settled. Between them lies what is in flight. A row
that turns out to have ended has been launched once more already; its slot is no longer `reading`, so what lands there
is dropped, and the fence keeps slot and pages until it has landed.

Tokens of the same rows, step after step, are written down together (`note_again`, `catch_up`).

Settled full pages go to the prefix tree: those of a prompt as its chunks are settled, those of an answer when its
request leaves its slot. `shared` says which entries of a slot's table the tree has; the others are the slot's own.
"""

from __future__ import annotations

from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from overlap.cache.pages import PAGE, Fence, Ints, pages_for
from overlap.cache.store import Hit, PageStore
from overlap.errors import InternalError
from overlap.schedule.life import Change, Life
from overlap.schedule.plan import UNUSED
from overlap.schedule.request import Request

Bools: TypeAlias = npt.NDArray[np.bool_]
Update: TypeAlias = tuple[Ints, Ints, Ints]
"""Page table updates as parallel columns: slots, indices, pages."""
MOST_LATE: Final = 32
"""Steps whose tokens are written down at once at most."""


class Slots:
    """Who owns which slot, and which pages its table has. The columns are the planner's to read and to advance."""

    def __init__(self, max_rows: int, context: int, store: PageStore, ahead: int = 1) -> None:
        """`ahead` is how many positions behind its last token a row may write to before it is planned again."""

        def column() -> Ints:
            return np.zeros(max_rows, dtype=np.int32)

        def flags(*shape: int) -> Bools:
            return np.zeros(shape, dtype=np.bool_)

        width = pages_for(context)
        self._ahead, self._context = ahead, context
        self.store: Final = store
        self.owners: list[Request | None] = [None] * max_rows
        self.free = list(range(max_rows - 1, -1, -1))
        self.num_running = 0
        self.departures = 0
        """How often a request has left its slot."""
        self._of_priority: dict[int, int] = {}  # how many run of each
        self.next: Ints = column()
        self.left: Ints = column()
        """New tokens still to be planned."""
        self.made: Ints = column()
        """New tokens settled in this stay."""
        self.base: Ints = column()
        """Length of this stay's prompt."""
        self.limit: Ints = column()
        """New tokens in this stay at most."""
        self.filled: Ints = column()
        """Tokens of the prompt whose KV is settled."""
        self.main_step: Ints = column()
        """The last step of the main lane that ran a prompt chunk of this slot's."""
        self.side_step: Ints = column()
        """The last step of the side lane that this slot has a row in."""
        self.room: Ints = column()
        """Positions that the slot's pages hold."""
        self.table: Ints = np.zeros((max_rows, width), dtype=np.int32)
        self.shared: Bools = flags(max_rows, width)
        self.reading: Bools = flags(max_rows)
        self.sampled: Bools = flags(max_rows)
        self.truncates: Bools = flags(max_rows)
        self.shaped: Bools = flags(max_rows)
        self.logprobs: Bools = flags(max_rows)
        self.num_shaped = self.num_logprobs = 0
        """How many running requests have their logits shaped, or their log-probabilities told."""
        self.keys: npt.NDArray[np.int64] = np.zeros(max_rows, dtype=np.int64)
        self.fronts: Ints = column()
        self.stops: Ints = np.full((max_rows, 1), -1, dtype=np.int32)
        """Stop ids, padded with -1; widened on demand."""
        self._page_tokens: Ints = np.zeros(
            (store.num_pages, PAGE), dtype=np.int32
        )  # the host's copy of what pages hold
        self._late: list[Ints] = []  # tokens of `_late_slots`, or runs, an array a step, that are not written down yet
        self._late_slots: Ints = np.empty(0, dtype=np.int32)

    def take(self, request: Request, hit: Hit) -> Update:
        """Give a request a slot, the pages of its hit, and new ones for what `pages_at_first` says."""
        request.change(Change.ADMIT)
        slot = request.slot = self.free.pop()
        length, num_hit = len(request.prompt), len(hit.pages)
        own = self.store.take(self.pages_at_first(length) - num_hit)
        pages = np.concatenate([hit.pages, own])
        request.node = hit.node
        request.num_hit, request.chunked = num_hit, num_hit * PAGE
        self.owners[slot] = request
        self.num_running += 1
        self._of_priority[request.priority] = self._of_priority.get(request.priority, 0) + 1
        self.next[slot] = self.filled[slot] = request.chunked
        self.made[slot] = self.main_step[slot] = self.side_step[slot] = 0
        self.base[slot] = length
        self.left[slot] = self.limit[slot] = request.limit - request.made
        self.room[slot] = len(pages) * PAGE
        self.table[slot, : len(pages)] = pages
        self.shared[slot] = False
        self.shared[slot, :num_hit] = True
        self.reading[slot] = True
        self.sampled[slot] = not request.greedy
        self.truncates[slot] = request.truncates
        self.shaped[slot] = request.shaping is not None
        self.num_shaped += request.shaping is not None
        self.logprobs[slot] = request.logprobs
        self.num_logprobs += request.logprobs
        self.keys[slot] = request.key
        self.fronts[slot] = request.front
        self._write_stops(slot, request.stop_ids)
        tokens = np.zeros(len(own) * PAGE, dtype=np.int32)
        tokens[: length - request.chunked] = request.prompt[request.chunked :]
        self._page_tokens[own] = tokens.reshape(-1, PAGE)
        return np.full(len(pages), slot, dtype=np.int32), np.arange(len(pages), dtype=np.int32), pages

    @property
    def lowest_priority(self) -> int:
        """The lowest one that runs. Somebody has to."""
        return min(self._of_priority)

    def pages_at_first(self, length: int) -> int:
        """Return how many pages a prompt needs, with the positions that are written ahead of its answer."""
        return pages_for(max(length + 1, min(length + self._ahead, self._context)))

    def _write_stops(self, slot: int, stop_ids: tuple[int, ...]) -> None:
        missing = len(stop_ids) - self.stops.shape[1]
        if self.num_running == 1:  # all others have ended: no wider than this one asks for
            self.stops = np.full((len(self.stops), max(1, len(stop_ids))), -1, dtype=np.int32)
        elif missing > 0:
            self.stops = np.pad(self.stops, ((0, 0), (0, missing)), constant_values=-1)
        self.stops[slot] = -1
        self.stops[slot, : len(stop_ids)] = stop_ids

    def extend(self, slots: Ints) -> Update:
        """Give each of `slots` one page more."""
        pages, indices = self.store.take(len(slots)), self.room[slots] // PAGE
        self.table[slots, indices] = pages
        self.room[slots] += PAGE
        return slots, indices, pages

    def note_tokens(self, slots: Ints, tokens: Ints) -> None:
        """Take in one settled token for each of `slots`."""
        self.catch_up()
        positions = self.base[slots] + self.made[slots]
        self._page_tokens[self.table[slots, positions // PAGE], positions % PAGE] = tokens
        self.made[slots] += 1

    def note_again(self, slots: Ints, tokens: Ints) -> None:
        """Take in the same as `note_tokens`, soon: see `catch_up`. Cheap while `slots` stays the same object.

        For a wide step `tokens` are runs [N, J], of which all count that are none of `schedule.plan`'s marks.
        """
        if slots is not self._late_slots or (self._late and tokens.shape != self._late[0].shape):
            self.catch_up()
            self._late_slots = slots
        self._late.append(tokens)
        if len(self._late) == MOST_LATE:
            self.catch_up()

    def catch_up(self) -> None:
        """Write down what `note_again` was told. Whoever reads `made` or the tokens of pages asks for this first."""
        if not self._late:
            return
        slots, tokens, self._late = self._late_slots, np.stack(self._late), []
        if tokens.ndim == 3:
            self._note_all_runs(slots, tokens)
            return
        positions = self.base[slots] + self.made[slots] + np.arange(len(tokens), dtype=np.int32)[:, None]
        self._page_tokens[self.table[slots, positions // PAGE], positions % PAGE] = tokens
        self.made[slots] += len(tokens)

    def _note_all_runs(self, slots: Ints, runs: Ints) -> None:
        """Write down the runs [S, N, J] of S steps, one behind the other."""
        there = runs >= 0
        emitted = there.sum(axis=2, dtype=np.int32)
        begins = self.base[slots] + self.made[slots] + np.cumsum(emitted, axis=0, dtype=np.int32) - emitted
        steps, rows, places = there.nonzero()
        positions = begins[steps, rows] + places
        self._page_tokens[self.table[slots[rows], positions // PAGE], positions % PAGE] = runs[there]
        self.made[slots] += emitted.sum(axis=0, dtype=np.int32)

    def note_runs(self, slots: Ints, runs: Ints, kept: Ints) -> None:
        """Take in the first `kept` [N] tokens of each row of `runs` [N, J] for each of `slots` [N]."""
        self.catch_up()
        self._note_all_runs(slots, np.where(np.arange(runs.shape[1]) < kept[:, None], runs, UNUSED)[None])

    def note_chunk(self, slot: int, end: int) -> None:
        """Take in a settled prompt chunk that ends at position `end`: its full pages can be shared from now on."""
        self.filled[slot] = end
        request = self.owners[slot]
        if request is None:
            raise InternalError(f"a chunk came for slot {slot}, which nobody owns")
        self._keep(request, end // PAGE)

    def tokens(self, slot: int) -> Ints:
        """Return the tokens of a slot, the settled ones of its answer included."""
        self.catch_up()
        length = int(self.base[slot] + self.made[slot])
        return self._page_tokens[self.table[slot, : pages_for(length)]].reshape(-1)[:length].copy()

    def leave(self, request: Request, step: int) -> None:
        """Take a slot from its request, and put it with its pages behind the fence of `step`, and of its side step.

        The settled full pages stay in the prefix tree, which may give them up once the fence is open.
        """
        self.catch_up()
        slot = request.slot
        self.reading[slot] = False
        self.num_running -= 1
        self.departures += 1
        self._of_priority[request.priority] -= 1
        if not self._of_priority[request.priority]:
            del self._of_priority[request.priority]
        self.num_shaped -= request.shaping is not None
        self.num_logprobs -= request.logprobs
        made = int(self.made[slot])
        filled = int(self.base[slot]) + made - 1 if made else int(self.filled[slot])
        self._keep(request, filled // PAGE)
        pages = self.table[slot, : self.room[slot] // PAGE]
        self.store.fence(
            Fence(step, slot, pages[~self.shared[slot, : len(pages)]], request.node, int(self.side_step[slot]))
        )
        request.node = None

    def _keep(self, request: Request, num_full: int) -> None:
        slot = request.slot
        pages = self.table[slot, :num_full]
        if self.shared[slot, :num_full].all():
            return
        self.catch_up()
        tokens = self._page_tokens[pages].reshape(-1)
        request.node, kept = self.store.keep(tokens, pages.copy(), request.salt, request.node)
        self.shared[slot, :num_full] |= kept

    def open_fences(self, settled: int, side_settled: int = 0) -> None:
        """Take back what waited for steps up to those that are settled in the two lanes."""
        for slot in self.store.pass_step(settled, side_settled):
            request = self.owners[slot]
            if request is not None and request.life is Life.DRAINING:
                request.change(Change.LAND)
            self.owners[slot] = None
            self.free.append(slot)

    def check(self) -> None:
        """Raise InternalError unless every page and every slot is accounted for exactly once. O(pages); for tests."""
        owned = []
        for slot in np.flatnonzero(self.reading).tolist():
            pages = self.table[slot, : self.room[slot] // PAGE]
            owned.append(pages[~self.shared[slot, : len(pages)]])
        fenced = self.store.check(owned)
        if sorted([*self.free, *fenced, *np.flatnonzero(self.reading).tolist()]) != list(range(len(self.owners))):
            raise InternalError("a slot is lost, or owned twice")
        if int(self.reading.sum()) != self.num_running:
            raise InternalError("a running request has no slot, or a slot has no running request")
