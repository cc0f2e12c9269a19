"""Drafting as the planner sees it: how wide a step is, how far its rows may write, and what came of the drafts.

Legend: N rows, J numbers of a row's run (see `schedule.runs`).
"""

from __future__ import annotations

from typing import Final

import numpy as np

from overlap.cache.pages import PAGE, Ints
from overlap.errors import InternalError
from overlap.schedule.pace import Pace
from overlap.schedule.plan import REFUSED, Ladder, StepPlan, widths_for
from overlap.schedule.runs import DraftCounts, count_drafts

MOST_LATE: Final = 32
"""Steps whose runs are counted at once at most."""


class Drafting:
    """Says how many positions a decode row runs, and counts what became of its drafts. False without a drafter."""

    def __init__(
        self,
        drafts: int,
        ahead: int,
        pace: Pace | None,
        ladder: Ladder | None = None,
        *,
        with_prompts: bool = True,
        strips: bool = False,
    ) -> None:
        """`drafts` is how many drafted tokens a decode row verifies at most, under PAGE; 0 without a drafter.

        `ladder` says how many by the number of rows; None for always as many. `pace` says how many of them pay; None
        takes the most. The drafter writes to up to `ahead` positions behind the last token of a row. `with_prompts`
        False drafts nothing in steps that read prompts. `strips` says that short ones of those are one launch, whose
        rows verify nothing but may get drafts.
        """
        if not 0 <= drafts < PAGE or ahead > drafts:
            raise InternalError(f"{drafts} drafts, {ahead} ahead: a row would outgrow a page in one step")
        self.most: Final = drafts
        self._ladder: Final = ladder or ((1, drafts),)
        self._widths: Final[dict[int, tuple[int, ...]]] = {}  # by rows, the most first
        self.ahead: Final = max(1, ahead)
        """Positions behind a row's last token that are written to, one of which is the next token's."""
        nothing = DraftCounts(0, np.zeros(drafts, dtype=np.int64), np.zeros(drafts, dtype=np.int64))
        self._counted: tuple[DraftCounts, list[Ints]] = nothing, []  # and the runs, of one width, that are not yet
        self._first_has_none = ahead > 0  # the first wide step behind a plain one verifies no draft: it makes the first
        self._pace = pace
        self._with_prompts = with_prompts
        self.strips: Final = strips and drafts > 0
        """Whether steps with short prompts are one launch, and draft."""
        self._wanted = False  # the decode rows of the step with prompts that is planned now would verify drafts
        self._drafted = False  # the last step did
        self._read = False  # the last step read prompts, and drafted nothing for that
        self._owing: set[int] = set()  # steps in the air that have no drafts to verify for that

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
        widths = self._widths.get(num_decode)
        if widths is None:
            widths = self._widths[num_decode] = widths_for(num_decode, self._ladder)
        if num_decode * widths[0] >= budget:
            widths = tuple(width for width in widths if num_decode * width < budget)
        if not widths:
            return 1
        return widths[0] if self._pace is None else self._pace.choose(num_decode, widths)

    def drafts(
        self, number: int, width: int, num_decode: int, num_chunks: int = 0, *, short: bool = False, then: int = 0
    ) -> bool:
        """Return whether step `number` drafts for its rows' next one.

        `short` says that its prompt chunks are, `then` how many rows will decode behind it.
        """
        short = short and self.strips
        wide = self.most > 0 and (width > 1 or not num_decode)
        if short:
            on = self._pace is None or self._pace.is_on(max(then, num_chunks))
            wide = self.most > 0 and (self._wanted if num_decode else on)
        if wide and self._read and not num_chunks:
            self._owing.add(number)
        self._drafted = wide and (self._with_prompts or short or not num_chunks)
        self._read = num_chunks > 0 and not (self._with_prompts or short)
        return self._drafted

    def beside_prompts(self, width: int, *, short: bool = False) -> int:
        """Return the width of a step with prompts too: 1 if it would neither verify drafts nor make some, or is short.

        Of rows that have drafts those are lost then: less than what pieces take longer.
        """
        self._wanted = width > 1
        if short and self.strips:
            return 1
        return width if self._with_prompts or self._drafted else 1

    def needed(self, starts: Ints, context: int) -> Ints:
        """Return up to which position [N] each row that goes on at `starts` [N] may write in a step."""
        needed = starts + (self.most + 1 + self.ahead)
        return np.minimum(needed, context) if self.most else needed

    def note_runs(self, runs: Ints, num_emitted: int, number: int = 0) -> None:
        """Take in what became of the drafts of decode rows' runs [N, J], which emitted so many tokens together.

        `number` is their step's, if that was not a repeated one.
        """
        owed = number in self._owing  # drafting has to pay in spite of what prompts cost it
        if owed:
            self._owing = {other for other in self._owing if other > number}
        if not len(runs):
            return
        _, late = self._counted
        if len(late) == MOST_LATE or (late and late[-1].shape[1] != runs.shape[1]):
            self._counted = self.counts(), []
        self._counted[1].append(runs)
        had_some = num_emitted > len(runs) or not self._first_has_none or owed or bool((runs == REFUSED).any())
        if self._pace is not None:
            full = np.count_nonzero(runs[:, -1] >= 0) / len(runs)
            self._pace.note_emitted(num_emitted / len(runs) if had_some else None, full)

    def counts(self) -> DraftCounts:
        """Return what became of all drafts so far. From any thread: it changes nothing."""
        counts, late = self._counted
        late = list(late)
        if not late:
            return counts
        new, missing = count_drafts(np.concatenate(late)), self.most - (late[0].shape[1] - 1)
        return DraftCounts(
            counts.drafted + new.drafted,
            counts.tried_at + np.pad(new.tried_at, (0, missing)),
            counts.accepted_at + np.pad(new.accepted_at, (0, missing)),
        )

    def note_time(self, plan: StepPlan, seconds: float) -> None:
        """Take in what a step took, with what the device waited for it."""
        if self._pace is not None and plan.num_decode == plan.num_rows:
            self._pace.note_time(plan.num_decode, plan.width, seconds)

    def explain(self) -> tuple[str, ...]:
        """Return what drafting brought, as far as that is measured."""
        return self._pace.explain() if self._pace is not None else ()
