"""A matrix with what stands around it in a layer: norm before it, residual or SiLU after it.

The residual stream is a `Stream` between two calls. At few rows on CUDA one kernel takes the whole of a step, and
nothing is left to add, and so it is at more rows where that was measured to be faster; elsewhere the addition rides on
the norm that comes next, which reads the stream anyway. The two round differently: the kernels keep in float32 what the
separate ops round to the model's dtype in between.

A norm is done in one of three places: inside the product behind it; between the two products in front of and behind it,
if both are kernels of ours (`Scaled`); or by a kernel of its own.

Legend: T tokens, C channels, I inputs, O outputs, H query heads, K key/value heads, D head size, X = (H + 2 * K) * D,
P parts of a row's sum of squares.
"""

from __future__ import annotations

from typing import Final, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from overlap.ops.activation import silu_mul
from overlap.ops.linear import Linear
from overlap.ops.linear_choice import LARGE, Op, Tiles
from overlap.ops.norm import add_rms_norm, rms_norm
from overlap.ops.rope import rope_and_write

_MOST_PARTS: Final = 512
"""Parts of a row's sum of squares up to which each program behind may have to read them all, and..."""
_MOST_SQUARES: Final = 4096
"""...of its rows together, 256 for each of 16: they wait in its registers."""
Where: TypeAlias = tuple[Tensor, Tensor, Tensor, int, Tensor, int, int]
"""(positions [T], rope table, KV memory, layer, where keys and values go [T], query heads, key heads): see
`ops.rope.rope_and_write`."""


class Scaled(NamedTuple):
    """The stream halfway through one RMS norm: the factor of each row is left to the product that reads it."""

    x_TC: Tensor
    """The stream times `norm_C`, of the model's dtype."""
    squares_TP: Tensor
    """Parts of each row's sum of squares of the stream, float32."""
    norm_C: Tensor
    """The weight of the norm that this is good for, and for no other."""


class Stream(NamedTuple):
    """The residual stream: the sum of `x_TC` and `residual_TC`."""

    x_TC: Tensor | None
    """What is still to be added, of the model's dtype."""
    residual_TC: Tensor
    """In float32."""
    scaled: Scaled | None = None
    """The same once more, for the norm that comes next. Only where nothing is left to add."""


class Ahead(NamedTuple):
    """What will read the stream next: an RMS norm, and the product behind it."""

    norm_C: Tensor
    linear: Linear
    op: Literal["rope", "gated"]
    """What the product does with a normed x."""
    normed_head: int | None = None
    """The size of the heads that are normed behind the product, if they are."""

    def tiles(self, rows: int) -> Tiles | None:
        """Return the cut of our kernel for `op`; None if there is none, or one that takes the norm inside."""
        inside: Op = "norm_rope" if self.op == "rope" else "norm_gated"
        if _tiles(self.linear, inside, rows, self.normed_head) is not None:
            return None
        return _tiles(self.linear, self.op, rows, self.normed_head)


def _tiles(linear: Linear, op: Op, rows: int, normed_head: int | None) -> Tiles | None:
    """Return the linear's cut for the op, if there is one, and if it has whole heads where they are normed."""
    tiles = linear.tiles(op, rows)
    return tiles if tiles is None or normed_head is None or tiles.owns_heads(normed_head) else None


def norm_linear(linear: Linear, stream: Stream, norm_C: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return (the product of the RMS-normed stream with `linear`, [T, O], and the whole stream)."""
    residual_TC = stream.residual_TC
    if stream.x_TC is None:
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
    residual_TC = stream.residual_TC
    normed_head = None if head_norm_ND is None else table.shape[1]
    turns: tuple[Op, ...] = ("norm_rope", "rope") if stream.x_TC is None else ("rope",)
    for op in turns:
        tiles = _tiles(linear, op, residual_TC.shape[0], normed_head)
        if tiles is None:
            continue
        from overlap.ops import qkv_triton

        if op == "norm_rope":
            return qkv_triton.qkv(residual_TC, norm_C, eps, linear.weight, linear.bias, tiles, *rotation), residual_TC
        x_TC, squares_TP, residual_TC = _ready(stream, norm_C, eps, linear.dtype)
        given = (None, eps, linear.weight, linear.bias, tiles, *rotation)
        return qkv_triton.qkv(x_TC, *given, squares_TP=squares_TP), residual_TC
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
    residual_TC = stream.residual_TC
    rows = residual_TC.shape[0]
    tiles = linear.tiles("norm_gated", rows) if stream.x_TC is None else None
    if tiles is not None:
        from overlap.ops import linear_triton

        norm = (norm_C, eps)
        gated_TO = linear_triton.linear(residual_TC, linear.weight, linear.bias, tiles, norm=norm, gated=True)
        return gated_TO, residual_TC
    tiles = linear.tiles("gated", rows)
    if tiles is not None:
        from overlap.ops import linear_triton

        x_TC, squares_TP, residual_TC = _ready(stream, norm_C, eps, linear.dtype)
        squares = None if squares_TP is None else (squares_TP, eps)
        gated_TO = linear_triton.linear(x_TC, linear.weight, linear.bias, tiles, squares=squares, gated=True)
        return gated_TO, residual_TC
    normed_TC, residual_TC = _norm(stream, norm_C, eps, linear.dtype)
    return silu_mul(linear(normed_TC)), residual_TC


def linear_add(linear: Linear, x_TI: Tensor, residual_TC: Tensor, ahead: Ahead | None = None) -> Stream:
    """Return the stream after `linear` of x [T, I] was added to it, or is still to be.

    It is also made ready for what is `ahead`, where that takes it so.
    """
    tiles = linear.tiles("add", x_TI.shape[0])
    if tiles is None or x_TI.stride(1) != 1:
        return Stream(linear(x_TI), residual_TC)
    from overlap.ops import linear_triton

    given = (x_TI, linear.weight, linear.bias, tiles)
    if ahead is None or not _takes_scaled(ahead, linear, tiles, x_TI.shape[0]):
        return Stream(None, linear_triton.linear(*given, residual_TO=residual_TC))
    total_TC, scaled_TC, squares_TP = linear_triton.linear_add(*given, residual_TC, ahead.norm_C)
    return Stream(None, total_TC, Scaled(scaled_TC, squares_TP, ahead.norm_C))


def _takes_scaled(ahead: Ahead, linear: Linear, tiles: Tiles, rows: int) -> bool:
    """Whether what is ahead of a product, cut so, reads a scaled stream.

    In float16 none does: its largest number is 65,504, and a stream that is not normed yet has larger ones. Nor does a
    large product, which takes so long to read that a norm in front of it is nothing.
    """
    behind, weights = ahead.tiles(rows), ahead.linear.out_features * ahead.linear.in_features
    if behind is None or weights > LARGE or linear.dtype is torch.float16:
        return False
    parts = tiles.blocks(linear.out_features)
    return parts <= _MOST_PARTS and parts * behind.program_rows(rows) <= _MOST_SQUARES


def whole(stream: Stream) -> Tensor:
    """Return the residual stream with nothing left to add, float32 [T, C]."""
    return stream.residual_TC if stream.x_TC is None else stream.residual_TC + stream.x_TC


def norm(stream: Stream, norm_C: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """Return the RMS-normed stream, [T, C], as `dtype`."""
    return _norm(stream, norm_C, eps, dtype)[0]


def _norm(stream: Stream, norm_C: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    if stream.x_TC is None:
        return rms_norm(stream.residual_TC, norm_C, eps, dtype), stream.residual_TC
    return add_rms_norm(stream.x_TC, stream.residual_TC, norm_C, eps)


def _ready(stream: Stream, norm_C: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return (x [T, C] of `dtype` for a product of ours, the squares that go with it, the whole stream).

    x is the normed stream, or with squares [T, P] a scaled one.
    """
    if stream.scaled is None:
        normed_TC, residual_TC = _norm(stream, norm_C, eps, dtype)
        return normed_TC, None, residual_TC
    assert stream.scaled.norm_C is norm_C, "the stream was scaled for another norm"
    return stream.scaled.x_TC, stream.scaled.squares_TP, stream.residual_TC


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
