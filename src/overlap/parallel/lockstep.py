"""A rank's stream: once a step has failed on it, none behind that is run.

Another stream runs on after a failure. A rank must not: the sums of its next step would meet those of the step that
the other ranks still run, and be added to them.
"""

from __future__ import annotations

from collections.abc import Callable

from overlap.errors import EngineDead
from overlap.streams.stream import Busy, Mark, Stream


class Lockstep:
    """Keeps the Stream promise over another stream, but for that."""

    def __init__(self, stream: Stream, failed: Callable[[BaseException], None] | None = None) -> None:
        """`failed` is called once, where the work failed, with what it raised."""
        self._stream = stream
        self._tell = failed
        self._over = False

    @property
    def name(self) -> str:
        """What the timeline calls it."""
        return self._stream.name

    def use(self, share: int) -> None:
        """Run what is launched next on a share of the device."""
        self._stream.use(share)

    def launch(self, work: str, run: Callable[[], object], *, tokens: int = 1) -> None:
        """Queue `run` behind all earlier work, to be run if that has not failed."""
        self._stream.launch(work, lambda: self._run(run), tokens=tokens)

    def _run(self, run: Callable[[], object]) -> None:
        if self._over:
            raise EngineDead("A step before this one failed on this rank.")
        try:
            run()
        except BaseException as failure:
            self._over = True
            if self._tell is not None:
                self._tell(failure)
            raise

    def mark(self) -> Mark:
        """Return the place right behind what was launched last."""
        return self._stream.mark()

    def follow(self, mark: Mark) -> None:
        """Let what is launched next start no sooner than `mark`."""
        self._stream.follow(mark)

    def reached(self, mark: Mark) -> bool:
        """Return whether the device has passed `mark`."""
        return self._stream.reached(mark)

    async def wait_reached(self, mark: Mark) -> None:
        """Return once the device has passed `mark`; raise what the work before it raised."""
        await self._stream.wait_reached(mark)

    def busy(self, mark: Mark) -> Busy:
        """Return when the work between `mark` and the mark before it ran."""
        return self._stream.busy(mark)

    def close(self) -> None:
        """Finish what is queued, then give back threads and events."""
        self._stream.close()
