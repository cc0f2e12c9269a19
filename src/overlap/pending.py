"""Pending: what was asked of a thread that may end before it answers."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any


class Pending:
    """Futures that somebody waits for. From any thread: whoever takes a future, and nobody else, completes it."""

    def __init__(self) -> None:
        self._futures: set[Future[Any]] = set()  # one call at a time, each of which the interpreter does in one go

    def add(self, future: Future[Any]) -> None:
        """Take in a future, before its work is handed over."""
        self._futures.add(future)

    def take(self, future: Future[Any]) -> bool:
        """Return whether the future is to be completed: nobody else has, and it was not cancelled."""
        try:
            self._futures.remove(future)
        except KeyError:
            return False
        return future.set_running_or_notify_cancel()

    def fail(self, make: Callable[[], BaseException]) -> None:
        """The thread has ended: let all who still wait hear why."""
        while self._futures:
            try:
                future = self._futures.pop()
            except KeyError:  # it was taken at this moment
                return
            if future.set_running_or_notify_cancel():
                future.set_exception(make())
