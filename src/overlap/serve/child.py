"""A process that `overlap serve` has started: told what to do on stdin, tells what became of it on stdout.

The first line on stdin is its configuration in JSON, so that no key is seen in a list of processes; a line later on
asks it to drain. The end of stdin means that the parent is gone, however it went, and the process ends at once: no
child outlives its parent.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeVar

import msgspec

DRAIN: Final = b"drain\n"
ORPHANED: Final = 3
"""Exit code of a process whose parent is gone."""
MOST_CONFIG: Final = 1 << 20

C = TypeVar("C", bound=msgspec.Struct)


class EngineOrder(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine's process is told."""

    model: str
    options: dict[str, Any]
    """EngineConfig's fields."""
    socket: int
    """The file descriptor of the Unix socket that fronts connect to; it listens."""
    drain_seconds: float


class FrontOrder(msgspec.Struct, frozen=True, kw_only=True):
    """What a front is told."""

    model: str
    path: str
    """Of the engine's socket."""
    socket: int
    """The file descriptor of the socket that clients connect to; it listens."""
    app: dict[str, Any]
    """Fields of `ServeOptions`; `log` is whether to log to stderr."""
    drain_seconds: float


class Told(msgspec.Struct, frozen=True, kw_only=True):
    """What a child tells of itself: it is ready, or why it cannot be."""

    ready: bool
    why: str = ""
    asked_wrong: bool = False
    """Whether it failed for what it was asked to be (ConfigError)."""


def tell(told: Told) -> None:
    """Tell the parent, in a line on stdout."""
    os.write(sys.stdout.fileno(), msgspec.json.encode(told) + b"\n")


async def obey(kind: type[C], work: Callable[[C, asyncio.Event], Awaitable[int]]) -> int:
    """Read the order, run `work(order, drain)` and return its exit code. `drain` is set when the parent asks for it."""
    reader = asyncio.StreamReader(limit=MOST_CONFIG)
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    order = msgspec.json.decode(await reader.readline(), type=kind)
    drain = asyncio.Event()

    async def listen() -> None:
        while line := await reader.readline():
            if line == DRAIN:
                drain.set()
        os._exit(ORPHANED)  # nobody is left to tell, and threads may be deep in a step

    listening = asyncio.create_task(listen())
    try:
        return await work(order, drain)
    finally:
        listening.cancel()


def run(main: Awaitable[int]) -> int:
    """Run a child's coroutine on uvloop where there is one."""
    try:
        import uvloop
    except ImportError:
        factory = asyncio.new_event_loop
    else:
        factory = uvloop.new_event_loop

    async def whole() -> int:
        return await main

    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(whole())
