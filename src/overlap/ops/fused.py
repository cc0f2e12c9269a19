"""A matrix with what stands around it in a layer: norm before it, residual or SiLU after it.

The residual stream is a pair between two calls: `residual_TC` in float32, and `x_TC`, what is still to be added to it,
or None. At few rows on CUDA one kernel takes the whole of a step, and nothing is left to add, and so it is at more rows
where that was measured to be faster (there the norm can be a kernel of its own); elsewhere the addition rides on the
norm that comes next, which reads the stream anyway. The two round differently: the kernels keep in float32 what the
separate ops round to the model's dtype in between.

Legend: T tokens, C channels, I inputs, O outputs, H query heads, K key/value heads, D head size, X = (H + 2 * K) * D.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

from overlap.ops.activation import silu_mul
from overlap.ops.linear import Linear
from overlap.ops.linear_choice import Op
from overlap.ops.norm import add_rms_norm, rms_norm
from overlap.ops.rope import rope_and_write

Stream: TypeAlias = tuple[Tensor | None, Tensor]
"""(x [T, C] of the model's dtype or None, residual [T, C] in float32); their sum is the residual stream."""
Where: TypeAlias = tuple[Tensor, Tensor, Tensor, int, Tensor, int, int]
"""(positions [T], rope table, KV memory, layer, where keys and values go [T], query heads, key heads): see
`ops.rope.rope_and_write`."""


def norm_linear(linear: Linear, stream: Stream, norm_C: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return (the product of the RMS-normed stream with `linear`, [T, O], and the whole stream)."""
    x_TC, residual_TC = stream
    if x_TC is None:
        tiles = linear.tiles("norm", residual_TC.shape[0])
        if tiles is not None:
            from overlap.ops import linear_triton

            norm = (norm_C, eps)
            return linear_triton.linear(residual_TC, linear.weight, linear.bias, tiles, norm=norm), residual_TC
    normed_TC, residual_TC = _norm(stream, norm_C, eps, linear.dtype)
    return linear(normed_TC), residual_TC


def norm_qkv(
    linear: Linear,
    stream: Stream,
    norm_C: Tensor,
    eps: float,
    positions_T: Tensor,
    table: Tensor,
    kv: Tensor,
    layer: int,
    kv_index_T: Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_norm_ND: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return (the rotated q of the RMS-normed stream, [T, H, D], and the whole stream); k and v go into their pages.

    `linear` is [X, C]: q, k, v. The other arguments are those of `ops.rope.rope_and_write`, `eps` is every norm's.
    """
    rotation = (positions_T, table, kv, layer, kv_index_T, num_heads, num_kv_heads, head_norm_ND)
    x_TC, residual_TC = stream
    rows = residual_TC.shape[0]
    turns: tuple[Op, ...] = ("norm_rope", "rope") if x_TC is None else ("rope",)
    for op in turns:
        tiles = linear.tiles(op, rows)
        if tiles is None or (head_norm_ND is not None and not tiles.owns_heads(table.shape[1])):
            continue
        from overlap.ops import qkv_triton

        if op == "norm_rope":
            return qkv_triton.qkv(residual_TC, norm_C, eps, linear.weight, linear.bias, tiles, *rotation), residual_TC
        normed_TC, residual_TC = _norm(stream, norm_C, eps, linear.dtype)
        return qkv_triton.qkv(normed_TC, None, eps, linear.weight, linear.bias, tiles, *rotation), residual_TC
    qkv_TX, residual_TC = norm_linear(linear, stream, norm_C, eps)
    return rope_and_write(qkv_TX, *rotation, eps), residual_TC


def rotated(linear: Linear, x_TC: Tensor, *where: *Where) -> Tensor:
    """Return the rotated q of x [T, C], [T, H, D]; k and v go into their pages. `linear` is that of `norm_qkv`."""
    tiles = linear.tiles("rope", x_TC.shape[0])
    if tiles is None:
        return rope_and_write(linear(x_TC), *where)
    from overlap.ops import qkv_triton

    return qkv_triton.qkv(x_TC, None, 0.0, linear.weight, linear.bias, tiles, *where)


def norm_gated(linear: Linear, stream: Stream, norm_C: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return (silu(gate) * up, [T, O / 2], of the RMS-normed stream, and the whole stream).

    `linear` has the rows of the gate, then as many of up.
    """
    x_TC, residual_TC = stream
    rows = residual_TC.shape[0]
    tiles = linear.tiles("norm_gated", rows) if x_TC is None else None
    if tiles is not None:
        from overlap.ops import linear_triton

        norm = (norm_C, eps)
        gated_TO = linear_triton.linear(residual_TC, linear.weight, linear.bias, tiles, norm=norm, gated=True)
        return gated_TO, residual_TC
    normed_TC, residual_TC = _norm(stream, norm_C, eps, linear.dtype)
    tiles = linear.tiles("gated", rows)
    if tiles is not None:
        from overlap.ops import linear_triton

        return linear_triton.linear(normed_TC, linear.weight, linear.bias, tiles, gated=True), residual_TC
    return silu_mul(linear(normed_TC)), residual_TC


def linear_add(linear: Linear, x_TI: Tensor, residual_TC: Tensor) -> Stream:
    """Return the stream after `linear` of x [T, I] was added to it, or is still to be."""
    tiles = linear.tiles("add", x_TI.shape[0])
    if tiles is not None and x_TI.stride(1) == 1:
        from overlap.ops import linear_triton

        return None, linear_triton.linear(x_TI, linear.weight, linear.bias, tiles, residual_TO=residual_TC)
    return linear(x_TI), residual_TC


def whole(stream: Stream) -> Tensor:
    """Return the residual stream with nothing left to add, float32 [T, C]."""
    x_TC, residual_TC = stream
    return residual_TC if x_TC is None else residual_TC + x_TC


def norm(stream: Stream, norm_C: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """Return the RMS-normed stream, [T, C], as `dtype`."""
    return _norm(stream, norm_C, eps, dtype)[0]


def _norm(stream: Stream, norm_C: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    x_TC, residual_TC = stream
    if x_TC is None:
        return rms_norm(residual_TC, norm_C, eps, dtype), residual_TC
    return add_rms_norm(x_TC, residual_TC, norm_C, eps)


def greedy_head(hidden_EC: Tensor, head: Linear, ids_V: Tensor | None = None) -> Tensor:
    """Return `head.wide(hidden).argmax(-1)`, int32 [E], the lowest of equals. At few rows no logits are written.

    With `ids_V` (int32) it is the token's id there.
    """
    tiles = head.tiles("plain", hidden_EC.shape[0])
    if tiles is not None and hidden_EC.stride(1) == 1:
        from overlap.ops import linear_triton

        return linear_triton.greedy(hidden_EC, head.weight, head.bias, tiles, ids_O=ids_V)
    best_E = head.wide(hidden_EC).argmax(-1)
    return best_E.int() if ids_V is None else ids_V.index_select(0, best_E)


def norm_greedy_head(stream_EC: Tensor, norm_C: Tensor, eps: float, head: Linear, ids_V: Tensor | None) -> Tensor:
    """Return `greedy_head` of the RMS-normed float32 stream."""
    tiles = head.tiles("norm", stream_EC.shape[0])
    if tiles is None:
        return greedy_head(rms_norm(stream_EC, norm_C, eps, head.dtype), head, ids_V)
    from overlap.ops import linear_triton

    return linear_triton.greedy(stream_EC, head.weight, head.bias, tiles, norm=(norm_C, eps), ids_O=ids_V)
