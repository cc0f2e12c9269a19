"""Norm, q, k and v, their rotation, and the write of k and v into their pages: one Triton kernel for up to 256 rows.

A program owns pairs of rows of the weight that one rotation turns, (d, d + D/2) of a head, side by side, so that it can
turn what it has just computed. A norm of each head (Qwen3) needs programs that own whole heads: "blocks" has such.

Legend: T tokens, H query heads, K key/value heads, D head size, C hidden size, X = (H + 2 * K) * D, P parts of a row's
sum of squares.
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
from overlap.ops.linear_triton import cut
from overlap.ops.multiply_triton import factor_of, first_tile, first_values, multiply, owned, squares_of


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
    squares,
    head_norm,
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
    STAGES: tl.constexpr,
    WAY: tl.constexpr,
    RUN: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    SQUARES: tl.constexpr,
    HAS_HEAD_NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PDL: tl.constexpr,
):
    row, block = owned(ROWS, WAY)
    half = tl.arange(0, BLOCK_O)
    pair = block * (BLOCK_O // 2) + half // 2
    line = (pair // HALF) * (2 * HALF) + pair % HALF + (half % 2) * HALF
    line_inside = pair < (HEADS + 2 * KV_HEADS) * HALF
    tile = first_tile(weight, line, line_inside, INPUTS, BLOCK_I, PARTS, WAY, PDL)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()  # only now: attention reads old keys before it waits (`launch_triton`)

    # These and the turn of each pair are on their way while the product is computed.
    if SQUARES:
        sums = squares_of(squares, row, rows, SQUARES)
    pair = block * (BLOCK_O // 2) + tl.arange(0, BLOCK_O // 2)
    head, column = (pair // HALF)[None, :], (pair % HALF)[None, :]
    inside = (row < rows)[:, None] & (pair < (HEADS + 2 * KV_HEADS) * HALF)[None, :]
    turns = inside & (head < HEADS + KV_HEADS)
    turn = table + tl.load(positions + row, mask=row < rows, other=0).to(tl.int64)[:, None] * (2 * HALF) + column
    cos = tl.load(turn, mask=turns, other=1.0)
    sin = tl.load(turn + HALF, mask=turns, other=0.0)
    index = tl.load(kv_index + row, mask=row < rows, other=-1)[:, None]

    value = first_values(x, row, rows, x_stride, INPUTS, BLOCK_I, PARTS, WAY)
    y = multiply(
        tile, value, x, norm, weight, row, line, line_inside, rows, x_stride, eps, INPUTS, ROWS, BLOCK_O, BLOCK_I,
        PARTS, STAGES, WAY, RUN, HAS_NORM,
    )  # fmt: skip
    if SQUARES:
        y *= factor_of(sums, eps, INPUTS)[:, None]
    if HAS_BIAS:
        y += tl.load(bias + line, mask=line_inside, other=0.0).to(tl.float32)[None, :]
    straight, across = tl.split(tl.reshape(y, (ROWS, BLOCK_O // 2, 2)))
    if HAS_HEAD_NORM:  # the program's pairs are one head
        mean = tl.sum(straight * straight + across * across, axis=1) / BLOCK_O
        scale = tl.where(turns, tl.rsqrt(mean + eps)[:, None], 1.0)
        factor = head_norm + head * BLOCK_O + column
        straight *= scale * tl.load(factor, mask=head < HEADS + KV_HEADS, other=1.0)
        across *= scale * tl.load(factor + HALF, mask=head < HEADS + KV_HEADS, other=1.0)
    first = (straight * cos - across * sin).to(q_out.dtype.element_ty)
    second = (across * cos + straight * sin).to(q_out.dtype.element_ty)
    target = q_out + (row.to(tl.int64)[:, None] * HEADS + head) * (2 * HALF) + column
    tl.store(target, first, mask=inside & (head < HEADS))
    tl.store(target + HALF, second, mask=inside & (head < HEADS))
    target = kv + _place(head, column, index, layer, layers, HEADS, KV_HEADS, HALF, PAGE_TOKENS)
    tl.store(target, first, mask=inside & (head >= HEADS) & (index >= 0))
    tl.store(target + HALF, second, mask=inside & (head >= HEADS) & (index >= 0))


def qkv(
    x_TC: Tensor,
    norm_C: Tensor | None,
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
    head_norm_ND: Tensor | None = None,
    *,
    squares_TP: Tensor | None = None,
) -> Tensor:
    """Return the rotated q, [T, H, D], of x, or with `norm_C` of the RMS-normed float32 stream x.

    With `squares_TP` x is the `scaled` that `ops.linear_triton.linear_add` returned with them. As
    `ops.linear_triton.linear`, and `ops.rope.rope_and_write` behind it, but nothing is rounded between. The kernel is
    not "dot", and with `head_norm_ND` one whose programs own heads (`Tiles.owns_heads`). `eps` is every norm's.
    """
    (rows, inputs), head_dim = x_TC.shape, table.shape[1]
    assert head_norm_ND is None or tiles.owns_heads(head_dim)
    assert norm_C is None or squares_TP is None  # a norm is done in one place or in two
    q_THD = torch.empty((rows, num_heads, head_dim), dtype=weight_XC.dtype, device=x_TC.device)
    others = (given if given is not None else weight_XC for given in (norm_C, squares_TP, head_norm_ND))
    grid, constants = cut(tiles, weight_XC.shape[0], rows)
    options: dict[str, Any] = {**constants, **launch_triton.early(x_TC.device)}
    _qkv_kernel[grid](
        x_TC, *others, weight_XC, weight_XC if bias_X is None else bias_X, positions_T, table, kv, kv_index_T, q_THD,
        rows, layer, kv.shape[1], x_TC.stride(0), eps,
        INPUTS=inputs, HEADS=num_heads, KV_HEADS=num_kv_heads, HALF=head_dim // 2, PAGE_TOKENS=PAGE,
        HAS_NORM=norm_C is not None, SQUARES=0 if squares_TP is None else squares_TP.shape[1],
        HAS_HEAD_NORM=head_norm_ND is not None, HAS_BIAS=bias_X is not None, **options,
    )  # fmt: skip
    return q_THD
