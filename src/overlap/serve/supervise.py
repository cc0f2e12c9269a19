"""`overlap serve` with fronts: one process for the engine, some for HTTP, and this one, which only watches.

A front that dies is started again; its listening socket, which is held here, keeps who is about to connect. When the
engine dies everything ends, with an error to whoever waits. SIGTERM and SIGINT let what runs end within
`drain_seconds`, a second signal does not. No child outlives this process: each ends when its stdin does.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec

from overlap.errors import ConfigError, EngineDead
from overlap.serve.child import DRAIN, EngineOrder, FrontOrder, Told

BACKLOG: Final = 1024
SLACK_SECONDS: Final = 5.0
"""What a child may take for the rest once `drain_seconds` are over."""
DEATH_SECONDS: Final = 3.0
"""For fronts to tell their clients that the engine is dead."""
RESTART_SECONDS: Final = 0.2
"""Between the death of a front and its next life."""
MOST_DEATHS: Final = 5
"""A front that dies so often before it was ever ready is given up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What to serve, and how. Seconds are whole-process limits."""

    model: str
    options: dict[str, Any]
    """EngineConfig's fields."""
    app: dict[str, Any]
    """Fields of `ServeOptions`; `log` is whether to log to stderr."""
    fronts: int
    host: str = "127.0.0.1"
    port: int = 8000
    drain_seconds: float = 30.0


def default_fronts() -> int:
    """Return how many fronts suit this machine: one for every four cores, 1 to 8; none without Unix sockets."""
    if not hasattr(socket, "AF_UNIX"):
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return min(max(cores // 4, 1), 8)


def listen(host: str, port: int, count: int) -> list[socket.socket]:
    """Return `count` sockets that listen on one port, among which the kernel spreads connections.

    Where it does not (macOS, Windows), it is one socket `count` times. Raises OSError if the port is taken.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    if not sys.platform.startswith("linux"):
        return [socket.create_server((host, port), family=family, backlog=BACKLOG)] * count
    # Sockets that share a port would also share it with a server that runs already: a plain one finds that out.
    with socket.create_server((host, port), family=family) as probe:
        port = probe.getsockname()[1]
    return [socket.create_server((host, port), family=family, backlog=BACKLOG, reuse_port=True) for _ in range(count)]


class Child:
    """A process that was started, and the pipes to it."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self.process: Final = process
        self._stdin = process.stdin
        self._stdout = process.stdout

    @classmethod
    async def start(cls, module: str, order: EngineOrder | FrontOrder) -> Child:
        """Start a module of ours as a program, with an order on its stdin."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            module,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            pass_fds=(order.socket,),
            start_new_session=True,  # Ctrl-C at a terminal is for us: we tell them
        )
        child = cls(process)
        child._stdin.write(msgspec.json.encode(order) + b"\n")
        return child

    async def told(self) -> Told:
        """Wait for what it tells of itself."""
        line = await self._stdout.readline()
        if not line:
            code = await self.process.wait()
            return Told(ready=False, why=f"A process of the server ended with the exit code {code} as it started.")
        return msgspec.json.decode(line, type=Told)

    def drain(self) -> None:
        """Ask it to finish and end."""
        with suppress(OSError, RuntimeError):
            self._stdin.write(DRAIN)

    async def end(self, seconds: float = 0.0) -> int:
        """Wait until it has ended, for so long; then make it. Return its exit code."""
        with suppress(TimeoutError):
            return await asyncio.wait_for(self.process.wait(), seconds)
        with suppress(ProcessLookupError):
            self.process.kill()
        return await self.process.wait()


class Supervisor:
    """One run of `overlap serve` with fronts."""

    def __init__(self, asked: Asked, note: Callable[[str], None]) -> None:
        self._asked = asked
        self._note = note
        self._signals: list[signal.Signals] = []
        self._signalled = asyncio.Event()
        self._second = asyncio.Event()
        self._children: set[Child] = set()
        self._ending = asyncio.Event()

    async def run(self) -> int:
        """Serve until told to end; return the exit code. Raises ConfigError, EngineDead, OSError if it cannot start."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._hear, number)
        sockets = listen(self._asked.host, self._asked.port, self._asked.fronts)
        try:
            with tempfile.TemporaryDirectory(prefix="overlap-") as directory:  # mode 0700
                path = str(Path(directory) / "engine")
                with _unix_listener(path) as listener:
                    return await self._run(sockets, path, listener)
        finally:
            for child in self._children:
                await child.end()
            for each in sockets:
                each.close()
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

    def _hear(self, number: signal.Signals) -> None:
        self._signals.append(number)
        (self._second if self._signalled.is_set() else self._signalled).set()

    async def _run(self, sockets: Sequence[socket.socket], path: str, listener: socket.socket) -> int:
        asked = self._asked
        order = EngineOrder(
            model=asked.model, options=asked.options, socket=listener.fileno(), drain_seconds=asked.drain_seconds
        )
        engine = await self._start("overlap.serve.engine_process", order)
        signalled = asyncio.create_task(self._signalled.wait())
        told = asyncio.create_task(engine.told())
        await _first(signalled, told)
        if signalled.done():
            told.cancel()
            return self._code()
        answer = told.result()
        if not answer.ready:
            raise ConfigError(answer.why) if answer.asked_wrong else EngineDead(answer.why)
        orders = [
            FrontOrder(model=asked.model, path=path, socket=each.fileno(), app=asked.app,
                       drain_seconds=asked.drain_seconds) for each in sockets
        ]  # fmt: skip
        ready = [asyncio.Event() for _ in orders]
        keeping = [asyncio.create_task(self._keep(*pair)) for pair in zip(orders, ready, strict=True)]
        gone = asyncio.create_task(engine.process.wait())
        try:
            all_ready = asyncio.create_task(_all([asyncio.create_task(event.wait()) for event in ready]))
            await _first(all_ready, signalled, gone, *keeping)
            if all_ready.done():
                self._note(f"{asked.model} is served at {_address(sockets[0])}/v1 (Ctrl-C ends)")
            all_ready.cancel()
            await _first(signalled, gone, *keeping)
            if not signalled.done():
                return await self._die(engine, keeping)
            return await self._drain(engine, keeping, sockets)
        finally:
            for task in (signalled, gone, *keeping):
                task.cancel()
            await asyncio.gather(signalled, gone, *keeping, return_exceptions=True)

    async def _start(self, module: str, order: EngineOrder | FrontOrder) -> Child:
        child = await Child.start(module, order)
        self._children.add(child)
        return child

    async def _keep(self, order: FrontOrder, ready: asyncio.Event) -> None:
        """Keep one front alive. Returns when it has ended as it should, or is given up."""
        deaths = 0
        while deaths < MOST_DEATHS and not self._ending.is_set():
            child = await self._start("overlap.serve.front_process", order)
            told = await child.told()
            if told.ready:
                deaths = 0
                ready.set()
                if self._ending.is_set():
                    child.drain()
            else:
                deaths += 1
            code = await child.process.wait()
            self._children.discard(child)
            if self._ending.is_set():
                return
            self._note(f"overlap: a front ended with the exit code {code}{told.why and ': '}{told.why}; starting anew")
            await asyncio.sleep(RESTART_SECONDS)

    async def _die(self, engine: Child, keeping: Sequence[asyncio.Task[None]]) -> int:
        """The engine is dead, or a front cannot live: end what is left."""
        self._ending.set()
        with suppress(TimeoutError):  # fronts notice by themselves, and tell their clients
            await asyncio.wait_for(asyncio.gather(*keeping, return_exceptions=True), DEATH_SECONDS)
        code = engine.process.returncode
        self._note("overlap: error: a front cannot start" if code is None else
                   f"overlap: error: the engine's process ended with the exit code {code}")  # fmt: skip
        return 1

    async def _drain(
        self, engine: Child, keeping: Sequence[asyncio.Task[None]], sockets: Sequence[socket.socket]
    ) -> int:
        """Let what runs end: fronts first, then the engine."""
        self._ending.set()
        for each in sockets:
            each.close()
        for child in self._children - {engine}:
            child.drain()
        ended = asyncio.create_task(_all(keeping))
        second = asyncio.create_task(self._second.wait())
        await _first(second, ended, seconds=self._asked.drain_seconds + SLACK_SECONDS)
        if not second.done():
            engine.drain()
            await engine.end(SLACK_SECONDS)
        second.cancel()
        ended.cancel()
        return self._code()

    def _code(self) -> int:
        """0 for SIGTERM; for Ctrl-C what shells expect."""
        return 128 + signal.SIGINT if self._signals[0] == signal.SIGINT else 0


async def _first(*tasks: asyncio.Task[Any], seconds: float | None = None) -> None:
    """Wait until one of these is done."""
    await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)


async def _all(tasks: Sequence[asyncio.Task[Any]]) -> None:
    """Wait until all of these are done; when cancelled, cancel them."""
    await asyncio.gather(*tasks, return_exceptions=True)


def _unix_listener(path: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(path)
    Path(path).chmod(0o600)
    listener.listen(BACKLOG)
    return listener


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
