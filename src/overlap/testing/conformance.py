"""The stream's promise as a test that every keeper of it passes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from overlap.streams.stream import Stream


async def check_stream(make: Callable[[str], Stream]) -> None:
    """Raise AssertionError unless streams made by `make(name)`, all of one device, keep the promise of `Stream`."""
    first, second = make("first"), make("second")
    done: list[str] = []
    try:
        for name in ("a", "b", "c"):
            first.launch(name, lambda name=name: done.append(name))  # type: ignore[misc]
        mark = first.mark()
        await first.wait_reached(mark)
        assert done == ["a", "b", "c"], f"work ran as {done}, not in the order in which it was launched"
        others: list[str] = []
        asyncio.get_running_loop().call_soon(others.append, "ran")
        await first.wait_reached(mark)  # a mark stays reached
        assert others == ["ran"], "other tasks got no turn while a reached mark was waited for"
        await first.wait_reached(first.mark())  # a mark behind no new work is a place too

        first.launch("before", lambda: done.append("before"))
        behind = first.mark()
        second.follow(behind)
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
    finally:
        first.close()
        first.close()  # idempotent
        second.close()


def _fail() -> None:
    raise ZeroDivisionError
