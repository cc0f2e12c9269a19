"""A front: HTTP, JSON, templates and text in a process of its own, for an engine in another."""

from __future__ import annotations

import asyncio
import gc
import socket
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Final

from aiohttp import web

from overlap.errors import OverlapError
from overlap.serve.access import ServeOptions
from overlap.serve.app import make_app, make_runner
from overlap.serve.child import FrontOrder, Told, obey, run, tell
from overlap.serve.metrics import METER
from overlap.serve.remote import RemoteEngine

SHOW_SECONDS: Final = 0.25
LAST_WORDS_SECONDS: Final = 1.0
"""For clients to be told of the engine's death before the process goes."""
GONE: Final = 4
"""Exit code of a front whose engine has ended."""


async def serve(order: FrontOrder, drain: asyncio.Event) -> int:
    """Answer clients until told to drain, or until the engine has ended."""
    engine = RemoteEngine(order.model, order.path)
    await engine.start()
    app = make_app(engine, options_of(order.app), other_fronts=engine.other_fronts)
    runner = make_runner(app, shutdown_timeout=LAST_WORDS_SECONDS)
    await runner.setup()
    site = web.SockSite(runner, socket.socket(fileno=order.socket))
    try:
        await site.start()
        gc.collect()
        gc.freeze()  # what is here stays: to look through it took 14 ms (measured), in which no stream went on
        tell(Told(ready=True))
        while not drain.is_set():
            with suppress(TimeoutError):
                await asyncio.wait_for(drain.wait(), SHOW_SECONDS)
            engine.core.show(app[METER].figures())
            if engine.core.failure is not None:
                await asyncio.sleep(LAST_WORDS_SECONDS)
                return GONE
        engine.core.refuse_new()
        await site.stop()
        until = time.monotonic() + order.drain_seconds
        while app[METER].figures().answers_open and time.monotonic() < until:  # noqa: ASYNC110  # nobody sets an event
            await asyncio.sleep(0.02)
        engine.core.show(app[METER].figures())
        return 0
    finally:
        await runner.cleanup()
        await engine.aclose()


def options_of(given: Mapping[str, Any]) -> ServeOptions:
    """Return what crossed as JSON as the options of an application."""
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    values["log"] = sys.stderr if values.get("log") else None
    return ServeOptions(**values)


async def _main() -> int:
    try:
        return await obey(FrontOrder, serve)
    except (OverlapError, OSError) as error:
        tell(Told(ready=False, why=str(error)))
        return 1


if __name__ == "__main__":
    sys.exit(run(_main()))
