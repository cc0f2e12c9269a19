"""Does the device ever wait in steady decode, and what does a step cost on the host and on the device?

    python bench/steady.py                                        SmolLM2's shape, 1, 8, 64 and 256 rows
    python bench/steady.py --shape llama-8b --rows 1 8 --kernels  and which kernels a step's time goes to
    python bench/steady.py --model smollm2-135m-instruct --speculative eagle --rows 1 8   steps that verify and draft

Random weights, unless a model is named. Steps with a drafter are all wide ones here (`num_drafts` is fixed). As many
rows as asked for decode at once; windows with and without a trace take turns. A JSON line for each number of rows:

    step_ms        time between two steps, of the windows without a trace
    bubble         the share of the time in which the device had nothing queued, measured on the device (target: under
                   1% from 8 rows up, under 3% at one)
    host_us        plan, launch, tell and settle of a step, medians of the windows with a trace (target: 150 together)
    trace_costs    how much longer a step takes while a trace is on (target: 2%)
    kernels        with --kernels: what the device ran in a step, the dearest first: [µs that it adds to a step, µs that
                   it takes, times a step, name]; a kernel that starts early waits in what it takes

and lines of how long after the device's end the loop hears of it ("awaiting"), with steps of 0.3, 1 and 3 ms, each a
kernel that does nothing else:

    p50_us         from the end by the device's clock, set to the host's when the stream was made, until the loop goes
                   on; launching is not in it. The next step is queued meanwhile, as the engine has it
    launched_us    the median where each step is launched on an idle device (target: 100): from before its launch until
                   the loop goes on, less what the device says it took. So launching is in it, and the clocks are not
    cpu_us         what the process spent a step, all of its threads, launching and the loop too, while p50_us was taken

The first line of a length is of the engine's way, a thread that waits and wakes the loop, and knows from the steps
before how long one takes; the second, for comparison, of a loop whose own thread sleeps in the driver, and hears
nothing else meanwhile. Doubt it for this: a shared machine's host varies from run to run; the two clocks agree to some
µs; steps of a model differ by more than these; and the profiler behind --kernels slows small kernels down by a part of
a microsecond.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from overlap import AsyncEngine, SamplingParams
from overlap.observe.record import VERBS, Record
from overlap.observe.trace import Tracing
from overlap.streams.stream import Busy, Mark

sys.path.insert(0, str(Path(__file__).parent))
from offline import SHAPES, settled  # type: ignore[import-not-found]

WINDOW_S = 0.4


async def keep_busy(
    engine: AsyncEngine, rows: int, tokens: int, vocabulary: int, *, again: bool = False
) -> list[asyncio.Task[None]]:
    """Start `rows` answers and return once all of them decode; with `again` each that ends begins anew."""
    decoding = asyncio.Event()
    missing = rows

    async def answer(row: int) -> None:
        nonlocal missing
        prompt = [(row * 7919 + at * 31) % (vocabulary - 3) + 3 for at in range(64)]
        first = True
        while first or again:
            async for _ in engine.generate(prompt, SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)):
                if first:
                    first, missing = False, missing - 1
                    if not missing:
                        decoding.set()

    tasks = [asyncio.create_task(answer(row)) for row in range(rows)]
    await decoding.wait()
    return tasks


async def window(engine: AsyncEngine, rows: int) -> dict[str, float]:
    """Return what a window's steps of so many rows took: seconds between two, the bubble's share, tokens a second."""
    before, began = engine.statistics(), time.perf_counter()
    await asyncio.sleep(WINDOW_S)
    after, seconds = engine.statistics(), time.perf_counter() - began
    bubble, busy = after.bubble_s - before.bubble_s, after.busy_s - before.busy_s
    steps = max(1, after.steps - before.steps)
    return {
        "step_s": seconds / steps,
        "bubble": bubble / max(1e-9, bubble + busy),
        "tokens_per_s": (rows * steps + after.accepted_tokens - before.accepted_tokens) / seconds,
    }


def host_us(record: Record) -> dict[str, float]:
    """Return the median time of each verb but waiting, in µs."""
    return {
        verb: round(1e6 * statistics.median(span.end - span.start for span in record.host if span.verb == verb), 1)
        for verb in VERBS
        if verb != "land"
    }


async def kernels(engine: AsyncEngine) -> list[tuple[float, float, float, str]]:
    """Return (µs a step that it adds, µs a step that it takes, times a step, name) of what ran, the dearest first.

    A kernel that starts early takes the time in which it waits for the one before, too. What it adds is from the end of
    the one before until its own: this adds up to the step.
    """
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        before = engine.statistics().steps
        await asyncio.sleep(WINDOW_S / 4)
        steps = engine.statistics().steps - before
    events = sorted(
        (event for event in profile.events() or () if event.device_type.name == "CUDA"),
        key=lambda event: event.time_range.end,
    )
    added: Counter[str] = Counter()
    spent: Counter[str] = Counter()
    times: Counter[str] = Counter()
    last = events[0].time_range.start if events else 0.0
    for event in events:
        name = event.name[:60]
        added[name] += event.time_range.end - last
        spent[name] += event.device_time
        times[name] += 1
        last = event.time_range.end
    return [
        (round(us / steps, 1), round(spent[name] / steps, 1), round(times[name] / steps, 1), name)
        for name, us in added.most_common(24)
    ]


async def measure(asked: argparse.Namespace, model: str) -> None:
    """Open an engine and print a line for each number of rows."""
    options: dict[str, Any] = {"max_rows": max(asked.rows)}
    options |= {} if asked.model else {"context": 64 + asked.tokens + 16}
    options |= {} if asked.model else {"load_format": "dummy"}
    options |= {"speculative": asked.speculative, "num_drafts": asked.num_drafts} if asked.speculative else {}
    async with AsyncEngine(model, device=asked.device, **options) as engine:
        vocabulary = engine._opened.model.vocab_size  # type: ignore[union-attr]
        for rows in asked.rows:
            for task in await keep_busy(engine, rows, 40, vocabulary):
                await task
            await settled(engine)
            tokens = min(asked.tokens, engine.config.context - 80)
            tasks = await keep_busy(engine, rows, tokens, vocabulary, again=True)
            await asyncio.sleep(WINDOW_S / 4)
            found = await kernels(engine) if asked.kernels and torch.cuda.is_available() else []
            plain, traced, records = [], [], []
            for number in range(asked.rounds):  # answers grow, so steps do: the two take turns in being first
                plain += [await window(engine, rows)] if number % 2 == 0 else []
                with tempfile.TemporaryDirectory() as folder:
                    tracing: Tracing = engine.trace(f"{folder}/trace.json")
                    async with tracing as trace:
                        traced.append(await window(engine, rows))
                    records.append(trace.record())
                plain += [await window(engine, rows)] if number % 2 else []
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            step_s = statistics.median(one["step_s"] for one in plain)
            drafting = {"speculative": asked.speculative, "drafts": asked.num_drafts} if asked.speculative else {}
            rate = statistics.median(one["tokens_per_s"] for one in plain)
            line = {
                "bench": "steady", "shape": asked.model or asked.shape, **drafting, "rows": rows,
                "step_ms": round(1e3 * step_s, 4), "tokens_per_s": round(rate, 1),
                "bubble": [round(one["bubble"], 5) for one in plain], "host_us": host_us(records[-1]),
                "trace_costs": round(statistics.median(one["step_s"] for one in traced) / step_s - 1, 4),
                "device": name_of(asked.device), "torch": torch.__version__, "kernels": found,
            }  # fmt: skip
            print(json.dumps(line), flush=True)


async def awaiting(times: int, step_s: float, *, asleep: bool) -> None:
    """Print how long after a step's end a waiter is back; `asleep` in the driver, on the loop's own thread."""
    from overlap.streams.cuda import CudaStream

    stream = CudaStream(torch.device("cuda:0"))
    spin = int(step_s * torch.cuda.clock_rate() * 1e6)

    def launch() -> Mark:
        stream.launch("spin", lambda: torch.cuda._sleep(spin))  # type: ignore[no-untyped-call]
        return stream.mark()

    async def land(mark: Mark) -> tuple[Busy, float]:
        if asleep:
            mark.end.synchronize()  # type: ignore[attr-defined]  # a _CudaMark
        await stream.wait_reached(mark)
        ended = time.perf_counter()
        return stream.busy(mark), ended

    launched, late = [], []
    for _ in range(times):
        began = time.perf_counter()
        busy, ended = await land(launch())
        launched.append(1e6 * (ended - began - (busy.end - busy.start)))
        await asyncio.sleep(0.001)
    flight, cpu_s = launch(), time.process_time()
    for _ in range(times):
        following = launch()
        busy, ended = await land(flight)
        late.append(1e6 * (ended - busy.end))
        flight = following
    cpu_s = time.process_time() - cpu_s
    await land(flight)
    stream.close()
    inside = sorted(late)
    line = {
        "bench": "steady", "figure": "awaiting" + ", asleep in the loop" * asleep,
        "step_ms": round(1e3 * (busy.end - busy.start), 4), "p50_us": round(statistics.median(late), 1),
        "p90_us": round(inside[int(0.9 * len(inside))], 1), "max_us": round(inside[-1], 1),
        "launched_us": round(statistics.median(launched[10:]), 1), "cpu_us": round(1e6 * cpu_s / times, 1),
        "times": times, "device": torch.cuda.get_device_name(),
    }  # fmt: skip
    print(json.dumps(line), flush=True)


def name_of(device: str) -> str:
    """Return the GPU's name, or "cpu"."""
    return "cpu" if device == "cpu" or not torch.cuda.is_available() else torch.cuda.get_device_name()


def main() -> None:
    """Read the command line, measure, print."""
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    arguments.add_argument("--model", help="a model in place of random weights of a shape")
    arguments.add_argument("--speculative", choices=("ngram", "eagle"))
    arguments.add_argument("--num-drafts", type=int, default=4)
    arguments.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64, 256])
    arguments.add_argument("--tokens", type=int, default=12000, help="of each answer: more than the windows need")
    arguments.add_argument("--rounds", type=int, default=4, help="an even number: windows with and without a trace")
    arguments.add_argument("--kernels", action="store_true")
    arguments.add_argument("--device", default="auto")
    asked = arguments.parse_args()
    import uvloop

    with tempfile.TemporaryDirectory() as folder:
        shape = {**SHAPES[asked.shape], "max_position_embeddings": max(8192, asked.tokens + 128)}
        (Path(folder) / "config.json").write_text(json.dumps(shape))
        asyncio.run(measure(asked, asked.model or folder))
    if asked.device != "cpu" and torch.cuda.is_available():
        for step_s in (3e-4, 1e-3, 3e-3):
            for asleep in (False, True):
                uvloop.run(awaiting(200, step_s, asleep=asleep))


if __name__ == "__main__":
    main()
