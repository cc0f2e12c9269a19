"""What does launching one step cost the host, and where?

    python bench/launch.py [--model smollm2-135m-instruct] [--rows 1] [--eager]
    python bench/launch.py --prompt 4096      a step that reads a prompt, also beside a thread that computes in Python

Runs steps with no overlap and times `Runner.launch` alone (the enqueueing), then profiles 50 decode steps. What it
means: a step cannot be faster than this, however fast the device is. With `--eager` every kernel is launched by itself;
without it a decode step on CUDA is one graph, captured before the clock starts (and how long that took is shown), and a
prompt runs in pieces. The last line is JSON.

`beside_us` (with `--prompt`) is the same launch while another thread of the program computes in Python, and gives up
the interpreter every 200 us: what is more is waiting for it, once for each call on the way that gives it up.
`beside_wanted_us`: it gives it up every few microseconds, as readers do while such a step is launched.
`beside_kept_us`: and all calls of FlashInfer's keep it.

Reasons to doubt it: one thread that never rests is more than most programs' readers.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import gc
import json
import pstats
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from overlap.assemble import Parts, assemble
from overlap.config import EngineConfig
from overlap.schedule.request import Request
from overlap.turns import Rest, Turns


@contextmanager
def computing() -> Iterator[Rest]:
    """Let another thread compute as readers do, some microseconds for each Output; yield what it looks at."""
    done, rest = threading.Event(), Rest()

    def compute() -> None:
        turns, number = Turns(rest), 0
        while not done.is_set():
            for each in range(150):
                number += each
            turns.take()

    thread = threading.Thread(target=compute)
    thread.start()
    try:
        yield rest
    finally:
        done.set()
        thread.join()


@contextmanager
def keeping_the_lock() -> Iterator[int]:
    """Let FlashInfer's compiled functions keep the interpreter's lock; yield how many there are."""
    every = [each for each in gc.get_objects() if type(each).__name__ == "Function" and hasattr(each, "release_gil")]
    found = [each for each in every if each.release_gil]
    for each in found:
        each.release_gil = False
    try:
        yield len(found)
    finally:
        for each in found:
            each.release_gil = True


async def prompts(parts: Parts, length: int, times: int) -> float:
    """Return the median microseconds of launching a step that reads a prompt of `length` tokens."""
    launches = []
    for number in range(times):
        prompt = np.random.default_rng(number).integers(3, 999, length, dtype=np.int32)
        parts.planner.submit(Request(key=number, front=0, prompt=prompt, limit=1))
        plan = parts.planner.plan()
        assert plan is not None
        assert plan.num_tokens == length, "the prompt is longer than a step"
        start = time.perf_counter()
        flight = parts.runner.launch(plan)
        launches.append(time.perf_counter() - start)
        parts.planner.settle(plan, await flight.wait_landed())
    return round(1e6 * statistics.median(launches), 1)


async def measure_prompts(model: str, length: int, *, graphs: bool) -> dict[str, object]:
    """Launch steps that read a prompt, alone and beside a thread that computes."""
    options = {"token_budget": length + 64, "prefill_chunk": length, "prefix_cache": False, "max_rows": 32}
    parts = assemble(EngineConfig(model=model, kv_cache=65536, graphs=graphs, lanes="mixed", **options))  # type: ignore[arg-type]
    runner = parts.runner
    while runner.warm_up_one():
        pass
    await prompts(parts, length, 10)
    alone = await prompts(parts, length, 40)
    with computing() as rest:
        beside = await prompts(parts, length, 40)
        rest.wanted = True  # as the loop says while it launches such a step
        wanted = await prompts(parts, length, 40)
        with keeping_the_lock() as functions:
            kept = await prompts(parts, length, 40)
    runner.close()
    return {
        "bench": "launch", "model": model, "prompt": length, "launch_us": alone, "beside_us": beside,
        "beside_wanted_us": wanted,
        **({"beside_kept_us": kept, "functions": functions} if functions else {}), "graphs": graphs,
        "device": torch.cuda.get_device_name() if parts.resolved.device != "cpu" else "cpu",
    }  # fmt: skip


async def measure(model: str, rows: int, *, graphs: bool) -> dict[str, object]:
    """Launch decode steps and time them."""
    parts = assemble(EngineConfig(model=model, kv_cache=65536, graphs=graphs))
    planner, runner = parts.planner, parts.runner
    while runner.warm_up_one():
        pass
    for key in range(rows):
        prompt = np.arange(100, 132, dtype=np.int32)
        planner.submit(Request(key=key, front=0, prompt=prompt, limit=400))
    launches, steps = [], []
    profile = cProfile.Profile()
    for number in range(150):
        plan = planner.plan()
        assert plan is not None
        start = time.perf_counter()
        if number >= 100:
            profile.enable()
        flight = runner.launch(plan)
        profile.disable()
        launched = time.perf_counter()
        tokens = await flight.wait_landed()
        steps.append(time.perf_counter() - start)
        launches.append(launched - start)
        planner.settle(plan, tokens)
    pstats.Stats(profile).sort_stats("tottime").print_stats(18)
    device, graphed = parts.resolved.device, runner.statistics()
    print("\n".join(runner.explain()))
    runner.close()
    return {
        "bench": "launch",
        "model": model,
        "rows": rows,
        "launch_us": round(1e6 * statistics.median(launches[20:100]), 1),
        "step_us": round(1e6 * statistics.median(steps[20:100]), 1),
        "graphs": graphs,
        "replays": graphed.full_replays,
        "captures": graphed.captures,
        "capture_s": round(graphed.capture_seconds, 2),
        "pool_mib": round(graphed.pool_bytes / 2**20, 1),
        "device": torch.cuda.get_device_name() if device != "cpu" else "cpu",
    }


def main() -> None:
    """Read the command line, measure, print."""
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("--model", default="smollm2-135m-instruct")
    arguments.add_argument("--rows", type=int, default=1)
    arguments.add_argument("--eager", action="store_true")
    arguments.add_argument("--prompt", type=int, help="read prompts of so many tokens in place of decoding")
    asked = arguments.parse_args()
    if asked.prompt:
        print(json.dumps(asyncio.run(measure_prompts(asked.model, asked.prompt, graphs=not asked.eager))))
        return
    print(json.dumps(asyncio.run(measure(asked.model, asked.rows, graphs=not asked.eager))))


if __name__ == "__main__":
    main()
