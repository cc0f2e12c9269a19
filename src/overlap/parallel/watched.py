"""When pieces and sums ran: ranks that keep the time of every sum, and of the compute between two.

For pictures and figures, not for serving: on CUDA each piece and each sum gets two events, and the sums a stream; on a
CPU a sum runs on a thread of this object, so that its end is known.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, TypeAlias
from xml.sax.saxutils import escape

import torch
from torch import Tensor

from overlap.models.program import Pending, Ranks

Stamp: TypeAlias = "float | torch.cuda.Event"


@dataclass(frozen=True, slots=True)
class Span:
    """What ran, in seconds from the start of the watch: a sum, or a piece of compute. `half` counts from 0."""

    is_sum: bool
    half: int
    start: float
    end: float


class _Sum:
    """A sum under way."""

    def __init__(self, watched: Watched, half: int, x: Tensor, start: Stamp | Future[tuple[float, float]]) -> None:
        self.watched = watched
        self.half = half
        self.x = x
        self.start = start
        self.end: Stamp = 0.0

    def wait(self) -> Tensor:
        return self.watched._wait(self)


class Watched:
    """Keeps the Ranks protocol over other ranks. One forward, or halves as `microbatch.halves` drives them.

    `begin`, then run, then `end`. Not while a graph is captured.
    """

    def __init__(self, ranks: Ranks, device: torch.device) -> None:
        self.rank = ranks.rank
        self.size = ranks.size
        self._ranks = ranks
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._thread: ThreadPoolExecutor | None = None
        self._sums: list[_Sum] = []
        self._pieces: list[tuple[int, Stamp, Stamp]] = []
        self._first: Stamp = 0.0
        self._open: Stamp = 0.0
        self._half = -1
        self._fresh = True
        """Whether the open piece began behind a sum's start: then it is a new half's, or none."""
        self._num_halves = 0

    def begin(self) -> None:
        """Forget what was kept; the first piece begins now."""
        self._sums, self._pieces, self._num_halves, self._fresh = [], [], 0, True
        if self._stream is None and self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="overlap-sums")
        self._first = self._open = self._stamp()

    def end(self) -> list[Span]:
        """Wait for the device, and return what ran since `begin`, by start."""
        if not self._fresh:
            self._pieces.append((self._half, self._open, self._stamp()))
        if self._stream is not None:
            torch.cuda.synchronize(self._device)
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None
        spans = [Span(False, half, self._seconds(start), self._seconds(end)) for half, start, end in self._pieces]
        for one in self._sums:
            start, end = one.start.result() if isinstance(one.start, Future) else (one.start, one.end)
            spans.append(Span(True, one.half, self._seconds(start), self._seconds(end)))
        return sorted(spans, key=lambda span: span.start)

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum of `x` over all ranks, written over `x`."""
        return self.start_sum(x).wait()

    def start_sum(self, x: Tensor) -> Pending:
        """End a piece, and begin a sum behind it and behind all sums before it."""
        if self._fresh:
            self._half = self._num_halves
            self._num_halves += 1
        now = self._stamp()
        self._pieces.append((self._half, self._open, now))
        self._open, self._fresh = now, True
        if self._stream is None:
            assert self._thread is not None, "begin() comes first"
            started = _Sum(self, self._half, x, self._thread.submit(self._sum_timed, x))
        else:
            self._stream.wait_event(now)  # type: ignore[arg-type]
            with torch.cuda.stream(self._stream):
                started = _Sum(self, self._half, x, self._stamp())
                self._ranks.sum(x)
                started.end = self._stamp()
        self._sums.append(started)
        return started

    def gather(self, x: Tensor) -> Tensor:
        """Return the `x` of all ranks, [size, *x.shape]. Its time is part of a piece."""
        return self._ranks.gather(x)

    def _wait(self, started: _Sum) -> Tensor:
        if not self._fresh:
            self._pieces.append((self._half, self._open, self._stamp()))
        if isinstance(started.start, Future):
            started.start.result()
        else:
            torch.cuda.current_stream(self._device).wait_event(started.end)  # type: ignore[arg-type]
        self._half, self._fresh, self._open = started.half, False, self._stamp()
        return started.x

    def _sum_timed(self, x: Tensor) -> tuple[float, float]:
        start = time.perf_counter()
        self._ranks.sum(x)
        return start, time.perf_counter()

    def _stamp(self) -> Stamp:
        if self._stream is None:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _seconds(self, stamp: Stamp) -> float:
        if isinstance(stamp, float):
            assert isinstance(self._first, float)
            return stamp - self._first
        assert not isinstance(self._first, float)
        seconds: float = self._first.elapsed_time(stamp) / 1e3
        return seconds


# ── a picture ────────────────────────────────────────────────────────────────────────────────────────────────────────

_COLOURS: Final = ("#44566f", "#7b5ea7", "#2f7d6b", "#a8662a")
_WIDTH, _LEFT, _TALL = 1200, 150, 40


def picture(ways: Mapping[str, Sequence[Span]], title: str, *, sums: int = 12) -> str:
    """Return an SVG: of each way `sums` sums from its middle and the compute around them, all to one scale."""
    windows = {way: _window(spans, sums * (2 if _num_halves(spans) > 1 else 1)) for way, spans in ways.items()}
    longest = max(_end(spans) - spans[0].start for spans in windows.values())
    scale = (_WIDTH - _LEFT - 28) / longest
    parts, y = [_text(28, 36, title, 17)], 64
    for way, spans in windows.items():
        start = spans[0].start
        length = _end(spans) - start
        hidden = 1 - _alone(spans) / max(1e-12, sum(span.end - span.start for span in spans if span.is_sum))
        whole = _end(ways[way]) - ways[way][0].start
        about = f"{way}: {length * 1e3:.3g} ms shown of {whole * 1e3:.3g}; {hidden:.0%} of the sums beside compute"
        parts.append(_text(28, y, about, 13))
        for lane, is_sum in (("compute", False), ("sums", True)):
            y += 8
            parts.append(f'<rect x="{_LEFT}" y="{y}" width="{_WIDTH - _LEFT - 28}" height="{_TALL}" fill="#f3f5f7"/>')
            parts.append(_text(28, y + 25, lane, 12.5))
            parts += [
                _box(span, _LEFT + (span.start - start) * scale, y, (span.end - span.start) * scale)
                for span in spans
                if span.is_sum == is_sum
            ]
            y += _TALL
        y += 34
    ground = f'<rect width="{_WIDTH}" height="{y}" rx="10" fill="#ffffff"/>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {y}" width="{_WIDTH}" height="{y}" role="img" '
        f'aria-label="{escape(title)}" font-family="\'DejaVu Sans\', Helvetica, Arial, sans-serif">\n{ground}\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _end(spans: Sequence[Span]) -> float:
    return max(span.end for span in spans)


def _num_halves(spans: Sequence[Span]) -> int:
    return len({span.half for span in spans})


def _window(spans: Sequence[Span], sums: int) -> list[Span]:
    """Return what ran from the middle's first sum to its last one's end."""
    found = [span for span in spans if span.is_sum]
    first = max(0, (len(found) - sums) // 2)
    kept = found[first : first + sums]
    start, end = kept[0].start, kept[-1].end
    return sorted(
        (Span(span.is_sum, span.half, max(span.start, start), min(span.end, end))
         for span in spans if span.end > start and span.start < end),
        key=lambda span: span.start,
    )  # fmt: skip


def _alone(spans: Sequence[Span]) -> float:
    """Return for how long a sum ran and no piece did."""
    pieces = sorted((span.start, span.end) for span in spans if not span.is_sum)
    alone = 0.0
    for one in (span for span in spans if span.is_sum):
        beside = sum(max(0.0, min(end, one.end) - max(start, one.start)) for start, end in pieces)
        alone += max(0.0, one.end - one.start - beside)
    return alone


def _text(x: float, y: float, words: str, size: float) -> str:
    return f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" fill="#1c2430">{escape(words)}</text>'


def _box(span: Span, x: float, y: float, width: float) -> str:
    name = "ABCD"[span.half % 4]
    shown = max(0.6, width - 0.6)
    words = f"{'sum of' if span.is_sum else 'compute of'} {name}: {(span.end - span.start) * 1e6:.0f} µs"
    box = (
        f'<rect x="{x:.2f}" y="{y + 2}" width="{shown:.2f}" height="{_TALL - 4}" rx="2" '
        f'fill="{_COLOURS[span.half % 4]}" fill-opacity="{0.55 if span.is_sum else 1}"><title>{words}</title></rect>'
    )
    if width < 14:
        return box
    label = f'<text x="{x + width / 2:.1f}" y="{y + 25}" font-size="12" fill="#ffffff" text-anchor="middle">{name}'
    return box + label + "</text>"
