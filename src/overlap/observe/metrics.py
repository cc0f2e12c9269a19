"""What an engine and its HTTP fronts have to tell, as plain values that cross processes and add up.

The engine counts as it runs, so its figures cost nothing more: `engine_figures` reads them when somebody looks. What
only the reader's side can see (time to the first token, time between tokens) a `Meter` counts, one a front; `merged`
is the sum of several. Nothing here knows Prometheus: `serve/metrics.py` gives these figures their names.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from typing import Any, Final, TypeAlias

import msgspec

from overlap.errors import DeadlineExceeded, InternalError, RequestAborted, RequestError, RequestFailed
from overlap.messages import Output

EngineFigures: TypeAlias = Mapping[str, Any]
"""The fields of an engine's `statistics()` by name: numbers, and for figures of several kinds a dict of numbers."""

SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
"""Bounds of what a request waits for, in seconds."""
TOKEN_SECONDS: Final = (
    0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 5.0,
)  # fmt: skip
"""Bounds of the time between two tokens, in seconds."""
TOKENS: Final = (1.0, 4.0, 16.0, 64.0, 256.0, 1024.0, 4096.0, 16384.0, 65536.0, 262144.0)
"""Bounds of prompts and answers, in tokens."""


def engine_figures(statistics: object) -> EngineFigures:
    """Return the figures of `engine.statistics()`, a frozen dataclass, as plain values; such values as they are."""
    if isinstance(statistics, Mapping):
        return statistics
    if not is_dataclass(statistics) or isinstance(statistics, type):
        raise InternalError(f"statistics are a dataclass, not {type(statistics).__name__}")
    return asdict(statistics)


class HistogramFigures(msgspec.Struct, frozen=True, gc=False):
    """How often a value fell between two bounds. `counts` has one entry more than `bounds`: above the last."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    total: float
    """The sum of all values."""

    def __add__(self, other: HistogramFigures) -> HistogramFigures:
        """Return the figures of both together. Raises InternalError if their bounds differ."""
        if self.bounds != other.bounds:
            raise InternalError("histograms of different bounds do not add up: the fronts run different versions")
        counts = tuple(a + b for a, b in zip(self.counts, other.counts, strict=True))
        return HistogramFigures(self.bounds, counts, self.total + other.total)


class Histogram:
    """Counts values between fixed bounds. A value on a bound counts below it, as in Prometheus."""

    def __init__(self, bounds: Sequence[float]) -> None:
        """`bounds` rise."""
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._total = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        """Count a value, `count` times at once."""
        self._counts[bisect_left(self._bounds, value)] += count
        self._total += value * count

    def figures(self) -> HistogramFigures:
        """Return the counts so far."""
        return HistogramFigures(self._bounds, tuple(self._counts), self._total)


class FrontFigures(msgspec.Struct, frozen=True, kw_only=True):
    """What one front has seen since it started. Counters, so those of several fronts add up."""

    answers_open: int
    ends: dict[str, int]
    """Answers by how they ended: see `ENDS`."""
    responses: dict[str, dict[str, int]]
    """HTTP responses by route and status."""
    histograms: dict[str, HistogramFigures]
    fronts: int = 1
    """How many fronts these are the figures of."""


ENDS: Final = ("stop", "length", "tool_calls", "content_filter", "abort", "deadline", "refused", "error")
"""How an answer may end: its finish reason, or what kept it from one ("abort": its client left, or it was aborted)."""


class Meter:
    """Counts for one front. On its event loop's thread only."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        """`clock` gives seconds."""
        self.clock: Final = clock
        self.first_token: Final = Histogram(SECONDS)
        self.between_tokens: Final = Histogram(TOKEN_SECONDS)
        self.whole: Final = Histogram(SECONDS)
        self.prompt_tokens: Final = Histogram(TOKENS)
        self.answer_tokens: Final = Histogram(TOKENS)
        self.loop_lag: Final = Histogram(SECONDS)
        self._open = 0
        self._ends = Counter(dict.fromkeys(ENDS, 0))
        self._responses: dict[str, Counter[str]] = {}

    def begin(self) -> Timing:
        """Return the timing of an answer that is asked for now."""
        self._open += 1
        return Timing(self)

    def count_end(self, how: str) -> None:
        """Count the end of an answer; what is not of `ENDS` counts as "error"."""
        self._open -= 1
        self._ends[how if how in self._ends else "error"] += 1

    def count_response(self, route: str, status: int) -> None:
        """Count an HTTP response. `route` is the pattern that matched, never the path that was asked for."""
        self._responses.setdefault(route, Counter())[str(status)] += 1

    def figures(self) -> FrontFigures:
        """Return what was counted so far."""
        return FrontFigures(
            answers_open=self._open,
            ends=dict(self._ends),
            responses={route: dict(by_status) for route, by_status in self._responses.items()},
            histograms={
                "time_to_first_token_seconds": self.first_token.figures(),
                "inter_token_latency_seconds": self.between_tokens.figures(),
                "e2e_request_latency_seconds": self.whole.figures(),
                "request_prompt_tokens": self.prompt_tokens.figures(),
                "request_generation_tokens": self.answer_tokens.figures(),
                "http_loop_lag_seconds": self.loop_lag.figures(),
            },
        )


class Timing:
    """One answer as it passes. An Output costs the same, however many tokens it brings."""

    __slots__ = ("_began", "_ended", "_last", "_meter", "_prompt_tokens", "_tokens")

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self._began = self._last = meter.clock()
        self._tokens = self._prompt_tokens = 0
        self._ended = False

    def take(self, output: Output) -> None:
        """Count what an Output brings. Tokens that come in one Output share the time since the one before.

        The first Output may be the whole answer: it knows when its first token came.
        """
        now, meter = self._meter.clock(), self._meter
        count = output.num_tokens - self._tokens
        if count > 0:
            last = self._last
            if not self._tokens:
                self._prompt_tokens = output.usage.prompt_tokens
                last = now if output.first_token_at is None else output.first_token_at
                meter.first_token.observe(last - self._began)
            behind = count if self._tokens else count - 1
            if behind and (self._tokens or last < now):  # else nobody knows when they came
                meter.between_tokens.observe((now - last) / behind, behind)
            self._tokens += count
            self._last = now
        if output.finish_reason is not None:
            self.end(output.finish_reason)

    def end(self, how: str) -> None:
        """Count how the answer ended. Only the first call counts."""
        if self._ended:
            return
        self._ended = True
        meter = self._meter
        meter.count_end(how)
        if self._tokens:
            meter.whole.observe(meter.clock() - self._began)
            meter.prompt_tokens.observe(self._prompt_tokens)
            meter.answer_tokens.observe(self._tokens)


def end_of(error: BaseException) -> str:
    """Return how an answer ended that ended by `error`; one of `ENDS`."""
    if isinstance(error, RequestAborted) or not isinstance(error, Exception):
        return "abort"
    if isinstance(error, DeadlineExceeded):
        return "deadline"
    return "refused" if isinstance(error, RequestError) and not isinstance(error, RequestFailed) else "error"


def merged(parts: Sequence[FrontFigures]) -> FrontFigures:
    """Return the sum of several fronts' figures, those of none included."""
    ends: Counter[str] = Counter()
    responses: dict[str, Counter[str]] = {}
    histograms: dict[str, HistogramFigures] = {}
    for part in parts:
        ends.update(part.ends)
        for route, by_status in part.responses.items():
            responses.setdefault(route, Counter()).update(by_status)
        for name, histogram in part.histograms.items():
            histograms[name] = histograms[name] + histogram if name in histograms else histogram
    return FrontFigures(
        answers_open=sum(part.answers_open for part in parts),
        ends=dict(ends),
        responses={route: dict(by_status) for route, by_status in responses.items()},
        histograms=histograms,
        fronts=sum(part.fronts for part in parts),
    )
