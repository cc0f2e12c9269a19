"""The step planner: which rows run next, on which pages.

One token budget a step: every decode row takes one token (`schedule/decoding.py`), prompt chunks share the rest in
order of admission (`schedule/prefill.py`). Pages for answers come as they grow (`schedule/room.py`).

While prompts wait and rows decode, a splitter says how the two share the device: in one mixed step, in turn, or in two
lanes. In two lanes the side lane's steps hold the prompt chunks and the main lane's the decode rows, planned apart and
settled in any order; a request changes over when the step that reads the end of its prompt has been settled.

A steady step costs what has changed: while the same rows decode, the plan before is taken with other positions
(`_plan_again`), and its tokens are looked at for nothing but ends (`schedule/settling.py`).

With a drafter a decode row runs several positions, and is planned as if every draft in the air were confirmed: only the
device knows how many are, until the step is settled.
"""

from __future__ import annotations

from collections import Counter
from typing import Final

import numpy as np

from overlap.cache.pages import PAGE, Ints, pages_for
from overlap.cache.store import PageStore
from overlap.errors import InternalError, RequestError
from overlap.observe.metrics import Histogram
from overlap.schedule.decoding import Decoding
from overlap.schedule.desk import Desk
from overlap.schedule.drafting import Drafting
from overlap.schedule.forms import Forms
from overlap.schedule.lanes import Lanes
from overlap.schedule.life import Change, Life
from overlap.schedule.pace import Pace
from overlap.schedule.plan import MAIN, SIDE, STRIP, STRIPS, Ladder, StepPlan
from overlap.schedule.prefill import Chunk, Prefill
from overlap.schedule.request import Request, refusal_of
from overlap.schedule.room import Room
from overlap.schedule.scores import scores_of
from overlap.schedule.settled import PlannerStatistics, Settled
from overlap.schedule.settling import Settling
from overlap.schedule.slots import Slots, Update
from overlap.schedule.split import Splitter

NONE: Final = np.empty(0, dtype=np.int32)
NO_UPDATES: Final[Update] = (NONE, NONE, NONE)
_FEW_TOKENS: Final = 4 * STRIP * STRIPS[-1]
"""Prompt tokens that wait, up to which they are read in short steps, a few at a time."""


class Planner:
    """Owns slots, pages and the queue. Never touches a device and never waits.

    `plan` and `settle` alternate as the loop likes, but steps are settled in the order in which they were planned.
    """

    def __init__(
        self,
        *,
        max_rows: int,
        num_pages: int,
        token_budget: int,
        prefill_chunk: int,
        context: int,
        prefix_cache: bool = True,
        max_waiting: int = 2**31,
        splitter: Splitter | None = None,
        drafts: int = 0,
        drafts_ahead: int = 0,
        pace: Pace | None = None,
        ladder: Ladder | None = None,
        drafts_with_prompts: bool = True,
        strips: bool = False,
    ) -> None:
        """`splitter` is asked how to run prompts beside decode rows; None runs them in one mixed step, always.

        `drafts` is how many drafted tokens a decode row verifies at most, under PAGE; 0 without a drafter. The drafter
        writes to up to `drafts_ahead` positions behind the last token of a row. `pace` says when drafting pays; None
        always drafts. `ladder` says how many drafts by the number of rows; None for always as many.
        `drafts_with_prompts` False drafts nothing in steps that read prompts, but for short ones with `strips`: see
        `Drafting`.
        """
        self._drafting = Drafting(drafts, drafts_ahead, pace, ladder, with_prompts=drafts_with_prompts, strips=strips)
        if token_budget < max_rows + 1:
            raise InternalError(f"a budget of {token_budget} tokens leaves nothing beside {max_rows} decode rows")
        self._token_budget = token_budget
        self._context = min(context, num_pages * PAGE)
        self._store = PageStore(num_pages, prefix_cache=prefix_cache)
        self._slots = Slots(max_rows, self._context, self._store, self._drafting.ahead)
        self._forms = Forms(max_rows)
        self._desk = Desk(self._slots, self._store, max_waiting=max_waiting)
        self._queue = self._desk.queue
        self._lanes = Lanes(self._slots, splitter, token_budget)
        self._decoding = Decoding(self._slots)
        shared = self._desk, self._forms, self._drafting, self._decoding
        self._prefill = Prefill(self._slots, *shared, chunk=prefill_chunk)
        self._settling = Settling(self._slots, *shared, end=self._end_answer)
        self._room = Room(
            self._slots, self._desk, self._drafting, self._decoding, context=self._context, leave=self._leave
        )
        self._requests: dict[int, Request] = {}
        self._went_first = False  # short prompts had the last step, though there were decode rows
        self._planned = self._settled = 0
        self._before: StepPlan | None = None  # the last plan, if its rows may simply go on
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

    @property
    def wants_side(self) -> bool:
        """Whether the side lane has something to plan."""
        return self._lanes.side_tokens > 0

    @property
    def waits_for_mask(self) -> bool:
        """Whether a request could run, and its mask is still being made."""
        return self._forms.waits or self._desk.waits_for_mask

    def unmatched(self) -> list[Request]:
        """Return the requests that have to be ended, since their form allows nothing any more; see their matchers."""
        if not self._forms.requests:
            return []
        first = self._queue.first() if len(self._queue) else None
        waiting = [] if first is None or first.matcher is None or first.matcher.failure is None else [first]
        return [*self._forms.unmatched(), *waiting]

    @property
    def splitter(self) -> Splitter | None:
        """What says how prompts and decode rows share the device; None if they always share a step."""
        return self._lanes.splitter

    @property
    def lane_choices(self) -> Counter[str]:
        """How many steps with prompts were planned each way while rows decoded: see `StepPlan.way`."""
        return self._lanes.choices

    def explain_lanes(self) -> tuple[str, ...]:
        """Return how prompts and decode rows share the device, and why."""
        return self._lanes.explain()

    @property
    def queue_seconds(self) -> Histogram:
        """How long requests waited for their first slot."""
        return self._desk.queue_seconds

    def note_time(self, plan: StepPlan, seconds: float, waited_s: float = 0.0) -> None:
        """Take in what a landed step took on the device, and how long the device waited for it though there was work.

        Of plain steps that repeat one in eight says enough, of those beside a prompt each counts.
        """
        if plan.again and plan.number % 8 and not self._drafting.paced and not self._lanes.beside(plan)[0]:
            return
        if plan.scores is None:  # a step that scores is no measure for others
            self._lanes.note_time(plan, seconds + waited_s)
        self._drafting.note_time(plan, seconds + waited_s)

    def note_odd(self, plan: StepPlan) -> None:
        """A step landed whose time says nothing, since something was built or captured meanwhile."""
        self._lanes.note_odd(plan)

    def explain_drafts(self) -> tuple[str, ...]:
        """Return what drafting brought, as far as that is measured."""
        return self._drafting.explain()

    def refusal(self, num_prompt: int, limit: int) -> str | None:
        """Return why a request of this size could never run, or None if it can."""
        return refusal_of(num_prompt, limit, self._context)

    def submit(self, request: Request) -> None:
        """Queue a request; raises RequestError if it could never run, QueueFull if too many wait."""
        refusal = self.refusal(len(request.prompt), request.limit)
        if refusal is not None:
            raise RequestError(refusal)
        if request.key in self._requests:
            raise InternalError(f"the key {request.key} is in use")
        self._desk.submit(request)
        self._lanes.note_request()
        self._requests[request.key] = request
        self._forms.requests += request.matcher is not None

    def end(self, key: int) -> bool:
        """End a request in whatever state it is; nothing more of it is settled. False if it has ended already."""
        request = self._requests.get(key)
        if request is None:
            return False
        self._end(request)
        return True

    def request(self, key: int) -> Request | None:
        """Return a request that has not ended."""
        return self._requests.get(key)

    def keys_in(self, plan: StepPlan) -> list[tuple[int, int]]:
        """Return (key, front) of the requests that still read what `plan` brings: those that its failure concerns."""
        slots = plan.slots[self._slots.reading[plan.slots]]
        return list(zip(self._slots.keys[slots].tolist(), self._slots.fronts[slots].tolist(), strict=True))

    def clear_cache(self) -> int:
        """Forget every cached prefix that no request reads; return how many pages came free."""
        return self._store.clear()

    def queue(self) -> tuple[int, int]:
        """Return how many requests (wait, run)."""
        return len(self._queue), self._slots.num_running

    def statistics(self) -> PlannerStatistics:
        """Return the figures of this moment."""
        pages, drafts = self._store.statistics(), self._drafting.counts()
        return PlannerStatistics(
            waiting=len(self._queue),
            running=self._slots.num_running,
            draining=self._store.num_fences,
            free_pages=pages.free_pages,
            fenced_pages=pages.fenced_pages,
            cached_pages=pages.cached_pages,
            evictable_pages=pages.evictable_pages,
            num_pages=pages.num_pages,
            planned_steps=self._planned,
            settled_steps=self._settled,
            preemptions=self._room.preemptions,
            evicted_pages=pages.evicted_pages,
            prompt_tokens=self._desk.prompt_tokens,
            cached_tokens=self._desk.cached_tokens,
            drafted_tokens=drafts.drafted,
            accepted_tokens=int(drafts.accepted_at.sum()),
            tried_at=tuple(drafts.tried_at.tolist()),
            accepted_at=tuple(drafts.accepted_at.tolist()),
            structured_requests=self._forms.requests,
            masked_steps=self._forms.steps,
        )

    # ── plan ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def plan(self, lane: int = MAIN) -> StepPlan | None:
        """Plan a lane's next step, or return None when it has nothing to run before a flight has landed."""
        if lane == SIDE:
            return self._plan_side()
        updates: list[Update] = []
        self._room.make_for_pressing()
        preemptions = self._room.preemptions
        before, width, for_rows = self._before, 0, -1
        if before is not None and self._goes_on(before):
            for_rows = before.num_decode
            width = self._drafting.width(before.num_decode, self._token_budget)
            if width == before.width and (again := self._plan_again(before)) is not None:
                self._before = again
                return again
        self._decoding.refresh()
        free = self._forms.free(self._decoding.slots)
        if len(free) != for_rows:
            width = self._drafting.width(len(free), self._token_budget)
        alone, budget = self._lanes.split(self._decoding.slots, len(free) * width, self._prefill.outlook)
        apart = self._drafting.strips and len(free) > 0 and self._room.suffices(free)
        if apart and self._went_first:  # prompts had the step before
            budget = 0
        # Pages are given to rows of this step only: one that fails ends its own rows, and others would miss theirs.
        # So where prompts may go without the decode rows these come last; nobody is preempted then.
        last = alone or apart
        decode = free
        if not last:
            decode, width = self._grow(free, width, updates)
            budget = min(budget, self._token_budget - len(decode) * width)
        if budget:
            self._prefill.admit(budget, few=apart and self._queue.prompt_tokens <= _FEW_TOKENS)
        chunks = self._prefill.cut(budget, MAIN) if budget else []
        self._went_first = bool(chunks) and apart and self._go_first(free, chunks, width)
        if chunks and (alone or self._went_first):
            decode = NONE
        elif last:
            decode, width = self._grow(free, width, updates)
        if not len(decode) and not chunks:  # if the last row gave way, prompts have the step that was to be its
            return self.plan() if self._room.preemptions > preemptions else None
        short = False
        if chunks:  # a step may be in turn with prompts, and have no decode rows
            short = self._prefill.is_short(decode, chunks)
            width = self._drafting.beside_prompts(width, short=short) if len(decode) else 1
        plan = self._build(decode, chunks, updates, MAIN, width, short=short)
        repeats = decode is self._decoding.slots and not (chunks or plan.masked)
        self._before = plan if repeats else None
        return plan

    def _grow(self, free: Ints, width: int, updates: list[Update]) -> tuple[Ints, int]:
        """Give decode rows room; return those that have it, and how many positions each of so many runs."""
        if not len(free):
            return NONE, 1
        decode = self._room.grow(free, updates)
        return decode, width if len(decode) == len(free) else self._drafting.width(len(decode), self._token_budget)

    def _go_first(self, decode: Ints, chunks: list[Chunk], width: int) -> bool:
        """Return whether short prompts are read by a step of their own in front of decode rows, with a drafter.

        Such a step is one launch. One with all of them is one only if it is short, too, and then verifies nothing; else
        it takes as long to launch as several others.
        """
        is_short = self._prefill.is_short
        return is_short(NONE, chunks) and (width > 1 or not is_short(decode, chunks))

    def _goes_on(self, before: StepPlan) -> bool:
        """Whether there is nothing to consider but the rows of the step before.

        While the side lane has a step in the air, who waits and who is read are its own.
        """
        lanes = self._lanes
        if self._decoding.changes or self._forms or before.slots is not self._decoding.slots:
            return False
        if lanes.side.flying:
            return before.beside and before.share == lanes.share(MAIN)
        if before.beside or lanes.two or len(self._prefill):
            return False
        return not len(self._queue) or self._desk.is_stuck

    def _plan_again(self, before: StepPlan) -> StepPlan | None:
        """Plan the step of the same rows, some positions on; None if there are not enough pages, or if giving them may
        change whose turn it is."""
        slots, width = before.slots, before.width
        starts = self._slots.next[slots]  # with a drafter less may have come of the step before than was hoped for
        short = self._room.short(slots, starts)
        if len(short) > self._store.num_available or (len(short) and self._queue.shared and len(self._queue)):
            return None
        page_slots, page_indices, page_ids = self._room.extend(short) if len(short) else NO_UPDATES
        self._decoding.advance(slots, starts, width)
        self._planned += 1
        self._lanes[MAIN].note(self._planned)
        return StepPlan(
            number=self._planned,
            beside=before.beside,
            share=before.share,
            slots=slots,
            counts=before.counts,
            starts=starts,
            num_decode=before.num_decode,
            width=width,
            drafts=before.drafts,
            prompt=NONE,
            emits=before.emits,
            sampled=before.sampled,
            truncated=before.truncated,
            shaped=before.shaped,
            logprobs=before.logprobs,
            again=True,
            admissions=(),
            page_slots=page_slots,
            page_indices=page_indices,
            page_ids=page_ids,
            chunk_pages=NONE,
        )

    def _plan_side(self) -> StepPlan | None:
        """Plan prompt chunks beside the decode rows: as many tokens as the splitter wants now."""
        lanes = self._lanes
        if lanes.side.flying:
            lanes.split_again(self._decoding.slots, self._prefill.outlook)
        budget, lanes.side_tokens = lanes.side_tokens, 0
        if not budget:
            return None
        self._prefill.admit(budget)
        chunks = self._prefill.cut(budget, SIDE)
        return self._build(NONE, chunks, [], SIDE) if chunks else None

    def _build(
        self,
        decode: Ints,
        chunks: list[Chunk],
        updates: list[Update],
        lane: int,
        width: int = 1,
        *,
        short: bool = False,
    ) -> StepPlan:
        self._planned += 1
        self._lanes[lane].note(self._planned)
        at, num_decode, follows = self._slots, len(decode), 0
        slots, starts, counts = decode, at.next[decode], self._ones[:num_decode]
        if width > 1:
            counts = np.full(num_decode, width, dtype=np.int32)
        emits = self._all_rows[:num_decode]
        sampled, truncated = self._decoding.sampling(decode)
        self._decoding.advance(decode, starts, width)
        prompt = chunk_pages = NONE
        behind = scores = None
        if chunks:
            scores = scores_of(chunks)
            chunk_slots = np.array([request.slot for request, _, _ in chunks], dtype=np.int32)
            last = [i for i, (request, _, _) in enumerate(chunks) if request.chunked == len(request.prompt)]
            emits = np.concatenate([emits, np.array([num_decode + i for i in last], dtype=np.int32)])
            starts = np.concatenate([starts, np.array([start for _, start, _ in chunks], dtype=np.int32)])
            counts = np.concatenate([counts, np.array([count for _, _, count in chunks], dtype=np.int32)])
            slots = np.concatenate([slots, chunk_slots])
            prompt = np.concatenate([request.prompt[start : start + count] for request, start, count in chunks])
            chunk_pages = np.concatenate([at.table[r.slot, : pages_for(begin + count)] for r, begin, count in chunks])
            if self._drafting:
                ends = [(request.prompt, start + count) for request, start, count in chunks]
                behind = np.array([text[end] if end < len(text) else -1 for text, end in ends], dtype=np.int32)
            follows = self._lanes.note_chunks(chunk_slots, self._planned, lane)
            if last:
                sampled = np.flatnonzero(at.sampled[slots[emits]]).astype(np.int32)
                truncated = truncated or bool(at.truncates[chunk_slots[last]].any())
        masked, masks = self._forms.masks(slots[emits]) if self._forms else ((), ())
        admissions = self._prefill.entering(chunks, updates)
        page_slots, page_indices, page_ids = _columns(updates)
        return StepPlan(
            number=self._planned,
            lane=lane,
            follows=follows,
            share=self._lanes.share(lane),
            way=self._lanes.note_way(lane, num_decode) if chunks and len(self._decoding) else "",
            beside=len(self._decoding) > 0 if lane == SIDE else self._lanes.two,
            slots=slots,
            counts=counts,
            starts=starts,
            num_decode=num_decode,
            width=width,
            drafts=self._drafting.drafts(
                self._planned, width, num_decode, len(chunks), short=short, then=len(self._decoding) + len(chunks)
            ),
            behind=behind,
            prompt=prompt,
            emits=emits,
            sampled=sampled,
            truncated=truncated,
            shaped=at.num_shaped > 0 and bool(at.shaped[slots[emits]].any()),
            logprobs=at.num_logprobs > 0 and bool(at.logprobs[slots[emits]].any()),
            masked=masked,
            masks=masks,
            tells_drafts=self._drafting.most if masked else 0,
            scores=None if scores is None else scores[0],
            score_tokens=None if scores is None else scores[1],
            admissions=admissions,
            chunk_pages=chunk_pages,
            page_slots=page_slots,
            page_indices=page_indices,
            page_ids=page_ids,
        )

    # ── settle ───────────────────────────────────────────────────────────────────────────────────────────────────

    def settle(self, plan: StepPlan, tokens: Ints, words: Ints | None = None) -> Settled:
        """Take in the tokens [E] that a step emitted: end what ends, and give back what waited for this step.

        Of a wide plan `num_landing` numbers land. Of a plan with `logprobs` what lands is [E, 1 + TOLD_WORDS]: each
        token, then what is told with it. Of a plan with `scores` their `words` [S, TOLD_WORDS] land, too.
        """
        settled = self._settling.settle(plan, tokens, words)
        self.pass_step(plan)
        return settled

    def pass_step(self, plan: StepPlan) -> None:
        """Note that a step has landed, well or not: what waited for it behind a fence is free now."""
        self._lanes[plan.lane].pass_step(plan.number)
        self._settled += 1
        self._open_fences()

    def _open_fences(self) -> None:
        self._slots.open_fences(self._lanes[MAIN].settled, self._lanes[SIDE].settled)

    def _end_answer(self, request: Request, tokens: int) -> None:
        self._lanes.note_answer(tokens, request.limit)
        self._end(request)

    def _end(self, request: Request) -> None:
        del self._requests[request.key]
        if request.life is Life.WAITING:
            request.change(Change.END)
            self._queue.remove(request)
        else:
            request.change(Change.END)
            self._leave(request)
        self._queue.leave(request)

    def _leave(self, request: Request) -> None:
        """Take a running request's slot and pages from it; they are free once the last planned step is settled."""
        self._prefill.drop(request)
        self._desk.note_left(request)
        self._forms.leave(request)
        self._slots.leave(request, self._lanes[MAIN].planned)
        self._decoding.leaving = True
        self._open_fences()

    # ── check ────────────────────────────────────────────────────────────────────────────────────────────────────

    def check(self) -> None:
        """Raise InternalError unless every page and every slot is accounted for exactly once. O(pages); for tests."""
        self._slots.check()
        running = sorted(self._slots.keys[self._slots.reading].tolist())
        if running != sorted(k for k, r in self._requests.items() if r.life is Life.RUNNING):
            raise InternalError("a running request has no slot, or a slot has no running request")
        if len(self._queue) + len(running) != len(self._requests):
            raise InternalError("the queue has lost count of who waits")
        if not self._requests and (len(self._prefill) or not self._desk.expects_nothing):
            raise InternalError("a prompt that has ended is still expected")

    def check_idle(self) -> None:
        """Raise InternalError if the requests that have all ended left anything behind. For tests."""
        self.check()
        self._store.check_idle()


def _columns(updates: list[Update]) -> Update:
    """Return page table updates as the three columns of a plan."""
    if not updates:
        return NO_UPDATES
    slots, indices, pages = (np.concatenate(column) for column in zip(*updates, strict=True))
    return slots, indices, pages
