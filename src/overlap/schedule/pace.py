"""Pace: how many drafts a step verifies at this many rows, if any, by what steps have taken and brought.

What a step takes is measured for each power of two of rows and each width (positions a row; 1 is a plain step). What it
brings, in tokens a row, hangs on the text and hardly on how many rows there are: on the chance p that a draft is right
where those before it were. That is learned from all wide steps, over many rows or steps, for a row's run is short in
one line and long in the next. (A mean of 15 steps at one row was as often half as twice the truth, and the way that
lost then was not tried again for hundreds of steps.) K drafts bring 1 + p + ... + p^K tokens, as far as this width's
own runs do not say otherwise, and times what that was off for it so far: drafts far back are righter or wronger than
the first ones. So one width says what the others would bring.

Whatever brings the most tokens a second goes on; the others are tried again in turn (where plain steps go on, the best
of them), the more rarely the worse they were and the more often they have lost. Only steps without prompts count. Which
way a step goes changes no token, only how many a step brings.

A step that runs without its graph, or waits for its capture, takes many times as long as those behind it. So what a
kind of step takes is not the mean of the last ones but their lower quartile.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

WINDOW: Final = 15
"""Measured steps of a kind whose time counts."""
TRIAL: Final = 6
"""Steps of a trial at least; one of wide steps, where plain ones go on, has TRIAL_ROWS runs at least, too."""
TRIAL_ROWS: Final = 96
PRICE: Final = 0.01
"""The share of all tokens that trials may cost, after a change. Halves with each lost one, ..."""
MOST_LOST: Final = 1
"""... so often at most. (`TRIAL_ROWS` to here: the best of a sweep over the texts of tests/schedule/test_pace.py.)"""
LEAST: Final = 64
"""Steps between two trials at least."""
HALF_ROWS: Final = 256
"""Runs after which a run counts half in what is known of p, or ..."""
HALF_STEPS: Final = 32
"""... steps, whichever is later."""
FIRST_GUESS: Final = 0.55
"""What p is taken to be before any run has come, as if FIRST_TRIES drafts had."""
FIRST_TRIES: Final = 36.0
FIRST_ROWS: Final = 24
"""Runs of a width for which it counts what p says of it."""
OFF: Final = 64.0
"""Tokens for which it counts that p is taken to be right for a width, and ..."""
MOST_OFF: Final = 1.5
"""... how far it may lead astray."""
_OFF_KEPT: Final = 0.999
MARGIN: Final = 1.02
"""Another width has to promise this much more, plain steps nothing: the first wide step behind a plain one has no
drafts to verify, so going to and fro costs."""


@dataclass(slots=True)
class _Brought:
    """What runs of a width bring, and what they were taken to bring."""

    tokens: float = 0.0
    rows: float = 0.0
    """Sums in which older runs count less, those of other widths in between, too."""
    came: float = OFF
    expected: float = OFF
    """Tokens in all, and how many were expected."""

    def note(self, mean: float, expected: float, num_rows: int) -> None:
        self.tokens += mean * num_rows
        self.rows += num_rows
        self.came = self.came * _OFF_KEPT + mean * num_rows
        self.expected = self.expected * _OFF_KEPT + expected * num_rows

    def keep(self, share: float) -> None:
        """Let what is known of the text count for a share of what it does."""
        self.tokens *= share
        self.rows *= share

    def mean(self, expected: float) -> float:
        """Return what a run will bring, of which so many tokens are expected."""
        off = min(max(self.came / self.expected, 1 / MOST_OFF), MOST_OFF)
        return (self.tokens + FIRST_ROWS * expected * off) / (self.rows + FIRST_ROWS)


def _quartile(seconds: deque[float]) -> float:
    return sorted(seconds)[len(seconds) // 4]


@dataclass(slots=True)
class _Bucket:
    """What is known of steps of about as many rows."""

    times: dict[int, deque[float]] = field(default_factory=dict)
    """Of each width the seconds of the last steps."""
    width: int = 0
    """What brought the most when that was looked at last; 0 before that."""
    lost: int = 0
    """Trials that the other ways have lost since that changed."""
    left: int = LEAST
    """Steps until the next trial; from 0 on down while it lasts."""
    trial: int = TRIAL
    """How many steps it will have."""
    trying: int = 0
    """What is tried next, or now."""
    turn: int = 0

    def cost(self, width: int) -> float:
        """Return what a step of this width takes, in plain ones."""
        plain, wide = _quartile(self.times[1]), _quartile(self.times[width])
        return wide / plain if plain > 0 and wide > 0 else 1.0


class Pace:
    """Measures, and decides. The planner's."""

    def __init__(self) -> None:
        self._buckets: dict[int, _Bucket] = {}
        self._brought: dict[int, _Brought] = {}
        self._hits = FIRST_GUESS * FIRST_TRIES
        self._tries = FIRST_TRIES
        self._emitted: tuple[float, float | None] | None = None

    def choose(self, num_rows: int, widths: Sequence[int]) -> int:
        """Return how many positions each of so many decode rows has in the next step: one of `widths`, or 1."""
        own = self._bucket(num_rows)
        for width in (*widths, 1):
            if len(own.times.setdefault(width, deque(maxlen=WINDOW))) < TRIAL:
                return width
        gains = {width: self._brings(width) / own.cost(width) for width in widths}
        gains[1] = 1.0
        best = max(gains, key=lambda width: gains[width])
        now = gains.get(own.width, 0.0)
        if best != own.width and gains[best] > now * (MARGIN if best > 1 else 1.0):
            own.width, own.lost = best, 0
            self._await_trial(own, num_rows, gains)
        own.left -= 1
        if own.left >= 0 or own.trying not in gains:
            return own.width
        if own.left == -1 and own.width == 1:
            self._doubt(own.trial * num_rows)  # the trial is to count for half at least
        trying = own.trying
        if own.left <= -own.trial:
            own.lost = min(own.lost + 1, MOST_LOST)
            self._await_trial(own, num_rows, gains)
        return trying

    def _await_trial(self, own: _Bucket, num_rows: int, gains: dict[int, float]) -> None:
        others = sorted(width for width in gains if width != own.width)
        own.trying, own.turn = others[own.turn % len(others)], own.turn + 1
        if own.width == 1:  # any of them tells of the text, which is what may have changed
            own.trying = max(others, key=lambda width: gains[width])
        own.trial = TRIAL if own.width > 1 else max(TRIAL, -(-TRIAL_ROWS // num_rows))
        ratio = gains[own.trying] / gains[own.width]
        own.left = max(LEAST, int(own.trial * (1 - min(ratio, 1 / ratio)) / PRICE)) << own.lost

    def _brings(self, width: int) -> float:
        """Return what a run of so many positions will bring, in tokens."""
        return self._brought.setdefault(width, _Brought()).mean(self._expected(width))

    def _expected(self, width: int) -> float:
        chance = min(self._hits / self._tries, 0.999)
        return (1 - chance**width) / (1 - chance)

    def _doubt(self, num_runs: float) -> None:
        """Let all so far count for no more than so many runs."""
        if self._tries > num_runs:
            self._hits, self._tries = self._hits * num_runs / self._tries, num_runs
        for brought in self._brought.values():
            if brought.rows > num_runs:
                brought.keep(num_runs / brought.rows)

    def is_on(self, num_rows: int) -> bool:
        """Return whether steps of so many decode rows draft just now, as far as is known; decides nothing."""
        own = self._buckets.get((num_rows - 1).bit_length())
        return own is None or own.width != 1

    def note_emitted(self, tokens: float | None, full: float | None = None) -> None:
        """A wide step has brought so many tokens a row, of which the share `full` had all its drafts confirmed.

        None for tokens if it had no drafts to verify; for `full` if that is not known. It counts once the step's time
        is told, if it is.
        """
        self._emitted = None if tokens is None else (tokens, full)

    def note_time(self, num_rows: int, width: int, seconds: float) -> None:
        """A step of decode rows alone took so long."""
        own, emitted = self._bucket(num_rows), self._emitted
        self._emitted = None
        own.times.setdefault(width, deque(maxlen=WINDOW)).append(seconds)
        if width == 1 or emitted is None:
            return
        mean, full = emitted
        if full is None:
            full = min(self._hits / self._tries, 0.999) ** (width - 1)
        kept = 0.5 ** min(num_rows / HALF_ROWS, 1 / HALF_STEPS)
        for brought in self._brought.values():
            brought.keep(kept)
        self._brought.setdefault(width, _Brought()).note(mean, self._expected(width), num_rows)
        self._hits = self._hits * kept + (mean - 1) * num_rows
        self._tries = self._tries * kept + (mean - full) * num_rows

    def explain(self) -> tuple[str, ...]:
        """Return what was measured, a sentence for each width, and one for each number of rows."""
        lines = [
            f"speculation: a row and step of {width - 1} drafts brings {brought.tokens / brought.rows:.2f} tokens"
            for width, brought in sorted(self._brought.items())
            if brought.rows
        ]
        for bucket, own in sorted(self._buckets.items()):
            if own.width:
                what = f"{own.width - 1} drafts" if own.width > 1 else "off"
                known = [width for width in sorted(own.times) if width > 1 and own.times[width]]
                costs = ", ".join(f"{own.cost(width):.2f} with {width - 1}" for width in known)
                line = f"speculation: {what} for up to {1 << bucket} rows, where a step takes {costs} drafts times"
                lines.append(f"{line} as long as one without")
        return tuple(lines)

    def _bucket(self, num_rows: int) -> _Bucket:
        return self._buckets.setdefault((num_rows - 1).bit_length(), _Bucket())
