"""Pace: whether drafting pays at this many rows, by what steps have taken and brought.

Plain steps and wide ones are measured apart, for each power of two of rows. Whatever brought more tokens a second goes
on; the other is tried again now and then, a few steps in a row, and ever more rarely while it loses. Only steps without
prompts count. Which way a step goes changes no token, only how many a step brings.

A step that runs without its graph, or waits for its capture, takes many times as long as those behind it. So what a
kind of step takes is not the mean of the last ones but their lower quartile.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Final

WINDOW: Final = 15
"""Measured steps of a kind that count."""
TRIAL: Final = 6
"""Steps of a trial."""
EVERY: Final = 400
"""Steps until a trial, after a change: one that is twice as slow costs 1.5%. Doubles with each lost trial ..."""
MOST: Final = 16 * EVERY
"""... up to here."""
MARGIN: Final = 1.02
"""Drafting has to bring this much more than plain steps do."""


@dataclass(slots=True)
class _Kind:
    """What is known of steps of one kind."""

    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    emitted: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))

    def note(self, seconds: float, emitted: float) -> None:
        self.seconds.append(seconds)
        self.emitted.append(emitted)

    @property
    def tried(self) -> bool:
        return len(self.seconds) >= TRIAL

    @property
    def mean_emitted(self) -> float:
        return sum(self.emitted) / len(self.emitted)

    @property
    def rate(self) -> float:
        seconds = sorted(self.seconds)[len(self.seconds) // 4]
        return self.mean_emitted / seconds if seconds > 0 else float("inf")


@dataclass(slots=True)
class _Bucket:
    """What is known of steps of about as many rows."""

    plain: _Kind = field(default_factory=_Kind)
    wide: _Kind = field(default_factory=_Kind)
    drafts: bool = True
    """Whether wide steps brought more when that was looked at last."""
    every: int = EVERY
    left: int = EVERY
    """Steps until the next trial; from 0 on down while it lasts."""


class Pace:
    """Measures, and decides. The planner's."""

    def __init__(self) -> None:
        self._buckets: dict[int, _Bucket] = {}
        self._emitted = 1.0

    def choose(self, num_rows: int) -> bool:
        """Return whether the next step of so many decode rows verifies drafts."""
        own = self._bucket(num_rows)
        if not own.wide.tried or not own.plain.tried:
            return not own.wide.tried
        better = own.wide.rate > own.plain.rate * MARGIN
        if better != own.drafts:
            own.drafts, own.every, own.left = better, EVERY, EVERY
        own.left -= 1
        if own.left >= 0:
            return better
        if own.left <= -TRIAL:
            own.every = min(2 * own.every, MOST)
            own.left = own.every
        return not better

    def note_emitted(self, tokens: float) -> None:
        """A step has brought so many tokens a row, and its time is told next."""
        self._emitted = tokens

    def note_time(self, num_rows: int, width: int, seconds: float) -> None:
        """A step of decode rows alone took so long."""
        own = self._bucket(num_rows)
        if width > 1:
            own.wide.note(seconds, self._emitted)
        else:
            own.plain.note(seconds, 1.0)

    def explain(self) -> tuple[str, ...]:
        """Return what was measured, a sentence for each number of rows."""
        lines = []
        for bucket, own in sorted(self._buckets.items()):
            if own.plain.tried and own.wide.tried:
                lines.append(
                    f"speculation: up to {1 << bucket} rows it brings {own.wide.mean_emitted:.2f} tokens a row and "
                    f"step, and {own.wide.rate / own.plain.rate:.2f} times the tokens a second of plain steps"
                )
        return tuple(lines)

    def _bucket(self, num_rows: int) -> _Bucket:
        return self._buckets.setdefault((num_rows - 1).bit_length(), _Bucket())
