"""The stream's promise kept by a worker thread: the device is a CPU."""

from __future__ import annotations

import asyncio
import ctypes
import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final

from overlap.errors import InternalError
from overlap.streams.stream import Busy

if TYPE_CHECKING:
    from overlap.streams.stream import Mark


class _CpuMark:
    """Reached once the worker has passed it. Waiters of any event loop are woken from the worker's thread."""

    __slots__ = ("_lock", "_waiters", "busy", "failure", "reached")

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.busy: Busy | None = None
        self.failure: BaseException | None = None
        self._lock = threading.Lock()
        self._waiters: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []

    def reach(self, busy: Busy, failure: BaseException | None) -> None:
        self.busy = busy
        self.failure = failure
        with self._lock:
            self.reached.set()
            waiters, self._waiters = self._waiters, []
        for loop, future in waiters:
            try:
                loop.call_soon_threadsafe(_wake, future)
            except RuntimeError:  # that loop was closed meanwhile: nobody waits there any more
                continue

    async def wait(self) -> None:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        with self._lock:
            waits = not self.reached.is_set()
            if waits:
                self._waiters.append((loop, future))
        if waits:
            await future
        else:
            await asyncio.sleep(0)  # arrivals and aborts get their turn at every step, however fast the device
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise failure


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class _Follow:
    """What stands in the queue where the worker has to wait for another one. Not work: it is part of the gap."""

    __slots__ = ("mark",)

    def __init__(self, mark: _CpuMark) -> None:
        self.mark: Final = mark


class _Clock:
    """Keeps the time of what one worker runs, from mark to mark. Costs two looks at the clock for each launch."""

    __slots__ = ("_end", "_marked_end", "_name", "_start")

    def __init__(self, name: str) -> None:
        self._name = name
        self._start: float | None = None
        self._end = 0.0
        self._marked_end: float | None = None

    def run(self, work: Callable[[], object]) -> None:
        if self._start is None:
            self._start = perf_counter()
        try:
            work()
        finally:
            self._end = perf_counter()

    def mark(self) -> Busy:
        if self._start is None:
            self._start = self._end = perf_counter()
        gap = 0.0 if self._marked_end is None else self._start - self._marked_end
        busy = Busy(self._name, self._start, self._end, gap)
        self._marked_end, self._start = self._end, None
        return busy


_Item = Callable[[], object] | _CpuMark | _Follow


def use_cores(count: int) -> bool:
    """Let torch's operations on this thread run on `count` cores from now on; False where that cannot be said.

    It is OpenMP's own setting of the calling thread, and no other thread's; torch's function for this changes what
    threads made later begin with.
    """
    library = _openmp()
    if library is None:
        return False
    library.omp_set_num_threads(count)
    return True


@lru_cache(maxsize=1)
def _openmp() -> Any:
    """Return the OpenMP that torch brought, if it did."""
    import torch

    for path in sorted(Path(torch.__file__).parent.glob("lib/lib*omp*")):
        with suppress(OSError, AttributeError):
            library = ctypes.CDLL(str(path))
            library.omp_set_num_threads.argtypes = (ctypes.c_int,)
            return library
    return None


class CpuStream:
    """Runs its work in order on one daemon thread of its own."""

    def __init__(self, name: str = "cpu") -> None:
        self.name = name
        self._queue: queue.SimpleQueue[_Item | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=f"overlap-{name}", daemon=True)
        self._thread.start()
        self._closed = False

    def use(self, share: int) -> None:
        """Refuse any share: a worker's cores are its own (see `use_cores`)."""
        if share:
            raise InternalError(f"stream {self.name!r} has no share {share}")

    def launch(self, work: str, run: Callable[[], object], *, tokens: int = 1) -> None:  # noqa: ARG002 - the promise's
        """Queue `run` for the worker."""
        self._put(run)

    def mark(self) -> Mark:
        """Return the place right behind what was launched last."""
        mark = _CpuMark()
        self._put(mark)
        return mark

    def follow(self, mark: Mark) -> None:
        """Let the worker wait for a mark of another worker before it goes on."""
        self._put(_Follow(_own(mark)))

    def reached(self, mark: Mark) -> bool:
        """Return whether the worker has passed `mark`."""
        return _own(mark).reached.is_set()

    async def wait_reached(self, mark: Mark) -> None:
        """Return once the worker has passed `mark`; raise what the work before it raised."""
        await _own(mark).wait()

    def busy(self, mark: Mark) -> Busy:
        """Return when the worker ran what is between `mark` and the mark before it."""
        busy = _own(mark).busy
        if busy is None:
            raise InternalError(f"stream {self.name!r} was asked when a mark's work ran before the mark was reached")
        return busy

    def close(self) -> None:
        """Finish what is queued and end the thread."""
        if not self._closed:
            self._closed = True
            self._queue.put(None)
            self._thread.join()

    def _put(self, item: _Item) -> None:
        if self._closed:
            raise InternalError(f"stream {self.name!r} is closed")
        self._queue.put(item)

    def _work(self) -> None:
        failure: BaseException | None = None
        clock = _Clock(self.name)
        while (item := self._queue.get()) is not None:
            if isinstance(item, _CpuMark):
                item.reach(clock.mark(), failure)
                failure = None
            elif isinstance(item, _Follow):
                item.mark.reached.wait()
            else:
                try:
                    clock.run(item)
                except BaseException as error:
                    failure = failure or error
            del item  # hold nothing of a finished step while idle


def _own(mark: Mark) -> _CpuMark:
    if not isinstance(mark, _CpuMark):
        raise InternalError(f"a CPU stream knows no mark like {mark!r}")
    return mark
