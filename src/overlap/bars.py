"""Bars of tqdm's without its thread: that would stay in the process, and comes even with a bar that shows nothing."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm


class NoThread:
    """What makes a class of tqdm's such a bar: each update looks at the clock, so nobody else has to."""

    monitor_interval = 0

    def __init__(self, *args: Any, **given: Any) -> None:
        super().__init__(*args, **{"miniters": 1, **given})


class Bar(NoThread, tqdm):  # type: ignore[misc]  # tqdm has no types
    """A bar in a terminal."""
