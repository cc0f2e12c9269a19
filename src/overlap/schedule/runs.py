"""Runs: what a speculating step brings, several tokens a row, and where each run is cut.

Legend: N rows, J numbers a row (its tokens, then REFUSED for each refused draft, then UNUSED), W stop ids of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from overlap.cache.pages import Ints
from overlap.schedule.plan import REFUSED, UNUSED, StepPlan


@dataclass(frozen=True, slots=True)
class Cut:
    """How much of each run counts: int32 or bool [N] each."""

    emitted: Ints
    """Tokens that the device chose, whether anybody wants them or not."""
    kept: Ints
    """Of those, the ones up to the row's first stop id, or its limit."""
    stopped: npt.NDArray[np.bool_]
    """Whether the last kept one is a stop id."""


def runs_of(plan: StepPlan, landed: Ints) -> tuple[Ints, Ints]:
    """Return what landed as runs [E, J], and the first index of each run in `landed`, [E]."""
    num_decode, width = plan.num_decode, plan.width
    runs = np.full((len(plan.emits), width), UNUSED, dtype=np.int32)
    runs[:num_decode] = landed[: num_decode * width].reshape(num_decode, width)
    runs[num_decode:, 0] = landed[num_decode * width :]
    firsts = np.arange(len(plan.emits), dtype=np.int32)
    firsts[:num_decode] *= width
    firsts[num_decode:] += num_decode * (width - 1)
    return runs, firsts


def cut_runs(runs: Ints, stops: Ints, left: Ints) -> Cut:
    """Cut runs [N, J] behind their first stop id, of `stops` [N, W] (padded with -1), and at `left` [N] tokens."""
    width = runs.shape[1]
    emitted = (runs >= 0).sum(axis=1, dtype=np.int32)
    is_stop = (runs[:, :, None] == stops[:, None, :]).any(axis=2) & (runs >= 0)
    until_stop = np.where(is_stop.any(axis=1), is_stop.argmax(axis=1) + 1, width + 1).astype(np.int32)
    kept = np.minimum(np.minimum(emitted, until_stop), left)
    return Cut(emitted, kept, kept == until_stop)


@dataclass(frozen=True, slots=True)
class DraftCounts:
    """What became of the drafts of some runs."""

    drafted: int
    tried_at: npt.NDArray[np.int64]
    """[J - 1]: how many runs had a draft at each place, all drafts before it confirmed."""
    accepted_at: npt.NDArray[np.int64]
    """[J - 1]: of those, how many were confirmed."""


def count_drafts(runs: Ints) -> DraftCounts:
    """Return what became of the drafts of decode rows' runs [N, J]."""
    places = np.arange(runs.shape[1] - 1)
    confirmed = (runs >= 0).sum(axis=1) - 1
    drafted = confirmed + (runs == REFUSED).sum(axis=1)
    tried_at = (places < np.minimum(confirmed + 1, drafted)[:, None]).sum(axis=0)
    return DraftCounts(int(drafted.sum()), tried_at, (places < confirmed[:, None]).sum(axis=0))
