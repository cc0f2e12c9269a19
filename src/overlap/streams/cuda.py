"""The stream's promise kept by CUDA: a stream, an event a mark, and one thread that waits for them.

The waiter blocks in `cudaEventSynchronize` on an event made with `blocking=True`: the thread sleeps in the driver with
the GIL released, and wakes the event loop when the device gets there. Not Python inside `cudaLaunchHostFunc`, which
deadlocks the GIL against the driver (LMCache#2952, TensorRT-LLM#15855); not `torch.Event`, which ignores `blocking` on
CUDA (vllm#47081).
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import torch

from overlap.errors import InternalError

if TYPE_CHECKING:
    from overlap.streams.stream import Mark


class _CudaMark:
    __slots__ = ("event", "failure")

    def __init__(self, event: torch.cuda.Event, failure: BaseException | None) -> None:
        self.event = event
        self.failure = failure


_Wait = tuple[torch.cuda.Event, asyncio.AbstractEventLoop, "asyncio.Future[None]"]


class CudaStream:
    """A CUDA stream of its own on `device`. `priority` is CUDA's: lower numbers go first, 0 is the default."""

    def __init__(self, device: torch.device, name: str = "cuda", *, priority: int = 0) -> None:
        self.name = name
        self.device: Final = device
        self.stream: Final = torch.cuda.Stream(device, priority=priority)  # type: ignore[no-untyped-call]
        self._failure: BaseException | None = None
        self._waits: queue.SimpleQueue[_Wait | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._wait, name=f"overlap-{name}-waiter", daemon=True)
        self._thread.start()
        self._closed = False

    def launch(self, work: str, run: Callable[[], object], *, tokens: int = 1) -> None:  # noqa: ARG002 - the promise's
        """Call `run`, which enqueues its kernels on this stream."""
        if self._closed:
            raise InternalError(f"stream {self.name!r} is closed")
        try:
            with torch.cuda.stream(self.stream):
                run()
        except Exception as failure:  # told by the next mark: the promise of every stream
            self._failure = self._failure or failure

    def mark(self) -> Mark:
        """Record an event right behind what was launched last."""
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(self.stream)
        mark, self._failure = _CudaMark(event, self._failure), None
        return mark

    def follow(self, mark: Mark) -> None:
        """Let the device hold back what is launched next until `mark`."""
        self.stream.wait_event(_own(mark).event)

    async def wait_reached(self, mark: Mark) -> None:
        """Return once the device has passed `mark`; raise what the work before it raised."""
        own = _own(mark)
        if own.event.query():  # type: ignore[no-untyped-call]
            await asyncio.sleep(0)  # arrivals and aborts get their turn at every step, however fast the device
        else:
            loop = asyncio.get_running_loop()
            future: asyncio.Future[None] = loop.create_future()
            self._waits.put((own.event, loop, future))
            await future
        if own.failure is not None:
            failure, own.failure = own.failure, None
            raise failure

    def close(self) -> None:
        """Wait for the device to finish what is queued, and end the waiter."""
        if self._closed:
            return
        self._closed = True
        try:
            self.stream.synchronize()
        finally:
            self._waits.put(None)
            self._thread.join()

    def _wait(self) -> None:
        torch.cuda.set_device(self.device)  # of this thread only
        while (wait := self._waits.get()) is not None:
            event, loop, future = wait
            failure: BaseException | None = None
            try:
                event.synchronize()
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
