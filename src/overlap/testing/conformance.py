"""The stream's promise as a test that every keeper of it passes."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable

from overlap.streams.stream import Stream


async def check_stream(make: Callable[[str], Stream], *, share: int = 0) -> None:
    """Raise AssertionError unless streams made by `make(name)`, all of one device, keep the promise of `Stream`.

    `share` is a share of the device that they can have: they then change between it and all of the device.
    """
    first, second = make("first"), make("second")
    done: list[str] = []
    try:
        for number, name in enumerate(("a", "b", "c")):
            first.use(share if number % 2 else 0)
            first.launch(name, lambda name=name: done.append(name))  # type: ignore[misc]
        mark = first.mark()
        await first.wait_reached(mark)
        assert done == ["a", "b", "c"], f"work ran as {done}, not in the order in which it was launched"
        first.use(share)
        others: list[str] = []
        asyncio.get_running_loop().call_soon(others.append, "ran")
        await first.wait_reached(mark)  # a mark stays reached
        assert others == ["ran"], "other tasks got no turn while a reached mark was waited for"
        await first.wait_reached(first.mark())  # a mark behind no new work is a place too

        first.launch("before", lambda: done.append("before"))
        behind = first.mark()
        second.follow(behind)
        second.use(share)
        second.launch("after", lambda: done.append("after"))
        await second.wait_reached(second.mark())
        assert done[-2:] == ["before", "after"], f"a stream did not follow the mark of another: {done}"
        await first.wait_reached(behind)

        first.launch("broken", _fail)
        first.launch("next", lambda: done.append("next"))
        broken = first.mark()
        try:
            await first.wait_reached(broken)
        except ZeroDivisionError:
            pass
        else:
            raise AssertionError("a failure was not told by the mark behind it")
        assert done[-1] == "next", "work behind failed work did not run"
        first.launch("well", lambda: done.append("well"))
        await first.wait_reached(first.mark())  # told once
        assert done[-1] == "well"
        await _check_busy(first, share)
    finally:
        first.close()
        first.close()  # idempotent
        second.close()


async def _check_busy(stream: Stream, share: int) -> None:
    marks = []
    for works in (1, 3, 0, 1):
        stream.use(share if works % 2 else 0)
        for i in range(works):
            stream.launch(f"timed {i}", lambda: None)
        marks.append(stream.mark())
    await stream.wait_reached(marks[-1])
    stream.launch("late", lambda: None)  # the stream may have been idle
    marks.append(stream.mark())
    await stream.wait_reached(marks[-1])
    last = stream.busy(marks[-1])
    spans = [stream.busy(mark) for mark in marks]  # of earlier marks, after a later one
    assert spans[-1] == last, "a mark's work ran at two different times"
    assert all(span.stream == stream.name for span in spans), "a span names another stream"
    assert all(span.start <= span.end for span in spans), f"work ended before it began: {spans}"
    assert all(span.gap >= 0.0 for span in spans), f"work began before the work in front of it had ended: {spans}"
    for before, span in itertools.pairwise(spans):
        hole = abs(span.start - before.end - span.gap)
        assert hole < 1e-6, f"a span does not begin where the one before ended plus the gap: {before}, {span}"
    assert spans[2].start == spans[2].end, f"a mark behind no new work took time: {spans[2]}"


def _fail() -> None:
    raise ZeroDivisionError
