"""When readers let the engine's thread have the interpreter."""

from __future__ import annotations

from pathlib import Path

import pytest

from overlap import AsyncEngine, turns
from overlap.turns import TURN_S, Rest, Turns


def test_a_reader_gives_up_the_interpreter_every_turn_but_not_while_the_engine_rests(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, slept = [100.0], list[float]()
    monkeypatch.setattr(turns, "perf_counter", lambda: now[0])
    monkeypatch.setattr(turns, "sleep", lambda _: slept.append(now[0]))
    rest = Rest()
    reader = Turns(rest)
    times = [100.0 + 0.4 * TURN_S * number for number in range(30)]
    for now[0] in times:
        if len(slept) == 3:
            rest.until = times[20]
        reader.take()
    assert slept[:3] == [times[0], times[3], times[6]], "the third time that it looks a turn has passed"
    assert slept[3] == times[21], "the engine rested until then"
    assert len(slept) == 6


async def test_an_engine_on_a_cpu_wants_the_interpreter_for_its_steps_and_never_rests(tiny_llama_dir: Path) -> None:
    async with AsyncEngine(tiny_llama_dir, device="cpu", kv_cache=1024) as engine:
        loop = engine._core._loop
        assert loop is not None
        assert loop._rest is not engine._core._rest
