"""Turns: how readers and the engine's thread share the interpreter of one program.

Python takes the interpreter's lock from a thread only every 5 ms, longer than most steps take: a reader of many answers
would hold up the engine that feeds it. So readers give it up by themselves now and then, which costs them some 70 µs
each time, since the thread has to sleep for the other to wake up. While a step runs on a device of its own, though, the
engine's thread sleeps and wants nothing, and it knows for how long about: then readers go on.

And while it launches a step of many parts, it lets go of the lock in each, since torch does, and wants it back at once:
then readers give it up with every Output. (40 such calls: 11 ms beside a thread that gives it up every 200 µs, 4 ms
beside one that does with every Output, 3.4 ms alone: `python bench/turns.py`. Beside steps that are one launch it would
do harm: see the log.)
"""

from __future__ import annotations

from time import perf_counter, sleep
from typing import Final

TURN_S: Final = 2e-4
SURE: Final = 0.9
"""Of the time that a step took, what the next one of the same rows will take at least."""
WAKING_S: Final = 1e-4
"""How long before the end of a step the rest is over."""
DRIFT: Final = 1e-4
"""By how much the device's clock may fall behind the host's, at most."""


class Rest:
    """When the engine's thread wants the interpreter, and when not. Its loop writes it, readers on any thread read.

    When a step ends follows from the one before by the device's clock, not from when that was seen to have ended: a
    loop that readers had held up would let them go on for longer still.
    """

    __slots__ = ("_end", "_late", "_step_s", "until", "wanted")

    def __init__(self) -> None:
        self.wanted = False
        """Whether it wants it now, again and again."""
        self.until = 0.0
        """In seconds of `time.perf_counter`: it will not want it before; 0 if it may at any time."""
        self._end = self._step_s = 0.0
        self._late = float("inf")
        """The least that passes from a step's end until it is seen, and the clocks' difference."""

    def begin(self) -> None:
        """The loop waits for a step of the rows of the last one that was noted."""
        self.until = self._end + self._late + SURE * self._step_s - WAKING_S if self._step_s else 0.0

    def end(self) -> None:
        """The loop waits no more."""
        self.until = 0.0

    def note(self, start: float, end: float, seen: float) -> None:
        """A step ran from `start` to `end` by the device's clock, and was `seen` to have ended by the host's."""
        self._late = min(self._late + DRIFT * (end - self._end), seen - end)
        self._end, self._step_s = end, end - start


class Turns:
    """Lets the engine's thread have the interpreter now and then; one for each thread that reads."""

    __slots__ = ("_last", "_rest")

    def __init__(self, rest: Rest) -> None:
        self._last = 0.0
        self._rest = rest

    def take(self) -> None:
        """Give up the lock for a moment, if the engine wants it, or may and this thread has had it for TURN_S.

        Sleeping for 0 s blocks no event loop.
        """
        now, rest = perf_counter(), self._rest
        if (now - self._last > TURN_S and now > rest.until) or rest.wanted:
            sleep(0)
            self._last = perf_counter()
