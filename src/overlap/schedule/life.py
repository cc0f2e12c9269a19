"""The life of a request, as one table.

DRAINING is the state that overlap adds: the reader is done, and a launched step still writes to the request's pages.
Engines that lack it free a slot twice when an abort meets a finish (mini-sglang#111).

A preempted request goes back to WAITING at once, also with a flight in the air: its slot and pages wait behind a fence
of their own, what the flight brings for that slot is dropped, and the request takes a fresh slot when it resumes.
"""

from __future__ import annotations

from enum import Enum
from typing import Final

from overlap.errors import InternalError


class Life(Enum):
    """Where a request is."""

    WAITING = "waiting"
    RUNNING = "running"
    DRAINING = "draining"
    GONE = "gone"


class Change(Enum):
    """What can happen to a request."""

    ADMIT = "be admitted"
    PREEMPT = "be preempted"
    END = "end"
    LAND = "land"


LIFE: Final[dict[tuple[Life, Change], Life]] = {
    (Life.WAITING, Change.ADMIT): Life.RUNNING,
    (Life.WAITING, Change.END): Life.GONE,
    (Life.RUNNING, Change.PREEMPT): Life.WAITING,
    (Life.RUNNING, Change.END): Life.DRAINING,  # its reader is done; a launched step may still write to its pages
    (Life.DRAINING, Change.LAND): Life.GONE,
}
"""All that may happen. What is not here is an InternalError."""


def after(life: Life, change: Change) -> Life:
    """Return the state that follows."""
    try:
        return LIFE[life, change]
    except KeyError:
        raise InternalError(f"a {life.name} request cannot {change.value}") from None
