"""What do the loop's verbs take while the program that the engine lives in reads every answer, token by token?

    python bench/beside_readers.py                     1, 64 and 256 answers, steps of 2 ms (no device and no model)
    python bench/beside_readers.py --rows 192 --step-ms 1.2

The engine is whole but for its device: planner, loop, thread, front, detokenizer, `AsyncEngine.generate`. The device
is a clock: a step lands when the one before it has and so many milliseconds more have passed, and a thread that sleeps
until then wakes the loop, as the one does that waits for a CUDA event. Launching packs the plan, keeps the interpreter
for LAUNCH_US (a guess at what a graph's launch takes), and gives it up once, for a few. Two JSON lines for each number
of rows, one with a reader for each answer ("streamed") and one with a reader who waits for the ends ("whole"), medians
of a window's steps in microseconds, and of the windows:

    plan, launch, tell, settle, sum   of a step: what "streamed" has more than "whole" is waiting for the interpreter
    step                        between two steps; the device's own time is the least that it can be
    bubble                      the share of the time in which the device had nothing queued
    told                        from a step's end on the device until as many tokens are read as had come by then

Reasons to doubt it: a clock that sleeps is late by the kernel's timer slack (some 60 us), which is in "told"; a real
launch gives up the interpreter more often, or never; the machine's other work. Look at the spread.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from readers import CONTEXT, VOCABULARY, welcome, write_tokenizer  # type: ignore[import-not-found]

import overlap.assemble
from overlap import AsyncEngine, SamplingParams
from overlap.assemble import Parts
from overlap.cache.pages import Ints
from overlap.graphs.driver import GraphStatistics
from overlap.observe.record import VERBS
from overlap.schedule.plan import StepPlan
from overlap.schedule.planner import Planner
from overlap.serve.remote import opened_of
from overlap.state.packing import capacity, goes_over, pack, pack_again
from overlap.streams.stream import Busy

LAUNCH_US = 20.0
WINDOW_S = 0.5
WARM_UP_STEPS = 20


class Clock:
    """A device on which a step takes `step_s`, and the thread that waits for it."""

    def __init__(self, step_s: float) -> None:
        self._step_s = step_s
        self._free = 0.0
        self._waits: SimpleQueue[tuple[float, asyncio.AbstractEventLoop, asyncio.Future[None]] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._wait, daemon=True)
        self._thread.start()

    def run(self) -> Busy:
        """Begin a step behind the last one; return when it runs."""
        now, free = time.perf_counter(), self._free
        start = max(free, now)
        self._free = start + self._step_s
        return Busy("clock", start, self._free, start - free if free else 0.0)

    async def passed(self, end: float) -> None:
        """Return once it is `end`."""
        if time.perf_counter() >= end:
            await asyncio.sleep(0)
            return
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        self._waits.put((end, loop, future))
        await future

    def close(self) -> None:
        """End the thread."""
        self._waits.put(None)
        self._thread.join()

    def _wait(self) -> None:
        while (wait := self._waits.get()) is not None:
            end, loop, future = wait
            time.sleep(max(0.0, end - time.perf_counter()))
            loop.call_soon_threadsafe(future.set_result, None)


LIBC = ctypes.CDLL(None)  # whose calls give it up
GROUND = ctypes.create_string_buffer(1 << 19)


class ClockFlight:
    """A plan that runs on a clock."""

    blocks_left = 0

    def __init__(self, plan: StepPlan, clock: Clock, ends: list[tuple[int, float]]) -> None:
        self.plan = plan
        self._clock = clock
        self._busy = clock.run()
        self._ends = ends

    def launch_block(self) -> None:
        """Do nothing: there is none."""

    @property
    def landed(self) -> bool:
        """Whether it has passed."""
        return time.perf_counter() >= self._busy.end

    async def wait_landed(self) -> Ints:
        """Return tokens that go on in the text."""
        await self._clock.passed(self._busy.end)
        before = self._ends[-1][0] if self._ends else 0
        self._ends.append((before + len(self.plan.emits), self._busy.end))
        tokens: Ints = ((self.plan.emits * 97 + self.plan.number) % (VOCABULARY - 300) + 270).astype(np.int32)
        return tokens

    def scored(self) -> Ints | None:
        """Return nothing: nobody asks."""
        return None

    def busy(self) -> Busy:
        """Return when it ran."""
        return self._busy


class ClockRunner:
    """Packs plans, and runs them on a clock."""

    def __init__(self, step_s: float, max_rows: int, budget: int, pages: int) -> None:
        self._clock = Clock(step_s)
        self._buffers = [np.zeros(capacity(max_rows, budget, pages), dtype=np.int32) for _ in range(3)]
        self._plans: list[StepPlan | None] = [None] * 3
        self.ends: list[tuple[int, float]] = []
        """Of each step that has landed: tokens by then, and when it had ended on the device."""

    def launch(self, plan: StepPlan) -> ClockFlight:
        """Pack a plan as the runner does, spend a launch's time, and let it run."""
        place = plan.number % 3
        before, self._plans[place] = self._plans[place], plan
        if goes_over(plan, before):
            pack_again(plan, self._buffers[place])
        else:
            pack(plan, self._buffers[place])
        until = time.perf_counter() + LAUNCH_US / 1e6
        while time.perf_counter() < until:
            pass
        LIBC.memset(GROUND, 0, len(GROUND))
        return ClockFlight(plan, self._clock, self.ends)

    def usable(self) -> bool:
        """Return True."""
        return True

    def warm_up_one(self) -> bool:
        """Return False: there is nothing to do."""
        return False

    def statistics(self) -> GraphStatistics:
        """Return nothing."""
        return GraphStatistics()

    def explain(self) -> tuple[str, ...]:
        """Say nothing."""
        return ()

    def close(self) -> None:
        """End the clock."""
        self._clock.close()


class Readers:
    """Whoever reads the answers of an engine on a clock, and when they had what."""

    def __init__(self, rows: int, runner: ClockRunner) -> None:
        self._runner = runner
        self._rows = rows
        self._got = 0
        self.decoding = asyncio.Event()
        self.told: list[float] = []
        """Of each step: how long after its end on the device as many tokens were read as had come by then."""

    async def stream(self, engine: AsyncEngine, row: int) -> None:
        """Read an answer token by token."""
        read = 0
        async for output in engine.generate([3 + row % 7, 4, 5, 6], PARAMS):
            before, read = read, len(output.token_ids)
            self._got += read - before
            ends = self._runner.ends
            while len(self.told) < len(ends) and self._got >= ends[len(self.told)][0]:
                self.told.append(time.perf_counter() - ends[len(self.told)][1])
            if len(self.told) >= WARM_UP_STEPS and self._got >= WARM_UP_STEPS * self._rows:
                self.decoding.set()

    async def whole(self, engine: AsyncEngine) -> None:
        """Read all answers at their ends."""
        prompts = [[3 + row % 7, 4, 5, 6] for row in range(self._rows)]
        async for _ in engine.generate_batch(prompts, PARAMS, progress=False):
            pass


PARAMS = SamplingParams(max_tokens=CONTEXT - 16, temperature=0, ignore_eos=True)


def parts_of(tokenizer: Path, rows: int, step_s: float) -> tuple[Parts, ClockRunner]:
    """Return an engine of so many rows on a clock."""
    pages, budget = rows * (CONTEXT // 16), rows * 8 + 1
    opened = opened_of(welcome(tokenizer))
    planner = Planner(
        max_rows=rows, num_pages=pages, token_budget=budget, prefill_chunk=budget, context=CONTEXT, prefix_cache=False
    )
    runner: Any = ClockRunner(step_s, rows, budget, pages)
    resolved = replace(opened.resolved, device="cuda:0")  # whose steps need no interpreter
    parts = Parts(
        resolved=resolved, model=opened.model, text=opened.text, planner=planner, runner=runner, own=runner, notes=()
    )
    return parts, runner


async def measure(tokenizer: Path, rows: int, step_s: float, *, streamed: bool) -> dict[str, float]:
    """Return a window's medians, in microseconds."""
    parts, runner = parts_of(tokenizer, rows, step_s)
    overlap.assemble.assemble = lambda asked, stages=None: parts  # noqa: ARG005
    async with AsyncEngine("clock") as engine:
        readers = Readers(rows, runner)
        reads = [readers.stream(engine, row) for row in range(rows)] if streamed else [readers.whole(engine)]
        tasks = [asyncio.create_task(read) for read in reads]
        if streamed:
            await readers.decoding.wait()
        else:
            while engine.statistics().steps < WARM_UP_STEPS:  # noqa: ASYNC110  # nobody sets an event
                await asyncio.sleep(0.01)
        with tempfile.TemporaryDirectory() as folder:
            async with engine.trace(f"{folder}/trace.json") as trace:
                skipped = len(readers.told)
                before, began = engine.statistics(), time.perf_counter()
                await asyncio.sleep(WINDOW_S)
                after, seconds = engine.statistics(), time.perf_counter() - began
                told = readers.told[skipped:]
            record = trace.record()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    figures = {
        verb: 1e6 * statistics.median(s.end - s.start for s in record.host if s.verb == verb)
        for verb in VERBS
        if verb != "land" and any(s.verb == verb for s in record.host)
    }
    figures["sum"] = sum(figures.values())
    figures["step"] = 1e6 * seconds / (after.steps - before.steps)
    figures["bubble"] = max(0.0, 1.0 - (after.busy_s - before.busy_s) / seconds)
    if told:
        figures["told"] = 1e6 * statistics.median(told)
    return figures


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 64, 256])
    parser.add_argument("--step-ms", type=float, default=2.0, help="of the device")
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    rounds: dict[tuple[int, bool], list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = Path(folder) / "tokenizer.json"
        write_tokenizer(tokenizer)
        for _ in range(asked.rounds):  # in turns, so that a noisy moment is no one's alone
            for rows in asked.rows:
                for streamed in (False, True):
                    figures = asyncio.run(measure(tokenizer, rows, asked.step_ms / 1e3, streamed=streamed))
                    rounds.setdefault((rows, streamed), []).append(figures)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    for (rows, streamed), each in rounds.items():
        sums = [one["sum"] for one in each]
        line = {
            "bench": "beside_readers", "rows": rows, "read": "streamed" if streamed else "whole",
            "step_ms": asked.step_ms,
            **{name: round(statistics.median(o[name] for o in each if name in o), 3) for name in each[0]},
            "sums": [round(min(sums), 1), round(max(sums), 1)], "cpu": platform.processor() or platform.machine(),
            "python": platform.python_version(), "commit": commit.stdout.strip(),
        }  # fmt: skip
        print(json.dumps(line))


if __name__ == "__main__":
    main()
