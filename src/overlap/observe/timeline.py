"""What the loop tells about its verbs: plan, launch, land, settle."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Final, Protocol


class Timeline(Protocol):
    """Told of each verb of the loop as it happens."""

    def span(self, verb: str) -> AbstractContextManager[None]:
        """Return what is entered before the verb and left behind it."""


_NOTHING: Final = nullcontext()


class NoTimeline:
    """Keeps nothing and costs about 0.1 µs a verb."""

    def span(self, verb: str) -> AbstractContextManager[None]:  # noqa: ARG002 - the promise's
        """Return a context that does nothing."""
        return _NOTHING
