"""What does deciding a step cost on the host: microseconds of plan, launch and settle, by the number of rows?

Steady: every row decodes and nothing else happens, the state in which a step should cost what changes and not what
stays. Full: the same while another request waits for a slot, as under any load that is more than the slots can
hold. Churn: at each step one row in a hundred ends and a new request comes in its place. One step is planned ahead, as
in the loop, and the device is simulated: launching is packing the plan and queueing it. A round's figure is the mean
over its steps, so the steps in which rows get a new page (one in 16 for each row, at different steps for each) are in
it; what is shown is the median of the rounds, each with a planner of its own. The limit it is set against: while
plan + launch + settle take less than a step takes on the device, the device never waits.

    python bench/host_step.py               (half a minute; no device and no model; the last line is JSON)
    python bench/host_step.py --drafts 4    wide steps: each row's run has two refused drafts of four

Reasons to doubt it: it leaves out what launching calls on a real device, the event loop, and the message to the reader;
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
from collections import deque

import numpy as np
from tqdm import tqdm

from overlap.cache.pages import Ints
from overlap.schedule.plan import REFUSED, StepPlan
from overlap.schedule.planner import Planner
from overlap.schedule.request import Request
from overlap.state.packing import capacity, goes_over, pack, pack_again
from overlap.streams.sim import SimDevice

ROWS = (1, 16, 64, 256, 1024)
VERBS = ("plan", "launch", "settle")
CONTEXT = 1024
PROMPTS = range(8, 24)
"""Lengths of the prompts: sixteen in a row, so that a sixteenth of the rows needs a page at each step."""
STATES = {"steady": 0.0, "full": 0.0, "churn": 0.01}
"""Which share of the rows is replaced at each step."""
WARM_UP = 20
STOP_ID = 10**6


class Rig:
    """A planner whose rows all decode from the next plan on, and what launches its plans."""

    def __init__(self, num_rows: int, drafts: int, *, full: bool) -> None:
        # Who has ended keeps a slot until its last step has landed.
        max_rows = num_rows if full else num_rows + num_rows // 50 + 2
        num_pages, budget = max_rows * (CONTEXT // 16 + 1), max_rows * max(PROMPTS) + 1
        self.planner = Planner(
            max_rows=max_rows, num_pages=num_pages, token_budget=budget, prefill_chunk=budget, context=CONTEXT,
            drafts=drafts, drafts_ahead=max(0, drafts - 1),
        )  # fmt: skip
        self.running: deque[int] = deque()
        self._next_key = 0
        self._stream = SimDevice(0.0).stream("compute")
        self._buffers = [np.zeros(capacity(max_rows, budget, num_pages), dtype=np.int32) for _ in range(3)]
        self._plans: list[StepPlan | None] = [None] * 3
        for _ in range(num_rows + full):
            self.submit()

    def submit(self) -> None:
        """Send a request that goes on for longer than the measurement."""
        key, self._next_key = self._next_key, self._next_key + 1
        prompt = np.arange(key, key + PROMPTS[key % len(PROMPTS)], dtype=np.int32)
        self.planner.submit(Request(key=key, front=0, prompt=prompt, limit=CONTEXT - 32, stop_ids=(STOP_ID,)))
        self.running.append(key)

    def replace_one(self) -> None:
        """End the oldest request, and send a new one."""
        self.planner.end(self.running.popleft())
        self.submit()

    def launch(self, plan: StepPlan) -> None:
        """Pack a plan and queue it."""
        out, before = self._buffers[plan.number % 3], self._plans[plan.number % 3]
        if goes_over(plan, before):  # as the runner does
            pack_again(plan, out)
        else:
            pack(plan, out)
        self._plans[plan.number % 3] = plan
        self._stream.launch("step", int, tokens=plan.num_tokens)
        self._stream.mark()
        self._stream.spans.clear()


def measure(num_rows: int, steps: int, state: str, drafts: int) -> dict[str, float]:
    """Return the mean microseconds of each verb, and of all together, over one round."""
    rig, churn = Rig(num_rows, drafts, full=state == "full"), STATES[state]
    planner, flight = rig.planner, rig.planner.plan()
    assert flight is not None
    clock, seed = time.perf_counter, np.random.default_rng(0)
    spent, owed = np.zeros(len(VERBS)), 0.0
    for step in range(WARM_UP + steps):
        owed += churn * num_rows
        while owed >= 1:
            owed -= 1
            rig.replace_one()
        start = clock()
        plan = planner.plan()
        planned = clock()
        assert plan is not None
        rig.launch(plan)
        launched = clock()
        tokens: Ints = seed.integers(0, STOP_ID, flight.num_landing, dtype=np.int32)
        if flight.width > 1:
            runs = tokens[: flight.num_decode * flight.width].reshape(-1, flight.width)
            runs[:, 1 + (flight.width - 1) // 2 :] = REFUSED
        landed = clock()
        planner.settle(flight, tokens)
        settled = clock()
        flight = plan
        if step >= WARM_UP:
            spent += (planned - start, launched - planned, settled - landed)
    means = (spent * 1e6 / steps).tolist()
    return dict(zip(VERBS, means, strict=True)) | {"sum": sum(means)}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Microseconds of plan, pack and settle, by the number of rows.")
    parser.add_argument("--steps", type=int, help="steps of a round (default: 800, or as many as answers last)")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--drafts", type=int, default=0, help="drafts that each row verifies in each step")
    asked = parser.parse_args()
    most = min(900, (CONTEXT - 64) // (1 + asked.drafts // 2) - WARM_UP)  # a row gets half of its drafts and one
    asked.steps = min(800, most) if asked.steps is None else asked.steps
    if not 1 <= asked.steps <= most:
        parser.error(f"--steps is {asked.steps}; it must be from 1 to {most}, as an answer is not longer")
    rounds: dict[tuple[str, int], list[dict[str, float]]] = {}
    for _ in tqdm(range(asked.rounds), unit="round"):
        for state in STATES:
            for rows in ROWS:  # in turns, so that a noisy moment is no one's alone
                rounds.setdefault((state, rows), []).append(measure(rows, asked.steps, state, asked.drafts))
    table: dict[str, dict[int, dict[str, object]]] = {state: {} for state in STATES}
    for state in STATES:
        print(f"{state:>8}" + "".join(f"{name + ' us':>12}" for name in (*VERBS, "sum")) + "   the rounds' sums")
        for rows in ROWS:
            each = rounds[state, rows]
            medians = {name: statistics.median(one[name] for one in each) for name in (*VERBS, "sum")}
            sums = [one["sum"] for one in each]
            figures = "".join(f"{median:>12.1f}" for median in medians.values())
            print(f"{rows:>8}{figures}   {min(sums):.1f} to {max(sums):.1f}")
            table[state][rows] = {name: round(median, 1) for name, median in medians.items()} | {
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
