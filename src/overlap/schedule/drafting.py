"""Drafting as the planner sees it: how wide a step is, how far its rows may write, and what came of the drafts.

Legend: N rows, J numbers of a row's run (see `schedule.runs`).
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from overlap.cache.pages import PAGE, Ints
from overlap.errors import InternalError
from overlap.schedule.pace import Pace
from overlap.schedule.plan import StepPlan
from overlap.schedule.runs import count_drafts


class Drafting:
    """Says how many positions a decode row runs, and counts what became of its drafts. False without a drafter."""

    def __init__(self, drafts: int, ahead: int, pace: Pace | None) -> None:
        """`drafts` is how many drafted tokens a decode row verifies at most, under PAGE; 0 without a drafter.

        The drafter writes to up to `ahead` positions behind the last token of a row. `pace` says when drafting pays;
        None always drafts.
        """
        if not 0 <= drafts < PAGE or ahead > drafts:
            raise InternalError(f"{drafts} drafts, {ahead} ahead: a row would outgrow a page in one step")
        self.most: Final = drafts
        self.ahead: Final = max(1, ahead)
        """Positions behind a row's last token that are written to, one of which is the next token's."""
        self.drafted = 0
        """Drafted tokens that were verified."""
        self.tried_at: npt.NDArray[np.int64] = np.zeros(drafts, dtype=np.int64)
        """Of each place in a run: drafts behind confirmed ones only."""
        self.accepted_at: npt.NDArray[np.int64] = np.zeros(drafts, dtype=np.int64)
        """Of those, the confirmed ones."""
        self._first_has_none = ahead > 0  # the first wide step behind a plain one verifies no draft: it makes the first
        self._pace = pace

    def __bool__(self) -> bool:
        return self.most > 0

    @property
    def paced(self) -> bool:
        """Whether it is measured if drafting pays."""
        return self._pace is not None

    def width(self, num_decode: int, budget: int) -> int:
        """Return how many positions each decode row of the next step runs, with a budget of tokens for all."""
        if not (self.most and num_decode):
            return 1
        wide = self.most + 1
        fits = num_decode * wide < budget
        return wide if fits and (self._pace is None or self._pace.choose(num_decode)) else 1

    def needed(self, starts: Ints, context: int) -> Ints:
        """Return up to which position [N] each row that goes on at `starts` [N] may write in a step."""
        needed = starts + (self.most + 1 + self.ahead)
        return np.minimum(needed, context) if self.most else needed

    def note_runs(self, runs: Ints) -> None:
        """Take in what became of the drafts of decode rows' runs [N, J]."""
        outcome = count_drafts(runs)
        self.tried_at += outcome.tried_at
        self.accepted_at += outcome.accepted_at
        self.drafted += outcome.drafted
        if self._pace is not None and len(runs) and (outcome.drafted or not self._first_has_none):
            self._pace.note_emitted(1 + int(outcome.accepted_at.sum()) / len(runs))

    def note_time(self, plan: StepPlan, seconds: float) -> None:
        """Take in what a step took, with what the device waited for it."""
        if self._pace is not None and plan.num_decode == plan.num_rows:
            self._pace.note_time(plan.num_decode, plan.width, seconds)

    def explain(self) -> tuple[str, ...]:
        """Return what drafting brought, as far as that is measured."""
        return self._pace.explain() if self._pace is not None else ()
