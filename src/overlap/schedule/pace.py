"""Pace: whether drafting pays at this many rows, by what steps have taken and brought.

Plain steps and wide ones are measured apart, for each power of two of rows. Whatever brought more tokens a second goes
on; the other is tried again now and then, a few steps in a row (the first wide step has no drafts yet). Only steps
without prompts count. Which way a step goes changes no token, only how many a step brings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

MEMORY: Final = 0.9
"""What a measured step counts after one more of its kind."""
TRIAL: Final = 6
"""Steps of a trial."""
EVERY: Final = 400
"""Steps between two trials: one that is twice as slow costs 1.5%."""
MARGIN: Final = 1.02
"""Drafting has to bring this much more than plain steps do."""


@dataclass(slots=True)
class _Kind:
    """What is known of steps of one kind."""

    seconds: float = 0.0
    emitted: float = 1.0
    count: int = 0

    def note(self, seconds: float, emitted: float) -> None:
        if not self.count:
            self.seconds, self.emitted = seconds, emitted
        self.seconds += (seconds - self.seconds) * (1 - MEMORY)
        self.emitted += (emitted - self.emitted) * (1 - MEMORY)
        self.count += 1

    @property
    def rate(self) -> float:
        return self.emitted / self.seconds if self.seconds > 0 else float("inf")


class Pace:
    """Measures, and decides. The planner's."""

    def __init__(self) -> None:
        self._kinds: dict[tuple[int, bool], _Kind] = {}
        self._steps: dict[int, int] = {}
        self._emitted = 1.0

    def choose(self, num_rows: int) -> bool:
        """Return whether the next step of so many decode rows verifies drafts."""
        bucket = num_rows.bit_length()
        step = self._steps[bucket] = self._steps.get(bucket, 0) + 1
        plain, wide = self._kind(bucket, False), self._kind(bucket, True)
        if wide.count < TRIAL:
            return True
        if plain.count < TRIAL:
            return False
        better = wide.rate > plain.rate * MARGIN
        return better != (step % EVERY < TRIAL)

    def note_emitted(self, tokens: float) -> None:
        """A step has brought so many tokens a row, and its time is told next."""
        self._emitted = tokens

    def note_time(self, num_rows: int, width: int, seconds: float) -> None:
        """A step of decode rows alone took so long."""
        self._kind(num_rows.bit_length(), width > 1).note(seconds, self._emitted if width > 1 else 1.0)

    def explain(self) -> tuple[str, ...]:
        """Return what was measured, a sentence for each number of rows."""
        lines = []
        for bucket in sorted(self._steps):
            plain, wide = self._kind(bucket, False), self._kind(bucket, True)
            if plain.count and wide.count:
                ratio = wide.rate / plain.rate if plain.rate else 0.0
                lines.append(
                    f"speculation: under {1 << bucket} rows it brings {wide.emitted:.2f} tokens a row and step, and "
                    f"{ratio:.2f} times the tokens a second of plain steps"
                )
        return tuple(lines)

    def _kind(self, bucket: int, wide: bool) -> _Kind:
        return self._kinds.setdefault((bucket, wide), _Kind())
