"""Settling: what the tokens that a step emitted mean for the requests that still read them.

A steady step's tokens are looked at for nothing but ends (`schedule/repeats.py`). With a drafter only the device knows
how many tokens come of a row until its step is settled, so `next` had been an upper bound, as if every draft in the air
were confirmed. What turns out not to be is taken back here; pages that were taken for it stay, and hold what comes
instead.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from overlap.cache.pages import PAGE, Ints
from overlap.errors import InternalError
from overlap.schedule.decoding import Decoding
from overlap.schedule.desk import Desk
from overlap.schedule.drafting import Drafting
from overlap.schedule.forms import Forms
from overlap.schedule.plan import SIDE, StepPlan
from overlap.schedule.repeats import Repeats
from overlap.schedule.request import Request
from overlap.schedule.runs import cut_runs, runs_of
from overlap.schedule.scores import Scored, cut_scores
from overlap.schedule.settled import End, Settled
from overlap.schedule.slots import Bools, Slots


class Settling:
    """Takes in what lands. The planner's."""

    def __init__(
        self,
        slots: Slots,
        desk: Desk,
        forms: Forms,
        drafting: Drafting,
        decoding: Decoding,
        *,
        end: Callable[[Request, int], None],
    ) -> None:
        """`end` ends a request, whose answer has so many tokens."""
        self._slots, self._desk = slots, desk
        self._forms, self._drafting, self._decoding = forms, drafting, decoding
        self._repeats = Repeats(slots, drafting)
        self._end = end

    def settle(self, plan: StepPlan, tokens: Ints, words: Ints | None) -> Settled:
        """Take in the tokens of a step, as `Planner.settle` says."""
        if plan.again and not plan.logprobs:
            again = self._repeats.settle(plan, tokens)
            if again is not None:
                if plan.width > 1:
                    self._decoding.note_less_left(plan.slots)
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
        keys, fronts = at.keys[slots], at.fronts[slots]
        ends = self._settle_ends(slots, stopped, tokens)
        if self._forms:
            self._forms.note(plan, slots, tokens[:, None], None, draft_words)
        return Settled(keys, fronts, tokens, ends, cached, told, scored)

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
        self._decoding.note_less_left(slots)
        rows, places = np.where(np.arange(plan.width) < cut.kept[:, None])
        keys, fronts = at.keys[slots[rows]], at.fronts[slots[rows]]
        ends = self._settle_ends(slots, cut.stopped, runs[np.arange(len(runs)), cut.kept - 1])
        if self._forms:
            self._forms.note(plan, slots, runs, cut.kept, draft_words)
        told = None if told is None else told[firsts[rows] + places]
        return Settled(keys, fronts, runs[rows, places], ends, cached, told, scored)

    def _settle_ends(self, slots: Ints, stopped: Bools, tokens: Ints) -> tuple[End, ...]:
        """End what has stopped, or has as many tokens as it may have. `tokens` are the last ones."""
        at = self._slots
        ended = stopped | (at.made[slots] == at.limit[slots])
        if not ended.any():
            return ()
        return tuple(self._settle_end(int(slots[i]), bool(stopped[i]), int(tokens[i])) for i in np.flatnonzero(ended))

    def _settle_end(self, slot: int, stopped: bool, token: int) -> End:
        request = self._slots.owners[slot]
        if request is None:
            raise InternalError(f"a token came for slot {slot}, which nobody owns")
        self._end(request, request.made + int(self._slots.made[slot]))
        return End(request.key, request.front, "stop" if stopped else "length", token if stopped else None)

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
                self._decoding.join(slot)
            if end == len(request.prompt) and request.cached and not request.made:
                cached[request.key] = request.cached
        return cached

    def _settle_scores(self, plan: StepPlan, words: Ints) -> tuple[Scored, ...]:
        """Take in the scores of prompts that are still read."""
        scored = []
        for slot, start, own in cut_scores(plan, words):
            request = self._slots.owners[slot]
            if request is not None and self._slots.reading[slot]:
                request.scored = start + len(own)
                scored.append(Scored(request.key, request.front, start, own))
        return tuple(scored)
