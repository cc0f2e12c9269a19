"""The stream's promise kept by CUDA: a stream, an event a mark, and one thread that waits for them.

The waiter sleeps until shortly before the device is expected to be there, asks it between short naps, and wakes the
event loop (`streams.naps`). If the device is late, or nothing is known of it yet, the waiter blocks in
`cuEventSynchronize` on an event made to block: asleep in the driver, with the GIL released. That alone would be
simpler, but the loop hears of it 78 to 165 µs after the device is done, and by naps after 42 to 93 (an H200,
`bench/steady.py`).
Not Python inside `cudaLaunchHostFunc`, which deadlocks the GIL against the driver (LMCache#2952, TensorRT-LLM#15855),
and a host function that posts a semaphore is slower still; not `torch.Event`, which ignores `blocking` on CUDA
(vllm#47081).

Time is measured on the device. Every mark's event keeps the device's time; a second event goes in front of the work
only where the stream was empty or held back by another one's mark. Behind work that still runs, the next work begins
where that ends: nothing was missing in between, and an event there would only delay it. Times add up in double
precision from one event to the next, since CUDA tells them as float32 milliseconds, which from a far start are coarse.

A lane that runs on some of the SMs (`streams.green`) is still one stream to all others: one order, one clock. `use`
lets its work go on in another of CUDA's streams, which waits for the one before. So memory that one of them has freed
in torch's allocator, which keeps a list for each stream, is never written to before the others are done with it.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import torch

from overlap.errors import InternalError
from overlap.streams.events import Event
from overlap.streams.green import Half, splits
from overlap.streams.naps import Due, Expectation, sleep_finely, sleep_until_passed
from overlap.streams.stream import Busy

if TYPE_CHECKING:
    from overlap.streams.stream import Mark


class _CudaMark:
    """An event behind the work, and one in front of it where that does not begin at the mark before.

    Once `busy` is known the events are the stream's again, and the mark is known to be reached.
    """

    __slots__ = ("busy", "end", "failure", "heard", "launched", "start")

    def __init__(self, start: Event | None, end: Event, launched: float | None, failure: BaseException | None) -> None:
        self.start = start
        self.end = end
        self.launched = launched
        """When the host launched the work, if that did not begin at the mark before."""
        self.failure = failure
        self.heard = float("inf")
        """When the waiter heard that it was passed, which writes it before it wakes the loop."""
        self.busy: Busy | None = None


class _Clock:
    """Keeps the device's time of one stream, from mark to mark, with events that are used again and again."""

    def __init__(self, name: str, stream: torch.cuda.Stream) -> None:
        self._name = name
        self._handle: int = stream.cuda_stream
        self._free: list[Event] = []
        self._unread: deque[_CudaMark] = deque()  # in the stream's order
        self._start: Event | None = None
        self._launched: float | None = None
        self._started = False  # work was launched behind the last mark
        self._held = False  # what is launched next waits for another stream
        self._any_marks = False
        self._read_event, self._read_time = self._set()
        self._last = self._read_event  # the last mark's
        self.expectation: Final = Expectation(self._read_time)

    def _set(self) -> tuple[Event, float]:
        """Return an event and the host's time of it: the narrowest of a few looks, some µs wide. Waits."""
        looks = []
        for _ in range(5):
            event = self._event()
            before = time.perf_counter()
            event.record(self._handle)
            while not event.query():
                pass
            after = time.perf_counter()
            looks.append((after - before, (before + after) / 2, event))
        _, middle, event = min(looks, key=lambda look: look[0])
        self._free += [other for _, _, other in looks if other is not event]
        return event, middle

    def hold(self) -> None:
        self._held = True

    def move(self, stream: torch.cuda.Stream) -> None:
        """Go on in another stream, behind all that this one holds."""
        behind = self._last
        if self._started or self._held:
            behind = self._event()
            behind.record(self._handle)
            self._free.append(behind)  # a wait is for the record that was there when it was asked for
        behind.wait(stream.cuda_stream)
        self._handle = stream.cuda_stream

    def start(self) -> None:
        """Work is about to be launched."""
        if self._started:
            return
        self._started = True
        if self._held or self._last.query():
            self._start, self._launched = self._event(), time.perf_counter()
            self._start.record(self._handle)

    def mark(self, failure: BaseException | None) -> _CudaMark:
        end = self._event()
        end.record(self._handle)
        start = self._start if self._started else end
        mark = _CudaMark(start, end, self._launched, failure)
        self._unread.append(mark)
        self._last, self._start, self._launched, self._started, self._held = end, None, None, False, False
        return mark

    def busy(self, mark: _CudaMark) -> Busy:
        while mark.busy is None:
            if not self._unread:
                raise InternalError(f"stream {self._name!r} was asked when another stream's work ran")
            self._read(self._unread[0])
            self._unread.popleft()
        return mark.busy

    def _read(self, mark: _CudaMark) -> None:
        gap = length = 0.0
        if mark.start is not None:
            gap = self._read_event.elapsed_s(mark.start)
        if mark.start is not mark.end:
            length = (mark.start or self._read_event).elapsed_s(mark.end)
            self._free += [mark.start] if mark.start is not None else []
        start = self._read_time + gap
        mark.busy = Busy(self._name, start, start + length, gap if self._any_marks else 0.0)
        self.expectation.note(start, start + length, mark.heard)
        self._free.append(self._read_event)
        self._read_event, self._read_time, self._any_marks = mark.end, start + length, True

    def _event(self) -> Event:
        if self._free:
            return self._free.pop()
        return Event()


_Wait = tuple[_CudaMark, Due | None, asyncio.AbstractEventLoop, "asyncio.Future[None]"]


_Place = tuple[torch.device, int, int, Half]
"""Device, priority, share of SMs (0 for all) and which part of it."""

_IDLE_STREAMS: Final[dict[_Place, deque[torch.cuda.Stream]]] = {}
"""Streams that a closed engine leaves to the next one.

torch keeps a workspace of cuBLAS (32 MiB on Hopper) for each stream it has ever multiplied on, for as long as the
process lives, and gives no way to free one: with a new stream for each engine, 20 engines left 640 MiB behind."""


def _stream_at(place: _Place) -> torch.cuda.Stream:
    """Return a stream that nobody uses."""
    idle = _IDLE_STREAMS.get(place)
    if idle:
        return idle.pop()
    device, priority, share, half = place
    if not share:
        return torch.cuda.Stream(device, priority=priority)  # type: ignore[no-untyped-call]
    address = splits(device.index or 0).new_stream(share, half, priority)
    return torch.cuda.ExternalStream(address, device=device)  # type: ignore[no-untyped-call]


class CudaStream:
    """A CUDA stream of its own on `device`. `priority` is CUDA's: lower numbers go first, 0 is the default.

    With a share (see `use`) it has the SMs that the share names, or with `half="rest"` all others.
    """

    def __init__(self, device: torch.device, name: str = "cuda", *, priority: int = 0, half: Half = "own") -> None:
        self.name = name
        self.device: Final = device
        self._priority, self._half = priority, half
        self._streams = {0: _stream_at(self._place(0))}
        self.stream = self._streams[0]
        """Where work goes now."""
        torch.cuda.mem_get_info(device)  # makes the device's context this thread's, which the driver's calls ask for
        self._clock = _Clock(name, self.stream)
        self._failure: BaseException | None = None
        self._waits: queue.SimpleQueue[_Wait | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._wait, name=f"overlap-{name}-waiter", daemon=True)
        self._thread.start()
        self._closed = False

    def _place(self, share: int) -> _Place:
        return self.device, self._priority, share, self._half if share else "own"

    def use(self, share: int) -> None:
        """Run what is launched next on a share of the SMs, 0 for all, still behind all earlier work. Never waits.

        Raises NoShares where there is no such share; the stream stays as it was then.
        """
        stream = self._streams.get(share)
        if stream is None:
            stream = self._streams[share] = _stream_at(self._place(share))
        if stream is not self.stream:
            self._clock.move(stream)
            self.stream = stream

    def launch(self, work: str, run: Callable[[], object], *, tokens: int = 1) -> None:  # noqa: ARG002 - the promise's
        """Call `run`, which enqueues its kernels on this stream."""
        if self._closed:
            raise InternalError(f"stream {self.name!r} is closed")
        try:
            self._clock.start()
            before = torch.cuda.current_stream(self.device)
            if before == self.stream:
                run()
                return
            torch.cuda.set_stream(self.stream)  # `torch.cuda.stream` does the same in four times the time
            try:
                run()
            finally:
                torch.cuda.set_stream(before)
        except Exception as failure:  # told by the next mark: the promise of every stream
            self._failure = self._failure or failure

    def mark(self) -> Mark:
        """Record an event right behind what was launched last."""
        mark, self._failure = self._clock.mark(self._failure), None
        return mark

    def follow(self, mark: Mark) -> None:
        """Let the device hold back what is launched next until `mark`."""
        own = _own(mark)
        if own.busy is None:  # else it was reached
            own.end.wait(self.stream.cuda_stream)
            self._clock.hold()

    def reached(self, mark: Mark) -> bool:
        """Ask the device whether it has passed `mark`."""
        own = _own(mark)
        return own.busy is not None or own.end.query()

    async def wait_reached(self, mark: Mark) -> None:
        """Return once the device has passed `mark`; raise what the work before it raised."""
        own = _own(mark)
        if own.busy is not None or own.end.query():
            await asyncio.sleep(0)  # arrivals and aborts get their turn at every step, however fast the device
        else:
            loop = asyncio.get_running_loop()
            future: asyncio.Future[None] = loop.create_future()
            self._waits.put((own, self._clock.expectation.due(own.launched), loop, future))
            await future
        if own.failure is not None:
            failure, own.failure = own.failure, None
            raise failure

    def busy(self, mark: Mark) -> Busy:
        """Return when the device ran what is between `mark` and the mark before it."""
        return self._clock.busy(_own(mark))

    def close(self) -> None:
        """Wait for the device to finish what is queued, and end the waiter."""
        if self._closed:
            return
        self._closed = True
        try:
            for share, stream in self._streams.items():
                stream.synchronize()
                _IDLE_STREAMS.setdefault(self._place(share), deque()).append(stream)
        finally:
            self._waits.put(None)
            self._thread.join()

    def _wait(self) -> None:
        torch.cuda.set_device(self.device)  # of this thread only
        torch.cuda.mem_get_info(self.device)  # as above: for asking
        sleep_finely()
        while (wait := self._waits.get()) is not None:
            mark, due, loop, future = wait
            failure: BaseException | None = None
            try:
                sleep_until_passed(mark.end, due, time.perf_counter, time.sleep)
                mark.heard = time.perf_counter()
            except Exception as error:
                failure = error
            try:
                loop.call_soon_threadsafe(_wake, future, failure)
            except RuntimeError:  # that loop was closed meanwhile: nobody waits there any more
                continue


def _wake(future: asyncio.Future[None], failure: BaseException | None) -> None:
    if future.done():
        return
    if failure is None:
        future.set_result(None)
    else:
        future.set_exception(failure)


def _own(mark: Mark) -> _CudaMark:
    if not isinstance(mark, _CudaMark):
        raise InternalError(f"a CUDA stream knows no mark like {mark!r}")
    return mark
