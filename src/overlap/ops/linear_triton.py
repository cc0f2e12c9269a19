"""Matrix products of 1 to 16 rows on CUDA, with what stands around them in a layer. Imported only where Triton is.

At so few rows a product is one reading of the weight, so all of this is about reading it early and in large pieces:
each program owns a few rows of the weight, loads its first tile *before* it waits for the kernel that makes x (weights
are never written), and loads each later tile one ahead. Norm before, residual or SiLU after cost nothing but arithmetic
there, and save a kernel and a round trip through memory each.

Two kernels. `_skinny_kernel` takes its first tile of the weight before it waits, the whole of it where inputs are few,
and multiplies either in float32 registers ("gemv") or on the tensor cores, each warp a part of the inputs ("split": one
chain of 16 by 8 products would be as long as the inputs, and the other warps idle). `_dot_kernel` runs on the tensor
cores over large weights, which are its left operand. All add up in float32 and round once, when the result is stored;
a norm before "split" is rounded to the weight's dtype once more, before the tensor cores.

Legend: T tokens (rows of x), I inputs, O outputs.
"""

from __future__ import annotations

from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from overlap.ops import launch_triton
from overlap.ops.linear_choice import Tiles, bucket

RUN: Final = 8
"""Inputs that one thread has side by side: 16 bytes."""


@triton.jit
def _silu(value):
    return value / (1.0 + tl.exp(-value))


@triton.jit
def _columns(BLOCK_I: tl.constexpr, PARTS: tl.constexpr):
    """Return the inputs of a tile, [PARTS, 1, BLOCK_I / PARTS]."""
    PART: tl.constexpr = BLOCK_I // PARTS
    return tl.arange(0, PARTS)[:, None, None] * PART + tl.arange(0, PART)[None, None, :]


@triton.jit
def first_tile(weight, line, inside, INPUTS: tl.constexpr, BLOCK_I: tl.constexpr, PARTS: tl.constexpr):  # noqa: ANN201
    """Load the first [PARTS, BLOCK_O, BLOCK_I / PARTS] of the weight's rows `line`: never written, so no wait."""
    column = _columns(BLOCK_I, PARTS)
    source = weight + line.to(tl.int64)[None, :, None] * INPUTS + column
    mask = inside[None, :, None] & (column < INPUTS)
    return tl.load(source, mask=mask, other=0.0, eviction_policy="evict_first")


@triton.jit
def multiply(  # noqa: ANN201
    tile,
    x,
    norm,
    weight,
    line,
    line_inside,
    rows,
    x_stride,
    eps,
    INPUTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    PARTS: tl.constexpr,
    RUN: tl.constexpr,
    HAS_NORM: tl.constexpr,
):
    """Return x (or its RMS norm) times the weight's rows `line`, [ROWS, BLOCK_O], given the `first_tile` of them."""
    if PARTS > 1:
        y = _by_parts(
            tile, x, norm, weight, line, line_inside, rows, x_stride, eps, INPUTS, ROWS, BLOCK_O, BLOCK_I, PARTS,
            HAS_NORM,
        )  # fmt: skip
    else:
        y = _by_lanes(
            tile, x, norm, weight, line, line_inside, rows, x_stride, eps, INPUTS, ROWS, BLOCK_O, BLOCK_I, RUN, HAS_NORM
        )
    return y


@triton.jit
def _by_parts(
    tile,
    x,
    norm,
    weight,
    line,
    line_inside,
    rows,
    x_stride,
    eps,
    INPUTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_NORM: tl.constexpr,
):
    """On the tensor cores: a warp multiplies its part of the inputs, and the parts are added up at the end."""
    row = tl.arange(0, ROWS)
    column = _columns(BLOCK_I, PARTS)
    source = weight + line.to(tl.int64)[None, :, None] * INPUTS + column
    x_source = x + row.to(tl.int64)[None, :, None] * x_stride + column
    total = tl.zeros((PARTS, ROWS, BLOCK_O), tl.float32)
    squares = tl.zeros((PARTS, ROWS, BLOCK_I // PARTS), tl.float32)
    for start in range(0, INPUTS, BLOCK_I):
        ahead = start + BLOCK_I
        ahead_inside = line_inside[None, :, None] & (ahead + column < INPUTS)
        next_tile = tl.load(source + ahead, mask=ahead_inside, other=0.0, eviction_policy="evict_first")
        inside = start + column < INPUTS
        value = tl.load(x_source + start, mask=(row < rows)[None, :, None] & inside, other=0.0)
        if HAS_NORM:
            squares += value * value
            value = (value * tl.load(norm + start + column, mask=inside, other=0.0)).to(tile.dtype)
        total = tl.dot(value, tl.permute(tile, (0, 2, 1)), total, input_precision="ieee")
        tile = next_tile
    y = tl.sum(total, axis=0)
    if HAS_NORM:
        y *= tl.rsqrt(tl.sum(tl.sum(squares, axis=2), axis=0) / INPUTS + eps)[:, None]
    return y


@triton.jit
def _by_lanes(
    tile,
    x,
    norm,
    weight,
    line,
    line_inside,
    rows,
    x_stride,
    eps,
    INPUTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    RUN: tl.constexpr,
    HAS_NORM: tl.constexpr,
):
    """In float32 registers."""
    row = tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_I)
    source = weight + line.to(tl.int64)[None, :, None] * INPUTS + column[None, None, :]
    x_source = x + row.to(tl.int64)[:, None, None] * x_stride + column[None, None, :]
    total = tl.zeros((ROWS, BLOCK_O, BLOCK_I // RUN), tl.float32)
    squares = tl.zeros((ROWS, 1, BLOCK_I), tl.float32)
    for start in range(0, INPUTS, BLOCK_I):
        ahead = start + BLOCK_I
        ahead_inside = line_inside[None, :, None] & (ahead + column < INPUTS)[None, None, :]
        next_tile = tl.load(source + ahead, mask=ahead_inside, other=0.0, eviction_policy="evict_first")
        inside = (start + column < INPUTS)[None, None, :]
        value = tl.load(x_source + start, mask=(row < rows)[:, None, None] & inside, other=0.0).to(tl.float32)
        if HAS_NORM:
            squares += value * value
            value *= tl.load(norm + start + column[None, None, :], mask=inside, other=0.0)
        product = tile.to(tl.float32) * value
        # A thread's run of inputs is added up in its registers; threads come together once, below.
        total += tl.sum(tl.reshape(product, (ROWS, BLOCK_O, BLOCK_I // RUN, RUN)), axis=3)
        tile = next_tile
    y = tl.sum(total, axis=2)
    if HAS_NORM:
        y *= tl.rsqrt(tl.sum(squares, axis=2) / INPUTS + eps)
    return y


# `rows` is not specialised: 1 and 16 would each be compiled anew. INPUTS is known so that a loop of one turn is none.
@triton.jit(do_not_specialize=["rows"])
def _skinny_kernel(
    x,
    norm,
    weight,
    bias,
    residual,
    out,
    best,
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
    RUN: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    GATED: tl.constexpr,
    GREEDY: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    program = tl.program_id(0)
    row = tl.arange(0, ROWS)
    line = tl.arange(0, BLOCK_O)
    # Gated, a tile has the gate's row and the up's row of one output side by side; `outputs` rows lie between them.
    if GATED:
        output = program * (BLOCK_O // 2) + line // 2
        line = output + (line % 2) * outputs
    else:
        output = program * BLOCK_O + line
        line = output
    tile = first_tile(weight, line, output < outputs, INPUTS, BLOCK_I, PARTS)
    if PDL:
        tl.extra.cuda.gdc_wait()
    y = multiply(
        tile,
        x,
        norm,
        weight,
        line,
        output < outputs,
        rows,
        x_stride,
        eps,
        INPUTS,
        ROWS,
        BLOCK_O,
        BLOCK_I,
        PARTS,
        RUN,
        HAS_NORM,
    )
    if HAS_BIAS:
        y += tl.load(bias + line, mask=output < outputs, other=0.0).to(tl.float32)[None, :]

    if GATED:
        gate, up = tl.split(tl.reshape(y, (ROWS, BLOCK_O // 2, 2)))
        y = _silu(gate) * up
        output = program * (BLOCK_O // 2) + tl.arange(0, BLOCK_O // 2)
    inside = (row < rows)[:, None] & (output < outputs)[None, :]
    place = row.to(tl.int64)[:, None]
    if HAS_RESIDUAL:
        y += tl.load(residual + place * residual_stride + output[None, :], mask=inside, other=0.0)
    if GREEDY:
        y = tl.where((output < outputs)[None, :], y, float("-inf"))
        highest = tl.max(y, axis=1)
        token = tl.min(tl.where(y == highest[:, None], output[None, :], 2147483647), axis=1)
        place = row.to(tl.int64) * tl.num_programs(0) + program
        tl.store(out + place, highest, mask=row < rows)
        tl.store(best + place, token, mask=row < rows)
    else:
        tl.store(out + place * outputs + output[None, :], y.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _dot_kernel(
    x,
    weight,
    bias,
    residual,
    out,
    best,
    rows,
    outputs,
    x_stride,
    residual_stride,
    INPUTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    STAGES: tl.constexpr,
    EVEN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
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
    if PDL:
        tl.extra.cuda.gdc_wait()

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
def _best_kernel(highest, best, tokens, parts, BLOCK: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, BLOCK)
    value = tl.load(highest + row * parts + part, mask=part < parts, other=float("-inf"))
    token = tl.load(best + row * parts + part, mask=part < parts, other=2147483647)
    tl.store(tokens + row, tl.min(tl.where(value == tl.max(value, axis=0), token, 2147483647), axis=0))


def linear(
    x_TI: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tiles: Tiles,
    *,
    norm: tuple[Tensor, float] | None = None,
    residual_TO: Tensor | None = None,
    gated: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return x W^T + b, [T, O], for x [T, I] and a contiguous weight; T is at most 16.

    `norm` is (weight [I] in float32, eps) of an RMS norm of x before the product; x is the float32 stream then,
    and the kernel not "dot". `residual_TO` (float32) is added to the result, which is float32 then. `gated`: the
    weight is [2O, I], and the result silu(first half) * second half. `dtype` is that of the result, else the weight's.
    """
    outputs = weight.shape[0] // 2 if gated else weight.shape[0]
    dtype = torch.float32 if residual_TO is not None else dtype or weight.dtype
    out_TO = torch.empty((x_TI.shape[0], outputs), dtype=dtype, device=x_TI.device)
    grid = triton.cdiv(weight.shape[0], tiles.block_o)
    _launch(x_TI, weight, bias, tiles, grid, norm, residual_TO, out_TO, out_TO, GATED=gated, GREEDY=False)
    return out_TO


def greedy(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, tiles: Tiles) -> Tensor:
    """Return the arg max of each row of x W^T + b in float32, the lowest of equals: int32 [T]. T is at most 16."""
    rows, parts = x_TI.shape[0], triton.cdiv(weight_OI.shape[0], tiles.block_o)
    highest = torch.empty((rows, parts), dtype=torch.float32, device=x_TI.device)
    best = torch.empty((rows, parts), dtype=torch.int32, device=x_TI.device)
    tokens = torch.empty(rows, dtype=torch.int32, device=x_TI.device)
    _launch(x_TI, weight_OI, bias_O, tiles, parts, None, None, highest, best, GATED=False, GREEDY=True)
    block = triton.next_power_of_2(parts)
    options: dict[str, Any] = launch_triton.early(x_TI.device)
    _best_kernel[(rows,)](highest, best, tokens, parts, BLOCK=block, num_warps=max(1, min(block // 256, 16)), **options)
    return tokens


def parts_of(tiles: Tiles, rows: int) -> dict[str, int]:
    """Return the constants PARTS and ROWS of a skinny kernel: a warp's part each, and the tensor cores' 16 rows."""
    return {"PARTS": tiles.warps, "ROWS": 16} if tiles.kernel == "split" else {"PARTS": 1, "ROWS": bucket(rows)}


def _launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tiles: Tiles,
    grid: int,
    norm: tuple[Tensor, float] | None,
    residual: Tensor | None,
    out: Tensor,
    best: Tensor,
    **flags: bool,
) -> None:
    """Start the kernel that `tiles` names. What is not there gets some other pointer, which is not followed."""
    rows, inputs = x.shape
    outputs = weight.shape[0] // 2 if flags["GATED"] else weight.shape[0]
    flags |= {"HAS_BIAS": bias is not None, "HAS_RESIDUAL": residual is not None}
    options: dict[str, Any] = {**flags, **launch_triton.early(x.device), "num_warps": tiles.warps}
    strides = (x.stride(0), 0 if residual is None else residual.stride(0))
    others = (weight if bias is None else bias, out if residual is None else residual)
    if tiles.kernel == "dot":
        assert norm is None  # `linear_choice` never asks for it
        _dot_kernel[(grid,)](
            x, weight, *others, out, best, rows, outputs, *strides,
            INPUTS=inputs, ROWS=max(8, bucket(rows)), BLOCK_O=tiles.block_o, BLOCK_I=tiles.block_i, STAGES=tiles.stages,
            EVEN=inputs % tiles.block_i == 0, **options,
        )  # fmt: skip
        return
    scale, eps = (weight, 0.0) if norm is None else norm
    _skinny_kernel[(grid,)](
        x, scale, weight, *others, out, best, rows, outputs, *strides, eps,
        INPUTS=inputs, BLOCK_O=tiles.block_o, BLOCK_I=tiles.block_i, RUN=RUN, **parts_of(tiles, rows),
        HAS_NORM=norm is not None, **options,
    )  # fmt: skip
