"""Norm, q, k and v, their rotation, and the write of k and v into their pages: one Triton kernel for a few rows.

A program owns pairs of rows of the weight that one rotation turns, (d, d + D/2) of a head, side by side, so that it can
turn what it has just computed. (A norm of each head needs the whole head: Qwen3 takes `ops.rope_triton` instead.)

Legend: T tokens, H query heads, K key/value heads, D head size, C hidden size, X = (H + 2 * K) * D.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from overlap.cache.pages import PAGE
from overlap.ops import launch_triton
from overlap.ops.linear_choice import Tiles
from overlap.ops.linear_triton import RUN, first_tile, multiply, parts_of


@triton.jit
def _place(head, column, kv_index, layer, layers, HEADS, KV_HEADS, HALF, PAGE_TOKENS):
    """Return where the first half of a k or v head goes in the KV memory."""
    side = tl.where(head < HEADS + KV_HEADS, 0, 1)
    kv_head = head - HEADS - side * KV_HEADS
    block = ((kv_index // PAGE_TOKENS).to(tl.int64) * layers + layer) * 2 + side
    return ((block * PAGE_TOKENS + kv_index % PAGE_TOKENS) * KV_HEADS + kv_head) * (2 * HALF) + column


# Not specialised on rows and layer: 0, 1 and multiples of 16 would each be compiled anew.
@triton.jit(do_not_specialize=["rows", "layer"])
def _qkv_kernel(
    x,
    norm,
    weight,
    bias,
    positions,
    table,
    kv,
    kv_index,
    q_out,
    rows,
    layer,
    layers,
    x_stride,
    eps,
    INPUTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    PARTS: tl.constexpr,
    RUN: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    program = tl.program_id(0)
    row = tl.arange(0, ROWS)
    half = tl.arange(0, BLOCK_O)
    pair = program * (BLOCK_O // 2) + half // 2
    line = (pair // HALF) * (2 * HALF) + pair % HALF + (half % 2) * HALF
    line_inside = pair < (HEADS + 2 * KV_HEADS) * HALF
    tile = first_tile(weight, line, line_inside, INPUTS, BLOCK_I, PARTS)
    if PDL:
        tl.extra.cuda.gdc_wait()

    # The turn of each pair, on its way while the product is computed.
    pair = program * (BLOCK_O // 2) + tl.arange(0, BLOCK_O // 2)
    head, column = (pair // HALF)[None, :], (pair % HALF)[None, :]
    inside = (row < rows)[:, None] & (pair < (HEADS + 2 * KV_HEADS) * HALF)[None, :]
    turns = inside & (head < HEADS + KV_HEADS)
    turn = table + tl.load(positions + row, mask=row < rows, other=0).to(tl.int64)[:, None] * (2 * HALF) + column
    cos = tl.load(turn, mask=turns, other=1.0)
    sin = tl.load(turn + HALF, mask=turns, other=0.0)
    index = tl.load(kv_index + row, mask=row < rows, other=-1)[:, None]

    y = multiply(
        tile, x, norm, weight, line, line_inside, rows, x_stride, eps, INPUTS, ROWS, BLOCK_O, BLOCK_I, PARTS, RUN, True
    )
    if HAS_BIAS:
        y += tl.load(bias + line, mask=line_inside, other=0.0).to(tl.float32)[None, :]
    straight, across = tl.split(tl.reshape(y, (ROWS, BLOCK_O // 2, 2)))
    first = (straight * cos - across * sin).to(q_out.dtype.element_ty)
    second = (across * cos + straight * sin).to(q_out.dtype.element_ty)
    target = q_out + (row.to(tl.int64)[:, None] * HEADS + head) * (2 * HALF) + column
    tl.store(target, first, mask=inside & (head < HEADS))
    tl.store(target + HALF, second, mask=inside & (head < HEADS))
    target = kv + _place(head, column, index, layer, layers, HEADS, KV_HEADS, HALF, PAGE_TOKENS)
    tl.store(target, first, mask=inside & (head >= HEADS) & (index >= 0))
    tl.store(target + HALF, second, mask=inside & (head >= HEADS) & (index >= 0))


def norm_qkv(
    residual_TC: Tensor,
    norm_C: Tensor,
    eps: float,
    weight_XC: Tensor,
    bias_X: Tensor | None,
    tiles: Tiles,
    positions_T: Tensor,
    table: Tensor,
    kv: Tensor,
    layer: int,
    kv_index_T: Tensor,
    num_heads: int,
    num_kv_heads: int,
) -> Tensor:
    """Return the rotated q, [T, H, D], of the RMS-normed stream; T is at most 16, the kernel not "dot".

    As `ops.linear_triton.linear` with a norm, and `ops.rope.rope_and_write` behind it, but nothing is rounded between.
    """
    (rows, inputs), head_dim = residual_TC.shape, table.shape[1]
    q_THD = torch.empty((rows, num_heads, head_dim), dtype=weight_XC.dtype, device=residual_TC.device)
    options: dict[str, Any] = launch_triton.early(residual_TC.device)
    _qkv_kernel[(triton.cdiv(weight_XC.shape[0], tiles.block_o),)](
        residual_TC, norm_C, weight_XC, weight_XC if bias_X is None else bias_X, positions_T, table, kv, kv_index_T,
        q_THD, rows, layer, kv.shape[1], residual_TC.stride(0), eps,
        INPUTS=inputs, BLOCK_O=tiles.block_o, BLOCK_I=tiles.block_i, RUN=RUN, **parts_of(tiles, rows), HEADS=num_heads,
        KV_HEADS=num_kv_heads, HALF=head_dim // 2, PAGE_TOKENS=PAGE, HAS_BIAS=bias_X is not None,
        num_warps=tiles.warps, **options,
    )  # fmt: skip
    return q_THD
