"""The graphs of one lane: a driver for each share of the SMs that the lane has run with.

A kernel in a graph runs on the SMs of the stream that it was recorded on, so what was captured for one share is of no
use to another. Each driver has its own memory: pools are bound to a stream. The graphs of a share are captured when
they are used again; in idle gaps only those that were missed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from overlap.graphs.driver import GraphDriver, GraphStatistics
from overlap.graphs.policy import Shape


class ShareGraphs:
    """Use it on one thread, inside the lane's stream, which must be at the same share."""

    def __init__(self, make: Callable[[int], GraphDriver]) -> None:
        """`make` returns a new driver of a share; that of share 0, all SMs, is made now."""
        self._make = make
        self._drivers = {0: make(0)}
        self.current: GraphDriver | None = self._drivers[0]
        """That of the share that steps have now; None if there was no memory for one."""
        self._incomplete = True

    def turn_to(self, share: int) -> None:
        """Let `current` be the driver of a share, and know nothing of what others have launched."""
        self.current = None
        if share not in self._drivers:
            self._drivers[share] = self._make(share)
        self.current = self._drivers[share]
        self.current.forget_turn()

    def next_idle(self, *, missed_only: bool) -> tuple[int, Shape] | None:
        """Return what to capture in an idle moment and for which share, or None if all that is of use is there."""
        for share, driver in self._drivers.items():
            shape = driver.policy.next_idle(missed_only=missed_only or share > 0)
            if shape is not None:
                self._incomplete = True
                return share, shape
        self._incomplete = False
        return None

    def statistics(self) -> GraphStatistics:
        """Return the figures of all."""
        first, *others = (driver.statistics() for driver in self._drivers.values())
        return replace(sum(others, first), incomplete=int(self._incomplete))

    def explain(self) -> tuple[str, ...]:
        """Return what runs as which graph, share by share."""
        lines = list(self._drivers[0].explain())
        for share, driver in sorted(self._drivers.items())[1:]:
            lines += [f"sm:{share}: {line}" for line in driver.explain()]
        return tuple(lines)

    def close(self) -> None:
        """Free all graphs and pools. The stream must have finished."""
        for driver in self._drivers.values():
            driver.close()
