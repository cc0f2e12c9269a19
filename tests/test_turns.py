"""When readers let the engine's thread have the interpreter."""

from __future__ import annotations

from pathlib import Path
from typing import TypeAlias

import pytest

from overlap import AsyncEngine, turns
from overlap.turns import TURN_S, Rest, Turns

Clock: TypeAlias = tuple[list[float], list[float]]
"""What time it is, and when the reader gave it up."""


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    now, slept = [100.0], list[float]()
    monkeypatch.setattr(turns, "perf_counter", lambda: now[0])
    monkeypatch.setattr(turns, "sleep", lambda _: slept.append(now[0]))
    return now, slept


def test_a_reader_gives_up_the_interpreter_every_turn_but_not_while_the_engine_rests(clock: Clock) -> None:
    now, slept = clock
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


def test_a_reader_gives_it_up_each_time_while_the_engine_launches_many_calls(clock: Clock) -> None:
    now, slept = clock
    rest = Rest()
    reader = Turns(rest)
    times = [100.0 + 0.01 * TURN_S * number for number in range(30)]
    for now[0] in times:
        rest.wanted = times[10] <= now[0] < times[20]
        rest.until = times[-1] + 1.0 if now[0] > times[0] else 0.0
        reader.take()
    assert slept == [times[0], *times[10:20]]


async def test_an_engine_on_a_cpu_wants_the_interpreter_for_its_steps_and_never_rests(tiny_llama_dir: Path) -> None:
    async with AsyncEngine(tiny_llama_dir, device="cpu", kv_cache=1024) as engine:
        loop = engine._core._loop
        assert loop is not None
        assert loop._rest is not engine._core._rest


def test_a_rest_ends_before_the_step_does_however_late_the_one_before_was_seen() -> None:
    rest, ahead = Rest(), 1000.0  # by how much the host's clock is ahead of the device's
    rest.begin()
    assert rest.until == 0.0, "of no step anything is known"
    for step in range(200):
        end = 2e-3 * (step + 1)
        late = 8e-5 if step % 10 == 0 else 1.5e-3  # readers held the loop up most of the time
        rest.note(end - 2e-3, end, ahead + end + late)
        rest.begin()
        next_end = ahead + end + 2e-3
        assert next_end - 4e-4 < rest.until < next_end
        rest.end()
        assert rest.until == 0.0


def test_a_rest_follows_a_device_whose_clock_is_slower_and_one_whose_clock_is_faster() -> None:
    for rate in (1 - 5e-5, 1 + 5e-5):
        rest = Rest()
        for step in range(100_000):  # 200 seconds, in which the clocks go apart by ten milliseconds
            end = 2e-3 * (step + 1)
            rest.note((end - 2e-3) * rate, end * rate, end + 8e-5)
        rest.begin()
        assert end + 2e-3 - 4e-4 < rest.until < end + 2e-3
