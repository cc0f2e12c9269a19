"""What opening an engine takes: seconds of one stage after the other. Imports no torch."""

from __future__ import annotations

import time


class Stages:
    """A clock that is stopped at the end of each stage. What runs beside a stage on other threads is not told apart."""

    def __init__(self) -> None:
        self._began = self._last = time.perf_counter()
        self._seconds: dict[str, float] = {}

    def end(self, stage: str) -> None:
        """End a stage: all since the end of the one before was it."""
        now = time.perf_counter()
        self._seconds[stage] = now - self._last
        self._last = now

    def __str__(self) -> str:
        parts = ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in self._seconds.items())
        return f"opened in {self._last - self._began:.2f} s: {parts}"
