"""The stream's promise in virtual time: the device runs nowhere, and says when it would have been busy.

`launch` runs its work at once, in order, and books the time that it would have taken. That makes "the device never
waits for a host that is faster than a step" and "two lanes hide one behind the other" tests of milliseconds.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from overlap.errors import InternalError
from overlap.streams.stream import Busy

if TYPE_CHECKING:
    from collections.abc import Iterator

    from overlap.observe.timeline import Timeline
    from overlap.schedule.plan import StepPlan
    from overlap.streams.stream import Mark

Cost = Callable[[str, int], float]
"""(work, tokens) -> seconds of device time."""


@dataclass(frozen=True, slots=True)
class Span:
    """Some work that a stream was busy with, in virtual seconds."""

    work: str
    start: float
    end: float


@dataclass(slots=True)
class _SimMark:
    time: float
    busy: Busy
    failure: BaseException | None


class SimDevice:
    """A clock that the host and all streams of one device share.

    `now` is the host's time. The host spends it with `spend` (or through `SimTimeline`) and by waiting for a mark.
    """

    def __init__(self, cost: Cost | float = 1.0) -> None:
        self.now = 0.0
        self._cost = (lambda _work, _tokens: cost) if isinstance(cost, (int, float)) else cost
        self.streams: dict[str, SimStream] = {}

    def stream(self, name: str) -> SimStream:
        """Return a new stream of this device."""
        if name in self.streams:
            raise InternalError(f"the simulated device has a stream {name!r} already")
        stream = self.streams[name] = SimStream(self, name)
        return stream

    def spend(self, seconds: float) -> None:
        """Let the host be busy for some time."""
        self.now += seconds

    def cost(self, work: str, tokens: int) -> float:
        """Return how long some work takes."""
        return self._cost(work, tokens)

    def busy(self, name: str) -> float:
        """Return how long a stream was busy."""
        return sum(span.end - span.start for span in self.streams[name].spans)

    def bubble(self, name: str) -> float:
        """Return how long a stream was idle between its first work and its last."""
        spans = self.streams[name].spans
        return spans[-1].end - spans[0].start - self.busy(name) if spans else 0.0

    def hidden(self, name: str, *, behind: str) -> float:
        """Return the share of one stream's busy time during which another was busy too."""
        total = self.busy(name)
        both = sum(
            max(0.0, min(a.end, b.end) - max(a.start, b.start))
            for a in self.streams[name].spans
            for b in self.streams[behind].spans
        )
        return both / total if total else 0.0


class SimStream:
    """Keeps the stream's promise in a SimDevice's time."""

    def __init__(self, device: SimDevice, name: str) -> None:
        self.name = name
        self.spans: list[Span] = []
        self._device = device
        self._free_at = 0.0
        self._marked = 0  # spans that are in front of the last mark
        self._marked_end: float | None = None
        self._failure: BaseException | None = None
        self._closed = False
        self._share = 0

    def use(self, share: int) -> None:
        """Call what is launched next "work sm:share", for its cost and in the spans; 0 for "work" alone."""
        self._share = share

    def launch(self, work: str, run: Callable[[], object], *, tokens: int = 1) -> None:
        """Run `run` now, and book its time behind all earlier work."""
        if self._closed:
            raise InternalError(f"stream {self.name!r} is closed")
        work = f"{work} sm:{self._share}" if self._share else work
        start = max(self._free_at, self._device.now)
        self._free_at = start + self._device.cost(work, tokens)
        self.spans.append(Span(work, start, self._free_at))
        try:
            run()
        except Exception as failure:  # told by the next mark: the promise of every stream
            self._failure = self._failure or failure

    def mark(self) -> Mark:
        """Return the place right behind what was launched last."""
        time = max(self._free_at, self._device.now)
        mark = _SimMark(time, self._span_to(time), self._failure)
        self._failure = None
        return mark

    def _span_to(self, time: float) -> Busy:
        new, self._marked = self.spans[self._marked :], len(self.spans)
        start, end = (new[0].start, new[-1].end) if new else (time, time)
        gap = 0.0 if self._marked_end is None else start - self._marked_end
        self._marked_end = end
        return Busy(self.name, start, end, gap)

    def follow(self, mark: Mark) -> None:
        """Start what is launched next no sooner than `mark`."""
        self._free_at = max(self._free_at, _own(mark).time)

    def reached(self, mark: Mark) -> bool:
        """Return whether the host's clock is past `mark`."""
        return _own(mark).time <= self._device.now

    async def wait_reached(self, mark: Mark) -> None:
        """Let the host's clock go on to `mark`."""
        own = _own(mark)
        await asyncio.sleep(0)  # as on a real device, other tasks run meanwhile
        self._device.now = max(self._device.now, own.time)
        if own.failure is not None:
            failure, own.failure = own.failure, None
            raise failure

    def busy(self, mark: Mark) -> Busy:
        """Return when the work between `mark` and the mark before it runs in virtual time."""
        return _own(mark).busy

    def close(self) -> None:
        """Refuse further work."""
        self._closed = True


def _own(mark: Mark) -> _SimMark:
    if not isinstance(mark, _SimMark):
        raise InternalError(f"a simulated stream knows no mark like {mark!r}")
    return mark


class SimTimeline:
    """A timeline that lets the host spend virtual time in each verb of the loop, and may tell another of it."""

    def __init__(self, device: SimDevice, costs: Mapping[str, float], *, tell: Timeline | None = None) -> None:
        self._device = device
        self._costs = costs
        self._tell = tell

    @contextmanager
    def span(self, verb: str, plan: StepPlan | None = None) -> Iterator[None]:
        """Spend what `verb` costs, before its effect is seen."""
        with nullcontext() if self._tell is None else self._tell.span(verb, plan):
            self._device.spend(self._costs.get(verb, 0.0))
            yield

    def ran(self, plan: StepPlan, busy: Busy, bubble: float) -> None:
        """Tell the other timeline."""
        if self._tell is not None:
            self._tell.ran(plan, busy, bubble)
