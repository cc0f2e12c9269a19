"""A trace as a picture: a few steps from its middle, a lane for each verb of the loop and for each stream.

SVG written by hand. It brings its own ground, so that it can be read on any page, and turns dark where the reader's
system is. Colours stand in attributes, and only the dark ones in a style sheet: viewers that know no style sheets show
the light picture.
"""

from __future__ import annotations

from collections.abc import Iterable
from statistics import median
from typing import Final
from xml.sax.saxutils import escape

from overlap.observe.record import VERBS, DeviceSpan, HostSpan, Record, bubble_share

WIDTH: Final = 1200
LEFT: Final = 128  # where time begins
RIGHT: Final = WIDTH - 28
TOP: Final = 92
HOST_TALL, DEVICE_TALL, BETWEEN = 24, 44, 8
CHARACTER: Final = 0.6  # of the font's size: the width of a digit

INK, FAINT, LINE, PAPER, GROUND, RED = "#1c2430", "#5c6672", "#dfe3e8", "#ffffff", "#f3f5f7", "#d0302b"
FILL: Final = (("plan", "#9cc4ec"), ("launch", "#7fd1b4"), ("tell", "#d9c3ee"), ("land", "none"), ("settle", "#f4b183"))
DECODE, PROMPT = "#44566f", "#7b5ea7"
SAYS: Final = {"land": "land (waits)"}
DARK: Final = (
    "@media (prefers-color-scheme: dark) {.ov-ink{fill:#e4e8ee}.ov-faint{fill:#98a3b1}.ov-line{stroke:#39424e}"
    ".ov-paper{fill:#14191f}.ov-ground{fill:#1d242d}.ov-wait{stroke:#98a3b1}.ov-red{fill:#ff8079}"
    ".ov-hatch{fill:#46201f}.ov-halo{stroke:#14191f}.ov-decode{fill:#5d7596}.ov-prompt{fill:#8d6fbb}}"
)


class _Scale:
    """From seconds to pixels, over the window that is shown."""

    def __init__(self, start: float, end: float) -> None:
        self.start, self.end = start, end
        self._pixels = (RIGHT - LEFT) / (end - start)

    def x(self, seconds: float) -> float:
        """Return the place of a moment, at the edge if it is outside."""
        return LEFT + (min(max(seconds, self.start), self.end) - self.start) * self._pixels

    def shows(self, start: float, end: float) -> bool:
        """Return whether any of a span is in the window."""
        return start < self.end and end > self.start


def picture(record: Record, *, steps: int = 12) -> str:
    """Return an SVG of up to `steps` steps from the middle of the longest time in which there was always work."""
    shown = _window(record.device, steps)
    if not shown:
        return _svg(TOP + 20, [_text(28, 44, f"{record.engine}: no step ran while the trace was on.", size=15)])
    scale = _scale(record, shown)
    parts, y = _title(record, shown), TOP
    bottom = TOP + len(VERBS) * (HOST_TALL + BETWEEN) + 10 + len(record.streams) * (DEVICE_TALL + BETWEEN)
    grounds, lanes = [], list[str]()
    for verb, fill in FILL:
        grounds.append(_lane(y, HOST_TALL, SAYS.get(verb, verb)))
        lanes += _host_lane([span for span in record.host if span.verb == verb], scale, y, fill)
        y += HOST_TALL + BETWEEN
    y += 10
    for stream in record.streams:
        grounds.append(_lane(y, DEVICE_TALL, stream, "stream"))
        lanes += _device_lane([span for span in record.device if span.stream == stream], record, scale, y)
        y += DEVICE_TALL + BETWEEN
    parts += [*grounds, *_axis(scale, bottom), *lanes, *_legend(bottom + 56, several=len(record.streams) > 1)]
    return _svg(bottom + 78, parts)


# ── what is shown ────────────────────────────────────────────────────────────────────────────────────────────────────


def _window(device: tuple[DeviceSpan, ...], steps: int) -> list[DeviceSpan]:
    """Return the spans of the middle steps of the longest run of steps that no idle time interrupts.

    With several streams: of the longest in which more than one ran, the steps around the one nearest to the middle that
    ran on another stream than the first.
    """
    runs: list[list[DeviceSpan]] = []
    busy_until = 0.0
    for span in device:
        idle = span.gap - span.bubble > 1e-9 and span.start - span.bubble > busy_until
        if idle or not runs:
            runs.append([])
        runs[-1].append(span)
        busy_until = max(busy_until, span.end)
    several = [run for run in runs if len({span.stream for span in run}) > 1]
    longest = max(several or runs, key=len, default=[])
    numbers = sorted({span.number for span in longest})
    first = max(0, (len(numbers) - steps) // 2)
    others = sorted({span.number for span in longest if span.stream != longest[0].stream})
    if others:  # where a second lane runs is what is to be seen
        nearest = min(others, key=lambda number: abs(number - numbers[len(numbers) // 2]))
        first = max(0, min(numbers.index(nearest) - steps // 2, len(numbers) - steps))
    middle = set(numbers[first : first + steps])
    return [span for span in longest if span.number in middle]


def _scale(record: Record, shown: list[DeviceSpan]) -> _Scale:
    """Return a window around the spans; at an end of the trace with what the host did there."""
    start, end = min(span.start - span.bubble for span in shown), max(span.end for span in shown)
    first, last = shown[0].number, shown[-1].number
    before = [span.start for span in record.host if span.number == first]
    behind = [span.end for span in record.host if span.number == last]
    if shown[0] == record.device[0]:
        start = min([start, *before])
    if shown[-1] == record.device[-1]:
        end = max([end, *behind])
    margin = 0.006 * (end - start) + 1e-9
    return _Scale(start - margin, end + margin)


# ── lanes ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _lane(y: float, tall: float, name: str, kind: str = "") -> str:
    middle = y + tall / 2 + 4.5
    ground = (
        f'<rect class="ov-ground" x="{LEFT}" y="{y}" width="{RIGHT - LEFT}" height="{tall}" rx="3" fill="{GROUND}"/>'
    )
    label = _text(LEFT - 12, middle - (7 if kind else 0), name, more='text-anchor="end" font-weight="600"')
    if kind:
        label += _text(LEFT - 12, middle + 8, kind, size=11, kind="faint", more='text-anchor="end"')
    return f'<g class="ov-lane" data-lane="{escape(name)}">{ground}{label}</g>'


def _host_lane(spans: list[HostSpan], scale: _Scale, y: float, fill: str) -> list[str]:
    inside = [span for span in spans if scale.shows(span.start, span.end)]
    parts, free_from = [], 0.0
    for i, span in enumerate(inside):
        x, width = scale.x(span.start), max(1.5, scale.x(span.end) - scale.x(span.start))
        style = (
            f'fill="none" class="ov-wait" stroke="{FAINT}" stroke-width="0.8" stroke-dasharray="3 2.5"'
            if fill == "none" and width >= 4
            else f'fill="{FAINT if fill == "none" else fill}"'
        )
        words = f"{span.verb} {span.number or ''}: {_duration(span.end - span.start)}"
        parts.append(_box(x, y + 1, width, HOST_TALL - 2, style, words, radius=min(3.0, width / 3)))
        label = str(span.number or "")
        wide = len(label) * 11 * CHARACTER
        following = scale.x(inside[i + 1].start) if i + 1 < len(inside) else RIGHT
        if width >= wide + 4:
            ink = "faint" if fill == "none" else "on-box"
            parts.append(
                _text(x + width / 2, y + HOST_TALL / 2 + 4, label, size=11, kind=ink, more='text-anchor="middle"')
            )
        elif following - x - width >= wide + 5 and x >= free_from:  # no room in the box: behind it
            parts.append(_text(x + width + 3, y + HOST_TALL / 2 + 4, label, size=11, kind="faint"))
            free_from = x + width + wide + 4
    return parts


def _device_lane(spans: list[DeviceSpan], record: Record, scale: _Scale, y: float) -> list[str]:
    parts: list[str] = []
    for start, end in _idle_beside(spans, record.device):
        if scale.shows(start, end):
            x, until = scale.x(start), scale.x(end)
            words = f"idle while another lane ran: {_duration(end - start)}"
            parts.append(
                _box(
                    x,
                    y + 1,
                    max(1.0, until - x),
                    DEVICE_TALL - 2,
                    f'fill="url(#ov-idle)" stroke="{LINE}"',
                    words,
                    radius=1.5,
                )
            )
    for span in spans:
        if span.bubble > 0.0 and scale.shows(span.start - span.bubble, span.start):
            parts += _bubble(span, scale, y)
        if not scale.shows(span.start, span.end):
            continue
        x, width = scale.x(span.start), max(1.0, scale.x(span.end) - scale.x(span.start))
        step = record.steps.get(span.number)
        prompts = step is not None and step.prompt_tokens > 0
        kind, fill = ("ov-prompt", PROMPT) if prompts else ("ov-decode", DECODE)
        about = f": {step.rows} rows, {step.tokens} tokens, {step.prompt_tokens} of them of prompts" if step else ""
        about += f" ({step.way})" if step and step.way else ""
        words = f"step {span.number}{about}; {_duration(span.end - span.start)}"
        parts.append(
            _box(
                x + 0.4, y + 1, max(0.8, width - 0.8), DEVICE_TALL - 2, f'class="{kind}" fill="{fill}"', words,
                radius=min(3.0, width / 3),
            )
        )  # fmt: skip
        lines = [f"step {span.number}", *([_size(step.rows, step.prompt_tokens)] if step else [])]
        parts += _device_label(x + width / 2, y, width, lines, str(span.number))
    return parts


def _idle_beside(spans: list[DeviceSpan], device: Iterable[DeviceSpan]) -> list[tuple[float, float]]:
    """Return when a stream stood still between two of its spans, bubbles apart, while another stream ran."""
    others = [span for span in device if span.stream != spans[0].stream] if spans else []
    found = []
    for span in spans[1:]:
        start, end = span.start - span.gap, span.start - span.bubble
        if end - start > 1e-9:
            found += [(max(start, o.start), min(end, o.end)) for o in others if o.start < end and o.end > start]
    return found


def _device_label(middle: float, y: float, width: float, lines: list[str], short: str) -> list[str]:
    fitting = [line for line in lines if len(line) * 11.5 * CHARACTER + 6 <= width]
    if not fitting and len(short) * 11.5 * CHARACTER + 2 <= width:
        fitting = [short]
    first = y + DEVICE_TALL / 2 + 4 - 7.5 * (len(fitting) - 1)
    return [
        _text(middle, first + 15 * i, line, size=11.5, kind="on-dark", more='text-anchor="middle"')
        for i, line in enumerate(fitting)
    ]


def _size(rows: int, prompt_tokens: int) -> str:
    if prompt_tokens:
        return f"{prompt_tokens} prompt"
    return f"{rows} row" if rows == 1 else f"{rows} rows"


def _bubble(span: DeviceSpan, scale: _Scale, y: float) -> list[str]:
    x, until = scale.x(span.start - span.bubble), scale.x(span.start)
    words = f"bubble before step {span.number}: {_duration(span.bubble)}"
    parts = [
        _box(
            x, y + 1, max(1.5, until - x), DEVICE_TALL - 2, f'fill="url(#ov-bubble)" stroke="{RED}"', words, radius=1.5
        )
    ]
    label = _duration(span.bubble)
    if until - x >= len(label) * 11 * CHARACTER + 8:
        halo = f'text-anchor="middle" stroke="{PAPER}" stroke-width="4" stroke-linejoin="round" paint-order="stroke"'
        parts.append(_text((x + until) / 2, y + DEVICE_TALL / 2 + 4, label, size=11, kind="red", more=halo, halo=True))
    return parts


# ── around the lanes ─────────────────────────────────────────────────────────────────────────────────────────────────


def _title(record: Record, shown: list[DeviceSpan]) -> list[str]:
    numbers = sorted({span.number for span in shown})
    total = len({span.number for span in record.device})
    which = f"steps {numbers[0]} to {numbers[-1]}" if len(numbers) > 1 else f"step {numbers[0]}"
    here, all_steps = bubble_share(shown), record.bubble_share
    bubbles = f"bubbles {_percent(here)} of the device’s time"
    if total > len(numbers):
        bubbles += f", {_percent(all_steps)} in all {total} steps"
    if len(record.streams) > 1:
        lanes = [[span for span in shown if span.stream == stream] for stream in record.streams]
        idle = sum(end - start for lane in lanes for start, end in _idle_beside(lane, shown))
        whole = max(span.end for span in shown) - min(span.start for span in shown)
        bubbles += f"; one lane idle beside the other {_percent(idle / whole)}"
    medians = [
        f"{verb} {_duration(median(spans))}"
        for verb in VERBS
        if verb != "land" and (spans := [span.end - span.start for span in record.host if span.verb == verb])
    ]
    step = _duration(median([span.end - span.start for span in record.device]))
    return [
        _text(28, 38, f"{record.engine}: {which}", size=17, more='font-weight="600"'),
        _text(RIGHT, 38, bubbles, size=14, kind="red" if here >= 0.01 else "ink", more='text-anchor="end"'),
        _text(28, 62, f"medians: step {step} on the device; {', '.join(medians)} on the host", size=12.5, kind="faint"),
        _text(RIGHT, 62, f"{len(numbers)} of {total} steps shown", size=12.5, kind="faint", more='text-anchor="end"'),
    ]


def _axis(scale: _Scale, y: float) -> list[str]:
    milliseconds = 1e3 * (scale.end - scale.start)
    unit = next(u for k in range(-6, 12) for u in (10.0**k, 2 * 10.0**k, 5 * 10.0**k) if milliseconds / u <= 12)
    parts = []
    for i in range(int(milliseconds / unit) + 1):
        x = scale.x(scale.start + i * unit / 1e3)
        parts.append(f'<path class="ov-line" d="M{x:.1f} {TOP - 6}V{y + 2}" stroke="{LINE}" stroke-opacity="0.8"/>')
        parts.append(_text(x, y + 18, f"{i * unit:g}", size=11.5, kind="faint", more='text-anchor="middle"'))
    parts.append(_text(LEFT - 12, y + 18, "ms", size=11.5, kind="faint", more='text-anchor="end"'))
    return parts


def _legend(y: float, *, several: bool) -> list[str]:
    entries = [(verb, f'fill="{fill}"') for verb, fill in FILL if fill != "none"]
    entries += [
        ("waits", f'fill="none" class="ov-wait" stroke="{FAINT}" stroke-dasharray="3 2.5"'),
        ("step of answers only", f'class="ov-decode" fill="{DECODE}"'),
        ("step with prompts", f'class="ov-prompt" fill="{PROMPT}"'),
        ("bubble: work was waiting, nothing was queued", f'fill="url(#ov-bubble)" stroke="{RED}"'),
    ]
    if several:
        entries[-1] = ("bubble: nothing was queued", entries[-1][1])
        entries.append(("idle beside the other lane", f'fill="url(#ov-idle)" stroke="{LINE}"'))
    parts, x = [], 28.0 if several else float(LEFT)
    for words, style in entries:
        parts.append(_box(x, y - 10, 16, 12, style, words, radius=2))
        parts.append(_text(x + 22, y, words, size=12))
        x += 22 + len(words) * 7.0 + 18
    return parts


def _svg(height: float, parts: list[str]) -> str:
    hatch = (
        '<pattern id="ov-bubble" width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
        '<rect class="ov-hatch" width="6" height="6" fill="#fde3e1"/>'
        f'<path d="M0 0V6" stroke="{RED}" stroke-width="3"/></pattern>'
        '<pattern id="ov-idle" width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
        f'<path class="ov-line" d="M0 0V6" stroke="{LINE}" stroke-width="3"/></pattern>'
    )
    ground = f'<rect class="ov-paper" width="{WIDTH}" height="{height:g}" rx="10" fill="{PAPER}"/>'
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" width="{WIDTH}" height="{height:g}" '
        'role="img" aria-label="What the host and the device did, step by step" '
        "font-family=\"'DejaVu Sans', 'Segoe UI', Helvetica, Arial, sans-serif\">\n"
        f"<style>{DARK}</style>\n<defs>{hatch}</defs>\n{ground}\n{body}\n</svg>\n"
    )


def _text(
    x: float, y: float, words: str, *, size: float = 12.5, kind: str = "ink", more: str = "", halo: bool = False
) -> str:
    fill = {"ink": INK, "faint": FAINT, "red": RED, "on-box": INK, "on-dark": "#ffffff"}[kind]
    classes = f"ov-{kind} ov-halo" if halo else f"ov-{kind}"
    place = f'x="{x:.1f}" y="{y:.1f}" font-size="{size:g}"'
    return f'<text class="{classes}" {place} fill="{fill}" {more}>{escape(words)}</text>'


def _box(x: float, y: float, width: float, tall: float, style: str, words: str, *, radius: float) -> str:
    """Return a rectangle that says `words` when it is pointed at."""
    return (
        f'<rect x="{x:.2f}" y="{y:.1f}" width="{width:.2f}" height="{tall:g}" rx="{radius:.1f}" {style}>'
        f"<title>{escape(words)}</title></rect>"
    )


def _duration(seconds: float) -> str:
    """Return three digits with the unit that suits."""
    if seconds >= 1.0:
        return f"{seconds:.3g} s"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} µs"


def _percent(share: float) -> str:
    return f"{100 * share:.0f}%" if share >= 0.1 or share == 0.0 else f"{100 * share:.2g}%"
