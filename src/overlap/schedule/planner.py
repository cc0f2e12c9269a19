"""The step planner: which rows run next, on which pages.

Theory of operation. Each request that runs owns a slot. What the planner knows of a slot is one entry in each of a
few integer columns, so that planning and settling a step are a handful of vectorised operations however many rows
run; Python touches a row only when something changes for it (it is admitted, ends, needs a page every 16 tokens).

Two numbers of a slot must not be mixed up. `_next` is the position that the next planned token will have: it runs one
step ahead of the device. `_made` counts the tokens that have been settled. Between them lies what is in flight. A row
that turns out to have ended has been launched once more already; its slot is no longer `_reading`, so what lands there
is dropped, and the fence keeps its pages until it has landed.

One token budget a step: every decode row takes one token, prompt chunks share the rest in order of arrival. A request
is admitted when the pages for its whole prompt are free; pages for its answer come as it grows. When none is left, the
youngest request is preempted: it gives up slot and pages and comes back to the head of the queue with its answer so far
as prompt. The oldest is never preempted for another, so the oldest always ends: there is no deadlock at any number of
pages that holds one request. (Noise is keyed by absolute position, so a preempted answer goes on as it would have.)
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from overlap.cache.pages import PAGE, Fence, Fences, Ints, PagePool, pages_for
from overlap.errors import InternalError, RequestError
from overlap.schedule.life import Change, Life
from overlap.schedule.plan import Admission, StepPlan
from overlap.schedule.request import Request

NONE: Final = np.empty(0, dtype=np.int32)
Update: TypeAlias = tuple[Ints, Ints, Ints]
"""Page table updates as parallel columns: slots, indices, pages."""


@dataclass(frozen=True, slots=True)
class End:
    """A request ended by itself. `stop_id` is the token that ended it, if one did."""

    key: int
    front: int
    reason: Literal["stop", "length"]
    stop_id: int | None


@dataclass(frozen=True, slots=True)
class Settled:
    """What a step brought to its readers: parallel columns, one entry a token."""

    keys: npt.NDArray[np.int64]
    fronts: Ints
    tokens: Ints
    ends: tuple[End, ...]

    def of_front(self, front: int) -> Settled:
        """Return the entries of one front."""
        mine = self.fronts == front
        if mine.all():
            return self
        ends = tuple(end for end in self.ends if end.front == front)
        return Settled(self.keys[mine], self.fronts[mine], self.tokens[mine], ends)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannerStatistics:
    """The planner's figures at one moment."""

    waiting: int
    running: int
    draining: int
    """Slots that wait behind a fence."""
    free_pages: int
    fenced_pages: int
    num_pages: int
    planned_steps: int
    settled_steps: int
    preemptions: int


class Planner:
    """Owns slots, pages and the queue. Never touches a device and never waits.

    `plan` and `settle` alternate as the loop likes, but steps are settled in the order in which they were planned.
    """

    def __init__(self, *, max_rows: int, num_pages: int, token_budget: int, prefill_chunk: int, context: int) -> None:
        if token_budget < max_rows + 1:
            raise InternalError(f"a budget of {token_budget} tokens leaves nothing beside {max_rows} decode rows")
        self._token_budget = token_budget
        self._prefill_chunk = prefill_chunk
        self._context = min(context, num_pages * PAGE)
        self._pool = PagePool(num_pages)
        self._fences = Fences()
        self._requests: dict[int, Request] = {}
        self._waiting: OrderedDict[int, Request] = OrderedDict()
        self._prefilling: list[Request] = []
        self._owners: list[Request | None] = [None] * max_rows
        self._free_slots = list(range(max_rows - 1, -1, -1))
        self._planned = 0
        self._settled = 0
        self._preemptions = 0

        width = pages_for(self._context)
        self._decoding: Ints = NONE  # slots of the decode rows, in the order in which they came
        self._decoding_sampled: Ints = NONE
        self._decoding_truncates = False
        self._joining: list[int] = []  # slots that decode from the next plan on
        self._leaving = False  # a slot in _decoding has no more to run
        self._next: Ints = np.zeros(max_rows, dtype=np.int32)
        self._left: Ints = np.zeros(max_rows, dtype=np.int32)  # new tokens still to be planned
        self._made: Ints = np.zeros(max_rows, dtype=np.int32)  # new tokens settled in this stay
        self._base: Ints = np.zeros(max_rows, dtype=np.int32)  # length of this stay's prompt
        self._limit: Ints = np.zeros(max_rows, dtype=np.int32)  # new tokens in this stay at most
        self._room: Ints = np.zeros(max_rows, dtype=np.int32)  # positions that the slot's pages hold
        self._table: Ints = np.zeros((max_rows, width), dtype=np.int32)
        self._reading: npt.NDArray[np.bool_] = np.zeros(max_rows, dtype=np.bool_)
        self._sampled: npt.NDArray[np.bool_] = np.zeros(max_rows, dtype=np.bool_)
        self._truncates: npt.NDArray[np.bool_] = np.zeros(max_rows, dtype=np.bool_)
        self._keys: npt.NDArray[np.int64] = np.zeros(max_rows, dtype=np.int64)
        self._fronts: Ints = np.zeros(max_rows, dtype=np.int32)
        self._stops: Ints = np.full((max_rows, 1), -1, dtype=np.int32)  # stop ids, padded with -1; widened on demand
        self._page_tokens: Ints = np.zeros((num_pages, PAGE), dtype=np.int32)  # the host's copy of what pages hold
        self._all_rows: Ints = np.arange(max_rows, dtype=np.int32)
        self._ones: Ints = np.ones(max_rows, dtype=np.int32)

    # ── what may happen at any time ──────────────────────────────────────────────────────────────────────────────

    @property
    def context(self) -> int:
        """The most tokens of one request, prompt and answer together."""
        return self._context

    @property
    def has_work(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self._requests)

    def refusal(self, num_prompt: int, limit: int) -> str | None:
        """Return why a request of this size could never run, or None if it can."""
        if num_prompt < 1:
            return "The prompt is empty. Give at least one token."
        if num_prompt + limit > self._context:
            return (
                f"The prompt has {num_prompt} tokens and asks for up to {limit} more; "
                f"the engine holds {self._context} for one request. "
                "Shorten the prompt, lower max_tokens, or open the engine with more context or kv_cache."
            )
        return None

    def submit(self, request: Request) -> None:
        """Put a request at the end of the queue; raises RequestError if it could never run."""
        refusal = self.refusal(len(request.prompt), request.limit)
        if refusal is not None:
            raise RequestError(refusal)
        if request.key in self._requests:
            raise InternalError(f"the key {request.key} is in use")
        self._requests[request.key] = request
        self._waiting[request.key] = request

    def end(self, key: int) -> bool:
        """End a request in whatever state it is; nothing more of it is settled. False if it has ended already."""
        request = self._requests.get(key)
        if request is None:
            return False
        self._end(request)
        return True

    def keys_in(self, plan: StepPlan) -> list[tuple[int, int]]:
        """Return (key, front) of the requests that still read what `plan` brings: those that its failure concerns."""
        slots = plan.slots[self._reading[plan.slots]]
        return list(zip(self._keys[slots].tolist(), self._fronts[slots].tolist(), strict=True))

    def statistics(self) -> PlannerStatistics:
        """Return the figures of this moment."""
        return PlannerStatistics(
            waiting=len(self._waiting),
            running=len(self._requests) - len(self._waiting),
            draining=len(self._fences),
            free_pages=self._pool.num_free,
            fenced_pages=self._fences.num_pages,
            num_pages=self._pool.num_pages,
            planned_steps=self._planned,
            settled_steps=self._settled,
            preemptions=self._preemptions,
        )

    # ── plan ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def plan(self) -> StepPlan | None:
        """Plan the next step, or return None when there is nothing to run before a flight has landed."""
        updates: list[Update] = []
        self._refresh_decoding()
        decode = self._grow(self._decoding, updates) if len(self._decoding) else NONE
        admissions = self._admit(updates)
        chunks = self._cut_chunks(self._token_budget - len(decode))
        if not len(decode) and not chunks:
            if admissions:
                raise InternalError("a request was admitted to a step that has no room for it")
            return None
        self._planned += 1
        return self._build(decode, chunks, admissions, updates)

    def _refresh_decoding(self) -> None:
        """Drop rows that have no more to run, add those whose prompt is through. Costs nothing in a steady step."""
        if not (self._leaving or self._joining):
            return
        slots = self._decoding
        if self._leaving:
            slots = slots[self._reading[slots] & (self._left[slots] > 0)]
        if self._joining:
            joining = np.array([slot for slot in self._joining if self._reading[slot]], dtype=np.int32)
            slots = np.concatenate([slots, joining])
        self._leaving = False
        self._joining = []
        self._decoding = slots
        self._decoding_sampled = np.flatnonzero(self._sampled[slots]).astype(np.int32)
        self._decoding_truncates = bool(self._truncates[slots].any())

    def _grow(self, slots: Ints, updates: list[Update]) -> Ints:
        """Give each decode row room for this token and the one it emits; return the rows that have it."""
        short = slots[self._room[slots] < self._next[slots] + 2]
        if len(short) <= self._pool.num_free:
            if len(short):
                self._extend(short, updates)
            return slots
        stalled = []
        for slot in short.tolist():
            if not self._reading[slot]:
                continue  # preempted for an older one a moment ago
            if self._pool.num_free or self._make_room(slot):
                self._extend(np.array([slot], dtype=np.int32), updates)
            else:
                stalled.append(slot)
        if not self._leaving and not stalled:
            return slots
        if self._leaving:  # somebody was preempted
            updates[:] = [update for update in updates if self._reading[update[0]].all()]
            self._refresh_decoding()
            slots = self._decoding
        return slots[~np.isin(slots, stalled)] if stalled else slots

    def _extend(self, slots: Ints, updates: list[Update]) -> None:
        """Give each of `slots` one page more."""
        pages, indices = self._pool.take(len(slots)), self._room[slots] // PAGE
        self._table[slots, indices] = pages
        self._room[slots] += PAGE
        updates.append((slots, indices, pages))

    def _make_room(self, slot: int) -> bool:
        """See to it that a page comes free for `slot`; return whether one is free now."""
        if self._fences.num_pages == 0:
            youngest = max((r for r in self._owners if r is not None and r.life is Life.RUNNING), key=lambda r: r.key)
            self._preempt(youngest)
        return self._pool.num_free > 0 and bool(self._reading[slot])

    def _preempt(self, request: Request) -> None:
        slot = request.slot
        made = int(self._made[slot])
        length = int(self._base[slot]) + made
        tokens = self._page_tokens[self._table[slot, : pages_for(length)]].reshape(-1)[:length].copy()
        self._leave(request)
        request.change(Change.PREEMPT)
        request.prompt, request.made, request.chunked, request.slot = tokens, request.made + made, 0, -1
        self._waiting[request.key] = request
        self._waiting.move_to_end(request.key, last=False)
        self._preemptions += 1

    def _admit(self, updates: list[Update]) -> list[Admission]:
        """Admit from the head of the queue while slots, pages and budget last."""
        admissions: list[Admission] = []
        budget = self._token_budget - len(self._decoding) - sum(len(r.prompt) - r.chunked for r in self._prefilling)
        while self._waiting and self._free_slots and budget > 0:
            request = next(iter(self._waiting.values()))
            num_pages = pages_for(len(request.prompt) + 1)
            spare = len(self._requests) - len(self._waiting)  # a page for each running request to grow into
            if num_pages + spare > self._pool.num_free:
                break
            del self._waiting[request.key]
            request.change(Change.ADMIT)
            slot = request.slot = self._free_slots.pop()
            pages = self._pool.take(num_pages)
            self._take_slot(request, slot, pages)
            updates.append((np.full(num_pages, slot, dtype=np.int32), np.arange(num_pages, dtype=np.int32), pages))
            admissions.append(
                Admission(
                    slot=slot,
                    start=0,
                    temperature=request.temperature,
                    top_k=request.top_k,
                    top_p=request.top_p,
                    min_p=request.min_p,
                    seed=request.seed,
                )
            )
            self._prefilling.append(request)
            budget -= len(request.prompt)
        return admissions

    def _take_slot(self, request: Request, slot: int, pages: Ints) -> None:
        length = len(request.prompt)
        self._owners[slot] = request
        self._next[slot] = 0
        self._made[slot] = 0
        self._base[slot] = length
        self._left[slot] = self._limit[slot] = request.limit - request.made
        self._room[slot] = len(pages) * PAGE
        self._table[slot, : len(pages)] = pages
        self._reading[slot] = True
        self._sampled[slot] = not request.greedy
        self._truncates[slot] = request.truncates
        self._keys[slot] = request.key
        self._fronts[slot] = request.front
        width = len(request.stop_ids)
        if width > self._stops.shape[1]:
            self._stops = np.pad(self._stops, ((0, 0), (0, width - self._stops.shape[1])), constant_values=-1)
        self._stops[slot] = -1
        self._stops[slot, :width] = request.stop_ids
        tokens = np.zeros(len(pages) * PAGE, dtype=np.int32)
        tokens[:length] = request.prompt
        self._page_tokens[pages] = tokens.reshape(-1, PAGE)

    def _cut_chunks(self, budget: int) -> list[tuple[Request, int, int]]:
        """Cut this step's prompt chunks, as (request, start, count)."""
        chunks = []
        for request in self._prefilling:
            count = min(budget, self._prefill_chunk, len(request.prompt) - request.chunked)
            if count <= 0:
                break
            chunks.append((request, request.chunked, count))
            request.chunked += count
            budget -= count
            self._next[request.slot] = request.chunked
        done = [request for request, _, _ in chunks if request.chunked == len(request.prompt)]
        if done:
            self._prefilling = [r for r in self._prefilling if r.chunked < len(r.prompt)]
            for request in done:
                self._left[request.slot] -= 1
                if self._left[request.slot] > 0:
                    self._joining.append(request.slot)
        return chunks

    def _build(
        self,
        decode: Ints,
        chunks: list[tuple[Request, int, int]],
        admissions: list[Admission],
        updates: list[Update],
    ) -> StepPlan:
        num_decode = len(decode)
        slots, starts, counts = decode, self._next[decode], self._ones[:num_decode]
        emits, sampled, truncated = self._all_rows[:num_decode], self._decoding_sampled, self._decoding_truncates
        if num_decode != len(self._decoding):  # some rows stall
            sampled = np.flatnonzero(self._sampled[decode]).astype(np.int32)
            truncated = bool(self._truncates[decode].any())
        self._next[decode] += 1
        self._left[decode] -= 1
        self._leaving = self._leaving or not bool(self._left[decode].all())
        prompt = chunk_pages = NONE
        if chunks:
            chunk_slots = np.array([request.slot for request, _, _ in chunks], dtype=np.int32)
            last = [i for i, (request, _, _) in enumerate(chunks) if request.chunked == len(request.prompt)]
            emits = np.concatenate([emits, np.array([num_decode + i for i in last], dtype=np.int32)])
            starts = np.concatenate([starts, np.array([start for _, start, _ in chunks], dtype=np.int32)])
            counts = np.concatenate([counts, np.array([count for _, _, count in chunks], dtype=np.int32)])
            slots = np.concatenate([slots, chunk_slots])
            prompt = np.concatenate([request.prompt[start : start + count] for request, start, count in chunks])
            chunk_pages = np.concatenate([self._table[r.slot, : pages_for(at + count)] for r, at, count in chunks])
            if last:
                sampled = np.flatnonzero(self._sampled[slots[emits]]).astype(np.int32)
                truncated = truncated or bool(self._truncates[chunk_slots[last]].any())
        return StepPlan(
            number=self._planned,
            slots=slots,
            counts=counts,
            starts=starts,
            num_decode=num_decode,
            prompt=prompt,
            emits=emits,
            sampled=sampled,
            truncated=truncated,
            admissions=tuple(admissions),
            chunk_pages=chunk_pages,
            **_columns(updates),
        )

    # ── settle ───────────────────────────────────────────────────────────────────────────────────────────────────

    def settle(self, plan: StepPlan, tokens: Ints) -> Settled:
        """Take in the tokens [E] that a step emitted: end what ends, and give back what waited for this step."""
        slots = plan.slots[plan.emits]
        reading = self._reading[slots]
        if not reading.all():
            slots, tokens = slots[reading], tokens[reading]
        positions = self._base[slots] + self._made[slots]
        self._page_tokens[self._table[slots, positions // PAGE], positions % PAGE] = tokens
        self._made[slots] += 1
        stopped = (self._stops[slots] == tokens[:, None]).any(axis=1)
        ended = stopped | (self._made[slots] == self._limit[slots])
        keys, fronts = self._keys[slots], self._fronts[slots]
        ends: tuple[End, ...] = ()
        if ended.any():
            ends = tuple(
                self._settle_end(int(slots[i]), bool(stopped[i]), int(tokens[i])) for i in np.flatnonzero(ended)
            )
        self.pass_step(plan)
        return Settled(keys, fronts, tokens, ends)

    def pass_step(self, plan: StepPlan) -> None:
        """Note that a step has landed, well or not: what waited for it behind a fence is free now."""
        if plan.number != self._settled + 1:
            raise InternalError(f"step {plan.number} was settled after step {self._settled}")
        self._settled = plan.number
        self._open_fences()

    def _settle_end(self, slot: int, stopped: bool, token: int) -> End:
        request = self._owners[slot]
        if request is None:
            raise InternalError(f"a token came for slot {slot}, which nobody owns")
        self._end(request)
        return End(request.key, request.front, "stop" if stopped else "length", token if stopped else None)

    def _end(self, request: Request) -> None:
        del self._requests[request.key]
        if request.life is Life.WAITING:
            del self._waiting[request.key]
            request.change(Change.END)
            return
        request.change(Change.END)
        self._leave(request)

    def _leave(self, request: Request) -> None:
        """Take a running request's slot and pages from it, and put them behind the fence of the last planned step."""
        slot = request.slot
        self._reading[slot] = False
        self._leaving = True
        if request.chunked < len(request.prompt):
            self._prefilling.remove(request)
        pages = self._table[slot, : self._room[slot] // PAGE].copy()
        self._fences.put(Fence(self._planned, slot, pages))
        self._open_fences()

    def _open_fences(self) -> None:
        for fence in self._fences.pass_step(self._settled):
            request = self._owners[fence.slot]
            if request is not None and request.life is Life.DRAINING:
                request.change(Change.LAND)
            self._owners[fence.slot] = None
            self._free_slots.append(fence.slot)
            self._pool.give(fence.pages)

    # ── check ────────────────────────────────────────────────────────────────────────────────────────────────────

    def check(self) -> None:
        """Raise InternalError unless every page and every slot is accounted for exactly once. O(pages); for tests."""
        owned = [self._table[s, : self._room[s] // PAGE] for s in np.flatnonzero(self._reading)]
        everything = np.concatenate([self._pool.free_pages(), *(fence.pages for fence in self._fences), *owned])
        if not np.array_equal(np.sort(everything), np.arange(self._pool.num_pages)):
            raise InternalError("a page is lost, or owned twice")
        slots = [*self._free_slots, *(fence.slot for fence in self._fences), *np.flatnonzero(self._reading).tolist()]
        if sorted(slots) != list(range(len(self._owners))):
            raise InternalError("a slot is lost, or owned twice")
        running = sorted(self._keys[self._reading].tolist())
        if running != sorted(k for k, r in self._requests.items() if r.life is Life.RUNNING):
            raise InternalError("a running request has no slot, or a slot has no running request")


def _columns(updates: list[Update]) -> dict[str, Ints]:
    """Turn page table updates into the three columns of a plan."""
    if not updates:
        return {"page_slots": NONE, "page_indices": NONE, "page_ids": NONE}
    slots, indices, pages = (np.concatenate(column) for column in zip(*updates, strict=True))
    return {"page_slots": slots, "page_indices": indices, "page_ids": pages}
