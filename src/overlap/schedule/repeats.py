"""Repeats: steps of the same rows, settled again and again.

While rows decode and none of them ends or leaves, what is read of their slots' columns to settle a step stays the same,
but for their counts. So it is read once, and a step costs a few operations on columns that are there: about a quarter
of settling it at length, a third if it verifies drafts. Whatever else a step may bring (an end, a limit, prompts,
log-probabilities) is settled at length (`schedule/settling.py`).

Legend: N rows, J numbers of a row's run.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from overlap.cache.pages import Ints
from overlap.schedule.drafting import Drafting
from overlap.schedule.plan import StepPlan
from overlap.schedule.settled import Settled
from overlap.schedule.slots import Slots

_NO_TOKEN: Final = -9
"""Neither a token nor a mark in a run."""
_NONE: Final = np.empty(0, dtype=np.int32)


class _Known:
    """What is found out once about rows."""

    __slots__ = ("departures", "fronts", "keys", "only_front", "slots", "stops", "until_limit")

    def __init__(self, at: Slots, slots: Ints) -> None:
        self.slots = slots
        self.keys, self.fronts, stops = at.keys[slots], at.fronts[slots], at.stops[slots]
        self.stops = np.where(stops < 0, _NO_TOKEN, stops)  # the marks of runs are below 0, too
        self.only_front = int(self.fronts[0]) if (self.fronts == self.fronts[0]).all() else None
        self.departures = at.departures
        """How often a request had left its slot by then: the rows are all read while that stays so."""
        self.until_limit = int((at.limit[slots] - at.made[slots]).min())
        """New tokens until the first of them may have as many as it may have, if it got the most of each step."""


class Repeats:
    """Settles what repeats, and writes to the slots' columns what it brings."""

    def __init__(self, slots: Slots, drafting: Drafting) -> None:
        self._slots, self._drafting = slots, drafting
        self._known: _Known | None = None
        self._seen: Ints = _NONE  # the rows of the last step that repeated and was settled at length

    def forget(self) -> None:
        """A step was settled at length: what was known may be so no more."""
        self._known = None

    def settle(self, plan: StepPlan, tokens: Ints) -> Settled | None:
        """Take in a step of rows that all go on; None, and nothing is done, if one may end here or has left."""
        known = self._rows(plan.slots)
        if known is None:
            return None
        if plan.width > 1:
            return self._settle_runs(plan, tokens, known)
        if known.until_limit <= 1 or (known.stops == tokens[:, None]).any():
            return None
        known.until_limit -= 1
        self._slots.note_again(plan.slots, tokens)
        return Settled(known.keys, known.fronts, tokens, (), only_front=known.only_front)

    def _rows(self, slots: Ints) -> _Known | None:
        """Return what is known of these rows; None if they come for the first time, or are not all read any more."""
        known = self._known
        if known is None or known.slots is not slots or known.departures != self._slots.departures:
            first, self._seen = self._seen is not slots, slots
            if first or not self._slots.reading[slots].all():  # what comes once is not worth finding out about
                return None
            self._slots.catch_up()
            known = self._known = _Known(self._slots, slots)
        return known

    def _settle_runs(self, plan: StepPlan, landed: Ints, known: _Known) -> Settled | None:
        """Do the same for a wide step."""
        at, slots, width = self._slots, plan.slots, plan.width
        runs = landed[: plan.num_landing].reshape(-1, width)
        if known.until_limit <= width or (runs[:, None, :] == known.stops[:, :, None]).any():
            return None
        there = runs >= 0
        emitted = there.sum(axis=1, dtype=np.int32)
        known.until_limit -= int(emitted.max())
        at.note_again(slots, runs)
        at.next[slots] -= width - emitted  # what was hoped for and did not come
        at.left[slots] -= emitted - 1
        tokens = runs[there]
        self._drafting.note_runs(runs, len(tokens))
        keys, fronts = known.keys.repeat(emitted), known.fronts.repeat(emitted)
        return Settled(keys, fronts, tokens, (), only_front=known.only_front)
