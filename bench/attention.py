"""Which kernel is the faster for attention of decode rows, and how far is it from reading KV once?

    python bench/attention.py [--shape smollm2-135m llama-8b] [--rows 1 4 16] [--context 256 1024] [--width 1 5]
    python bench/attention.py --cuts --rows 8 --context 1024   and every cut that is worth trying, for `cut_of`

The kernels run over layer after layer of one KV memory, as in a step, recorded as one CUDA graph; the figure is the
time of one call. "own" is `ops.decode_triton`, "xqa" FlashInfer's kernel (with a width over 1, where a row verifies
drafts, as one row of so many positions). Both get page tables that are as wide as a step's: for `--longest` tokens.
"floor" is the time to read keys and values once at the bandwidth of a large copy in the same run. One JSON object a
line. Doubt it for this: nothing else runs, while in a step each call follows a matrix product.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from typing import Any

import torch
from flashinfer.xqa import xqa

from overlap.cache.pages import PAGE
from overlap.graphs.capture import Recorder
from overlap.ops.decode_triton import Cut, DecodeKernel

SHAPES = {"smollm2-135m": (9, 3, 64), "qwen3-0.6b": (16, 8, 128), "llama-8b": (32, 8, 128)}
LAYERS = 8
BLOCKS = ((32, 2), (64, 4), (128, 4), (128, 8))
"""(Keys at a time, warps) of the cuts that are tried."""
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


def cuts(every: bool, width: int) -> dict[str, Cut | None]:
    """Return what is tried, by name: how the engine cuts, and if asked for, other ways."""
    found: dict[str, Cut | None] = {"own": None}
    for keys, block_n in ((128, 64), (256, 64), (512, 64), (256, 32)) if every else ():
        for splits in (4, 8, 16):
            for warps in (2, 4):
                name = f"a program for {keys} keys, {splits} at most, {block_n}, {warps}"
                found[name] = Cut(1 << 31, block_n, warps, keys=keys, splits=splits)
    for programs in (132, 264, 528) if every else ():
        for block_n, warps in BLOCKS:
            for ahead in (True, False):
                for queries in (8, 16, 32) if width > 1 else (32,):
                    name = f"{programs}, {block_n}, {warps}, {'ahead' if ahead else 'plain'}, {queries}"
                    found[name] = Cut(programs, block_n, warps, ahead, queries)
    return found


def xqa_call(
    kv: torch.Tensor, table: torch.Tensor, lengths: torch.Tensor, width: int
) -> Callable[[int, torch.Tensor, torch.Tensor], object]:
    """Return a call of FlashInfer's kernel."""
    rows, (kv_heads, head_dim) = len(lengths), kv.shape[4:]
    scratch = torch.empty(128 << 20, dtype=torch.uint8, device="cuda")
    semaphores = torch.zeros(8 << 20, dtype=torch.uint8, device="cuda")
    sms = torch.cuda.get_device_properties("cuda").multi_processor_count
    seen_J = (2 << torch.arange(width, dtype=torch.int32, device="cuda")) - 1
    mask = seen_J[None, :].expand(rows, -1).contiguous().view(torch.uint16).view(rows, width, 2) if width > 1 else None
    several = (rows, 1, width) if width > 1 else (rows, 1)

    def attend(layer: int, q: torch.Tensor, out: torch.Tensor) -> None:
        shape = (*several, -1, head_dim)
        xqa(
            q.view(shape), kv[:, layer, 0], kv[:, layer, 1], table, lengths.view(-1, 1), out.view(shape), scratch,
            semaphores, kv_heads, PAGE, sm_count=sms, q_seq_len=width, mask=mask,
        )  # fmt: skip

    return attend


def own_call(
    kernel: DecodeKernel, table: torch.Tensor, lengths: torch.Tensor, width: int
) -> Callable[[int, torch.Tensor, torch.Tensor], object]:
    """Return a call of ours."""
    return lambda layer, q, out: kernel.attend(layer, q, table, lengths, out, width)


def measure(
    shape: str, num_rows: int, context: int, width: int, longest: int, rate: float, *, uneven: str | None, every: bool
) -> dict[str, Any]:
    """Return the line of one case."""
    heads, kv_heads, head_dim = SHAPES[shape]
    each = torch.linspace(0.125, 1.875, num_rows) if uneven and num_rows > 1 else torch.ones(num_rows)
    if uneven == "falling":
        each = each.flip(0)
    elif uneven == "shuffled":
        each = each[torch.randperm(num_rows, generator=torch.Generator().manual_seed(0))]
    lengths = (each * context).int().cuda()
    pages = -(-int(lengths.max()) // PAGE)
    kv = torch.randn(num_rows * pages, LAYERS, 2, PAGE, kv_heads, head_dim, device="cuda", dtype=torch.bfloat16)
    table = torch.zeros(num_rows, max(pages, longest // PAGE), dtype=torch.int32, device="cuda")
    table[:, :pages] = torch.randperm(num_rows * pages, device="cuda").int().view(num_rows, pages)
    q = torch.randn(num_rows * width, heads, head_dim, device="cuda").bfloat16()
    calls = {"xqa": xqa_call(kv, table, lengths, width)}
    for name, cut in cuts(every, width).items():
        calls[name] = own_call(DecodeKernel(kv, heads, num_rows, width, cut), table, lengths, width)
    took: dict[str, float] = {}
    answers: dict[str, torch.Tensor] = {}
    for name, call in calls.items():
        answers[name] = torch.empty_like(q)
        call(0, q, answers[name])
        took[name] = one_call(call, q)
    floor = 2 * int(lengths.sum()) * kv_heads * head_dim * 2 / rate
    others = sorted((round(1e6 * each, 2), name) for name, each in took.items() if name not in ("own", "xqa"))
    differences = [float((each - answers["xqa"]).abs().max()) for each in answers.values()]
    return {
        "bench": "attention", "shape": shape, "rows": num_rows, "context": context, "width": width,
        "uneven": uneven, "longest": longest,
        "xqa_us": round(1e6 * took["xqa"], 2), "own_us": round(1e6 * took["own"], 2),
        "floor_us": round(1e6 * floor, 2), "ratio": round(took["xqa"] / took["own"], 3), "cuts": others[:8],
        "difference": round(max(differences), 4), "device": torch.cuda.get_device_name(),
    }  # fmt: skip


def main() -> None:
    """Read the command line, measure, print."""
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("--shape", nargs="+", choices=SHAPES, default=list(SHAPES))
    arguments.add_argument("--rows", type=int, nargs="+", default=[1, 4, 8, 16, 32, 64, 256])
    arguments.add_argument("--context", type=int, nargs="+", default=[256, 1024])
    arguments.add_argument("--width", type=int, nargs="+", default=[1, 5])
    arguments.add_argument("--longest", type=int, default=8192, help="the context that page tables have room for")
    arguments.add_argument(
        "--uneven", choices=("rising", "falling", "shuffled"), nargs="?", const="rising",
        help="rows of 1/8 to 15/8 of the context, in this order",
    )  # fmt: skip
    arguments.add_argument("--cuts", action="store_true", help="try other cuts, too")
    asked = arguments.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("This compares kernels on a CUDA device, and there is none.")
    with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
        rate = bandwidth()
        for shape in asked.shape:
            for width in asked.width:
                for num_rows in asked.rows:
                    for context in asked.context:
                        line = measure(
                            shape, num_rows, context, width, asked.longest, rate, uneven=asked.uneven, every=asked.cuts
                        )
                        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
