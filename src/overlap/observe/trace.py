"""A record of what the loop and the device did step by step, and the file that it becomes.

While a trace is on, each verb appends one small tuple to a list; what that means is worked out when the record is
read. Files: `.json` is Chrome's trace event format (ui.perfetto.dev opens it), `.svg` a picture of a few steps.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from math import inf
from os import PathLike
from pathlib import Path
from time import perf_counter
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Final, TypeAlias

from overlap.errors import ConfigError, EngineClosed, EngineDead, OverlapError, nearest
from overlap.observe.perfetto import perfetto
from overlap.observe.picture import picture
from overlap.observe.record import VERBS, DeviceSpan, HostSpan, Record, Step

if TYPE_CHECKING:
    from overlap.observe.timeline import Timeline
    from overlap.schedule.plan import StepPlan
    from overlap.streams.stream import Busy

Watch: TypeAlias = "Callable[[Timeline], Future[None]]"

LONGEST: Final = 100_000  # steps of which a trace keeps what happened: the last ones
PATIENCE_S: Final = 5.0  # an engine that ends at this very moment does not answer any more
WRITERS: Final = MappingProxyType({".json": perfetto, ".svg": picture})


def no_queue() -> tuple[int, int]:
    """Return that nobody waits and nobody runs."""
    return 0, 0


class Trace:
    """A timeline that keeps what it is told: the last 100,000 steps of it. Read it with `record`.

    `queue` returns how many requests (wait, run) and is asked once a step. `clock` is the host's, in seconds.
    """

    def __init__(
        self,
        engine: str = "engine",
        *,
        queue: Callable[[], tuple[int, int]] = no_queue,
        clock: Callable[[], float] = perf_counter,
    ) -> None:
        self._engine = engine
        self._queue = queue
        self._clock = clock
        self._host: deque[tuple[str, int, float, float]] = deque(maxlen=len(VERBS) * LONGEST)
        self._steps: deque[tuple[int, float, int, int, int, int, int, int, str]] = deque(maxlen=LONGEST)
        self._device: deque[tuple[int, Busy, float]] = deque(maxlen=LONGEST)
        self._verb = ""  # this and what follows: of the span that is open
        self._plan: StepPlan | None = None
        self._start = 0.0

    # ── told by the loop ─────────────────────────────────────────────────────────────────────────────────────────

    def span(self, verb: str, plan: StepPlan | None = None) -> Trace:
        """Return what is entered before the verb and left behind it: this trace, as only one verb runs at a time."""
        self._verb, self._plan = verb, plan
        return self

    def __enter__(self) -> None:
        self._start = self._clock()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        plan, end = self._plan, self._clock()
        self._host.append((self._verb, 0 if plan is None else plan.number, self._start, end))
        if plan is not None and self._verb == "launch":
            waiting, running = self._queue()
            prompt = len(plan.prompt)
            self._steps.append(
                (
                    plan.number,
                    self._start,
                    len(plan.slots),
                    plan.num_decode + prompt,
                    prompt,
                    len(plan.admissions),
                    waiting,
                    running,
                    plan.way,
                )
            )
        self._plan = None  # a step's columns are not the trace's to keep

    def ran(self, plan: StepPlan, busy: Busy, bubble: float) -> None:
        """Keep when a step ran."""
        self._device.append((plan.number, busy, bubble))

    # ── read afterwards ──────────────────────────────────────────────────────────────────────────────────────────

    def record(self) -> Record:
        """Return what was kept so far."""
        host = [HostSpan(*span) for span in tuple(self._host)]
        launched: set[int] = set()
        for i, span in enumerate(host):  # a plan's step is known by the launch behind it, if that is its first
            if span.verb == "launch" and span.number not in launched:
                launched.add(span.number)
                before = i - 1 - (i > 0 and host[i - 1].verb == "tell")  # one is told in front of a prompt's launch
                if before >= 0 and host[before].verb == "plan":
                    host[before] = host[before]._replace(number=span.number)
        device = [
            DeviceSpan(busy.stream, number, busy.start, busy.end, busy.gap, bubble)
            for number, busy, bubble in tuple(self._device)
        ]
        steps = {step[0]: Step(*step) for step in reversed(tuple(self._steps))}  # told of again with each block
        streams = dict.fromkeys(span.stream for span in device)
        aligned = [span for stream in streams for span in _align(host, [s for s in device if s.stream == stream])]
        return Record(self._engine, tuple(host), tuple(sorted(aligned, key=lambda span: span.start)), steps)

    def _repr_svg_(self) -> str:
        """Show the picture in a notebook."""
        return picture(self.record())


def _align(host: list[HostSpan], device: list[DeviceSpan]) -> list[DeviceSpan]:
    """Move one stream's spans by what its clock has drifted away from the host's since the stream was made.

    Two things are certain: no step begins before its launch does, and none ends after it was seen to have landed. The
    spans move no further than these ask for.
    """
    launched = {span.number: span.start for span in reversed(host) if span.verb == "launch"}  # its first block
    landed = {span.number: span.end for span in host if span.verb == "land"}
    least = max((launched[span.number] - span.start for span in device if span.number in launched), default=0.0)
    most = min((landed[span.number] - span.end for span in device if span.number in landed), default=inf)
    move = min(max(0.0, least), most)
    return [span._replace(start=span.start + move, end=span.end + move) for span in device]


class Tracing:
    """Records a running engine for as long as the `with` (or `async with`) lasts, then writes the file.

    `watch(timeline)` lets the loop tell that timeline from now on, and `unwatch(timeline)` no more; their futures are
    done once it does. What is in the air at the end is not in the record. The file is written even if the engine has
    ended meanwhile. Raises ConfigError for a path that could not be written.
    """

    def __init__(self, path: str | PathLike[str], trace: Trace, watch: Watch, unwatch: Watch) -> None:
        self._path = Path(path)
        self._trace = trace
        self._watch = watch
        self._unwatch = unwatch
        if self._path.suffix not in WRITERS:
            raise ConfigError(
                f"A trace ends in .json (for Perfetto) or .svg (a picture), not {self._path.name!r}."
                + nearest(self._path.suffix, WRITERS)
            )
        if not self._path.parent.is_dir():
            raise ConfigError(f"The trace {str(self._path)!r} has no directory to be in: make it first.")

    def __enter__(self) -> Trace:
        with self._beginning():
            self._watch(self._trace).result(PATIENCE_S)
        return self._trace

    def __exit__(self, *_: object) -> None:
        try:
            with suppress(EngineClosed, EngineDead, TimeoutError):
                self._unwatch(self._trace).result(PATIENCE_S)
        finally:
            self._write()

    async def __aenter__(self) -> Trace:
        with self._beginning():
            await asyncio.wait_for(asyncio.wrap_future(self._watch(self._trace)), PATIENCE_S)
        return self._trace

    async def __aexit__(self, *_: object) -> None:
        try:
            with suppress(EngineClosed, EngineDead, TimeoutError):
                await asyncio.wait_for(asyncio.wrap_future(self._unwatch(self._trace)), PATIENCE_S)
        finally:  # also of a task that is cancelled while it leaves
            await asyncio.to_thread(self._write)

    @contextmanager
    def _beginning(self) -> Iterator[None]:
        """End what nobody waits for any more while it begins: it begins all the same, once the loop gets to it."""
        try:
            yield
        except ConfigError:  # another one is recorded
            raise
        except BaseException as error:
            with suppress(EngineClosed, EngineDead):
                self._unwatch(self._trace)
            if isinstance(error, TimeoutError):
                raise OverlapError(
                    f"No trace was begun: the engine has not answered for {PATIENCE_S:g} s. It may be in the middle "
                    "of a long step: look at `engine.health()`, and try again."
                ) from error
            raise

    def _write(self) -> None:
        self._path.write_text(WRITERS[self._path.suffix](self._trace.record()), encoding="utf-8")
