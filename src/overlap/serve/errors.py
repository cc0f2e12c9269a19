"""What a client is told when something is wrong: an error object in OpenAI's shape, and a status code.

Texts are bounded and hold no path and no address of this machine.
"""

from __future__ import annotations

from typing import Final

import msgspec
from aiohttp import web

from overlap.errors import (
    DeadlineExceeded,
    EngineClosed,
    EngineDead,
    QueueFull,
    RequestAborted,
    RequestError,
    RequestFailed,
)
from overlap.messages import SamplingParams

MAX_MESSAGE: Final = 600
"""Characters of an error message; the rest is cut."""

RETRY_SECONDS: Final = 1
"""After how long a client that was told 429 is to ask again."""

_TYPES: Final = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}
_SAMPLING_NAMES: Final = frozenset(SamplingParams.__dataclass_fields__)
_encode: Final = msgspec.json.Encoder().encode


class ApiError(Exception):
    """An answer that says what is wrong. `param` is the field that is at fault, `code` a word for programs."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message if len(message) <= MAX_MESSAGE else message[: MAX_MESSAGE - 1] + "…"
        self.param = param
        self.code = code

    def body(self) -> bytes:
        """The error object as JSON."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return _encode({"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}})

    def response(self) -> web.Response:
        """The error object as a whole answer."""
        headers = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": str(RETRY_SECONDS)}}.get(self.status)
        return web.Response(body=self.body(), status=self.status, content_type="application/json", headers=headers)


def to_api_error(error: Exception) -> ApiError:
    """Say what a failure means for the client that it happened to.

    An abort is a 400 and not a 5xx, because clients ask again after a 5xx, and somebody wanted this request to end.
    """
    match error:
        case ApiError():
            return error
        case RequestAborted():
            return ApiError(400, "The request was aborted.", code="request_aborted")
        case RequestFailed():
            return ApiError(500, "The request failed on the device. Other requests go on.", code="request_failed")
        case QueueFull():
            return ApiError(429, "Too many requests wait already. Send this one again later.", code="queue_full")
        case DeadlineExceeded():
            return ApiError(400, "The request had not ended by its deadline.", code="deadline_exceeded")
        case RequestError():
            name = str(error).partition(" ")[0]
            return ApiError(400, str(error), param=name if name in _SAMPLING_NAMES else None)
        case EngineDead():
            return ApiError(503, "The engine has failed and must be started again.", code="engine_dead")
        case EngineClosed():
            return ApiError(503, "The engine is closed.", code="engine_closed")
        case web.HTTPRequestEntityTooLarge():
            return ApiError(413, "The request body is too large.", code="body_too_large")
        case web.RequestPayloadError():
            return ApiError(400, "The body cannot be read: it ends too soon or is not encoded as its headers say.")
        case web.HTTPException():
            return ApiError(error.status, f"{error.reason}. /openapi.json says what this server has.")
        case _:
            return ApiError(500, "An error inside the server; its log says more.", code="internal_error")
