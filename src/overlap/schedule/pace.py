"""Pace: whether drafting pays at this many rows, by what steps have taken and brought.

What a plain step and a wide one take is measured for each power of two of rows. What a wide one brings, in tokens a
row, hangs on the text and hardly on how many rows there are: so it is learned from all steps of its width, over many
rows or steps, for a row's run is short in one line and long in the next. (A mean of 15 steps at one row was as often
half as twice the truth, and the way that lost then was not tried again for hundreds of steps.) Whatever brings more
tokens a second goes on; the other is tried again now and then, the more rarely the worse it was and the more often it
has lost. Only steps without prompts count. Which way a step goes changes no token, only how many a step brings.

A step that runs without its graph, or waits for its capture, takes many times as long as those behind it. So what a
kind of step takes is not the mean of the last ones but their lower quartile.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Final

WINDOW: Final = 15
"""Measured steps of a kind whose time counts."""
TRIAL: Final = 6
"""Steps of a trial at least; one of wide steps has TRIAL_ROWS runs at least, too."""
TRIAL_ROWS: Final = 96
PRICE: Final = 0.01
"""The share of all tokens that trials may cost, after a change. Halves with each lost one, ..."""
MOST_LOST: Final = 1
"""... so often at most. (`TRIAL_ROWS` to here: the best of a sweep over the texts of tests/schedule/test_pace.py.)"""
LEAST: Final = 64
"""Steps between two trials at least."""
HALF_ROWS: Final = 256
"""Runs after which a run counts half in what a wide step brings, or ..."""
HALF_STEPS: Final = 32
"""... steps, whichever is later."""
FIRST_GUESS: Final = 2.0
"""What a run is taken to bring before any has come, as if FIRST_ROWS had."""
FIRST_ROWS: Final = 12
MARGIN: Final = 1.02
"""Drafting that is off has to promise this much more than plain steps bring. On, it may bring as little as they do: the
first wide step behind a plain one has no drafts to verify, so going to and fro costs."""


@dataclass(slots=True)
class _Brought:
    """What runs of a width bring."""

    tokens: float = FIRST_GUESS * FIRST_ROWS
    rows: float = FIRST_ROWS
    any: bool = False
    """Whether any run has come."""

    def note(self, mean: float, num_rows: int) -> None:
        kept = 0.5 ** min(num_rows / HALF_ROWS, 1 / HALF_STEPS)
        self.tokens = self.tokens * kept + mean * num_rows
        self.rows = self.rows * kept + num_rows
        self.any = True

    def doubt(self, num_rows: float) -> None:
        """Let all so far count for no more than so many rows."""
        if self.rows > num_rows:
            self.tokens, self.rows = self.tokens * num_rows / self.rows, num_rows

    @property
    def mean(self) -> float:
        return self.tokens / self.rows


def _quartile(seconds: deque[float]) -> float:
    return sorted(seconds)[len(seconds) // 4]


def _window() -> deque[float]:
    return deque(maxlen=WINDOW)


@dataclass(slots=True)
class _Bucket:
    """What is known of steps of about as many rows."""

    plain: deque[float] = field(default_factory=_window)
    """Seconds of the last ones; `wide` likewise."""
    wide: deque[float] = field(default_factory=_window)
    drafts: bool = True
    """Whether wide steps brought more when that was looked at last."""
    lost: int = 0
    """Trials that the other way has lost since that changed."""
    left: int = LEAST
    """Steps until the next trial; from 0 on down while it lasts."""
    trial: int = TRIAL
    """How many steps it will have."""

    @property
    def known(self) -> bool:
        return min(len(self.plain), len(self.wide)) >= TRIAL

    @property
    def cost(self) -> float:
        """What a wide step takes, in plain ones."""
        plain, wide = _quartile(self.plain), _quartile(self.wide)
        return wide / plain if plain > 0 and wide > 0 else 1.0


class Pace:
    """Measures, and decides. The planner's."""

    def __init__(self) -> None:
        self._buckets: dict[int, _Bucket] = {}
        self._brought: dict[int, _Brought] = {}
        self._emitted: float | None = None

    def choose(self, num_rows: int, width: int) -> bool:
        """Return whether the next step of so many decode rows verifies drafts, `width` positions of each row."""
        own, brought = self._bucket(num_rows), self._brought.setdefault(width, _Brought())
        if not own.known:
            return len(own.wide) < TRIAL
        gain = brought.mean / own.cost  # tokens a second, over those of plain steps
        better = gain > (1.0 if own.drafts else MARGIN)
        if better != own.drafts:
            own.drafts, own.lost = better, 0
            self._await_trial(own, num_rows, gain)
        own.left -= 1
        if own.left >= 0:
            return better
        if own.left == -1 and not better:
            brought.doubt(own.trial * num_rows)  # the trial is to count for half at least
        if own.left <= -own.trial:
            own.lost = min(own.lost + 1, MOST_LOST)
            self._await_trial(own, num_rows, gain)
        return not better

    def is_on(self, num_rows: int) -> bool:
        """Return whether steps of so many decode rows draft just now, as far as is known; decides nothing."""
        own = self._buckets.get((num_rows - 1).bit_length())
        return own is None or own.drafts or not own.known

    def _await_trial(self, own: _Bucket, num_rows: int, gain: float) -> None:
        own.trial = TRIAL if own.drafts else max(TRIAL, -(-TRIAL_ROWS // num_rows))
        loses = 1 - min(gain, 1 / gain)
        own.left = max(LEAST, int(own.trial * loses / PRICE)) << own.lost

    def note_emitted(self, tokens: float | None) -> None:
        """A wide step has brought so many tokens a row; None if it had no drafts to verify.

        It counts once the step's time is told, if it is.
        """
        self._emitted = tokens

    def note_time(self, num_rows: int, width: int, seconds: float) -> None:
        """A step of decode rows alone took so long."""
        own, emitted = self._bucket(num_rows), self._emitted
        self._emitted = None
        (own.wide if width > 1 else own.plain).append(seconds)
        if width > 1 and emitted is not None:
            self._brought.setdefault(width, _Brought()).note(emitted, num_rows)

    def explain(self) -> tuple[str, ...]:
        """Return what was measured, a sentence for each width, and one for each number of rows."""
        lines = [
            f"speculation: a row and step of {width - 1} drafts brings {brought.mean:.2f} tokens"
            for width, brought in sorted(self._brought.items())
            if brought.any
        ]
        for bucket, own in sorted(self._buckets.items()):
            if own.known:
                what = f"speculation: {'on' if own.drafts else 'off'} for up to {1 << bucket} rows"
                lines.append(f"{what}, where a step with drafts takes {own.cost:.2f} times as long as one without")
        return tuple(lines)

    def _bucket(self, num_rows: int) -> _Bucket:
        return self._buckets.setdefault((num_rows - 1).bit_length(), _Bucket())
