"""RemoteEngine: an AsyncEngine whose loop runs in another process.

All that an AsyncEngine does on the reader's side (templates, tokenizing, text, stop strings) is done here, by the same
code; what it says to its Core goes over a Unix socket instead. Weights are not opened, and torch is not imported.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Final

import msgspec

from overlap.config import EngineConfig
from overlap.core import Core, Opened
from overlap.engine import AsyncEngine
from overlap.errors import EngineClosed, EngineDead, OverlapError, RequestError
from overlap.figures import Statistics
from overlap.front import Front
from overlap.observe.metrics import FrontFigures
from overlap.resolve import Resolved
from overlap.schedule.request import Request, refusal_of
from overlap.serve.link import (
    FROM_ENGINE,
    MOST_TO_ENGINE,
    MOST_TO_FRONT,
    Ended,
    EndRequest,
    Failed,
    FromEngine,
    FromFront,
    Look,
    Over,
    Pulse,
    Seen,
    Step,
    Welcome,
    error_of,
    frame,
    read_frame,
    settled_of,
    submit_of,
)
from overlap.text import Text

if TYPE_CHECKING:
    from overlap.loop import Loop
    from overlap.schedule.matcher import Matcher
    from overlap.schedule.planner import Planner
    from overlap.structured import StructuredOutput

SILENT_SECONDS: Final = 30.0
"""An engine that sends no figures for so long is not well. It sends them several times a second."""

IDLE_SECONDS: Final = 0.02
"""How often it is looked whether all answers have ended, while they are waited for."""


class RemoteCore(Core):
    """A Core at the other end of a Unix socket. On one event loop's thread only."""

    def __init__(self, asked: EngineConfig, path: str) -> None:
        super().__init__(asked)
        self._path = path
        self._reading: asyncio.Task[None] | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._asks = itertools.count()
        self._ended_asks: dict[int, Future[bool]] = {}
        self._looks: dict[int, asyncio.Future[Pulse]] = {}
        self._pulse: Pulse | None = None
        self._heard = 0.0

    def front(self, loop: asyncio.AbstractEventLoop) -> Front:
        """Return a new front for an event loop."""
        return self.add_front(lambda number: Front(number, loop))

    def start(self) -> Future[Opened]:
        """Connect, once. The future brings what the engine is, or why it could not be reached."""
        if self._close_asked:
            raise EngineClosed("The engine was closed. Make a new one.")
        if self._reading is None:
            self._reading = asyncio.get_running_loop().create_task(self._read())
        return self._opened

    def submit(self, request: Request) -> None:
        """Send a request. What the engine refuses is told to its front."""
        if self._draining:
            raise EngineClosed("The server is ending: it finishes what it has begun, and begins nothing new.")
        message = frame(submit_of(request))
        if len(message) > MOST_TO_ENGINE:  # the engine would take us for broken, and every request with us
            raise RequestError(f"The request takes {len(message)} bytes; {MOST_TO_ENGINE} are the most. Shorten it.")
        self._write(message)

    async def matcher(self, form: StructuredOutput) -> Matcher | None:
        """Refuse a form that no vocabulary could be held to; the engine's own process makes what holds to it."""
        from overlap.grammar.compile import check

        await asyncio.get_running_loop().run_in_executor(None, check, form)
        return None

    def end(self, key: int) -> None:
        """End a request soon, without waiting."""
        with suppress(EngineClosed, EngineDead):
            self._send(EndRequest(key))

    def end_and_tell(self, key: int) -> Future[bool]:
        """End a request; the future says whether it was still there. It raises EngineClosed, EngineDead as `call`'s."""
        future: Future[bool] = Future()
        ask = next(self._asks)
        self._send(EndRequest(key, ask))
        self._ended_asks[ask] = future
        self._pending.add(future)
        return future

    def idle(self) -> Future[None]:
        """Return a future of the moment when no answer of this process is open. It may raise as `drain`'s."""
        return asyncio.run_coroutine_threadsafe(self._wait_idle(), asyncio.get_running_loop())

    async def _wait_idle(self) -> None:
        self.check_open()
        while any(front.open_keys for front in self._fronts.values()):
            await asyncio.sleep(IDLE_SECONDS)
            self.check_open()

    def refuse_new(self) -> None:
        """Take no new request from now on."""
        self._draining = True

    async def look(self) -> Pulse:
        """Ask for the figures of this moment. Raises EngineClosed, EngineDead."""
        self.check_open()
        ask = next(self._asks)
        future = self._looks[ask] = asyncio.get_running_loop().create_future()
        try:
            self._send(Look(ask))
            pulse: Pulse = await future
            return pulse
        finally:
            del self._looks[ask]

    def show(self, figures: FrontFigures) -> None:
        """Let the other fronts know what this one has counted."""
        with suppress(EngineClosed, EngineDead):
            self._send(Seen(figures))

    def statistics(self) -> Statistics:
        """Return the engine's figures, a quarter of a second old at most while it is well."""
        self.check_open()
        if self._pulse is None:
            raise EngineClosed("The engine's figures have not arrived yet.")
        return Statistics(**self._pulse.figures)

    def late(self) -> str | None:
        """Return what is wrong with the engine, or None."""
        silent = time.monotonic() - self._heard
        if silent > SILENT_SECONDS:
            return f"The engine's process has not been heard of for {silent:.0f} s."
        return None if self._pulse is None else self._pulse.ill

    @property
    def parts(self) -> tuple[Planner, Loop]:
        """Nothing: they are in another process."""
        raise EngineClosed(
            "The engine runs in another process, where it cannot be traced, cleared or calibrated from here."
        )

    def close(self) -> Future[None]:
        """Hang up: whatever still runs ends. Idempotent."""
        first, self._close_asked = not self._close_asked, True
        if first:
            self._end_everything(lambda: EngineClosed("The engine was closed."))
            if self._writer is not None:
                self._writer.transport.abort()
            if self._reading is not None:
                self._reading.cancel()
            if not self._opened.done():
                self._opened.set_exception(EngineClosed("The engine was closed."))
            self._stopped.set_result(None)
        return self._stopped

    def _send(self, message: FromFront) -> None:
        self._write(frame(message))

    def _write(self, data: bytes) -> None:
        self.check_open()
        if self._writer is None:
            raise EngineClosed("The engine was not started. Use `async with` or `await engine.start()`.")
        self._writer.write(data)

    async def _read(self) -> None:
        try:
            reader, self._writer = await asyncio.open_unix_connection(self._path)
            while (data := await read_frame(reader, MOST_TO_FRONT)) is not None:
                self._heard = time.monotonic()
                self._hear(FROM_ENGINE.decode(data))
            failure: OverlapError = EngineDead("The engine's process has ended.")
        except asyncio.CancelledError:
            raise
        except Exception as error:
            failure = EngineDead(f"The engine cannot be reached any more: {error}")
        self._end_everything(lambda: type(failure)(str(failure)))
        if not self._opened.done():
            self._opened.set_exception(failure)

    def _hear(self, message: FromEngine) -> None:
        match message:
            case Step():
                settled = settled_of(message)
                for front in self._fronts.values():  # each knows its own keys
                    front.post_settled(settled)
            case Failed(key=key):
                error = error_of(message)
                for front in self._fronts.values():
                    front.post_failed(key, error)
            case Pulse(ask=ask):
                self._pulse = message
                if (look := self._looks.get(ask)) is not None and not look.done():
                    look.set_result(message)
            case Ended(ask=ask, was=was):
                future = self._ended_asks.pop(ask, None)  # None: the engine had ended before it said so
                if future is not None and self._pending.take(future):
                    future.set_result(was)
            case Over():
                self._end_everything(lambda: error_of(message))
            case Welcome():
                self._opened.set_result(opened_of(message))

    def _end_everything(self, make: Callable[[], OverlapError]) -> None:
        self._end_all(make)
        self._ended_asks.clear()
        self._pending.fail(make)
        for look in self._looks.values():
            if not look.done():
                look.set_exception(make())


class RemoteEngine(AsyncEngine):
    """An engine in another process, behind the Unix socket at `path`. `model` is its name.

    `aclose` ends what this process has asked for, or lets it end with `drain=True`; the engine itself serves on.
    """

    def __init__(self, model: str, path: str) -> None:
        self._path = path
        super().__init__(model)

    def _make_core(self) -> Core:
        self.core = RemoteCore(self._asked, self._path)
        return self.core

    async def other_fronts(self) -> Sequence[FrontFigures]:
        """Return what the other fronts had counted a moment ago."""
        try:
            return (await self.core.look()).others
        except (EngineClosed, EngineDead):
            return ()


def opened_of(welcome: Welcome) -> Opened:
    """Return what a front knows of its engine. Raises ModelError for a tokenizer that cannot be made."""
    source = welcome.tokenizer
    return Opened(
        resolved=msgspec.convert(welcome.resolved, Resolved),
        model=welcome.model,
        text=Text.of(None if source is None else source.unpacked(), welcome.template),
        notes=welcome.notes,
        refusal=partial(refusal_of, context=welcome.context),
        context=welcome.context,
    )
