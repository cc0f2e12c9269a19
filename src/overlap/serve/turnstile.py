"""Turnstile: when many requests come at once, a few are begun in each turn of the event loop, in the order they came.

Beginning a request (its JSON, its tokens, its way to the engine) takes a few tenths of a millisecond, and asyncio runs
all that is ready in one turn. So a thousand clients that come together would hold up every stream, and /health, for a
third of a second.
"""

from __future__ import annotations

import asyncio
from collections import deque


class Turnstile:
    """Lets `per_turn` pass in each turn of the event loop. On that loop's thread only."""

    def __init__(self, per_turn: int) -> None:
        self._per_turn = self._left = per_turn
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._turning = False

    async def wait_turn(self) -> None:
        """Return at once if this turn has room and nobody waits, else in one of the next turns."""
        self._turn_later()
        if self._left and not self._waiting:
            self._left -= 1
            return
        future = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        await future

    def _turn_later(self) -> None:
        if not self._turning:
            self._turning = True
            asyncio.get_running_loop().call_soon(self._turn)

    def _turn(self) -> None:
        self._turning = False
        self._left = self._per_turn
        while self._left and self._waiting:
            future = self._waiting.popleft()
            if not future.done():  # its client may have left
                self._left -= 1
                future.set_result(None)
        if self._left < self._per_turn:
            self._turn_later()
