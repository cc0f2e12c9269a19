"""The stream's promise: work in order, marks in that order, and one verb that waits.

Three keepers: `cuda.CudaStream`, `cpu.CpuStream` (a worker thread) and `sim.SimStream` (virtual time).
`overlap.testing.check_stream` is the promise as a test, and runs against all three.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol, TypeAlias, TypeVar

Mark: TypeAlias = object
"""A place in a stream's order. Opaque: only streams of the same device look inside."""

T = TypeVar("T")


class Busy(NamedTuple):
    """When the work between a mark and the mark before it ran, in seconds on its stream's clock.

    That clock is the host's (`time.perf_counter`) as it was when the stream was made; on a device that has a clock of
    its own the two drift apart by some millionths. The simulated clock is virtual. Marks follow each other without a
    hole: `start` is the `end` of the mark before plus `gap`.
    """

    stream: str
    """The stream's name."""
    start: float
    """When the first work began. For a mark behind no new work: its `end`."""
    end: float
    gap: float
    """How long the stream had nothing to run before `start`: 0 for its first mark."""
    typical: bool = True
    """Whether such work takes as long the next time; not if something was built or captured meanwhile."""


class Stream(Protocol):
    """What every device offers. Only `wait_reached` waits, and other tasks of the loop run meanwhile.

    If queued work fails, what was queued behind it still runs, and the mark right behind the failed work raises the
    failure from `wait_reached` (each later mark does not: a failure is told once).
    """

    @property
    def name(self) -> str:
        """What the timeline calls it."""

    def use(self, share: int) -> None:
        """Run what is launched next on a share of the device, 0 for all of it, still behind all earlier work.

        What a share is the device says: on CUDA, SMs. Raises an error for one that this stream cannot have.
        """

    def launch(self, work: str, run: Callable[[], object], *, tokens: int = 1) -> None:
        """Queue `run` behind all earlier work and return at once. `work` names it in the timeline."""

    def mark(self) -> Mark:
        """Return the place right behind what was launched last."""

    def follow(self, mark: Mark) -> None:
        """Let what is launched next start no sooner than `mark`: the device waits, the host does not."""

    def reached(self, mark: Mark) -> bool:
        """Return whether the device has passed `mark`. Never waits."""

    async def wait_reached(self, mark: Mark) -> None:
        """Return once the device has passed `mark`; raise what the work before it raised."""

    def busy(self, mark: Mark) -> Busy:
        """Return when the work between `mark` and the mark before it ran. Only once `mark` was reached; never waits."""

    def close(self) -> None:
        """Finish what is queued, then give back threads and events. Idempotent; may block; not for the hot path."""
