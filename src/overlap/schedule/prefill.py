"""Prefill: the prompts that are being read, chunk by chunk: the highest priority first, then in order of admission.

Pages for a prompt are there when its request is admitted (`schedule/desk.py`). A request whose prompt is through
decodes from the next plan on; if it was read in the side lane, once the step that reads its end has been settled.
"""

from __future__ import annotations

from bisect import insort
from typing import TypeAlias

import numpy as np

from overlap.cache.pages import Ints
from overlap.schedule.decoding import Decoding
from overlap.schedule.desk import Desk
from overlap.schedule.drafting import Drafting
from overlap.schedule.forms import Forms
from overlap.schedule.plan import MAIN, STRIP, STRIPS, Admission, is_short
from overlap.schedule.request import Request
from overlap.schedule.shaping import MOST_SCORED
from overlap.schedule.slots import Slots, Update
from overlap.schedule.split import Prompts

Chunk: TypeAlias = tuple[Request, int, int]
"""A request, and where a chunk of its prompt starts, and how many tokens it has."""


class Prefill:
    """Admits requests, and cuts their prompts into chunks. The planner's."""

    def __init__(
        self,
        slots: Slots,
        desk: Desk,
        forms: Forms,
        drafting: Drafting,
        decoding: Decoding,
        *,
        chunk: int,
    ) -> None:
        """`chunk` is how many tokens of one prompt a step reads at most."""
        self._slots, self._store, self._desk, self._queue = slots, slots.store, desk, desk.queue
        self._forms, self._drafting, self._decoding = forms, drafting, decoding
        self._chunk = chunk
        self._requests: list[Request] = []
        self._entering: dict[int, tuple[Admission, Update]] = {}
        """By key, what the device has to be told of those of whom it has read nothing yet."""

    def __len__(self) -> int:
        return len(self._requests)

    def drop(self, request: Request) -> None:
        """A request leaves its slot."""
        self._entering.pop(request.key, None)
        if request.chunked < len(request.prompt):
            self._requests.remove(request)

    def admit(self, budget: int, *, few: bool = False) -> None:
        """Admit who comes next, while slots, pages and a budget of prompt tokens last.

        What the budget has for one is what a step does not need for prompts of who is as pressing, or more. `few` takes
        no more than fit into a short step, as far as they are short.
        """
        if not len(self._queue):
            return
        self._decoding.refresh()  # a slot that is given anew must not be taken for the row that has left it
        left, before = budget, 0

        def budget_for(coming: Request) -> int:
            """Those who ask come by priority, as do those that are read: so each of these is counted once."""
            nonlocal left, before
            while before < len(self._requests) and self._requests[before].priority >= coming.priority:
                request, before = self._requests[before], before + 1
                left -= min(self._chunk, len(request.prompt) - request.chunked)
            return left

        strips = STRIPS[-1] - sum(-((r.chunked - len(r.prompt)) // STRIP) for r in self._requests) if few else -1
        for request, update in self._desk.admit(budget_for, strips if strips >= 0 else None):
            self._forms.enter(request)
            insort(self._requests, request, key=_rank)
            self._entering[request.key] = self._admission(request), update

    def _admission(self, request: Request) -> Admission:
        return Admission(
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

    def entering(self, chunks: list[Chunk], updates: list[Update]) -> tuple[Admission, ...]:
        """Return the admissions of those whose first chunk is among these, and add the updates of their pages."""
        if not self._entering:
            return ()
        entered = [self._entering.pop(request.key) for request, _, _ in chunks if request.key in self._entering]
        updates += [update for _, update in entered]
        return tuple(admission for admission, _ in entered)

    def cut(self, budget: int, lane: int) -> list[Chunk]:
        """Cut the chunks of a lane's step."""
        at, chunks, may_score = self._slots, list[Chunk](), MOST_SCORED
        for request in self._requests:
            count = min(budget, self._chunk, len(request.prompt) - request.chunked)
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
            self._requests = [r for r in self._requests if r.chunked < len(r.prompt)]
            for request in done:
                at.left[request.slot] -= 1
                if lane == MAIN and at.left[request.slot] > 0:
                    self._decoding.join(request.slot)
        return chunks

    def is_short(self, decode: Ints, chunks: list[Chunk]) -> bool:
        """Return whether a step of these rows is short (see `plan.is_short`) and has nothing that no graph has."""
        if not self._drafting.strips or self._forms or bool(self._slots.logprobs[decode].any()):
            return False
        for request, _, _ in chunks:
            if request.chunked < len(request.prompt) or request.scoring or request.logprobs or request.matcher:
                return False
        num_strips = len(decode) + sum(-(-count // STRIP) for _, _, count in chunks)
        longest = max(int(self._slots.next[decode].max(initial=0)), *(begin + count for _, begin, count in chunks))
        return is_short(num_strips, longest + 1)

    def outlook(self) -> Prompts:
        """Return what there is of prompts. Those that slots are free for are taken to be as long as the next one."""
        queue, reading = self._queue, self._requests
        coming = queue.first() if len(queue) else None
        if not reading and coming is None:
            return Prompts(0, 0, 0, 0)
        at = self._slots
        flying = at.reading & (at.left > 0)  # whose prompts are in the air: they will decode, too
        flying[self._decoding.slots] = False
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


def _rank(request: Request) -> int:
    return -request.priority
