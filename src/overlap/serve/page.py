"""The page at `/`: a place to talk to the model, beside the figures of the engine that answers.

Four files of plain HTML, CSS and JavaScript that a browser gets as they lie in `page/`; they ask for nothing from
elsewhere, and the Content-Security-Policy would not let them. The page talks to the same API as everybody else, and
reads its figures once a second from `/live`.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from importlib.resources import files
from typing import Final

import msgspec
from aiohttp import web

from overlap.observe.metrics import EngineFigures
from overlap.serve.metrics import Figured, figures_of, kv_usage

PAGE_ROUTES: Final = {
    "page": ("/", "index.html", "text/html"),
    "page-style": ("/style.css", "style.css", "text/css"),
    "page-script": ("/app.js", "app.js", "text/javascript"),
    "page-icon": ("/icon.svg", "icon.svg", "image/svg+xml"),
}
"""The routes that anyone may read, key or not, by name: path, file, content type. There is nothing of yours in them."""

HEADERS: Final = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


class Live(msgspec.Struct, frozen=True, kw_only=True):
    """The figures of one moment. Counters count from the start: two moments give a rate. None: the engine has none."""

    model: str
    seconds: float
    """When, in seconds of a clock that only rises."""
    serving: bool
    running: int = 0
    waiting: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generation_tokens: int = 0
    busy_seconds: float = 0.0
    side_busy_seconds: float = 0.0
    bubble_seconds: float = 0.0
    kv_usage: float = 0.0
    """Share of the KV pages in use, 0 to 1."""
    drafted_tokens: int | None = None
    accepted_tokens: int | None = None
    lane_choices: dict[str, int] | None = None


def live(model: str, figures: EngineFigures | None, *, clock: Callable[[], float] = time.monotonic) -> Live:
    """Return what the page shows of the engine's figures (None: the engine has ended)."""
    if figures is None:
        return Live(model=model, seconds=clock(), serving=False)
    return Live(
        model=model,
        seconds=clock(),
        serving=True,
        running=figures["running"],
        waiting=figures["waiting"],
        prompt_tokens=figures["prompt_tokens"],
        cached_tokens=figures["cached_tokens"],
        generation_tokens=figures["tokens_out"],
        busy_seconds=figures["busy_s"],
        side_busy_seconds=figures.get("side_busy_s", 0.0),
        bubble_seconds=figures["bubble_s"],
        kv_usage=kv_usage(figures),
        drafted_tokens=figures.get("drafted_tokens"),
        accepted_tokens=figures.get("accepted_tokens"),
        lane_choices=figures.get("lane_choices"),
    )


def add_page(app: web.Application, door: Figured, *, model_name: str | None = None) -> None:
    """Add the page at / and its figures at /live to `app`. Let every route of PAGE_ROUTES pass without a key.

    `model_name` is the one that clients use (default: the door's).
    """
    encode = msgspec.json.Encoder().encode
    name = model_name or door.model_name

    async def tell(_: web.Request) -> web.Response:
        body = encode(live(name, figures_of(door)))
        return web.Response(body=body, content_type="application/json", headers={"Cache-Control": "no-store"})

    for route, (path, file, content_type) in PAGE_ROUTES.items():
        body = files("overlap.serve").joinpath("page", file).read_bytes()
        app.router.add_get(path, _giving(body, content_type), name=route)
    app.router.add_get("/live", tell, name="live")


def _giving(body: bytes, content_type: str) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    async def give(_: web.Request) -> web.StreamResponse:
        return web.Response(body=body, content_type=content_type, charset="utf-8", headers=HEADERS)

    return give
