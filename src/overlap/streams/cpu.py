"""The stream's promise kept by a worker thread: the device is a CPU."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from overlap.errors import InternalError

if TYPE_CHECKING:
    from overlap.streams.stream import Mark


class _CpuMark:
    """Reached once the worker has passed it. Waiters of any event loop are woken from the worker's thread."""

    __slots__ = ("_lock", "_waiters", "failure", "reached")

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.failure: BaseException | None = None
        self._lock = threading.Lock()
        self._waiters: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []

    def reach(self, failure: BaseException | None) -> None:
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


_Work = tuple[Callable[[], object] | None, _CpuMark | None]


class CpuStream:
    """Runs its work in order on one daemon thread of its own."""

    def __init__(self, name: str = "cpu") -> None:
        self.name = name
        self._queue: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=f"overlap-{name}", daemon=True)
        self._thread.start()
        self._closed = False

    def launch(self, work: str, run: Callable[[], object], *, tokens: int = 1) -> None:  # noqa: ARG002 - the promise's
        """Queue `run` for the worker."""
        self._put((run, None))

    def mark(self) -> Mark:
        """Return the place right behind what was launched last."""
        mark = _CpuMark()
        self._put((None, mark))
        return mark

    def follow(self, mark: Mark) -> None:
        """Let the worker wait for a mark of another worker before it goes on."""
        self._put((_own(mark).reached.wait, None))

    async def wait_reached(self, mark: Mark) -> None:
        """Return once the worker has passed `mark`; raise what the work before it raised."""
        await _own(mark).wait()

    def close(self) -> None:
        """Finish what is queued and end the thread."""
        if not self._closed:
            self._closed = True
            self._queue.put(None)
            self._thread.join()

    def _put(self, work: _Work) -> None:
        if self._closed:
            raise InternalError(f"stream {self.name!r} is closed")
        self._queue.put(work)

    def _work(self) -> None:
        failure: BaseException | None = None
        while (item := self._queue.get()) is not None:
            run, mark = item
            if run is not None:
                try:
                    run()
                except BaseException as error:
                    failure = failure or error
            if mark is not None:
                mark.reach(failure)
                failure = None
            del item, run, mark  # hold nothing of a finished step while idle


def _own(mark: Mark) -> _CpuMark:
    if not isinstance(mark, _CpuMark):
        raise InternalError(f"a CPU stream knows no mark like {mark!r}")
    return mark
