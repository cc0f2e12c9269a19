"""Connections on which what is no HTTP gets an error object too.

aiohttp answers a request that it cannot read before there is an application to ask, in plain text that repeats what was
sent. Here it is an object like every other error, its text is fixed, and it is counted.
"""

from __future__ import annotations

import logging
import re
import secrets
from typing import Any, Final

from aiohttp import web
from aiohttp.http_exceptions import BadHttpMessage, BadStatusLine, InvalidHeader, LineTooLong, PayloadEncodingError

from overlap.observe.metrics import Meter
from overlap.serve.errors import ApiError, to_api_error
from overlap.serve.metrics import METER

_SAID: Final = (
    (LineTooLong, 431, "A line of the request's head is too long."),
    (InvalidHeader, 400, "A header of the request is malformed."),
    (BadStatusLine, 400, "The first line of the request is not one of HTTP/1.1."),
    (PayloadEncodingError, 400, "The body is not encoded as the headers say."),
)
"""What is said of each kind of bytes that are no request."""
_PLAIN: Final = re.compile(r"[A-Za-z' -]{1,80}")

_log = logging.getLogger(__name__)


class Runner(web.AppRunner):
    """Runs an application of `make_app`."""

    async def _make_server(self) -> web.Server:
        server = await super()._make_server()
        meter = self.app.get(METER)
        return _Server(meter, server.request_handler, request_factory=server.request_factory, **self._kwargs)


class _Server(web.Server):
    def __init__(self, meter: Meter | None, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._meter = meter

    def __call__(self) -> web.RequestHandler:
        """Return what speaks HTTP on a new connection."""
        return _Connection(self, self._meter, loop=self._loop, **self._kwargs)


class _Connection(web.RequestHandler):
    __slots__ = ("_meter",)

    def __init__(self, server: web.Server, meter: Meter | None, **settings: Any) -> None:
        super().__init__(server, **settings)
        self._meter = meter

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,  # noqa: ARG002  # repeats what was sent
    ) -> web.StreamResponse:
        """Answer bytes that are no request, or one on which everything else has failed; then the connection closes."""
        if request.writer.output_size > 0:
            raise ConnectionError("a part of the answer has been sent already")
        if status < 500:
            error = said_of(exc)
            _log.debug("no request: %r", exc)
        else:
            error = to_api_error(RuntimeError())
            _log.error("a request failed", exc_info=exc)
        if self._meter is not None:
            self._meter.count_response("none", error.status)
        response = error.response()
        response.headers["X-Request-Id"] = f"req-{secrets.token_hex(12)}"
        response.force_close()
        return response


def said_of(error: BaseException | None) -> ApiError:
    """Return what is said of bytes that are no request. Nothing of them is repeated."""
    for kind, status, text in _SAID:
        if isinstance(error, kind):
            return ApiError(status, text, code="bad_http")
    first = str(getattr(error, "message", "")).partition(":")[0]  # behind it aiohttp repeats what was sent
    why = f" ({first})" if type(error) is BadHttpMessage and _PLAIN.fullmatch(first) else ""
    return ApiError(400, f"This is no HTTP request that can be read{why}.", code="bad_http")
