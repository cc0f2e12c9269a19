"""Who may ask, how much and for how long, and what is written down about it."""

from __future__ import annotations

import asyncio
import hmac
import json
import re
import secrets
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, TextIO

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from overlap.serve.errors import ApiError

MAX_BODY_BYTES: Final = 16 * 2**20
"""The largest request body, decompressed. A million token ids take about 6 MB."""
IDLE_SECONDS: Final = 75.0
"""How long a connection may go without a request, or take over the headers of one."""

REQUEST_ID: Final = web.RequestKey("REQUEST_ID", str)
FAIRNESS_KEY: Final = web.RequestKey("FAIRNESS_KEY", str)
TOLD: Final = web.RequestKey("TOLD", dict[str, Any])
"""What a handler adds to the log's line about its request."""

_GOOD_ID: Final = re.compile(r"[\w.:-]{1,128}", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """How an endpoint is served."""

    model_name: str | None = None
    """The name that clients use. None is the engine's."""
    api_keys: tuple[str, ...] = ()
    """The keys that clients may send; each gets an equal share of a busy engine. Without one everybody may ask."""
    cors_origins: tuple[str, ...] = ()
    """The origins whose pages may ask from a browser, such as `https://example.org`; "*" is any."""
    log: TextIO | None = None
    """Where a JSON line about each request goes."""
    log_prompts: bool = False
    """Also write prompts there."""
    body_seconds: float = 60.0
    """How long a client may take over sending a body."""
    stall_seconds: float = 60.0
    """How long a client may take nothing of its stream, once about 64 KiB wait for it, before it is cut off."""
    deadline_seconds: float | None = None
    """The longest that an answer may take, waiting included."""


async def read_body(request: web.Request, seconds: float) -> bytes:
    """Return the body of a request. Raises ApiError for one that is too large or comes too slowly."""
    if request.content_length is not None and request.content_length > MAX_BODY_BYTES:
        raise web.HTTPRequestEntityTooLarge(MAX_BODY_BYTES, request.content_length)
    try:
        async with asyncio.timeout(seconds):
            return await request.read()
    except TimeoutError:
        raise ApiError(408, f"The body had not come within {seconds:g} s.", code="body_too_slow") from None


def logging_requests(options: ServeOptions) -> Middleware:
    """Return a middleware that gives each request an id, and writes a line about it when it is done."""

    @web.middleware
    async def logged(request: web.Request, handler: Handler) -> web.StreamResponse:
        given = request.headers.get("X-Request-Id", "")
        request[REQUEST_ID] = given if _GOOD_ID.fullmatch(given) else f"req-{secrets.token_hex(12)}"
        told: dict[str, Any] = {}
        request[TOLD] = told
        began = time.monotonic()
        status = 499  # the client left: what nginx writes then
        try:
            response = await handler(request)
            status = response.status
        finally:
            if options.log is not None:
                _write_line(options.log, request, status, time.monotonic() - began, told)
        return response

    return logged


def _write_line(log: TextIO, request: web.Request, status: int, seconds: float, told: dict[str, Any]) -> None:
    resource = request.match_info.route.resource
    line = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "request_id": request[REQUEST_ID],
        "method": request.method,
        "route": None if resource is None else resource.canonical,
        "status": status,
        "seconds": round(seconds, 4),
        **told,
    }
    log.write(json.dumps(line) + "\n")
    log.flush()


def checking_keys(api_keys: Sequence[str], open_routes: Collection[str]) -> Middleware:
    """Return a middleware that lets only requests with one of these keys pass, and anyone see the open routes."""
    expected = [f"Bearer {key}".encode() for key in api_keys]

    @web.middleware
    async def check_key(request: web.Request, handler: Handler) -> web.StreamResponse:
        given = request.headers.get("Authorization", "").encode("utf-8", "surrogateescape")
        # takes the same time wherever they differ, and whichever is right
        right = [number for number, key in enumerate(expected) if hmac.compare_digest(given, key)]
        if not right and request.match_info.route.name not in open_routes:
            raise ApiError(401, "The API key is missing or wrong. Send it as 'Authorization: Bearer KEY'.",
                           code="invalid_api_key")  # fmt: skip
        request[FAIRNESS_KEY] = f"key-{right[0]}" if right else ""
        return await handler(request)

    return check_key


def answering_preflights(origins: Collection[str]) -> Middleware:
    """Return a middleware that tells browsers which pages may ask."""

    @web.middleware
    async def preflight(request: web.Request, handler: Handler) -> web.StreamResponse:
        asks = "Access-Control-Request-Method" in request.headers
        if request.method == "OPTIONS" and asks and allowed_origin(request, origins):
            return web.Response(
                status=204,
                headers={
                    "Access-Control-Allow-Methods": "GET, POST",
                    "Access-Control-Allow-Headers": request.headers.get("Access-Control-Request-Headers", ""),
                    "Access-Control-Max-Age": "600",
                },
            )
        return await handler(request)

    return preflight


def allowed_origin(request: web.Request, origins: Collection[str]) -> str | None:
    """Return the origin of a request if its pages may ask."""
    origin = request.headers.get("Origin")
    if origin is None or not origins:
        return None
    return "*" if "*" in origins else origin if origin in origins else None


def marking_responses(origins: Collection[str]) -> Any:
    """Return what puts the request's id, and what browsers need, into the headers of every response."""

    async def mark(request: web.Request, response: web.StreamResponse) -> None:
        response.headers["X-Request-Id"] = request.get(REQUEST_ID, "")
        if (origin := allowed_origin(request, origins)) is not None:
            response.headers["Access-Control-Allow-Origin"] = origin
            response.headers["Access-Control-Expose-Headers"] = "X-Request-Id, Retry-After"
        if origins:
            response.headers.add("Vary", "Origin")

    return mark
