"""Compiles every Triton kernel for sm_90a's machine code, with no GPU. Run by test_kernels_interpreted.py.

The launchers are called with CPU tensors; a stand-in for Triton's driver says that the target is sm_90, and each launch
is turned into a compilation. It finds what the interpreter does not: whatever the compiler refuses.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from overlap.ops import (
    activation_triton,
    decode_triton,
    embedding_triton,
    launch_triton,
    linear_triton,
    norm_triton,
    qkv_triton,
    rope_triton,
)
from overlap.ops.linear_choice import FEW_ROWS, Op, Tiles, bucket, guess
from overlap.sample import draw_triton, mask_triton, philox_triton
from overlap.schedule.planner import Planner
from overlap.schedule.request import Request
from overlap.spec import pair_triton, places_triton, runs_triton
from overlap.spec.drafter import Drafts, Read
from overlap.spec.rows import DraftRows
from overlap.state import inputs_triton, replay_triton, strips_triton
from overlap.state.inputs import empty_inputs
from overlap.state.mail import Mail
from overlap.state.packing import pack
from overlap.state.rows import SlotRows

MORE_ROWS = Tiles("blocks", 32, 64, 4, 4, 64)


class Sm90:
    """What Triton asks of its driver before it compiles."""

    def get_current_target(self) -> Any:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_only() -> None:
    driver.set_active(Sm90())
    launch = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
        assert kernel.asm["cubin"]
        print(self.fn.__name__)
        return kernel

    JITFunction.run = run


def linears(outputs: int, inputs: int, rows: int) -> None:
    """Compile what `guess` would take for a matrix, or a cut for more rows."""
    weight, x = torch.empty(2 * outputs, inputs, dtype=torch.bfloat16), torch.empty(rows, inputs, dtype=torch.bfloat16)
    ops: tuple[Op, ...] = ("plain", "add", "norm", "gated", "norm_gated")
    for op in ops:
        tiles = MORE_ROWS if rows > FEW_ROWS else guess(op, outputs, inputs, bucket(rows))
        if tiles is not None:
            linear_triton.linear(
                x.float() if "norm" in op else x,
                weight if "gated" in op else weight[:outputs],
                None,
                tiles,
                norm=(torch.empty(inputs), 1e-5) if "norm" in op else None,
                residual_TO=torch.empty(rows, outputs) if op == "add" else None,
                gated="gated" in op,
            )
        if tiles is not None and "norm" not in op:  # the norm in two places
            squares = (torch.empty(rows, 36), 1e-5)
            given = (x, weight if op == "gated" else weight[:outputs], None, tiles)
            linear_triton.linear(*given, squares=squares, gated=op == "gated")
            if op == "add":
                linear_triton.linear_add(*given, torch.empty(rows, outputs), torch.empty(outputs))
    tiles = MORE_ROWS if rows > FEW_ROWS else guess("plain", outputs, inputs, bucket(rows))
    assert tiles is not None
    linear_triton.greedy(x, weight[:outputs], torch.empty(outputs, dtype=torch.bfloat16), tiles)
    if (tiles := guess("norm", outputs, inputs, bucket(rows))) is not None and rows <= FEW_ROWS:
        norm, ids = (torch.empty(inputs), 1e-5), torch.empty(outputs, dtype=torch.int32)
        linear_triton.greedy(x.float(), weight[:outputs], None, tiles, norm=norm, ids_O=ids)


def rotated(rows: int, num_heads: int, num_kv_heads: int, head_dim: int, hidden: int, tiles: Tiles | None) -> None:
    lines = (num_heads + 2 * num_kv_heads) * head_dim
    weight, index = torch.empty(lines, hidden, dtype=torch.bfloat16), torch.zeros(rows, dtype=torch.int32)
    tiles = tiles or guess("norm_rope", lines, hidden, bucket(rows)) or guess("rope", lines, hidden, bucket(rows))
    tiles = tiles or Tiles("gemv", 2, 1024, 4)
    head_norm = torch.empty(num_heads + num_kv_heads, head_dim) if tiles.owns_heads(head_dim) else None
    kv = torch.empty(2, 3, 2, 16, num_kv_heads, head_dim, dtype=torch.bfloat16)
    rotation = (index, torch.empty(9, head_dim), kv, 1, index, num_heads, num_kv_heads, head_norm)
    qkv_triton.qkv(torch.empty(rows, hidden), torch.empty(hidden), 1e-5, weight, None, tiles, *rotation)
    x = torch.empty(rows, hidden).bfloat16()
    for squares in (None, torch.empty(rows, 36)):
        qkv_triton.qkv(x, None, 1e-5, weight, None, tiles, *rotation, squares_TP=squares)


def decoded(num_kv_heads: int, group: int, head_dim: int, width: int) -> None:
    kv = torch.empty(4, 2, 2, 16, num_kv_heads, head_dim, dtype=torch.bfloat16)
    q, ints = torch.empty(width, num_kv_heads * group, head_dim, dtype=torch.bfloat16), torch.zeros(1, 4).int()
    kernel = decode_triton.DecodeKernel(kv, num_kv_heads * group, 1, width)
    kernel.attend(1, q, ints, ints[0, :1], torch.empty_like(q), width)


def main() -> None:
    compile_only()
    compile_all()
    launch_triton.early = lambda device: {"PDL": True, "launch_pdl": True}
    compile_all()
    for rows in (1, 3, 16):
        linears(576, 1536, rows)
    linears(2048, 4096, 16)
    linears(4096, 4096, 8)


def compile_all() -> None:
    linears(64, 128, 1)
    rotated(1, 9, 3, 64, 576, None)
    rotated(2, 32, 8, 128, 4096, None)
    rotated(8, 9, 3, 64, 576, None)
    rotated(32, 9, 3, 64, 576, Tiles("split", 16, 1024, 8))
    rotated(64, 9, 3, 64, 576, MORE_ROWS)
    rotated(64, 16, 8, 128, 1024, Tiles("blocks", 128, 64, 8, 4, 64))
    linears(576, 1536, 256)
    for width in (1, 5):
        decoded(3, 3, 64, width)
        decoded(8, 4, 128, width)
    embedding_triton.embed(torch.zeros(4, dtype=torch.int32), torch.empty(9, 64, dtype=torch.bfloat16))
    for dtype in (torch.bfloat16, torch.float32):
        residual = torch.randn(4, 64)
        norm_triton.rms_norm(residual, residual[0], 1e-5, dtype)
        norm_triton.add_rms_norm(residual.to(dtype), residual, residual[0], 1e-5)
        activation_triton.silu_mul(torch.randn(4, 128).to(dtype))
        kv = torch.zeros(4, 2, 2, 16, 3, 64).to(dtype)
        index = torch.arange(4, dtype=torch.int32)
        qkv, table = torch.randn(4, 15 * 64).to(dtype), torch.randn(100, 64)
        for head_norm in (None, torch.randn(12, 64)):
            rope_triton.rope_and_write(qkv, index, table, kv, 1, index, 9, 3, head_norm, 1e-5)
    mask_triton.mask_logits(torch.zeros(4, 1000), torch.zeros(2, 33, dtype=torch.int32))
    philox_triton.gumbel(index, index, index, 1000, None)
    philox_triton.gumbel(index, index, index, 1000, torch.zeros(4, 1000))
    planner = Planner(max_rows=4, num_pages=10, token_budget=64, prefill_chunk=64, context=100)
    planner.submit(Request(key=0, front=0, prompt=np.arange(20, dtype=np.int32), limit=5))
    plan = planner.plan()
    assert plan is not None
    words = np.zeros(1000, dtype=np.int32)
    layout = pack(plan, words)
    rows, inputs = SlotRows(4, 8, "cpu"), empty_inputs(64, 4, 8, "cpu")
    for logits in (torch.zeros(4, 1000), torch.zeros(4, 49152), torch.zeros(4, 1000, dtype=torch.bfloat16)):
        for truncated in (False, True):
            draw_triton.draw(logits, rows, index, index, truncated)
    inputs_triton.build_inputs(torch.from_numpy(words), layout, rows, inputs)
    mail = Mail(1000, 4, "cpu")
    replay_triton.take_plan(mail, rows, 4)
    replay_triton.build_decode_inputs(mail.packed, rows, inputs)
    for dtype in (torch.int64, torch.int32):
        replay_triton.settle_decode(mail, rows, torch.zeros(4, dtype=dtype))
    strips_triton.take_strips(mail, rows, 4)
    for width in (1, 4):
        speculated(rows, width)


def speculated(rows: SlotRows, width: int) -> None:
    mail, drafts = Mail(1000, 16, "cpu"), DraftRows(4, 3, "cpu")
    runs = runs_triton.build_runs(mail.packed, rows, drafts, 4, width, 100)
    for dtype in (torch.int64, torch.int32):
        outcome = runs_triton.settle_runs(runs, torch.zeros(4 * width, dtype=dtype), rows, drafts, 0.0)
    one, three = torch.zeros(4, dtype=torch.int32), torch.zeros((4, 3), dtype=torch.int32)
    runs_triton.keep_drafts(one, Drafts(tokens_RK=three, num_R=one), outcome.most_D, drafts)
    runs_triton.land_runs(mail, outcome.landing_DJ)
    read = Read(
        token_ids=runs.token_ids_N, next_tokens=runs.token_ids_N, positions=runs.positions_N,
        kv_index=runs.kv_index_N, hidden=None, rows=None, last=outcome.last_D, slots=runs.slots_D,  # type: ignore[arg-type]
        token_slots=runs.token_slots_N, page_table=runs.page_table, longest=99,
    )  # fmt: skip
    places_triton.chain_places(read, 2, 100, 2, 4)
    runs_triton.forget_runs(mail.packed, drafts, 4)
    table, norm = torch.empty(9, 576, dtype=torch.bfloat16), torch.empty(576)
    for dtype in (torch.bfloat16, torch.float32):
        pair_triton.normed_pair(one, table, torch.empty(4, 576, dtype=dtype), norm, norm, 1e-5)


if __name__ == "__main__":
    main()
