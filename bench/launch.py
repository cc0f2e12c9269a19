"""What does launching one decode step cost the host, and where?

    python bench/launch.py [--model smollm2-135m-instruct] [--rows 1] [--eager]

Runs decode steps with no overlap and times `Runner.launch` alone (the enqueueing), then profiles 50 of them. What it
means: a step cannot be faster than this, however fast the device is. With `--eager` every kernel is launched by itself;
without it a decode step on CUDA is one graph, captured before the clock starts (and how long that took is shown). The
last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import json
import pstats
import statistics
import time

import numpy as np
import torch

from overlap.assemble import assemble
from overlap.config import EngineConfig
from overlap.schedule.request import Request


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
    arguments = argparse.ArgumentParser(description="host cost of launching a decode step")
    arguments.add_argument("--model", default="smollm2-135m-instruct")
    arguments.add_argument("--rows", type=int, default=1)
    arguments.add_argument("--eager", action="store_true")
    asked = arguments.parse_args()
    print(json.dumps(asyncio.run(measure(asked.model, asked.rows, graphs=not asked.eager))))


if __name__ == "__main__":
    main()
