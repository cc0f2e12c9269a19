"""Matrix products of 1 to 256 rows on CUDA, with what stands around them in a layer. Imported only where Triton is.

At few rows a product is one reading of the weight, and at some more it is still over as soon as it has begun. So all of
this is about reading the weight early: each program owns a few rows of it and begins to read them *before* it waits for
the kernel that makes x (weights are never written). Norm before, residual or SiLU after cost little but arithmetic
there, and save a kernel and a round trip through memory each.

Where every program would have to norm all of x, the norm is done in two places instead: the product in front, which has
the new residual stream in registers, writes it times the norm's weight, and each program the sum of squares of its
outputs (`linear_add`); the product behind multiplies its result by what they say of each row.

Two kernels. `_linear_kernel` multiplies in one of three ways (`ops.multiply_triton`); `_dot_kernel` runs on the tensor
cores over large weights, which are its left operand, for up to 16 rows. All add up in float32 and round once, when the
result is stored.

Legend: T tokens (rows of x), I inputs, O outputs, P parts of a row's sum of squares.
"""

from __future__ import annotations

from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from overlap.ops import launch_triton
from overlap.ops.linear_choice import Tiles
from overlap.ops.multiply_triton import factor_of, first_tile, first_values, multiply, owned, squares_of

_RUN: Final = 8
"""Inputs that one thread of "gemv" has side by side: 16 bytes."""


@triton.jit
def _silu(value):
    return value / (1.0 + tl.exp(-value))


# `rows` is not specialised: 1 and 16 would each be compiled anew. INPUTS is known so that a loop of one turn is none.
@triton.jit(do_not_specialize=["rows"])
def _linear_kernel(
    x,
    norm,
    squares,
    weight,
    bias,
    residual,
    next_norm,
    out,
    best,
    scaled,
    next_squares,
    rows,
    outputs,
    x_stride,
    residual_stride,
    eps,
    INPUTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    PARTS: tl.constexpr,
    STAGES: tl.constexpr,
    WAY: tl.constexpr,
    RUN: tl.constexpr,
    HAS_NORM: tl.constexpr,
    SQUARES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_NEXT_NORM: tl.constexpr,
    GATED: tl.constexpr,
    GREEDY: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    row, block = owned(ROWS, WAY)
    line = tl.arange(0, BLOCK_O)
    # Gated, a tile has the gate's row and the up's row of one output side by side; `outputs` rows lie between them.
    if GATED:
        output = block * (BLOCK_O // 2) + line // 2
        line = output + (line % 2) * outputs
        result = block * (BLOCK_O // 2) + tl.arange(0, BLOCK_O // 2)
    else:
        output = block * BLOCK_O + line
        line = output
        result = output
    tile = first_tile(weight, line, output < outputs, INPUTS, BLOCK_I, PARTS, WAY, PDL)
    if HAS_NEXT_NORM:
        next_factor = tl.load(next_norm + result, mask=result < outputs, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()

    inside = (row < rows)[:, None] & (result < outputs)[None, :]
    place = row.to(tl.int64)[:, None]
    if SQUARES:
        sums = squares_of(squares, row, rows, SQUARES)
    value = first_values(x, row, rows, x_stride, INPUTS, BLOCK_I, PARTS, WAY)
    if HAS_RESIDUAL:  # on its way while the product is computed
        added = tl.load(residual + place * residual_stride + result[None, :], mask=inside, other=0.0)
    y = multiply(
        tile, value, x, norm, weight, row, line, output < outputs, rows, x_stride, eps, INPUTS, ROWS, BLOCK_O, BLOCK_I,
        PARTS, STAGES, WAY, RUN, HAS_NORM,
    )  # fmt: skip
    if SQUARES:
        y *= factor_of(sums, eps, INPUTS)[:, None]
    if HAS_BIAS:
        y += tl.load(bias + line, mask=output < outputs, other=0.0).to(tl.float32)[None, :]

    if GATED:
        gate, up = tl.split(tl.reshape(y, (ROWS, BLOCK_O // 2, 2)))
        y = _silu(gate) * up
    if HAS_RESIDUAL:
        y += added
    if HAS_NEXT_NORM:
        ready = (y * next_factor[None, :]).to(scaled.dtype.element_ty)
        tl.store(scaled + place * outputs + result[None, :], ready, mask=inside)
        summed = tl.sum(tl.where((result < outputs)[None, :], y * y, 0.0), axis=1)
        tl.store(next_squares + row.to(tl.int64) * tl.cdiv(outputs, BLOCK_O) + block, summed, mask=row < rows)
    if GREEDY:
        y = tl.where((result < outputs)[None, :], y, float("-inf"))
        highest = tl.max(y, axis=1)
        token = tl.min(tl.where(y == highest[:, None], result[None, :], 2147483647), axis=1)
        place = row.to(tl.int64) * tl.cdiv(outputs, BLOCK_O) + block
        tl.store(out + place, highest, mask=row < rows)
        tl.store(best + place, token, mask=row < rows)
    else:
        tl.store(out + place * outputs + result[None, :], y.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _dot_kernel(
    x,
    squares,
    weight,
    bias,
    residual,
    next_norm,
    out,
    best,
    scaled,
    next_squares,
    rows,
    outputs,
    x_stride,
    residual_stride,
    eps,
    INPUTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    STAGES: tl.constexpr,
    EVEN: tl.constexpr,
    SQUARES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_NEXT_NORM: tl.constexpr,
    GATED: tl.constexpr,
    GREEDY: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    program = tl.program_id(0)
    row = tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_I)
    line = tl.arange(0, BLOCK_O)
    if GATED:
        output = program * (BLOCK_O // 2) + line // 2
        line = output + (line % 2) * outputs
    else:
        output = program * BLOCK_O + line
        line = output
    line_inside = (output < outputs)[:, None]
    source = weight + line.to(tl.int64)[:, None] * INPUTS + column[None, :]
    tile = tl.load(source, mask=line_inside & (column < INPUTS)[None, :], other=0.0, eviction_policy="evict_first")
    if HAS_NEXT_NORM:
        next_factor = tl.load(next_norm + output, mask=output < outputs, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()

    if SQUARES:
        sums = squares_of(squares, row, rows, SQUARES)
    row_inside = (row < rows)[None, :]
    x_source = x + row.to(tl.int64)[None, :] * x_stride + column[:, None]
    value = tl.load(x_source, mask=row_inside & (column < INPUTS)[:, None], other=0.0)
    total = tl.dot(tile, value)
    for start in tl.range(BLOCK_I, INPUTS, BLOCK_I, num_stages=STAGES):
        if EVEN:
            tile = tl.load(source + start, mask=line_inside, other=0.0, eviction_policy="evict_first")
            value = tl.load(x_source + start, mask=row_inside, other=0.0)
        else:
            inside = start + column < INPUTS
            tile = tl.load(source + start, mask=line_inside & inside[None, :], other=0.0, eviction_policy="evict_first")
            value = tl.load(x_source + start, mask=row_inside & inside[:, None], other=0.0)
        total = tl.dot(tile, value, total)
    if SQUARES:
        total *= factor_of(sums, eps, INPUTS)[None, :]
    if HAS_BIAS:
        total += tl.load(bias + line, mask=output < outputs, other=0.0).to(tl.float32)[:, None]

    if GATED:
        gate, up = tl.split(tl.permute(tl.reshape(total, (BLOCK_O // 2, 2, ROWS)), (0, 2, 1)))
        total = _silu(gate) * up
        output = program * (BLOCK_O // 2) + tl.arange(0, BLOCK_O // 2)
    inside = (output < outputs)[:, None] & (row < rows)[None, :]
    place = row.to(tl.int64)[None, :]
    if HAS_RESIDUAL:
        total += tl.load(residual + place * residual_stride + output[:, None], mask=inside, other=0.0)
    if HAS_NEXT_NORM:
        ready = (total * next_factor[:, None]).to(scaled.dtype.element_ty)
        tl.store(scaled + place * outputs + output[:, None], ready, mask=inside)
        summed = tl.sum(tl.where((output < outputs)[:, None], total * total, 0.0), axis=0)
        tl.store(next_squares + row.to(tl.int64) * tl.num_programs(0) + program, summed, mask=row < rows)
    if GREEDY:
        total = tl.where((output < outputs)[:, None], total, float("-inf"))
        highest = tl.max(total, axis=0)
        token = tl.min(tl.where(total == highest[None, :], output[:, None], 2147483647), axis=0)
        place = row.to(tl.int64) * tl.num_programs(0) + program
        tl.store(out + place, highest, mask=row < rows)
        tl.store(best + place, token, mask=row < rows)
    else:
        tl.store(out + place * outputs + output[:, None], total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _best_kernel(highest, best, ids, tokens, parts, BLOCK: tl.constexpr, HAS_IDS: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, BLOCK)
    value = tl.load(highest + row * parts + part, mask=part < parts, other=float("-inf"))
    token = tl.load(best + row * parts + part, mask=part < parts, other=2147483647)
    token = tl.min(tl.where(value == tl.max(value, axis=0), token, 2147483647), axis=0)
    if HAS_IDS:
        token = tl.load(ids + token)
    tl.store(tokens + row, token)


def linear(
    x_TI: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tiles: Tiles,
    *,
    norm: tuple[Tensor, float] | None = None,
    squares: tuple[Tensor, float] | None = None,
    residual_TO: Tensor | None = None,
    gated: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return x W^T + b, [T, O], for x [T, I] and a contiguous weight; T is at most 16 for "gemv" and "dot".

    `norm` is (weight [I] in float32, eps) of an RMS norm of x before the product; x is the float32 stream then,
    and the kernel not "dot". `squares` is (squares [T, P], eps) of an RMS norm, and x the `scaled` that `linear_add`
    returned with these squares. `residual_TO` (float32) is added to the result, which is float32 then. `gated`: the
    weight is [2O, I], and the result silu(first half) * second half. `dtype` is that of the result, else the weight's.
    """
    outputs = weight.shape[0] // 2 if gated else weight.shape[0]
    dtype = torch.float32 if residual_TO is not None else dtype or weight.dtype
    out_TO = torch.empty((x_TI.shape[0], outputs), dtype=dtype, device=x_TI.device)
    _launch(x_TI, weight, bias, tiles, out_TO, norm=norm, squares=squares, residual=residual_TO, GATED=gated)
    return out_TO


def linear_add(
    x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, tiles: Tiles, residual_TO: Tensor, next_norm_O: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (stream, scaled, squares): `linear` with a residual, made ready for the RMS norm that comes next.

    The stream is float32 [T, O]; `scaled`, of the weight's dtype, is it times that norm's weight; `squares` (float32
    [T, P]) has each row's sum of squares of the stream in P parts, one a block of outputs.
    """
    rows, outputs = x_TI.shape[0], weight_OI.shape[0]
    out_TO = torch.empty((rows, outputs), dtype=torch.float32, device=x_TI.device)
    scaled_TO = torch.empty_like(out_TO, dtype=weight_OI.dtype)
    squares_TP = torch.empty((rows, tiles.blocks(outputs)), dtype=torch.float32, device=x_TI.device)
    ahead = (next_norm_O, scaled_TO, squares_TP)
    _launch(x_TI, weight_OI, bias_O, tiles, out_TO, residual=residual_TO, ahead=ahead)
    return out_TO, scaled_TO, squares_TP


def greedy(
    x_TI: Tensor,
    weight_OI: Tensor,
    bias_O: Tensor | None,
    tiles: Tiles,
    *,
    norm: tuple[Tensor, float] | None = None,
    ids_O: Tensor | None = None,
) -> Tensor:
    """Return the arg max of each row of x W^T + b in float32, the lowest of equals: int32 [T]. T as for `linear`.

    `norm` is as for `linear`. With `ids_O` (int32) it is the id of the output in place of its place.
    """
    rows, parts = x_TI.shape[0], tiles.blocks(weight_OI.shape[0])
    highest = torch.empty((rows, parts), dtype=torch.float32, device=x_TI.device)
    best = torch.empty((rows, parts), dtype=torch.int32, device=x_TI.device)
    tokens = torch.empty(rows, dtype=torch.int32, device=x_TI.device)
    _launch(x_TI, weight_OI, bias_O, tiles, highest, norm=norm, best=best)
    block = triton.next_power_of_2(parts)
    options: dict[str, Any] = launch_triton.early(x_TI.device)
    options |= {"BLOCK": block, "HAS_IDS": ids_O is not None, "num_warps": max(1, min(block // 256, 16))}
    _best_kernel[(rows,)](highest, best, best if ids_O is None else ids_O, tokens, parts, **options)
    return tokens


def cut(tiles: Tiles, lines: int, rows: int) -> tuple[tuple[int, ...], dict[str, Any]]:
    """Return the grid and the constants with which `ops.multiply_triton` cuts a weight of `lines` rows, and x."""
    blocks, size = tiles.blocks(lines), tiles.program_rows(rows)
    constants = {
        "ROWS": size,
        "BLOCK_O": tiles.block_o,
        "BLOCK_I": tiles.block_i,
        "PARTS": tiles.warps if tiles.kernel == "split" else 1,
        "STAGES": tiles.stages,
        "WAY": tiles.kernel,
        "RUN": _RUN,
        "num_warps": tiles.warps,
    }
    return (blocks,) if tiles.kernel == "gemv" else (triton.cdiv(rows, size), blocks), constants


def _launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tiles: Tiles,
    out: Tensor,
    *,
    norm: tuple[Tensor, float] | None = None,
    squares: tuple[Tensor, float] | None = None,
    residual: Tensor | None = None,
    best: Tensor | None = None,
    ahead: tuple[Tensor, Tensor, Tensor] | None = None,
    GATED: bool = False,
) -> None:
    """Start the kernel that `tiles` names. What is not there gets some other pointer, which is not followed."""
    assert norm is None or squares is None  # a norm is done in one place or in two
    rows, inputs = x.shape
    outputs = weight.shape[0] // 2 if GATED else weight.shape[0]
    options: dict[str, Any] = {
        "SQUARES": 0 if squares is None else squares[0].shape[1],
        "HAS_BIAS": bias is not None,
        "HAS_RESIDUAL": residual is not None,
        "HAS_NEXT_NORM": ahead is not None,
        "GATED": GATED,
        "GREEDY": best is not None,
        **launch_triton.early(x.device),
    }
    factor, eps = norm or squares or (weight, 0.0)
    next_norm, scaled, next_squares = ahead or (out, out, out)
    read = (weight, weight if bias is None else bias, out if residual is None else residual, next_norm)
    written = (out, out if best is None else best, scaled, next_squares)
    sizes = (rows, outputs, x.stride(0), 0 if residual is None else residual.stride(0), eps)
    if tiles.kernel == "dot":
        assert norm is None  # `linear_choice` never asks for it
        _dot_kernel[(tiles.blocks(weight.shape[0]),)](
            x, factor, *read, *written, *sizes,
            INPUTS=inputs, ROWS=max(8, tiles.program_rows(rows)), BLOCK_O=tiles.block_o, BLOCK_I=tiles.block_i,
            STAGES=tiles.stages, EVEN=inputs % tiles.block_i == 0, num_warps=tiles.warps, **options,
        )  # fmt: skip
        return
    grid, constants = cut(tiles, weight.shape[0], rows)
    _linear_kernel[grid](
        x, factor, factor, *read, *written, *sizes,
        INPUTS=inputs, HAS_NORM=norm is not None, **constants, **options,
    )  # fmt: skip
