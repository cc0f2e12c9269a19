"""Forms: the rows whose answers are held to a form, and when each of them may run.

The mask of a token depends on the token before it, which the host learns when its step is settled. So such a row sits
out while its token is in the air, and until the mask behind it is made: it takes part in every second step, while the
other rows of the engine go on one step ahead. No mask is ever guessed, so none is ever wrong. With a drafter, the
drafts that the step has made for the row land with its token, so that there is a mask behind each of them, too.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from overlap.cache.pages import Ints
from overlap.errors import InternalError
from overlap.schedule.matcher import Matcher
from overlap.schedule.plan import StepPlan
from overlap.schedule.request import Request


class Forms:
    """Which slots have a matcher, and which of them sit out. The planner's."""

    def __init__(self, max_rows: int) -> None:
        self._requests: dict[int, Request] = {}
        self._formed: npt.NDArray[np.bool_] = np.zeros(max_rows, dtype=np.bool_)
        """Slots whose request has a form, ..."""
        self._flying: npt.NDArray[np.bool_] = np.zeros(max_rows, dtype=np.bool_)
        """... whose token is in the air, ..."""
        self._held: npt.NDArray[np.bool_] = np.zeros(max_rows, dtype=np.bool_)
        """... and which sit out."""
        self.steps = 0
        """Steps with a row that is held to a form."""
        self.requests = 0
        """Requests with a form that were submitted."""

    def __bool__(self) -> bool:
        """Whether any running request has a form."""
        return bool(self._requests)

    def enter(self, request: Request) -> None:
        """A request takes its slot. Its matcher is ready, since it was not admitted before (`may_enter`)."""
        if request.matcher is not None:
            self._requests[request.slot] = request
            self._formed[request.slot] = True

    def leave(self, request: Request) -> None:
        """A request gives up its slot. What is in the air for it is never taken in."""
        if request.matcher is not None:
            del self._requests[request.slot]
            self._formed[request.slot] = self._flying[request.slot] = self._held[request.slot] = False

    def free(self, slots: Ints) -> Ints:
        """Return those of `slots` that may run now."""
        for slot, request in self._requests.items():
            if self._held[slot] and not self._flying[slot] and may_enter(request):
                self._held[slot] = False
        return slots[~self._held[slots]] if self._requests else slots

    @property
    def waits(self) -> bool:
        """Whether a running request waits for nothing but its mask."""
        return bool((self._held & ~self._flying).any())

    def masks(self, slots: Ints) -> tuple[tuple[int, ...], tuple[Ints, ...]]:
        """Return which of a new step's emitting slots have a mask, as indices, and the masks; they sit out from now."""
        rows = np.flatnonzero(self._formed[slots])
        held = slots[rows]
        masks = tuple(_matcher(self._requests[slot]).mask for slot in held.tolist())
        self._flying[held] = self._held[held] = True
        self.steps += bool(masks)
        return tuple(rows.tolist()), masks

    def note(self, plan: StepPlan, slots: Ints, runs: Ints, kept: Ints | None, draft_words: Ints) -> None:
        """Take in the settled tokens of each of `slots`; those that have ended meanwhile have left.

        `runs` are [n, width], of which `kept` [n] count; None: all.
        """
        drafts = _drafts_of(plan, draft_words)
        for row in np.flatnonzero(self._flying[slots]).tolist():
            slot = int(slots[row])
            self._flying[slot] = False
            tokens = runs[row] if kept is None else runs[row, : kept[row]]
            _matcher(self._requests[slot]).take(tokens.tolist(), drafts.get(slot, ()))

    def unmatched(self) -> list[Request]:
        """Return the running requests whose form allows nothing any more: they have to be ended."""
        return [r for r in self._requests.values() if _matcher(r).ready and _matcher(r).failure is not None]


def _drafts_of(plan: StepPlan, words: Ints) -> dict[int, Sequence[int]]:
    """Return the drafts that masked rows hold now, by slot."""
    if not len(words):
        return {}
    slots = plan.slots[plan.emits[list(plan.masked)]].tolist()
    return {
        slot: told[1 : 1 + told[0]] for slot, told in zip(slots, words.reshape(len(slots), -1).tolist(), strict=True)
    }


def may_enter(request: Request) -> bool:
    """Whether the mask of a request's next token is there, or none is needed."""
    return request.matcher is None or (request.matcher.ready and request.matcher.failure is None)


def _matcher(request: Request) -> Matcher:
    if request.matcher is None:
        raise InternalError(f"the request {request.key} is held to no form")
    return request.matcher
