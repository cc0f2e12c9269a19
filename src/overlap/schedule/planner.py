"""The step planner: which rows run next, on which pages.

One token budget a step: every decode row takes one token, prompt chunks share the rest in order of admission. Pages for
a prompt are there when its request is admitted (`schedule/desk.py`); pages for its answer come as it grows.

When no page is left, the youngest request of the lowest priority is preempted: it gives up slot and pages, waits again
at its place in the queue, and runs its prompt and its answer so far once more (what the prefix cache still has of them
is spared). The oldest of the highest priority is never preempted for another, so it always ends: there is no deadlock
at any number of pages that holds one request. A request that waits preempts only those of a lower priority. Noise is
keyed by absolute position, so a preempted answer goes on as it would have.

While prompts wait and rows decode, a splitter says how the two share the device: in one mixed step, in turn, or in two
lanes. In two lanes the side lane's steps hold the prompt chunks and the main lane's the decode rows, planned apart and
settled in any order; a request changes over when the step that reads the end of its prompt has been settled.

A steady step costs what has changed: while the same rows decode, the plan before is taken with other positions
(`_plan_again`), and its tokens are looked at for nothing but ends (`_settle_again`).

With a drafter a decode row runs several positions, and only the device knows how many tokens come of them until the
step is settled. So `next` is an upper bound then: as if every draft in the air were confirmed. What turns out not to be
is taken back when the step is settled; pages that were taken for it stay, and hold what comes instead.
"""

from __future__ import annotations

from collections import Counter
from typing import Final

import numpy as np

from overlap.cache.pages import PAGE, Ints, pages_for
from overlap.cache.store import PageStore
from overlap.errors import InternalError, RequestError
from overlap.observe.metrics import Histogram
from overlap.schedule.desk import Desk
from overlap.schedule.drafting import Drafting
from overlap.schedule.forms import Forms
from overlap.schedule.lanes import Lanes
from overlap.schedule.life import Change, Life
from overlap.schedule.pace import Pace
from overlap.schedule.plan import MAIN, SIDE, STRIP, STRIPS, Admission, Ladder, StepPlan, is_short
from overlap.schedule.repeats import Repeats
from overlap.schedule.request import Request
from overlap.schedule.runs import cut_runs, runs_of
from overlap.schedule.scores import Scored, cut_scores, scores_of
from overlap.schedule.settled import End, PlannerStatistics, Settled
from overlap.schedule.shaping import MOST_SCORED
from overlap.schedule.slots import Slots, Update
from overlap.schedule.split import Prompts, Splitter

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
        self._prefill_chunk = prefill_chunk
        self._context = min(context, num_pages * PAGE)
        self._store = PageStore(num_pages, prefix_cache=prefix_cache)
        self._slots = Slots(max_rows, self._context, self._store, self._drafting.ahead)
        self._repeats = Repeats(self._slots, self._drafting)
        self._forms = Forms(max_rows)
        self._desk = Desk(self._slots, self._store, max_waiting=max_waiting)
        self._queue = self._desk.queue
        self._requests: dict[int, Request] = {}
        self._prefilling: list[Request] = []
        self._went_first = False  # short prompts had the last step, though there were decode rows
        self._planned = self._settled = self._preemptions = 0
        self._lanes = Lanes(self._slots, splitter, token_budget)

        self._decoding: Ints = NONE  # slots of the decode rows, in the order in which they came
        self._decoding_sampled: Ints = NONE
        self._decoding_truncates = False
        self._joining: list[int] = []  # slots that decode from the next plan on
        self._leaving = False  # a slot in _decoding has no more to run
        self._before: StepPlan | None = None  # the last plan, if its rows may simply go on
        self._departures = 0  # how often a request has left its slot
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
        """How often the splitter chose which way."""
        return self._lanes.choices

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
            preemptions=self._preemptions,
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
        updates: list[Update] = []
        if lane == SIDE:
            return self._plan_side(updates)
        self._preempt_for_pressing()
        before, width, for_rows = self._before, 0, -1
        if before is not None and self._goes_on(before):
            for_rows = before.num_decode
            width = self._drafting.width(before.num_decode, self._token_budget)
            if width == before.width and (again := self._plan_again(before)) is not None:
                self._before = again
                return again
        self._refresh_decoding()
        free = self._forms.free(self._decoding)
        decode = self._grow(free, updates) if len(free) else NONE
        if len(decode) != for_rows:  # that of as many rows: pages may not have sufficed for all
            width = self._drafting.width(len(decode), self._token_budget)
        alone, budget = self._lanes.split(self._decoding, len(decode) * width, self._prompts)
        stalled = max(0, len(free) - len(decode)) * width
        apart = self._drafting.strips and len(decode) > 0
        if apart and self._went_first:  # prompts had the step before
            budget = 0
        few = apart and self._queue.prompt_tokens <= _FEW_TOKENS
        admissions = self._admit(updates, budget - stalled, few=few) if budget else []
        chunks = self._cut_chunks(budget, MAIN)
        self._went_first = bool(chunks) and apart and self._go_first(decode, chunks, width)
        if chunks and (alone or self._went_first):
            decode = NONE
        if not len(decode) and not chunks:
            if admissions:
                raise InternalError("a request was admitted to a step that has no room for it")
            return None
        short = False
        if chunks:  # a step may be in turn with prompts, and have no decode rows
            short = self._is_short(decode, chunks)
            width = self._drafting.beside_prompts(width, short=short) if len(decode) else 1
        plan = self._build(decode, chunks, admissions, updates, MAIN, width, short=short)
        repeats = decode is self._decoding and not (chunks or admissions or plan.masked)
        self._before = plan if repeats else None
        return plan

    def _go_first(self, decode: Ints, chunks: list[tuple[Request, int, int]], width: int) -> bool:
        """Return whether short prompts are read by a step of their own in front of decode rows, with a drafter.

        Such a step is one launch. One with all of them is one only if it is short, too, and then verifies nothing; else
        it takes as long to launch as several others.
        """
        return self._is_short(NONE, chunks) and (width > 1 or not self._is_short(decode, chunks))

    def _is_short(self, decode: Ints, chunks: list[tuple[Request, int, int]]) -> bool:
        """Return whether a step of these rows is short (see `plan.is_short`) and has nothing that no graph has."""
        if not self._drafting.strips or self._forms or bool(self._slots.logprobs[decode].any()):
            return False
        for request, _, _ in chunks:
            if request.chunked < len(request.prompt) or request.scoring or request.logprobs or request.matcher:
                return False
        num_strips = len(decode) + sum(-(-count // STRIP) for _, _, count in chunks)
        longest = max(int(self._slots.next[decode].max(initial=0)), *(begin + count for _, begin, count in chunks))
        return is_short(num_strips, longest + 1)

    def _goes_on(self, before: StepPlan) -> bool:
        """Whether there is nothing to consider but the rows of the step before.

        While the side lane has a step in the air, who waits and who is read are its own.
        """
        lanes = self._lanes
        if self._leaving or self._joining or self._forms or before.slots is not self._decoding:
            return False
        if lanes.side.flying:
            return before.beside and before.share == lanes.share(MAIN)
        return not (before.beside or lanes.two or self._prefilling or len(self._queue))

    def _plan_again(self, before: StepPlan) -> StepPlan | None:
        """Plan the step of the same rows, some positions on; None if there are not enough pages."""
        at, slots, width = self._slots, before.slots, before.width
        starts = at.next[slots]  # with a drafter less may have come of the step before than was hoped for
        short = slots[at.room[slots] < self._drafting.needed(starts, self._context)]
        if len(short) > self._store.num_available:
            return None
        page_slots, page_indices, page_ids = self._extend(short) if len(short) else NO_UPDATES
        at.next[slots] = starts + width
        at.left[slots] = left = at.left[slots] - 1
        self._leaving = not left.all()
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

    def _plan_side(self, updates: list[Update]) -> StepPlan | None:
        """Plan prompt chunks beside the decode rows: as many tokens as the splitter wants now."""
        lanes = self._lanes
        if lanes.side.flying:
            lanes.choose(self._decoding, self._prompts())
        budget, lanes.side_tokens = lanes.side_tokens, 0
        if not budget:
            return None
        admissions = self._admit(updates, budget)
        chunks = self._cut_chunks(budget, SIDE)
        if not chunks:
            return None
        return self._build(NONE, chunks, admissions, updates, SIDE)

    def _prompts(self) -> Prompts:
        """Return what there is of prompts. Those that slots are free for are taken to be as long as the next one."""
        queue, reading = self._queue, self._prefilling
        coming = queue.first() if len(queue) else None
        if not reading and coming is None:
            return Prompts(0, 0, 0, 0)
        at = self._slots
        flying = at.reading & (at.left > 0)  # whose prompts are in the air: they will decode, too
        flying[self._decoding] = False
        flying[[request.slot for request in reading]] = False
        number = len(reading) + int(np.count_nonzero(flying))
        tokens = sum(len(request.prompt) - request.chunked for request in reading)
        limits = [request.limit - request.made for request in reading] + at.left[flying].tolist()
        answers, longest = sum(limits), max(limits, default=0)
        if coming is None:
            return Prompts(tokens, number, tokens, answers, len(limits), longest)
        fit = max(0, self._store.num_available - at.num_running) // (at.pages_at_first(len(coming.prompt)) + 1)
        others = min(len(queue), len(at.free), fit)
        now = tokens + others * len(coming.prompt)
        every = max(now, tokens + queue.prompt_tokens)
        mean = queue.answer_tokens / len(queue)
        slot_steps = (len(queue) - others) * mean / max(1, at.num_running + others)
        return Prompts(
            now, number + others, every, answers + queue.answer_tokens, len(limits) + len(queue),
            max(longest, mean), slot_steps,
        )  # fmt: skip

    def _refresh_decoding(self) -> None:
        """Drop rows that have no more to run, add those whose prompt is through. Costs nothing in a steady step."""
        if not (self._leaving or self._joining):
            return
        at, slots = self._slots, self._decoding
        if self._leaving:
            slots = slots[at.reading[slots] & (at.left[slots] > 0)]
        if self._joining:
            joining = np.array([slot for slot in self._joining if at.reading[slot]], dtype=np.int32)
            slots = np.concatenate([slots, joining])
        self._leaving = False
        self._joining = []
        self._decoding = slots
        self._decoding_sampled = np.flatnonzero(at.sampled[slots]).astype(np.int32)
        self._decoding_truncates = bool(at.truncates[slots].any())

    def _grow(self, slots: Ints, updates: list[Update]) -> Ints:
        """Give each decode row room for this token and the one it emits, with a drafter for all that it may write to;
        return the rows that have it."""
        at = self._slots
        short = slots[at.room[slots] < self._drafting.needed(at.next[slots], self._context)]
        if len(short) <= self._store.num_available:
            if len(short):
                updates.append(self._extend(short))
            return slots
        stalled = []
        for slot in short.tolist():
            if not at.reading[slot]:
                continue  # preempted for an older one a moment ago
            if self._store.num_available or self._make_room(slot):
                updates.append(self._extend(np.array([slot], dtype=np.int32)))
            else:
                stalled.append(slot)
        if not self._leaving and not stalled:
            return slots
        if self._leaving:  # somebody was preempted
            updates[:] = [update for update in updates if at.reading[update[0]].all()]
            self._refresh_decoding()
            slots = self._forms.free(self._decoding)
        return slots[~np.isin(slots, stalled)] if stalled else slots

    def _extend(self, slots: Ints) -> Update:
        if self._queue.shared:
            for slot in slots.tolist():
                if (owner := self._slots.owners[slot]) is not None:
                    self._queue.charge(owner.fairness_key, 1)
        return self._slots.extend(slots)

    def _make_room(self, slot: int) -> bool:
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
        self._preemptions += 1

    def _preempt_for_pressing(self) -> None:
        """Preempt one of a lower priority, if there is one, for a request that was not admitted for want of room."""
        pressing = self._desk.pressing()
        if pressing is not None and self._slots.num_running:
            last = self._last_in_rank()
            if last.priority < pressing.priority:
                self._preempt(last)

    def _admit(self, updates: list[Update], budget: int, *, few: bool = False) -> list[Admission]:
        """Admit who comes next, while slots, pages and a budget of prompt tokens last.

        `few` takes no more than fit into a short step, as far as they are short.
        """
        admissions: list[Admission] = []
        budget -= sum(len(r.prompt) - r.chunked for r in self._prefilling)
        strips = STRIPS[-1] - sum(-((r.chunked - len(r.prompt)) // STRIP) for r in self._prefilling) if few else -1
        for request, update in self._desk.admit(budget, strips if strips >= 0 else None):
            updates.append(update)
            self._forms.enter(request)
            self._prefilling.append(request)
            admissions.append(
                Admission(
                    slot=request.slot,
                    start=request.chunked,
                    temperature=request.temperature,
                    top_k=request.top_k,
                    top_p=request.top_p,
                    min_p=request.min_p,
                    seed=request.seed,
                    shaped=request.shaped,
                    spared=request.prompt[: request.chunked] if self._drafting and request.chunked else None,
                )
            )
        return admissions

    def _cut_chunks(self, budget: int, lane: int) -> list[tuple[Request, int, int]]:
        """Cut this step's prompt chunks, as (request, start, count)."""
        at, chunks, may_score = self._slots, [], MOST_SCORED
        for request in self._prefilling:
            count = min(budget, self._prefill_chunk, len(request.prompt) - request.chunked)
            if count <= 0:
                break
            if request.scoring:
                count = min(count, may_score)
                may_score -= count
                if not count:
                    continue
            chunks.append((request, request.chunked, count))
            request.chunked += count
            budget -= count
            at.next[request.slot] = request.chunked
        done = [request for request, _, _ in chunks if request.chunked == len(request.prompt)]
        if done:
            self._prefilling = [r for r in self._prefilling if r.chunked < len(r.prompt)]
            for request in done:
                at.left[request.slot] -= 1
                if lane == MAIN and at.left[request.slot] > 0:
                    self._joining.append(request.slot)
        return chunks

    def _build(
        self,
        decode: Ints,
        chunks: list[tuple[Request, int, int]],
        admissions: list[Admission],
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
        emits, sampled, truncated = self._all_rows[:num_decode], self._decoding_sampled, self._decoding_truncates
        if num_decode != len(self._decoding):  # some rows stall
            sampled = np.flatnonzero(at.sampled[decode]).astype(np.int32)
            truncated = bool(at.truncates[decode].any())
        at.next[decode] += width
        at.left[decode] -= 1
        self._leaving = self._leaving or not bool(at.left[decode].all())
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
        page_slots, page_indices, page_ids = _columns(updates)
        return StepPlan(
            number=self._planned,
            lane=lane,
            follows=follows,
            share=self._lanes.share(lane),
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
            admissions=tuple(admissions),
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
        if plan.again and not plan.logprobs:
            again = self._repeats.settle(plan, tokens, self._departures)
            if again is not None:
                if plan.width > 1:
                    self._leaving = self._leaving or int(self._slots.left[plan.slots].min()) <= 0
                self.pass_step(plan)
                return again
        self._slots.catch_up()
        self._repeats.forget()
        scored = self._settle_scores(plan, words) if words is not None else ()
        told = tokens[:, 1:] if plan.logprobs else None
        tokens = tokens[:, 0] if plan.logprobs else tokens
        tokens, draft_words = tokens[: plan.num_landing], tokens[plan.num_landing :]
        if plan.width > 1:
            return self._settle_runs(plan, tokens, told, draft_words, scored)
        at = self._slots
        cached = self._settle_chunks(plan) if plan.num_rows > plan.num_decode else {}
        slots = plan.slots[plan.emits]
        told = None if told is None else told[: plan.num_landing]
        reading = at.reading[slots]
        if not reading.all():
            slots, tokens, told = slots[reading], tokens[reading], None if told is None else told[reading]
        at.note_tokens(slots, tokens)
        stopped = (at.stops[slots] == tokens[:, None]).any(axis=1)
        ended = stopped | (at.made[slots] == at.limit[slots])
        keys, fronts = at.keys[slots], at.fronts[slots]
        ends: tuple[End, ...] = ()
        if ended.any():
            ends = tuple(
                self._settle_end(int(slots[i]), bool(stopped[i]), int(tokens[i])) for i in np.flatnonzero(ended)
            )
        if self._forms:
            self._forms.note(plan, slots, tokens[:, None], None, draft_words)
        self.pass_step(plan)
        return Settled(keys, fronts, tokens, ends, cached, told, scored)

    def _settle_scores(self, plan: StepPlan, words: Ints) -> tuple[Scored, ...]:
        """Take in the scores of prompts that are still read."""
        scored = []
        for slot, start, own in cut_scores(plan, words):
            request = self._slots.owners[slot]
            if request is not None and self._slots.reading[slot]:
                request.scored = start + len(own)
                scored.append(Scored(request.key, request.front, start, own))
        return tuple(scored)

    def _settle_runs(
        self, plan: StepPlan, landed: Ints, told: Ints | None, draft_words: Ints, scored: tuple[Scored, ...]
    ) -> Settled:
        """Take in a wide step: up to `width` tokens a row, cut where the answer ends."""
        at = self._slots
        cached = self._settle_chunks(plan) if plan.num_rows > plan.num_decode else {}
        runs, firsts = runs_of(plan, landed)
        slots = plan.slots[plan.emits]
        reading = at.reading[slots]
        num_decode = int(reading[: plan.num_decode].sum())
        slots, runs, firsts = slots[reading], runs[reading], firsts[reading]
        cut = cut_runs(runs, at.stops[slots], at.limit[slots] - at.made[slots])
        self._drafting.note_runs(runs[:num_decode], int(cut.emitted[:num_decode].sum()), plan.number)
        at.note_runs(slots, runs, cut.kept)
        at.next[slots[:num_decode]] -= plan.width - cut.emitted[:num_decode]  # what was hoped for and did not come
        at.left[slots] -= cut.emitted - 1
        self._leaving = self._leaving or bool((at.left[slots] <= 0).any())
        rows, places = np.where(np.arange(plan.width) < cut.kept[:, None])
        keys, fronts = at.keys[slots[rows]], at.fronts[slots[rows]]
        ended = cut.stopped | (at.made[slots] == at.limit[slots])
        ends = tuple(
            self._settle_end(int(slots[i]), bool(cut.stopped[i]), int(runs[i, cut.kept[i] - 1]))
            for i in np.flatnonzero(ended)
        )
        if self._forms:
            self._forms.note(plan, slots, runs, cut.kept, draft_words)
        self.pass_step(plan)
        told = None if told is None else told[firsts[rows] + places]
        return Settled(keys, fronts, runs[rows, places], ends, cached, told, scored)

    def _settle_chunks(self, plan: StepPlan) -> dict[int, int]:
        """Share what the chunks have filled; return the prefix hits of requests whose first token this step brings."""
        at, cached = self._slots, {}
        rows = range(plan.num_decode, plan.num_rows)
        for row, slot in zip(rows, plan.slots[plan.num_decode :].tolist(), strict=True):
            request = at.owners[slot]
            if request is None or not at.reading[slot]:
                continue
            end = int(plan.starts[row] + plan.counts[row])
            at.note_chunk(slot, end)
            self._desk.note_shared(request, end // PAGE)
            if plan.lane == SIDE and end == len(request.prompt) and at.left[slot] > 0:
                self._joining.append(slot)
            if end == len(request.prompt) and request.cached and not request.made:
                cached[request.key] = request.cached
        return cached

    def pass_step(self, plan: StepPlan) -> None:
        """Note that a step has landed, well or not: what waited for it behind a fence is free now."""
        self._lanes[plan.lane].pass_step(plan.number)
        self._settled += 1
        self._open_fences()

    def _open_fences(self) -> None:
        self._slots.open_fences(self._lanes[MAIN].settled, self._lanes[SIDE].settled)

    def _settle_end(self, slot: int, stopped: bool, token: int) -> End:
        request = self._slots.owners[slot]
        if request is None:
            raise InternalError(f"a token came for slot {slot}, which nobody owns")
        self._lanes.note_answer(request.made + int(self._slots.made[slot]), request.limit)
        self._end(request)
        return End(request.key, request.front, "stop" if stopped else "length", token if stopped else None)

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
        if request.chunked < len(request.prompt):
            self._prefilling.remove(request)
        self._desk.note_left(request)
        self._forms.leave(request)
        self._slots.leave(request, self._lanes[MAIN].planned)
        self._leaving = True
        self._departures += 1
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
        if not self._requests and (self._prefilling or not self._desk.expects_nothing):
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
