"""Which kernel is the faster for attention of decode rows, and how far is it from reading KV once?

    python bench/attention.py [--shape smollm2-135m llama-8b] [--rows 1 4 16] [--context 256 1024] [--width 1 5]

The kernels run over layer after layer of one KV memory, as in a step, recorded as one CUDA graph; the figure is the
time of one call. "xqa" is FlashInfer's, "own" is `ops.decode_triton` as the engine cuts it, "own_..." with other cuts.
With a width over 1 a row verifies drafts: XQA then gets each position as a row of its own and reads a row's KV as many
times. "floor" is the time to read keys and values once at the bandwidth of a large copy in the same run. One JSON
object a line. Doubt it for this: nothing else runs, while in a step each call follows a matrix product.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from overlap.cache.pages import PAGE
from overlap.graphs.capture import Recorder
from overlap.ops.attention import AttentionRows
from overlap.ops.attention_flashinfer import FlashInferAttention
from overlap.ops.decode_triton import Cut, DecodeKernel

SHAPES = {"smollm2-135m": (9, 3, 64), "qwen3-0.6b": (16, 8, 128), "llama-8b": (32, 8, 128)}
LAYERS = 8
CUTS = {
    "own": Cut(), "own_264": Cut(264), "own_1056": Cut(1056), "own_128": Cut(block_n=128, stages=2),
    "own_32": Cut(block_n=32, stages=4),
}  # fmt: skip
LOOPS = 4
"""Calls over all layers in one graph."""


def seconds(run: Any, rounds: int) -> float:
    """Return the median time of a launch."""
    took = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        took.append(float(start.elapsed_time(end)) / 1e3)
    return statistics.median(took)


def one_call(attend: Callable[[int, torch.Tensor, torch.Tensor], object], q: torch.Tensor) -> float:
    """Return the seconds of a call, as one of many in a graph."""
    out, recorder = torch.empty_like(q), Recorder(q.device)
    with recorder.recording():
        recorder.begin()
        for layer in [*range(LAYERS)] * LOOPS:
            attend(layer, q, out)
        graph = recorder.end()
    graph.launch()
    took = seconds(graph.launch, 15) / (LAYERS * LOOPS)
    graph.close()
    return took


def bandwidth() -> float:
    """Return bytes a second of a large copy, read and written."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds(lambda: target.copy_(source), 7)


def measure(shape: str, num_rows: int, context: int, width: int, copy_rate: float) -> dict[str, Any]:
    """Return the line of one case."""
    heads, kv_heads, head_dim = SHAPES[shape]
    pages = -(-context // PAGE)
    kv = torch.randn(num_rows * pages, LAYERS, 2, PAGE, kv_heads, head_dim, device="cuda").bfloat16()
    table = torch.randperm(num_rows * pages, device="cuda").int().view(num_rows, pages)
    lengths = torch.full((num_rows,), context, dtype=torch.int32, device="cuda")
    q = torch.randn(num_rows * width, heads, head_dim, device="cuda").bfloat16()
    rows = AttentionRows(
        num_decode=num_rows, width=width, seq_lens=lengths, page_table=table,
        starts=np.full(num_rows, context - width, np.int32), counts=np.full(num_rows, width, np.int32),
        chunk_pages=np.empty(0, np.int32),
    )  # fmt: skip
    took: dict[str, float] = {}
    answers = {}
    xqa = FlashInferAttention(kv, heads, pages, width=width, many_pairs=2**31, max_rows=0)
    xqa.plan(rows)
    answers["xqa"] = xqa.attend(0, q).float()
    took["xqa"] = one_call(xqa.attend, q)
    for name, cut in CUTS.items():
        own = DecodeKernel(kv, heads, num_rows, width, cut)

        def attend(layer: int, q: torch.Tensor, out: torch.Tensor, own: DecodeKernel = own) -> None:
            own.attend(layer, q, table, lengths, out, width)

        out = torch.empty_like(q)
        attend(0, q, out)
        answers[name] = out.float().view(answers["xqa"].shape)
        took[name] = one_call(attend, q)
    best = min((each for name, each in took.items() if name != "xqa"))
    floor = 2 * num_rows * context * kv_heads * head_dim * 2 / copy_rate
    return {
        "bench": "attention", "shape": shape, "rows": num_rows, "context": context, "width": width,
        **{f"{name}_us": round(1e6 * each, 2) for name, each in took.items()},
        "floor_us": round(1e6 * floor, 2), "ratio": round(took["xqa"] / best, 3),
        "difference": round(max(float((each - answers["xqa"]).abs().max()) for each in answers.values()), 4),
        "device": torch.cuda.get_device_name(),
    }  # fmt: skip


def main() -> None:
    """Read the command line, measure, print."""
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("--shape", nargs="+", choices=SHAPES, default=list(SHAPES))
    arguments.add_argument("--rows", type=int, nargs="+", default=[1, 4, 8, 16, 32, 64, 256])
    arguments.add_argument("--context", type=int, nargs="+", default=[256, 1024])
    arguments.add_argument("--width", type=int, nargs="+", default=[1, 5])
    asked = arguments.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("This compares kernels on a CUDA device, and there is none.")
    with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
        rate = bandwidth()
        for shape in asked.shape:
            for width in asked.width:
                for num_rows in asked.rows:
                    for context in asked.context:
                        print(json.dumps(measure(shape, num_rows, context, width, rate)), flush=True)


if __name__ == "__main__":
    main()
