"""Draws `one-step-ahead.svg`: who does what while step N runs. Run it again after a change: `python docs/draw_step.py`.

Lengths are chosen to be seen, not measured: a host that takes a bit over half of a step.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

WIDTH, HEIGHT = 1000, 560
LEFT: Final = 182  # where time begins
STEP: Final = 244  # px that a step takes on the device
SETTLE, PLAN, LAUNCH, TELL, READ = 50, 42, 52, 32, 40
RIGHT: Final = LEFT + 3 * STEP + 56  # where the drawing is cut off
TALL: Final = 46

INK, FAINT, LINE, PAPER = "#1c2430", "#66707d", "#d5dae1", "#ffffff"
FILL: Final = {"settle": "#f4b183", "plan": "#9cc4ec", "launch": "#7fd1b4", "tell": "#d9c3ee", "read": "#d9c3ee"}
STEPS: Final = ("#39465a", "#4d5d75", "#63758f", "#7d8ea6")
FONT: Final = "font-family=\"'DejaVu Sans', 'Segoe UI', Helvetica, Arial, sans-serif\""


def text(x: float, y: float, words: str, *, size: float = 12.5, fill: str = INK, more: str = "") -> str:
    """Return words with their baseline at y."""
    return f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" fill="{fill}" {more}>{words}</text>'


def box(x: float, y: float, width: float, fill: str, words: tuple[str, ...], *, ink: str = INK) -> str:
    """Return a block of work with one or two lines in it."""
    middle = y + TALL / 2 + 4.5 - 7.5 * (len(words) - 1)
    lines = "".join(
        text(x + width / 2, middle + 15 * i, line, fill=ink, more='text-anchor="middle"')
        for i, line in enumerate(words)
    )
    return f'<rect x="{x + 0.75:g}" y="{y:g}" width="{width - 1.5:g}" height="{TALL}" rx="4" fill="{fill}"/>{lines}'


def gap(x: float, y: float, width: float, words: str) -> str:
    """Return a dashed outline: nobody works here."""
    return (
        f'<rect x="{x + 2:g}" y="{y + 0.5:g}" width="{width - 4:g}" height="{TALL - 1}" rx="4" fill="none" '
        f'stroke="{FAINT}" stroke-dasharray="3 3"/>'
        + text(x + width / 2, y + TALL / 2 + 4.5, words, fill=FAINT, more='text-anchor="middle" font-style="italic"')
    )


def arrow(path: str) -> str:
    """Return a line with a head."""
    return f'<path d="{path}" fill="none" stroke="{INK}" stroke-width="1.4" marker-end="url(#head)"/>'


def lane(y: float, name: str, owner: str) -> str:
    """Return a lane's name and its ground."""
    ground = f'<rect x="{LEFT - 8}" y="{y - 7}" width="{RIGHT - LEFT + 8}" height="{TALL + 14}" rx="6" fill="#f4f6f8"/>'
    label = text(20, y + 20, name, size=13.5, more='font-weight="bold"') + text(
        20, y + 37, owner, size=11.5, fill=FAINT
    )
    return ground + label


def at(offset: int) -> str:
    """Return the name of a step."""
    return "N" if offset == 0 else f"N{'+' if offset > 0 else '−'}{abs(offset)}"


def ahead(top: float) -> list[str]:
    """Return the drawing of the loop as it is."""
    reader, host, device = top, top + 78, top + 186
    out = [
        lane(reader, "your event loop", "Front, Answer"),
        lane(host, "engine thread", "Loop, Planner, Runner"),
        lane(device, "device", "CUDA or CPU stream"),
    ]
    for k in range(3):
        x = LEFT + k * STEP
        out.append(box(x, device, STEP, STEPS[k], (f"step {at(k)}",), ink=PAPER))
        out.append(box(x, host, SETTLE, FILL["settle"], ("settle", at(k - 1))))
        out.append(box(x + SETTLE, host, PLAN, FILL["plan"], ("plan", at(k + 1))))
        launch = x + SETTLE + PLAN
        out.append(box(launch, host, LAUNCH, FILL["launch"], ("launch", at(k + 1))))
        tell = launch + LAUNCH
        out.append(box(tell, host, TELL, FILL["tell"], ("tell", at(k - 1))))
        out.append(gap(tell + TELL, host, STEP - SETTLE - PLAN - LAUNCH - TELL, "sleeps"))
        out.append(box(tell + TELL + 6, reader, READ, FILL["read"], ("text", at(k - 1))))
        middle = tell + TELL / 2
        out.append(arrow(f"M{middle} {host - 1} C{middle} {host - 26} {middle} {reader + 23} "
                         f"{tell + TELL + 3} {reader + 23}"))  # fmt: skip
        queued = launch + LAUNCH - 10
        out.append(
            arrow(
                f"M{queued} {host + TALL} C{queued} {host + 84} {x + STEP - 46} {host + 60} {x + STEP - 7} {device - 3}"
            )
        )
        out.append(arrow(f"M{x + STEP} {device} V{host + TALL + 4}"))
    x = LEFT + 3 * STEP
    out.append(box(x, device, RIGHT - x, STEPS[3], (at(3),), ink=PAPER))
    out.append(box(x, host, RIGHT - x, FILL["settle"], ("settle", at(2))))
    queued = LEFT + SETTLE + PLAN + LAUNCH - 22
    out.append(text(queued, host + 84, f"queued behind step {at(0)}", size=11.5, fill=FAINT, more='text-anchor="end"'))
    out.append(text(LEFT + STEP + 9, host + 84, f"landed: tokens of {at(0)}", size=11.5, fill=FAINT))
    return out


def in_turn(top: float) -> list[str]:
    """Return the drawing of the same loop with overlap=False."""
    host, device = top, top + 66
    out = [lane(host, "engine thread", ""), lane(device, "device", "")]
    x = LEFT
    for k in range(2):
        out.append(box(x, host, PLAN, FILL["plan"], ("plan", at(k))))
        out.append(box(x + PLAN, host, LAUNCH, FILL["launch"], ("launch", at(k))))
        begin = x + PLAN + LAUNCH
        out.append(box(begin, device, STEP, STEPS[k], (f"step {at(k)}",), ink=PAPER))
        out.append(gap(begin, host, STEP, "sleeps"))
        end = begin + STEP
        out.append(box(end, host, SETTLE, FILL["settle"], ("settle", at(k))))
        out.append(gap(end, device, min(SETTLE + PLAN + LAUNCH, RIGHT - end), "idle"))
        x = end + SETTLE
    return out


def drawing() -> str:
    """Return the whole SVG."""
    parts = [
        text(20, 34, "One step ahead", size=16.5, more='font-weight="bold"'),
        text(
            LEFT + 6,
            34,
            "While the device runs a step, the host settles the one before and launches the next.",
            size=13,
        ),
        *ahead(64),
        f'<path d="M20 330 H{RIGHT}" stroke="{LINE}"/>',
        text(20, 362, "In turn", size=16.5, more='font-weight="bold"'),
        text(
            LEFT + 6,
            362,
            "The same loop with overlap=False: the device waits for the host between any two steps.",
            size=13,
        ),
        *in_turn(392),
        text(RIGHT, 538, "time →", size=11.5, fill=FAINT, more='text-anchor="end"'),
        text(LEFT, 538, "Lengths are chosen to be seen, not measured.", size=11.5, fill=FAINT),
    ]
    head = (
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0.8 L8 4 L0 7.2 z" fill="{INK}"/></marker></defs>'
    )
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'role="img" aria-label="Plan, launch, tell and settle above steps without a gap on the device" {FONT}>\n'
        f'{head}\n<rect width="{WIDTH}" height="{HEIGHT}" rx="10" fill="{PAPER}"/>\n{body}\n</svg>\n'
    )


if __name__ == "__main__":
    Path(__file__).with_name("one-step-ahead.svg").write_text(drawing(), encoding="utf-8")
