"""The aiohttp application that has the routes, and how it is served.

`make_app` can be mounted in an application of your own; `serving` runs it on a port of its own. The engine is yours:
neither starts or closes it.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from overlap.serve.access import (
    IDLE_SECONDS,
    MAX_BODY_BYTES,
    ServeOptions,
    answering_preflights,
    checking_keys,
    logging_requests,
    marking_responses,
)
from overlap.serve.connection import Runner
from overlap.serve.endpoint import Endpoint
from overlap.serve.errors import to_api_error
from overlap.serve.metrics import add_metrics
from overlap.serve.page import PAGE_ROUTES, add_page

if TYPE_CHECKING:
    from overlap.observe.metrics import FrontFigures
    from overlap.serve.door import Door

SHUTDOWN_SECONDS: Final = 5.0
"""How long `serving` lets open answers go on once it was told to end."""

_log = logging.getLogger(__name__)


def make_app(
    door: Door,
    options: ServeOptions | None = None,
    *,
    model_name: str | None = None,
    api_key: str | None = None,
    other_fronts: Callable[[], Awaitable[Sequence[FrontFigures]]] | None = None,
) -> web.Application:
    """Return an application with the routes of docs/serving.md, in front of `door`: an AsyncEngine, or another Door.

    `model_name` and `api_key` are short for options. With a key, every route but /health and the page's own files asks
    for `Authorization: Bearer KEY`. `other_fronts` is for /metrics; see `add_metrics`.

    To mount it: `app.add_subapp("/llm/", make_app(engine))`. Then run your application with
    `handler_cancellation=True` (an argument of `web.run_app` and `web.AppRunner`), or a client that leaves will not
    stop its answer, and with `client_max_size=MAX_BODY_BYTES`, as aiohttp asks the outermost application for it.
    """
    options = _with(options, model_name, api_key)
    middlewares: list[Middleware] = [logging_requests(options), errors_as_objects]
    if options.cors_origins:
        middlewares.append(answering_preflights(options.cors_origins))
    if options.api_keys:
        middlewares.append(checking_keys(options.api_keys, open_routes=("health", *PAGE_ROUTES)))
    app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=middlewares)
    app.on_response_prepare.append(marking_responses(options.cors_origins))
    metered = add_metrics(app, door, model_name=options.model_name, other_fronts=other_fronts)
    add_page(app, metered, model_name=options.model_name)
    app.add_routes(Endpoint(metered, options).routes())
    return app


@asynccontextmanager
async def serving(
    door: Door,
    options: ServeOptions | None = None,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    model_name: str | None = None,
    api_key: str | None = None,
) -> AsyncIterator[str]:
    """Serve `door` while the `async with` lasts. Gives the address, such as `http://127.0.0.1:8000`.

    `port` 0 takes a free one. Raises OSError if the port is taken.
    """
    runner = make_runner(make_app(door, options, model_name=model_name, api_key=api_key))
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
        taken = runner.addresses[0][1]
        yield f"http://[{host}]:{taken}" if ":" in host else f"http://{host}:{taken}"
    finally:
        await runner.cleanup()


def make_runner(app: web.Application, **more: Any) -> web.AppRunner:
    """Return what runs `app` as the endpoint must be run.

    A client that leaves ends its handler, idle ones are cut, and what is no HTTP gets an error object.
    """
    settings = {"handler_cancellation": True, "access_log": None, "shutdown_timeout": SHUTDOWN_SECONDS}
    return Runner(app, **{**settings, "keepalive_timeout": IDLE_SECONDS, **more})


def _with(options: ServeOptions | None, model_name: str | None, api_key: str | None) -> ServeOptions:
    options = options or ServeOptions()
    return replace(
        options,
        model_name=options.model_name if model_name is None else model_name,
        api_keys=options.api_keys if api_key is None else (*options.api_keys, api_key),
    )


@web.middleware
async def errors_as_objects(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turn whatever a handler raises into an error object. What is our fault is also logged, without the request."""
    try:
        return await handler(request)
    except Exception as error:
        told = to_api_error(error)
        if told.code == "internal_error":
            _log.exception("%s %s failed", request.method, request.path)
        response = told.response()
        if isinstance(error, web.HTTPException) and "Allow" in error.headers:
            response.headers["Allow"] = error.headers["Allow"]
        return response
