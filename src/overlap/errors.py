"""Every error that overlap raises, split by who is at fault.

    OverlapError
    ├── ConfigError            what the engine was asked to be cannot be; nothing was loaded or started
    │   └── ModelError         the model's files are missing, broken, or of a kind that overlap does not know
    ├── RequestError           this request cannot be served; every other request goes on
    │   ├── RequestAborted     somebody aborted it
    │   ├── DeadlineExceeded   it had not ended by its deadline
    │   ├── QueueFull          too many requests wait already
    │   └── RequestFailed      a step that it was part of failed on the device
    ├── EngineClosed           the engine was closed, or never started
    ├── EngineDead             the engine can not go on; the cause is attached
    └── InternalError          a broken promise inside overlap: please report it

A message says what is wrong, the value that is wrong, and what to do about it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class OverlapError(Exception):
    """The root of the tree."""


class ConfigError(OverlapError, ValueError):
    """What the engine was asked to be cannot be; raised before anything is loaded or started."""


class ModelError(ConfigError):
    """The model's files are missing, broken, or of a kind that overlap does not know."""


class RequestError(OverlapError, ValueError):
    """This request cannot be served as asked. No other request is harmed."""


class RequestAborted(RequestError):
    """The request was aborted by somebody other than its reader."""


class DeadlineExceeded(RequestError, TimeoutError):
    """The request had not ended by its deadline; what it made so far comes before this, unless it is read whole."""


class QueueFull(RequestError):
    """Too many requests wait already (`max_waiting`). Sent again later, it may be served."""


class RequestFailed(RequestError):
    """A step that the request was part of failed on the device; the cause is attached."""


class EngineClosed(OverlapError, RuntimeError):
    """The engine was closed, or never started."""


class EngineDead(OverlapError, RuntimeError):
    """The engine can not go on; `__cause__` says why."""


class InternalError(OverlapError, AssertionError):
    """A promise inside overlap was broken. Please report it with the traceback."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `" Did you mean 'x'?"` for the known name nearest to `name`, or an empty string."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean {near[0]!r}?" if near else ""
