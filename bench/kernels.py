"""Which kernel should multiply some rows by a matrix, and how near is each to what the memory gives?

    python bench/kernels.py [--shape llama-8b] [--rows 1 8 2 4 16] [--seconds 80]
    python bench/kernels.py --shape smollm2-135m --rows 64 256 32 128

For each matrix of a shape, each number of rows, and each way in which the layer uses it (with the norm before it, the
rotation, the residual or SiLU after it), times the library's product *with the separate kernels it then needs*, and
every cut of our kernels that is worth trying, inside one CUDA graph. The graph runs over enough copies of the matrix
that none is found in the cache, and kernels follow each other as in a step, so early launches count. The physical limit
is the bytes of the weight over the bandwidth of a large copy.

One JSON line a question, then lines for `MEASURED` in src/overlap/ops/linear_choice.py; the last line is JSON. A cut
that fails or whose result differs from the library's is dropped, and said. Doubt single figures: the clock of a GPU
drifts by some percent, so the library's product (`None`) stays where ours is not 3% faster.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from overlap.cache.pages import PAGE
from overlap.ops import linear_triton, qkv_triton
from overlap.ops.activation import silu_mul
from overlap.ops.linear_choice import FEW_ROWS, Op, Tiles, guess
from overlap.ops.norm import add_rms_norm
from overlap.ops.rope import rope_and_write, rope_table

# (hidden, inner, query heads, key heads, head size, vocabulary)
SHAPES = {
    "smollm2-135m": (576, 1536, 9, 3, 64, 49152),
    "qwen3-0.6b": (1024, 3072, 16, 8, 128, 151936),
    "llama-8b": (4096, 14336, 32, 8, 128, 128256),
}
SMS = 132
"""Of an H100: a cut of so many programs keeps each busy once."""
BLOCKS = (
    (16, 128, 2, 4, 16), (32, 128, 4, 4, 16),
    (16, 128, 4, 4, 32), (32, 64, 4, 6, 32), (32, 128, 4, 4, 32), (128, 64, 4, 4, 32),
    (16, 64, 4, 6, 64), (32, 64, 4, 6, 64), (32, 128, 4, 4, 64), (64, 64, 4, 5, 64), (128, 64, 8, 4, 64),
    (32, 64, 8, 4, 128), (64, 64, 8, 4, 128), (128, 64, 8, 4, 128),
)  # fmt: skip
"""Cuts of "blocks": (block_o, block_i, warps, stages, block_t)."""
ROUND_BYTES = 160 << 20
"""Bytes of weights that a graph reads before it reads one again: more than any cache holds."""


@dataclass(frozen=True)
class Question:
    """A product as a layer asks for it."""

    name: str
    ops: tuple[Op, ...]
    """The ops that answer it, in the order in which the layer asks for them: the most fused first."""
    outputs: int
    inputs: int
    heads: tuple[int, int, int] | None = None
    """(query heads, key heads, head size) of a product whose result is rotated and written to the KV memory."""
    head_norm: bool = False
    """Whether each head is normed before it is rotated."""

    @property
    def gated(self) -> bool:
        """Whether gate and up are one matrix."""
        return "gated" in self.ops[0]

    @property
    def lines(self) -> int:
        """Rows of the weight."""
        return self.outputs * (1 + self.gated)


def questions(shape: str) -> list[Question]:
    """The five products of a model."""
    hidden, inner, heads, kv_heads, head_dim, vocabulary = SHAPES[shape]
    ops: tuple[Op, ...] = ("norm_rope", "rope", "norm", "plain")
    rotated = (heads, kv_heads, head_dim)
    return [
        Question("qkv", ops, (heads + 2 * kv_heads) * head_dim, hidden, rotated, head_norm="qwen3" in shape),
        Question("o", ("add",), hidden, heads * head_dim),
        Question("gate_up", ("norm_gated", "gated"), inner, hidden),
        Question("down", ("add",), hidden, inner),
        Question("head", ("plain",), vocabulary, hidden),
    ]


def candidates(op: Op, question: Question, rows: int) -> Iterator[Tiles]:
    """Yield the cuts that may be best, the guess first where there is one."""
    cuts = few_rows_candidates if rows <= FEW_ROWS else more_rows_candidates
    for tiles in cuts(op, question, rows):
        heads = question.heads if question.head_norm and "rope" in op else None
        if heads is None or tiles.owns_heads(heads[2]):
            yield tiles


def more_rows_candidates(op: Op, question: Question, rows: int) -> Iterator[Tiles]:
    """Of "blocks" the cuts whose number of programs comes nearest to the SMs; "split" where rows are not many."""

    def programs(cut: tuple[int, int, int, int, int]) -> int:
        return -(-question.lines // cut[0]) * -(-rows // cut[4])

    cuts = [cut for cut in BLOCKS if cut[4] <= max(64, rows)]
    if question.head_norm and "rope" in op:
        cuts = [cut for cut in cuts if cut[0] == 128]
    if "norm" in op:  # a thread's squares would take its registers
        cuts = [cut for cut in cuts if cut[4] * cut[1] // cut[2] <= 1024]
    for cut in sorted(cuts, key=lambda cut: abs(math.log2(programs(cut) / SMS)))[:8]:
        yield Tiles("blocks", *cut)
    if rows <= 64 and question.lines * question.inputs <= 1 << 23:
        width = 1024 if question.inputs <= 1024 else 2048
        yield Tiles("split", 16, width, 8, 1, 16)
        yield Tiles("split", 32, width, 8, 1, 16)
        if "norm" not in op:
            yield Tiles("split", 16, width, 8, 1, 32)


def few_rows_candidates(op: Op, question: Question, rows: int) -> Iterator[Tiles]:
    """Yield cuts for up to 16 rows, the guess first."""
    first = guess(op, question.outputs, question.inputs, rows)
    if first is not None:
        yield first
    large = question.lines * question.inputs > 1 << 23
    if rows <= 8:
        width = 1024 if question.inputs <= 1024 else 2048
        cuts = [(4, width), (8, width), (2, width)]
        if large:
            cuts += [(8, 1024), (4, 1024), (16, 1024), (8, 512)]
        for block_o, block_i in cuts:
            if block_o * rows <= 32 and (block_i <= 2 * question.inputs):
                yield Tiles("gemv", block_o, block_i, max(1, block_i // 256))
    if rows > 1:
        width = 1024 if question.inputs <= 1024 or large else 2048
        warps = (4, 8) if question.inputs <= 1024 else (8,)
        for block_o in (8, 16, 32):
            yield from (Tiles("split", block_o, width, count) for count in warps)
        if not large and question.inputs % 2048 > 1024:
            yield Tiles("split", 8, 4096, 16)
        if large:
            yield Tiles("split", 16, 512, 4)
            yield Tiles("split", 64, 512, 8)
    if question.head_norm and "rope" in op:
        yield Tiles("blocks", 128, 64, 4, 4, 16)
        yield Tiles("blocks", 128, 128, 8, 3, 16)
    if rows > 1 and op in ("plain", "add", "gated"):
        yield Tiles("dot", 16, 128 if question.inputs < 1024 else 256, 4, 4)
        yield Tiles("dot", 16, 256, 2, 5)
        if large:
            yield Tiles("dot", 32, 128, 4, 5)
            yield Tiles("dot", 32, 256, 4, 4)
            yield Tiles("dot", 64, 128, 4, 4)
            yield Tiles("dot", 64, 64, 4, 6)
            yield Tiles("dot", 64, 256, 8, 3)
            yield Tiles("dot", 128, 64, 4, 4)
            yield Tiles("dot", 128, 128, 8, 3)
            yield Tiles("dot", 32, 512, 4, 3)


class Bench:
    """The tensors of one question at one number of rows, and a clock."""

    def __init__(self, question: Question, rows: int, dtype: torch.dtype, device: torch.device) -> None:
        self.question = question
        size = question.lines * question.inputs
        copies = 1 if device.type != "cuda" else max(2, min(256, ROUND_BYTES // (size * dtype.itemsize) + 1))
        self.weights = [torch.randn(question.lines, question.inputs, device=device).mul_(0.02).to(dtype)]
        self.weights += [self.weights[0].clone() for _ in range(copies - 1)]
        self.residual = torch.randn(rows, question.inputs, device=device)
        self.x = torch.randn(rows, question.inputs, device=device).to(dtype)
        self.norm = torch.rand(question.inputs, device=device) + 0.5
        self.out_residual = torch.randn(rows, question.outputs, device=device)
        self.rotation: tuple[Any, ...] = ()
        if question.heads is not None:
            heads, kv_heads, head_dim = question.heads
            index = torch.arange(rows, dtype=torch.int32, device=device)
            kv = torch.zeros(-(-rows // PAGE), 1, 2, PAGE, kv_heads, head_dim, dtype=dtype, device=device)
            table = rope_table(head_dim, max(64, rows), 1e4, None, device)
            head_norm = torch.rand(heads + kv_heads, head_dim, device=device) + 0.5 if question.head_norm else None
            self.rotation = (index, table, kv, 0, index, heads, kv_heads, head_norm)

    def library(self, weight: Tensor) -> Tensor:
        """The product by the library, with the kernels that it needs around it."""
        x, op = self.x, self.question.ops[0]
        if "norm" in op:
            x = add_rms_norm(self.x, self.residual, self.norm, 1e-5)[0]
        y = F.linear(x, weight)
        if self.rotation:
            return rope_and_write(y, *(*self.rotation, 1e-5))
        if self.question.gated:
            return silu_mul(y)
        return y.float() if op == "plain" else y  # an addition rides on the norm that comes next

    def ours(self, op: Op, tiles: Tiles, weight: Tensor) -> Tensor:
        """The same by a kernel of ours."""
        if op == "norm_rope":
            return qkv_triton.qkv(self.residual, self.norm, 1e-5, weight, None, tiles, *self.rotation)
        norm = None
        x = self.x
        if "norm" in op:
            x, norm = self.residual, (self.norm, 1e-5)
        elif len(self.question.ops) > 1:  # the norm apart
            x = add_rms_norm(self.x, self.residual, self.norm, 1e-5)[0]
        if op == "rope":
            return qkv_triton.qkv(x, None, 1e-5, weight, None, tiles, *self.rotation)
        added = self.out_residual if op == "add" else None
        head = torch.float32 if self.question.ops == ("plain",) else None
        gated = self.question.gated
        y = linear_triton.linear(x, weight, None, tiles, norm=norm, residual_TO=added, gated=gated, dtype=head)
        return rope_and_write(y, *(*self.rotation, 1e-5)) if self.rotation else y

    def wrong(self, op: Op, tiles: Tiles) -> str | None:
        """Return what is wrong with a kernel's result, against float32 on its own inputs; None if nothing is."""
        weight = self.weights[0]
        got = self.ours(op, tiles, weight).float()
        x = self.x.float()
        if "norm" in self.question.ops[0]:
            stream = self.residual.float() if "norm" in op else self.residual.float() + x
            x = stream * torch.rsqrt(stream.pow(2).mean(-1, keepdim=True) + 1e-5) * self.norm.float()
        want = x @ weight.float().T
        if self.question.gated:
            want = F.silu(want[:, : self.question.outputs]) * want[:, self.question.outputs :]
        if op == "add":
            want = want + self.out_residual.float()
        if self.rotation:
            positions, table, kv, *rest = self.rotation
            want = rope_and_write(want, positions, table, kv.float(), *(*rest, 1e-5))
        error = float((got - want).norm() / want.norm())
        return None if error < 1e-2 else f"relative error {error:.3g}"

    def time_us(self, run: Callable[[Tensor], Tensor], budget_ms: float = 6.0) -> float:
        """Return the microseconds of one call inside a graph over all copies of the weight; on a CPU, of one call."""
        if not self.x.is_cuda:
            run(self.weights[0])
            start = time.perf_counter()
            run(self.weights[0])
            return 1e6 * (time.perf_counter() - start)
        calls = self.weights * max(1, 24 // len(self.weights))
        run(calls[0])
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for weight in calls:
                run(weight)
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
        return 1e3 * best / len(calls)


def compile_ahead(jobs: list[Callable[[], object]], threads: int) -> None:
    """Run what compiles in threads: most of Triton's compiler runs without the interpreter's lock."""

    def run(job: Callable[[], object]) -> None:
        try:
            with torch.inference_mode():
                job()
        except Exception as failure:  # said again, with its name, when it is timed
            sys.stderr.write(f"a cut does not compile: {type(failure).__name__}\n")

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(run, jobs))


def answer(question: Question, rows: int, shape: str, device: torch.device, bandwidth: float) -> dict[str, Any]:
    """Time the library and every cut; return the JSON line, with the lines to paste under "paste"."""
    bench = Bench(question, rows, torch.bfloat16, device)
    cuts = [(op, tiles) for op in question.ops for tiles in dict.fromkeys(candidates(op, question, rows))]
    threads = 8 if device.type == "cuda" else 1  # the interpreter is not for threads
    compile_ahead([partial(bench.ours, op, tiles, bench.weights[0]) for op, tiles in cuts], threads)
    library = bench.time_us(bench.library)
    best: dict[Op, tuple[float, Tiles]] = {}
    dropped: list[list[object]] = []
    guessed: dict[Op, float] = {}
    for op, tiles in cuts:
        try:
            fault = bench.wrong(op, tiles)
            took = float("inf") if fault else bench.time_us(partial(bench.ours, op, tiles))
        except Exception as failure:
            fault, took = f"{type(failure).__name__}: {str(failure)[:200]}", float("inf")
        if fault:
            dropped.append([op, *_columns(tiles), fault])
            continue
        guessed.setdefault(op, took)
        best[op] = min(best.get(op, (float("inf"), tiles)), (took, tiles), key=lambda pair: pair[0])
    fastest = min([library, *(took for took, _ in best.values())])
    floor = 1e6 * question.lines * question.inputs * 2 / bandwidth
    return {
        "shape": shape, "matrix": question.name, "outputs": question.outputs, "inputs": question.inputs, "rows": rows,
        "library_us": round(library, 2), "floor_us": round(floor, 2), "fastest_us": round(fastest, 2),
        "share_of_limit": round(floor / fastest, 3), "gb_per_s": round(floor * bandwidth / fastest / 1e9),
        "ours": {op: [round(took, 2), *_columns(tiles)] for op, (took, tiles) in best.items()},
        "guess_us": {op: round(took, 2) for op, took in guessed.items()}, "dropped": dropped,
        "paste": list(paste(question, rows, library, best)),
    }  # fmt: skip


def paste(question: Question, rows: int, library: float, best: dict[Op, tuple[float, Tiles]]) -> Iterator[str]:
    """Yield the table's lines: an op only where it beats the library's and all that is less fused.

    All figures of a question are of the same work, so they can be compared.
    """
    for position, op in enumerate(question.ops):
        rivals = [best[later][0] for later in question.ops[position + 1 :] if later in best]
        won = op in best and best[op][0] <= min([library * 0.97, *rivals])
        chosen = "None" if not won else f"Tiles{_columns(best[op][1])}".replace("'", '"')
        yield f'    ("{op}", {question.outputs}, {question.inputs}, {rows}): {chosen},'


def _columns(tiles: Tiles) -> tuple[str | int, ...]:
    columns = (tiles.kernel, tiles.block_o, tiles.block_i, tiles.warps, tiles.stages, tiles.block_t)
    return columns if tiles.kernel in ("split", "blocks") else columns[:-1]


def copy_bandwidth(device: torch.device) -> float:
    """Return bytes a second read and written by a large copy."""
    source = torch.empty(2**30 if device.type == "cuda" else 2**24, dtype=torch.uint8, device=device)
    target, best = torch.empty_like(source), 0.0
    for _ in range(5):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = max(best, 2 * source.nbytes / (time.perf_counter() - start))
    return best


def main() -> None:
    """Read the command line, measure, print."""
    arguments = argparse.ArgumentParser(description="some rows times a matrix: which kernel?")
    arguments.add_argument("--shape", choices=SHAPES, nargs="+", default=list(SHAPES))
    arguments.add_argument("--rows", type=int, nargs="+", default=[1, 8, 2, 4, 16])
    arguments.add_argument("--matrix", nargs="+", default=["qkv", "o", "gate_up", "down", "head"])
    arguments.add_argument("--seconds", type=float, default=1e9, help="begin no further question after so long")
    asked = arguments.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench/kernels.py times CUDA kernels, and there is no CUDA device here.")
    device, begun = torch.device("cuda"), time.perf_counter()
    bandwidth = copy_bandwidth(device)
    lines: list[str] = []
    todo = [
        (shape, question, rows)
        for rows in asked.rows
        for shape in asked.shape
        for question in questions(shape)
        if question.name in asked.matrix
    ]
    done = 0
    with torch.inference_mode():
        for shape, question, rows in todo:
            if time.perf_counter() - begun > asked.seconds:
                break
            found = answer(question, rows, shape, device, bandwidth)
            lines += found.pop("paste")
            print(json.dumps(found), flush=True)
            done += 1
    print("\n".join(dict.fromkeys(lines)))
    print(
        json.dumps(
            {
                "bench": "kernels", "answered": done, "of": len(todo), "bandwidth_gb_per_s": round(bandwidth / 1e9),
                "seconds": round(time.perf_counter() - begun, 1), "device": torch.cuda.get_device_name(device),
                "torch": torch.__version__,
            }
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
