"""The stream's promise: work in order, marks in that order, and one verb that waits.

Three keepers: `cuda.CudaStream`, `cpu.CpuStream` (a worker thread) and `sim.SimStream` (virtual time).
`overlap.testing.check_stream` is the promise as a test, and runs against all three.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeAlias, TypeVar

Mark: TypeAlias = object
"""A place in a stream's order. Opaque: only streams of the same device look inside."""

T = TypeVar("T")


class Stream(Protocol):
    """What every device offers. Only `wait_reached` waits, and other tasks of the loop run meanwhile.

    If queued work fails, what was queued behind it still runs, and the mark right behind the failed work raises the
    failure from `wait_reached` (each later mark does not: a failure is told once).
    """

    @property
    def name(self) -> str:
        """What the timeline calls it."""

    def launch(self, work: str, run: Callable[[], object], *, tokens: int = 1) -> None:
        """Queue `run` behind all earlier work and return at once. `work` names it in the timeline."""

    def mark(self) -> Mark:
        """Return the place right behind what was launched last."""

    def follow(self, mark: Mark) -> None:
        """Let what is launched next start no sooner than `mark`: the device waits, the host does not."""

    async def wait_reached(self, mark: Mark) -> None:
        """Return once the device has passed `mark`; raise what the work before it raised."""

    def close(self) -> None:
        """Finish what is queued, then give back threads and events. Idempotent; may block; not for the hot path."""
