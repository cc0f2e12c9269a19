"""What does deciding a step cost on the host: microseconds of plan, pack and settle, by the number of rows?

Every row decodes and nothing else happens: the steady state, in which a step should cost what changes and not what
stays. One step is planned ahead, as in the loop. A round's figure is the mean over its steps, so the steps in which
rows get a new page (one in 16 for each row, at different steps for different rows) are in it; what is shown is the
median of the rounds, each with a planner of its own. The limit it is set against: while plan + pack + settle and the
launch's own calls take less than a step takes on the device, the device never waits.

    python bench/host_step.py           (a few seconds; no device and no model; the last line is JSON)

Reasons to doubt it: it leaves out what `launch` calls on the device, the event loop, and the message to the reader;
nothing else wants the CPU or the GIL meanwhile, and one planner's columns stay in the cache, which in a running engine
they may not. All rows are greedy with one stop token. Shared machines vary by tens of percent: look at the spread.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import time

import numpy as np
from tqdm import tqdm

from overlap.cache.pages import Ints
from overlap.schedule.planner import Planner
from overlap.schedule.request import Request
from overlap.state.packing import capacity, pack

ROWS = (1, 16, 64, 256, 1024)
VERBS = ("plan", "pack", "settle")
CONTEXT = 1024
PROMPTS = range(8, 24)
"""Lengths of the prompts: sixteen in a row, so that a sixteenth of the rows needs a page at each step."""
WARM_UP = 20
STOP_ID = 10**6


def steady(num_rows: int) -> tuple[Planner, int]:
    """Return a planner whose rows all decode from the next plan on, and how many words hold one of its plans."""
    num_pages, budget = num_rows * CONTEXT // 16, num_rows * max(PROMPTS) + 1
    planner = Planner(
        max_rows=num_rows, num_pages=num_pages, token_budget=budget, prefill_chunk=budget, context=CONTEXT
    )
    for key in range(num_rows):
        prompt = np.arange(PROMPTS[key % len(PROMPTS)], dtype=np.int32)
        planner.submit(Request(key=key, front=0, prompt=prompt, limit=CONTEXT - 32, stop_ids=(STOP_ID,)))
    return planner, capacity(num_rows, budget, num_pages)


def measure(num_rows: int, steps: int) -> dict[str, float]:
    """Return the mean microseconds of each verb, and of all together, over one round."""
    planner, words = steady(num_rows)
    buffers = [np.zeros(words, dtype=np.int32) for _ in range(3)]
    flight = planner.plan()
    assert flight is not None
    clock, seed = time.perf_counter, np.random.default_rng(0)
    spent = np.zeros(len(VERBS))
    for step in range(WARM_UP + steps):
        start = clock()
        plan = planner.plan()
        planned = clock()
        assert plan is not None
        pack(plan, buffers[plan.number % 3])
        packed = clock()
        tokens: Ints = seed.integers(0, STOP_ID, len(flight.emits), dtype=np.int32)
        landed = clock()
        planner.settle(flight, tokens)
        settled = clock()
        flight = plan
        if step >= WARM_UP:
            spent += (planned - start, packed - planned, settled - landed)
    means = (spent * 1e6 / steps).tolist()
    return dict(zip(VERBS, means, strict=True)) | {"sum": sum(means)}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Microseconds of plan, pack and settle, by the number of rows.")
    parser.add_argument("--steps", type=int, default=800, help="steps of a round (1 to 900)")
    parser.add_argument("--rounds", type=int, default=9)
    asked = parser.parse_args()
    if not 1 <= asked.steps <= 900:
        parser.error(f"--steps is {asked.steps}; it must be from 1 to 900, as an answer is not longer")
    rounds: dict[int, list[dict[str, float]]] = {rows: [] for rows in ROWS}
    for _ in tqdm(range(asked.rounds), unit="round"):
        for rows in ROWS:  # in turns, so that a noisy moment is no one's alone
            rounds[rows].append(measure(rows, asked.steps))
    print(f"{'rows':>6}" + "".join(f"{name + ' us':>12}" for name in (*VERBS, "sum")) + "   the rounds' sums")
    table = {}
    for rows, each in rounds.items():
        medians = {name: statistics.median(one[name] for one in each) for name in (*VERBS, "sum")}
        sums = [one["sum"] for one in each]
        figures = "".join(f"{median:>12.1f}" for median in medians.values())
        print(f"{rows:>6}{figures}   {min(sums):.1f} to {max(sums):.1f}")
        table[rows] = {name: round(median, 1) for name, median in medians.items()} | {
            "spread": [round(min(sums), 1), round(max(sums), 1)]
        }
    result = {
        "bench": "host_step",
        "unit": "microseconds a step",
        "steps": asked.steps,
        "rounds": asked.rounds,
        "rows": table,
        "cpu": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
        ).stdout.strip(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
