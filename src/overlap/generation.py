"""Generation: one answer to iterate over, and all the ways to stop."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Generator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, NoReturn

from overlap.errors import RequestError
from overlap.front import Answer
from overlap.messages import Output

if TYPE_CHECKING:
    from overlap.register import Register


class Generation:
    """One answer to iterate over: an async iterator of Outputs. `await` reads it to its end and returns the last one.

    The request starts with the first `__anext__`, or `await`, and stops, giving its pages back, at the first of: its
    last Output; an exception out of `__anext__` (a cancelled task and `asyncio.timeout` among them); `aclose()`;
    leaving `async with`; the loss of the last reference to it (which is what `break` in an `async for` does).

    It is read by one task at a time, on the event loop that began it: anywhere else `__anext__` raises (RuntimeError,
    RequestError; in a forked process EngineClosed), and the request goes on.
    """

    def __init__(
        self,
        begin: Callable[[str, int, bool], Awaitable[Answer]],
        requests: Register,
        request_id: str,
        index: int,
        *,
        whole: bool = False,
    ) -> None:
        """`begin` enters it in `requests`."""
        self.request_id: Final = request_id
        self._begin = begin
        self._requests = requests
        self._index = index
        self._whole = whole
        self._answer: Answer | None = None
        self._loop: asyncio.AbstractEventLoop | None = None  # where it was begun
        self._last: Output | None = None
        self._reading = False
        self._done = False

    def __aiter__(self) -> Generation:
        return self

    async def __anext__(self) -> Output:
        if self._done:
            raise StopAsyncIteration
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            self._take_place(loop)
        if self._reading:
            raise RuntimeError(f"request {self.request_id!r} is being read by another task")
        self._reading = True
        try:
            answer = self._answer
            if answer is None:
                answer = self._answer = await self._begin(self.request_id, self._index, self._whole)
            while (output := self._output_of(answer)) is None:
                self._requests.check_process()  # the same loop runs in a forked one, too
                await answer.news(loop)
        except GeneratorExit:  # nobody waits for this any more, and a finalizer may have found that out
            self._abandon()
            raise
        except BaseException:
            self._end()
            raise
        else:
            self._last = output
            if output.finished:
                self._end()
            return output
        finally:
            self._reading = False

    def _take_place(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin on this event loop. Raises RequestError (EngineClosed) if it was begun elsewhere: no news come here."""
        if self._loop is not None:
            self._requests.check_process()
            raise RequestError(
                f"Request {self.request_id!r} was begun on another event loop, and nothing of it comes to this one. "
                "Read it there, or send a request of this loop's own."
            )
        self._loop = loop

    def _output_of(self, answer: Answer) -> Output | None:
        """Return what is new, or None; raise StopAsyncIteration behind the end, and once a task has closed this."""
        if self._done:
            raise StopAsyncIteration
        return answer.output_nowait()

    def __await__(self) -> Generator[Any, None, Output]:
        """Return the answer's last Output, with its whole text. Raises what iterating raises."""
        return self._read().__await__()

    async def _read(self) -> Output:
        if self._answer is None and not self._reading:
            self._whole = True  # nobody reads how it grows
        async for _ in self:
            pass
        if self._last is None or not self._last.finished:
            raise RuntimeError(f"request {self.request_id!r} was stopped before its answer was whole")
        return self._last

    def __iter__(self) -> NoReturn:
        raise TypeError("A Generation is read with `async for output in generation`, or whole with `await generation`.")

    async def aclose(self) -> None:
        """Stop the request; a task that reads it sees its end. Idempotent."""
        self._end()

    async def __aenter__(self) -> Generation:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def __del__(self) -> None:
        self._abandon()

    def _end(self) -> None:
        self._done = True
        answer, self._answer = self._answer, None
        if answer is not None:
            self._requests.forget_answer(answer)
            answer.stop_waiting()

    def _abandon(self) -> None:
        self._done = True
        answer, self._answer = self._answer, None
        if answer is not None:
            self._requests.drop_answer(answer)
