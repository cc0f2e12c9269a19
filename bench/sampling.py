"""What does drawing tokens cost, and how near is it to reading the logits once?

    python bench/sampling.py [--rows 1 8 64 256] [--vocabulary 49152 128256] [--kind sampled truncated]

For each number of rows and vocabulary, times the torch code of `sampler` (its noise is a kernel of ours already) and
the kernels of `draw_triton`, each inside a CUDA graph of several draws, as a decode step has it: so launches on the
host do not count, and logits that fit into the L2 cache are found there, as they are behind the head that has just
written them. "sampled" rows have a temperature; "truncated" ones also top-k 50, top-p 0.9, both, or min-p 0.05, in
turn. The physical limit is one read of the logits at the bandwidth of a large copy.

One JSON line for each; the last line is JSON. `same` says whether both draw the same tokens.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from overlap.sample import draw_triton
from overlap.sample.philox import gumbel
from overlap.sample.sampler import scale, truncate
from overlap.state.rows import SlotRows

FILTERS = ((50, 1.0, 0.0), (0, 0.9, 0.0), (50, 0.9, 0.0), (0, 1.0, 0.05))
"""(top_k, top_p, min_p) of truncated rows, in turn."""
CALLS = 8
"""Draws in one graph."""


def state(num_rows: int, truncated: bool) -> SlotRows:
    """Return slots with a temperature of 0.8 and a seed each."""
    rows = SlotRows(num_rows, 1, "cpu")
    rows.temperature.fill_(0.8)
    for slot in range(num_rows + 1):
        k, p, least = FILTERS[slot % len(FILTERS)] if truncated else (0, 1.0, 0.0)
        rows.top_k[slot], rows.top_p[slot], rows.min_p[slot], rows.seed_lo[slot] = k, p, least, slot
    there = SlotRows(num_rows, 1, "cuda")
    for name in ("temperature", "top_k", "top_p", "min_p", "seed_lo"):
        getattr(there, name).copy_(getattr(rows, name))
    return there


def by_torch(logits_EV: Tensor, rows: SlotRows, slots: Tensor, positions: Tensor, truncated: bool) -> Tensor:
    """Draw as `sampler.sample_all` does without the kernels."""

    def of(column: Tensor) -> Tensor:
        return column.index_select(0, slots)

    greedy = logits_EV.argmax(dim=-1)
    scaled_EV = scale(logits_EV, of(rows.temperature))
    if truncated:
        scaled_EV = truncate(scaled_EV, of(rows.top_k), of(rows.top_p), of(rows.min_p))
    noisy_EV = gumbel(of(rows.seed_lo), of(rows.seed_hi), positions, scaled_EV.shape[1], scaled_EV)
    return torch.where(of(rows.temperature) > 0, noisy_EV.argmax(dim=-1), greedy)


def time_us(call: Callable[[], Tensor], budget_ms: float = 60.0) -> float:
    """Return the microseconds of one call inside a graph of `CALLS`: the least of some replays."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()
    begin: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    end: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    graph.replay()
    best, spent = float("inf"), 0.0
    while spent < budget_ms:
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        took = begin.elapsed_time(end)
        best, spent = min(best, took), spent + took
    return 1e3 * best / CALLS


def copy_bandwidth() -> float:
    """Return bytes a second read and written by a large copy."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    took = time_us(lambda: target.copy_(source))
    return 2 * source.nbytes / (took * 1e-6)


def measure(num_rows: int, vocabulary: int, kind: str, bandwidth: float) -> dict[str, Any]:
    """Return the JSON line of one case. The logits are smooth, with a spread like a language model's."""
    torch.manual_seed(0)
    truncated = kind == "truncated"
    logits_EV = torch.randn(num_rows, vocabulary, device="cuda") * 2.5
    rows = state(num_rows, truncated)
    slots = torch.arange(num_rows, dtype=torch.int32, device="cuda")

    def ours() -> Tensor:
        return draw_triton.draw(logits_EV, rows, slots, slots, truncated)

    def theirs() -> Tensor:
        return by_torch(logits_EV, rows, slots, slots, truncated)

    same = int((ours() == theirs()).sum())
    torch_us, ours_us = time_us(theirs), time_us(ours)
    floor_us = 1e6 * logits_EV.nbytes / bandwidth
    return {
        "kind": kind, "rows": num_rows, "vocabulary": vocabulary, "torch_us": round(torch_us, 1),
        "ours_us": round(ours_us, 1), "floor_us": round(floor_us, 2), "times": round(torch_us / ours_us, 2),
        "share_of_limit": round(floor_us / ours_us, 3), "same": f"{same} of {num_rows}",
    }  # fmt: skip


def main() -> None:
    """Read the command line, measure, print."""
    arguments = argparse.ArgumentParser(description="what does drawing tokens cost?")
    arguments.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64, 256])
    arguments.add_argument("--vocabulary", type=int, nargs="+", default=[49152, 128256])
    arguments.add_argument("--kind", choices=["sampled", "truncated"], nargs="+", default=["sampled", "truncated"])
    asked = arguments.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench/sampling.py times CUDA kernels, and there is no CUDA device here.")
    with torch.inference_mode():
        bandwidth = copy_bandwidth()
        lines = [
            measure(rows, vocabulary, kind, bandwidth)
            for kind in asked.kind
            for vocabulary in asked.vocabulary
            for rows in asked.rows
        ]
    for line in lines:
        print(json.dumps(line))
    print(
        json.dumps(
            {
                "bench": "sampling", "cases": len(lines), "least_times": min(line["times"] for line in lines),
                "bandwidth_gb_per_s": round(bandwidth / 1e9), "device": torch.cuda.get_device_name(),
                "torch": torch.__version__,
            }
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
