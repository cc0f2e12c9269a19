"""Matcher: what the planner knows of a request whose answer is held to a form. Imports no torch and no llguidance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from overlap.cache.pages import Ints
from overlap.errors import RequestError


class Matcher(Protocol):
    """Says which tokens may come next. It learns settled tokens only, so it has nothing to take back."""

    @property
    def ready(self) -> bool:
        """Whether all that it was told is taken in, and `mask` or `failure` is there."""

    @property
    def mask(self) -> Ints:
        """int32 [P, B]: bit `v % 32` of word `v // 32` says whether token v may come next; first behind what is
        settled, then behind each of the drafts that it was told of. Never written to again."""

    @property
    def failure(self) -> RequestError | None:
        """Why the request cannot go on: its form allows no token, or took too much to follow."""

    def take(self, tokens: Sequence[int], drafts: Sequence[int] = ()) -> None:
        """Take in settled tokens of the answer, and begin the next masks, on another thread. Returns at once.

        `drafts` are what may come next, and are not taken in.
        """
