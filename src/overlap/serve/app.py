"""The routes, and the aiohttp application that has them.

`make_app` can be mounted in an application of your own; `serving` runs it on a port of its own. The engine is yours:
neither starts or closes it.
"""

from __future__ import annotations

import hmac
import logging
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import TYPE_CHECKING, Final

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from overlap.messages import Output, Usage
from overlap.serve.answers import answer
from overlap.serve.errors import ApiError, to_api_error
from overlap.serve.protocol import Asked, parse_chat, parse_completion
from overlap.serve.shapes import Answer, ChatShape, CompletionShape, Shape, total_usage
from overlap.serve.sse import EventStream

if TYPE_CHECKING:
    from overlap import AsyncEngine

MAX_BODY_BYTES: Final = 8 * 2**20
"""The largest request body, decompressed. A million token ids take about 6 MB."""
SHUTDOWN_SECONDS: Final = 5.0
"""How long `serving` lets open answers go on once it was told to end."""

_log = logging.getLogger(__name__)
_encode: Final = msgspec.json.Encoder().encode


def make_app(engine: AsyncEngine, *, model_name: str | None = None, api_key: str | None = None) -> web.Application:
    """Return an application with /v1/models, /v1/completions, /v1/chat/completions and /health.

    `model_name` is the name that clients use (default: the engine's). With `api_key`, every route but /health asks for
    `Authorization: Bearer <api_key>`.

    To mount it: `app.add_subapp("/llm/", make_app(engine))`. Then run your application with
    `handler_cancellation=True` (an argument of `web.run_app` and `web.AppRunner`), or a client that leaves will not
    stop its answer, and with `client_max_size=MAX_BODY_BYTES`, as aiohttp asks the outermost application for it.
    """
    endpoint = Endpoint(engine, model_name or engine.model_name)
    middlewares: list[Middleware] = [errors_as_objects]
    if api_key is not None:
        middlewares.append(keys(api_key))
    app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=middlewares)
    app.add_routes(
        [
            web.get("/health", endpoint.health, name="health"),
            web.get("/v1/models", endpoint.models),
            web.get("/v1/models/{model:.+}", endpoint.model),
            web.post("/v1/completions", endpoint.completions),
            web.post("/v1/chat/completions", endpoint.chat_completions),
        ]
    )
    return app


@asynccontextmanager
async def serving(
    engine: AsyncEngine,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    model_name: str | None = None,
    api_key: str | None = None,
) -> AsyncIterator[str]:
    """Serve `engine` while the `async with` lasts. Gives the address, such as `http://127.0.0.1:8000`.

    `port` 0 takes a free one. Raises OSError if the port is taken.
    """
    app = make_app(engine, model_name=model_name, api_key=api_key)
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=SHUTDOWN_SECONDS)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
        taken = runner.addresses[0][1]
        yield f"http://[{host}]:{taken}" if ":" in host else f"http://{host}:{taken}"
    finally:
        await runner.cleanup()


class Endpoint:
    """The handlers of one engine's routes."""

    def __init__(self, engine: AsyncEngine, model_name: str) -> None:
        self._engine = engine
        self._model_name = model_name
        self._started = int(time.time())

    async def health(self, _: web.Request) -> web.Response:
        """200 while the engine can answer, 503 when it cannot."""
        health = self._engine.health()
        if health.ok:
            return _json({"status": "ok"})
        return _json({"status": "failed", "reason": health.reason}, status=503)

    async def models(self, _: web.Request) -> web.Response:
        """List the one model."""
        return _json({"object": "list", "data": [self._description()]})

    async def model(self, request: web.Request) -> web.Response:
        """Describe the one model."""
        self._check_model(request.match_info["model"])
        return _json(self._description())

    async def completions(self, request: web.Request) -> web.StreamResponse:
        """Go on with a text."""
        return await self._answer(request, parse_completion(await request.read()), CompletionShape())

    async def chat_completions(self, request: web.Request) -> web.StreamResponse:
        """Answer a conversation."""
        return await self._answer(request, parse_chat(await request.read()), ChatShape())

    async def _answer(self, request: web.Request, asked: Asked, shape: Shape) -> web.StreamResponse:
        if asked.model is not None:
            self._check_model(asked.model)
        id = shape.id_prefix + uuid.uuid4().hex  # noqa: A001
        created = int(time.time())
        async with aclosing(answer(self._engine, asked.prompts, asked.params, id)) as answers:
            if asked.stream:
                stream = EventStream(shape, asked, id=id, created=created, model=self._model_name)
                return await stream.send(request, answers)
            finals = await _finals(answers)
        usages: list[Usage] = [output.usage for output in finals.values()]
        return _json(
            Answer(
                id=id,
                object=shape.object,
                created=created,
                model=self._model_name,
                choices=tuple(shape.whole(index, finals[index]) for index in sorted(finals)),
                usage=total_usage(usages),
            )
        )

    def _check_model(self, name: str) -> None:
        if name != self._model_name:
            raise ApiError(404, f"There is no model {name[:200]!r} here; there is {self._model_name!r}.",
                           param="model", code="model_not_found")  # fmt: skip

    def _description(self) -> dict[str, object]:
        return {"id": self._model_name, "object": "model", "created": self._started, "owned_by": "overlap"}


async def _finals(answers: AsyncGenerator[tuple[int, Output], None]) -> dict[int, Output]:
    return {index: output async for index, output in answers if output.finished}


def _json(body: object, *, status: int = 200) -> web.Response:
    return web.Response(body=_encode(body), status=status, content_type="application/json")


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


def keys(api_key: str) -> Middleware:
    """Return a middleware that lets only requests with this key pass, and anyone see /health."""
    expected = f"Bearer {api_key}".encode()

    @web.middleware
    async def check_key(request: web.Request, handler: Handler) -> web.StreamResponse:
        given = request.headers.get("Authorization", "").encode("utf-8", "surrogateescape")
        right = hmac.compare_digest(given, expected)  # takes the same time wherever they differ
        if not right and request.match_info.route.name != "health":
            raise ApiError(401, "The API key is missing or wrong. Send it as 'Authorization: Bearer KEY'.",
                           code="invalid_api_key")  # fmt: skip
        return await handler(request)

    return check_key
