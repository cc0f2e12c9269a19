"""Naps: how a thread waits for the device without spinning, and without the driver's long way.

A blocking wait in CUDA's driver comes back some 100 µs after the device is done, and spinning takes a core. But most
steps take about as long as the last ones did. So the waiter's thread sleeps until shortly before the end that is
expected, and from then on asks the device between short naps.

An expectation may be wrong, so three rules bound what that costs, whatever the device does:

- Far ahead of the end, no nap is longer than half the time that has passed since the work began, or 50 µs. Work that
  turns out much shorter is heard of within half of what it took.
- Behind the end, no nap is longer than an eighth of how late it is. Work that turns out longer is heard of in
  proportion, and naps grow as quickly as they add up: there are a few dozen at most, however long it takes.
- Once such a nap would be as long as the driver's way, the driver waits. It does, too, where nothing is known yet, and
  where work takes so long that 100 µs more do not matter.

What is expected comes from the device's own clock, not from when its ends were heard of: a thread that had to wait for
the interpreter would take the one step for long and the next one for short. (`overlap.turns` does the same for those
who take the interpreter.)
"""

from __future__ import annotations

import ctypes
import sys
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Final, NamedTuple, Protocol

from overlap.turns import DRIFT

NAP_S: Final = 5e-6
"""Asked for; on Linux some 6 µs more pass until the thread runs again."""
AHEAD_S: Final = 8e-5
"""How long before the end that is expected the thread is awake: a longer sleep ends up to that much late."""
FAR_NAP_S: Final = 5e-5
"""The shortest nap far ahead of the end: work that has just begun would else be asked for again and again."""
DRIVER_S: Final = 1e-4
"""How much later than the device is done the driver's blocking wait comes back, about."""
LONG_S: Final = 2e-2
"""Of work that takes longer, nobody minds DRIVER_S more."""
NUM_RECENT: Final = 4
_PR_SET_TIMERSLACK: Final = 29


class Due(NamedTuple):
    """When the work in front of a mark began, and when it is expected to end; seconds of the host's clock."""

    begin: float
    end: float

    def nap(self, now: float) -> float | None:
        """Return for how many seconds to sleep until the device is asked again; None to wait in the driver."""
        left = self.end - AHEAD_S - now
        if left > 0.0:
            return max(NAP_S, min(left, max(FAR_NAP_S, (now - self.begin) / 2)))
        nap = max(NAP_S, (now - self.end) / 8)
        return nap if nap < DRIVER_S else None


class Expectation:
    """When a stream's next mark will be passed. The stream's clock tells it of each mark, in their order."""

    __slots__ = ("_end", "_lag", "_lengths")

    def __init__(self, now: float) -> None:
        """`now` is when the stream's clock and the host's were the same."""
        self._lengths: deque[float] = deque(maxlen=NUM_RECENT)
        self._end = now
        self._lag = 0.0
        """The least that passes from an end until it is heard of, and by how much the host's clock is ahead."""

    def note(self, start: float, end: float, heard: float) -> None:
        """The work before a mark ran from `start` to `end` by the stream's clock, and was `heard` of by the host's.

        Infinite where nobody listened.
        """
        self._lag = min(self._lag + DRIFT * (end - self._end), heard - end)
        self._end = end
        if end > start:
            self._lengths.append(end - start)

    def due(self, launched: float | None) -> Due | None:
        """Return what is expected of the work before the next mark; None if nothing is, or nothing soon.

        `launched` is when it was launched to an idle stream, None if it was queued behind what was noted last. The
        work is taken to be as short as the shortest of the last few: too early costs naps, too late costs time. (So if
        marks in between are still to be noted, it costs naps.)
        """
        length = min(self._lengths, default=LONG_S)
        if length >= LONG_S:
            return None
        begin = self._end + self._lag if launched is None else launched
        return Due(begin, begin + length)


class Passable(Protocol):
    """An event, as `overlap.streams.events` has them."""

    def query(self) -> bool:
        """Return whether the device has passed it; raise what it failed at."""

    def synchronize(self) -> None:
        """Wait in the driver until then; raise the same."""


def sleep_until_passed(
    event: Passable, due: Due | None, now: Callable[[], float], sleep: Callable[[float], object]
) -> None:
    """Return once the device has passed an event; raise what it failed at. For a thread that has nothing else to do."""
    while not event.query():
        nap = None if due is None else due.nap(now())
        if nap is None:
            event.synchronize()
            return
        sleep(nap)


def sleep_finely() -> None:
    """Let this thread's sleeps end when they are to: by default Linux may add 50 µs to each, its timer slack.

    Of this thread only. Elsewhere, or where it is refused, naps are longer, and nothing else changes.
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, *map(ctypes.c_ulong, (1, 0, 0, 0)))
