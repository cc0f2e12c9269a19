"""Turns: how readers and the engine's thread share the interpreter of one program.

Python takes the interpreter's lock from a thread only every 5 ms, longer than most steps take: a reader of many answers
would hold up the engine that feeds it. So readers give it up by themselves now and then, which costs them some 70 µs
each time, since the thread has to sleep for the other to wake up. While a step runs on a device of its own, though, the
engine's thread sleeps and wants nothing, and it knows for how long about: then readers go on.
"""

from __future__ import annotations

from time import perf_counter, sleep
from typing import Final

TURN_S: Final = 2e-4


class Rest:
    """Until when the engine's thread will not want the interpreter. Its loop writes it, readers on any thread read."""

    __slots__ = ("until",)

    def __init__(self) -> None:
        self.until = 0.0
        """In seconds of `time.perf_counter`; 0 if it may want it at any time."""


class Turns:
    """Lets the engine's thread have the interpreter now and then; one for each thread that reads."""

    __slots__ = ("_last", "_rest")

    def __init__(self, rest: Rest) -> None:
        self._last = 0.0
        self._rest = rest

    def take(self) -> None:
        """Give up the lock for a moment, if this thread has had it for TURN_S and the engine may want it.

        Sleeping for 0 s blocks no event loop.
        """
        now = perf_counter()
        if now - self._last > TURN_S and now > self._rest.until:
            sleep(0)
            self._last = perf_counter()
