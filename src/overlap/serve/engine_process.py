"""The engine's process: token ids come in over a Unix socket, token ids go out. No HTTP, JSON or text here.

Each front has a connection, and gets one message a step. A front that does not read is not waited for: what came
meanwhile is merged into one message. A front whose connection ends takes its requests with it.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from typing import Any, Final

import msgspec

from overlap.config import EngineConfig
from overlap.core import Core, Opened
from overlap.environment import cache_directory, package_index
from overlap.errors import ConfigError, EngineClosed, EngineDead, OverlapError, RequestError
from overlap.front import Front
from overlap.observe.metrics import FrontFigures, engine_figures
from overlap.observe.metrics import merged as figures_of_all
from overlap.schedule.request import Request
from overlap.schedule.settled import Settled
from overlap.serve.child import EngineOrder, Told, obey, run, tell
from overlap.serve.link import (
    MOST_TO_ENGINE,
    BadFrame,
    Ended,
    EndRequest,
    Failed,
    FromEngine,
    FromFront,
    Look,
    Over,
    Pulse,
    Seen,
    Submit,
    TokenizerFrom,
    Welcome,
    failed_of,
    frame,
    from_front,
    merged,
    read_frame,
    request_of,
    step_of,
)

HELD_BYTES: Final = 256 << 10
"""What may wait in a front's socket before steps are merged."""
MOST_BEHIND_BYTES: Final = 64 << 20
"""What may wait behind that. A front that leaves more unread is taken for dead."""
PULSE_SECONDS: Final = 0.25

_log = logging.getLogger(__name__)


class Line(Front):
    """A front in another process. Like any Front it is posted to by the engine's loop; it sends on what it gets."""

    def __init__(self, number: int, loop: asyncio.AbstractEventLoop, writer: asyncio.StreamWriter) -> None:
        super().__init__(number, loop)
        self.engine_keys: dict[int, int] = {}
        """The engine's key of each open request, by the front's."""
        self.wire_keys: dict[int, int] = {}
        self.figures: FrontFigures | None = None
        self._writer = writer
        self._behind: list[Settled | Failed] = []
        self._behind_bytes = 0
        self._draining: asyncio.Task[None] | None = None

    def begin(self, wire_key: int, key: int) -> None:
        """A request of this front is about to be submitted."""
        self.engine_keys[wire_key] = key
        self.wire_keys[key] = wire_key

    def finish(self, key: int) -> None:
        """Forget a request, by the engine's key."""
        self.engine_keys.pop(self.wire_keys.pop(key, -1), None)

    def send(self, message: FromEngine) -> None:
        """Send a message now, behind nothing that waits."""
        self._writer.write(frame(message))

    @property
    def full(self) -> bool:
        """Whether its socket holds so much that only answers to what it asks are sent right now."""
        return self._writer.transport.get_write_buffer_size() > HELD_BYTES

    def hang_up(self) -> None:
        """End the connection. What was not sent is lost."""
        self._behind.clear()
        if self._draining is not None:
            self._draining.cancel()
        self._writer.transport.abort()

    def _take_settled(self, settled: Settled) -> None:
        if not self._behind and not self.full:
            self._send_step(settled)  # nearly always
            return
        size = settled.keys.nbytes + settled.tokens.nbytes + (0 if settled.told is None else settled.told.nbytes)
        size += sum(one.words.nbytes for one in settled.scored)
        self._put(settled, size)

    def _take_failed(self, key: int, failure: BaseException) -> None:
        if (wire_key := self.wire_keys.get(key)) is not None:
            self.finish(key)
            self._put(failed_of(wire_key, failure), 256)

    def _take_end(self, make: Callable[[], OverlapError]) -> None:
        error = make()
        self._send_behind()
        self.send(Over("EngineDead" if isinstance(error, EngineDead) else "EngineClosed", str(error)))

    def _put(self, item: Settled | Failed, size: int) -> None:
        self._behind.append(item)
        self._behind_bytes += size
        if not self.full:
            self._send_behind()
        elif self._behind_bytes > MOST_BEHIND_BYTES:
            _log.error("front %d has left %d bytes unread and is cut off", self.number, self._behind_bytes)
            self.hang_up()
        elif self._draining is None or self._draining.done():
            self._draining = asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        with suppress(OSError):
            await self._writer.drain()
            self._send_behind()

    def _send_behind(self) -> None:
        """Send what waits: the steps between two failures as one."""
        behind, self._behind, self._behind_bytes = self._behind, [], 0
        for is_step, items in itertools.groupby(behind, lambda item: isinstance(item, Settled)):
            if is_step:
                self._send_step(merged([item for item in items if isinstance(item, Settled)]))
            else:
                for item in items:
                    if isinstance(item, Failed):
                        self.send(item)

    def _send_step(self, settled: Settled) -> None:
        self.send(step_of(settled, self.wire_keys))
        for end in settled.ends:
            self.finish(end.key)


class Hub:
    """All fronts of one engine. On the event loop of the process' main thread."""

    def __init__(self, core: Core, opened: Opened, welcome: Welcome) -> None:
        self._core = core
        self._opened = opened
        self._welcome = welcome
        self._keys = itertools.count()
        self._lines: set[Line] = set()
        self._compiling: set[asyncio.Task[None]] = set()
        self._left: FrontFigures | None = None
        """What fronts that have ended had counted: without them, sums would fall."""

    async def attend(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one front until either side ends the connection."""
        writer.transport.set_write_buffer_limits(high=HELD_BYTES)
        loop = asyncio.get_running_loop()
        line = self._core.add_front(lambda number: Line(number, loop, writer))
        self._lines.add(line)
        try:
            line.send(self._welcome)
            while (data := await read_frame(reader, MOST_TO_ENGINE)) is not None:
                self._hear(line, from_front(data))
        except BadFrame as error:
            _log.warning("a front was cut off: %s", error)
        finally:
            self._leave(line)

    def pulse(self, line: Line, ask: int = -1) -> Pulse:
        """Return the figures of this moment for one front."""
        ill = self._core.late()
        figures = {}
        try:
            figures = dict(engine_figures(self._core.statistics()))
        except (EngineClosed, EngineDead) as error:
            ill = str(error)
        others = [other.figures for other in self._lines if other is not line and other.figures is not None]
        if self._left is not None:
            others.append(self._left)
        return Pulse(ask=ask, figures=figures, ill=ill, others=tuple(others))

    async def beat(self) -> None:
        """Send every front the figures, again and again; none to one that does not read."""
        while True:
            for line in tuple(self._lines):
                if not line.full:
                    line.send(self.pulse(line))
            await asyncio.sleep(PULSE_SECONDS)

    def _hear(self, line: Line, message: FromFront) -> None:
        match message:
            case Submit():
                self._submit(line, message)
            case EndRequest(key=wire_key, ask=ask):
                key = line.engine_keys.get(wire_key)
                if key is not None:
                    line.finish(key)
                    self._core.end(key)
                if ask >= 0:
                    line.send(Ended(ask, key is not None))
            case Look(ask=ask):
                line.send(self.pulse(line, ask))
            case Seen(figures=figures):
                line.figures = figures

    def _submit(self, line: Line, submit: Submit) -> None:
        if submit.key in line.engine_keys or submit.key < 0 or submit.limit < 1:
            raise BadFrame(f"A request came with the key {submit.key} and the limit {submit.limit}.")
        key = next(self._keys)
        vocab_size = self._opened.model.vocab_size
        try:
            request = request_of(submit, key=key, front=line.number, vocab_size=vocab_size)
            refusal = self._opened.refusal(len(request.prompt), request.limit)
        except RequestError as error:
            refusal = str(error)
        if refusal is None and submit.shaping is not None and submit.shaping.min_tokens > submit.limit:
            refusal = f"min_tokens is {submit.shaping.min_tokens}, and the answer may have {submit.limit} tokens."
        if refusal is not None:
            line.send(Failed(submit.key, "RequestError", refusal))
            return
        line.begin(submit.key, key)
        if request.structured is None:
            self._pass_on(line, request)
        else:
            compiling = asyncio.create_task(self._hold_to_form(line, request))
            self._compiling.add(compiling)
            compiling.add_done_callback(self._compiling.discard)

    async def _hold_to_form(self, line: Line, request: Request) -> None:
        """Compile a request's form, then pass it on if it was not ended meanwhile."""
        assert request.structured is not None, "only what asks for a form is held to one"
        try:
            request.matcher = await self._core.matcher(request.structured)
        except OverlapError as error:
            self._refuse(line, request.key, error)
            return
        except BaseException as error:  # ours, or a panic's: whoever waits has to hear of it
            self._refuse(line, request.key, error)
            raise
        if request.key in line.wire_keys:
            self._pass_on(line, request)

    def _pass_on(self, line: Line, request: Request) -> None:
        try:
            self._core.submit(request)
        except (EngineClosed, EngineDead) as error:
            self._refuse(line, request.key, error)

    @staticmethod
    def _refuse(line: Line, key: int, error: BaseException) -> None:
        wire_key = line.wire_keys.get(key)
        if wire_key is not None:
            line.finish(key)
            line.send(failed_of(wire_key, error))

    def _leave(self, line: Line) -> None:
        self._lines.discard(line)
        self._core.remove_front(line)
        for key in tuple(line.wire_keys):
            line.finish(key)  # one whose form is being compiled is not submitted then
            self._core.end(key)
        if line.figures is not None:  # its counters stay; what was open, and it itself, is no more
            line.figures = msgspec.structs.replace(line.figures, answers_open=0, fronts=0)
            self._left = figures_of_all([line.figures] if self._left is None else [self._left, line.figures])
        line.hang_up()


def welcome_of(asked: EngineConfig, opened: Opened) -> Welcome:
    """Return what fronts are told first. The model's files are opened once more, for what its tokenizer is made of."""
    from overlap.models import open_checkpoint

    checkpoint = open_checkpoint(
        asked.model,
        load_format=asked.load_format,
        revision=asked.revision,
        cache_dir=cache_directory(asked.cache_dir),
        index_url=package_index(),
    )
    try:
        source = checkpoint.tokenizer_source
        return Welcome(
            resolved=asdict(opened.resolved),
            model=opened.model,
            tokenizer=None if source is None else TokenizerFrom.packed(source),
            template=checkpoint.chat_template,
            notes=opened.notes,
            context=opened.context,
        )
    finally:
        checkpoint.close()


async def serve(order: EngineOrder, drain: asyncio.Event) -> int:
    """Run the engine until it is told to drain, or dies."""
    asked = EngineConfig.from_options(order.model, order.options)
    core = Core(asked)
    stopped: asyncio.Future[None] | None = None
    try:
        opened = await asyncio.wrap_future(core.start())
        stopped = asyncio.wrap_future(core.stopped)
        hub = Hub(core, opened, await asyncio.to_thread(welcome_of, asked, opened))
        listening = socket.socket(fileno=order.socket)
        server = await asyncio.start_unix_server(hub.attend, sock=listening)
        beating = asyncio.create_task(hub.beat())
        tell(Told(ready=True))
        told: asyncio.Future[Any] = asyncio.ensure_future(drain.wait())
        try:
            await asyncio.wait((told, stopped), return_when=asyncio.FIRST_COMPLETED)
            if core.failure is not None:
                await asyncio.sleep(0.2)  # for what was posted to be sent
                return 1
            with suppress(TimeoutError, EngineClosed, EngineDead):
                await asyncio.wait_for(asyncio.wrap_future(core.drain()), order.drain_seconds)
            return 0
        finally:
            told.cancel()
            beating.cancel()
            server.close()
    finally:
        core.close()
        if stopped is not None:
            with suppress(TimeoutError):
                await asyncio.wait_for(asyncio.shield(stopped), 10)


async def _main() -> int:
    try:
        return await obey(EngineOrder, serve)
    except (OverlapError, OSError) as error:
        tell(Told(ready=False, why=str(error), asked_wrong=isinstance(error, ConfigError)))
        return 2 if isinstance(error, ConfigError) else 1


if __name__ == "__main__":
    sys.exit(run(_main()))
