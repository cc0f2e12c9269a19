"""The three ways in which a program multiplies rows of x by rows of a weight: in registers, by parts, by blocks.

"gemv" multiplies in float32 registers. "split" runs on the tensor cores, each warp a part of the inputs: one chain of
16 by 8 products would be as long as the inputs, and the other warps idle. Both have their first tile of the weight in
registers before they wait for x, the whole of it where inputs are few. "blocks" is for more rows, which share what is
read of the weight: a loop over the inputs on the tensor cores (`wgmma` from 64 rows a program on), some tiles on their
way; before it waits, it has the weight brought into the L2 cache.

All add up in float32. A norm before the tensor cores is rounded to the weight's dtype once more.

An RMS norm in front is computed in here, or in two places: x comes times the norm's weight, with the sum of squares of
each row in P parts, and since the factor of a row commutes with the product (FlashNorm, arXiv:2407.09577), what comes
out is multiplied by it (`squares_of`, `factor_of`).

Legend: T tokens (rows of x), I inputs, O outputs, P parts of a row's sum of squares.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def owned(ROWS: tl.constexpr, WAY: tl.constexpr):  # noqa: ANN201
    """Return (rows of x, block of the weight's rows) that this program owns.

    Programs that share a part of the weight stand next to each other, so that memory is asked for it once.
    """
    if WAY == "gemv":  # all rows; the grid's second axis would be too short for a vocabulary
        row, block = tl.arange(0, ROWS), tl.program_id(0)
    else:
        row, block = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
    return row, block


@triton.jit
def _columns(BLOCK_I: tl.constexpr, PARTS: tl.constexpr):
    """Return the inputs of a tile, [PARTS, 1, BLOCK_I / PARTS]."""
    PART: tl.constexpr = BLOCK_I // PARTS
    return tl.arange(0, PARTS)[:, None, None] * PART + tl.arange(0, PART)[None, None, :]


@triton.jit
def first_tile(  # noqa: ANN201
    weight,
    line,
    inside,
    INPUTS: tl.constexpr,
    BLOCK_I: tl.constexpr,
    PARTS: tl.constexpr,
    WAY: tl.constexpr,
    PDL: tl.constexpr,
):
    """Begin to read the weight's rows `line` before the wait, since nobody writes them.

    Return their first tile, [PARTS, BLOCK_O, BLOCK_I / PARTS]; None by blocks, where the cache gets them.
    """
    if WAY == "blocks":
        tile = None
        if PDL and tl.program_id(0) == 0:
            _bring_near(weight, tl.where(inside, line, 0), INPUTS)
    else:
        column = _columns(BLOCK_I, PARTS)
        source = weight + line.to(tl.int64)[None, :, None] * INPUTS + column
        mask = inside[None, :, None] & (column < INPUTS)
        tile = tl.load(source, mask=mask, other=0.0, eviction_policy="evict_first")
    return tile


@triton.jit
def _bring_near(weight, line, INPUTS: tl.constexpr):
    """Have up to 2,048 inputs of the rows `line` brought into the L2 cache, whose lines are 128 bytes, 64 inputs."""
    NEAR: tl.constexpr = min(2048, INPUTS)
    piece = tl.minimum(tl.arange(0, triton.next_power_of_2(triton.cdiv(NEAR, 64))) * 64, NEAR - 1)
    source = weight + line.to(tl.int64)[:, None] * INPUTS + piece[None, :]
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [source.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def first_values(  # noqa: ANN201
    x,
    row,
    rows,
    x_stride,
    INPUTS: tl.constexpr,
    BLOCK_I: tl.constexpr,
    PARTS: tl.constexpr,
    WAY: tl.constexpr,
):
    """Begin to read x's rows `row`; return their first inputs, [PARTS, ROWS, BLOCK_I / PARTS], or None if not by parts.

    They are asked for before a residual: the compiler moves that through shared memory to where the tensor cores have
    their results, as soon as it is loaded, and whatever is behind waits meanwhile.
    """
    if WAY == "split":
        column = _columns(BLOCK_I, PARTS)
        source = x + row.to(tl.int64)[None, :, None] * x_stride + column
        value = tl.load(source, mask=(row < rows)[None, :, None] & (column < INPUTS), other=0.0)
    else:
        value = None
    return value


@triton.jit
def squares_of(squares, row, rows, SQUARES: tl.constexpr):  # noqa: ANN201
    """Begin to read the SQUARES parts of each row's sum of squares, so that they are there when the product is."""
    part = tl.arange(0, triton.next_power_of_2(SQUARES))
    mask = (row < rows)[:, None] & (part < SQUARES)[None, :]
    return tl.load(squares + row.to(tl.int64)[:, None] * SQUARES + part[None, :], mask=mask, other=0.0)


@triton.jit
def factor_of(sums, eps, INPUTS: tl.constexpr):  # noqa: ANN201
    """Return the RMS norm's factor of each row by what `squares_of` read, [ROWS]."""
    return tl.rsqrt(tl.sum(sums, axis=1) / INPUTS + eps)


@triton.jit
def multiply(  # noqa: ANN201
    tile,
    value,
    x,
    norm,
    weight,
    row,
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
    STAGES: tl.constexpr,
    WAY: tl.constexpr,
    RUN: tl.constexpr,
    HAS_NORM: tl.constexpr,
):
    """Return x's rows `row` (or their RMS norm) times the weight's rows `line`, [ROWS, BLOCK_O].

    `tile` is the `first_tile` of these, `value` the `first_values` of those; BLOCK_I inputs are taken at a time. Rows
    from `rows` on count as zeros.
    """
    if WAY == "blocks":
        y = _by_blocks(
            x, norm, weight, row, line, line_inside, rows, x_stride, eps, INPUTS, ROWS, BLOCK_O, BLOCK_I, STAGES,
            HAS_NORM,
        )  # fmt: skip
    elif WAY == "split":
        y = _by_parts(
            tile, value, x, norm, weight, row, line, line_inside, rows, x_stride, eps, INPUTS, ROWS, BLOCK_O, BLOCK_I,
            PARTS, HAS_NORM,
        )  # fmt: skip
    else:
        y = _by_lanes(
            tile, x, norm, weight, row, line, line_inside, rows, x_stride, eps, INPUTS, ROWS, BLOCK_O, BLOCK_I, RUN,
            HAS_NORM,
        )  # fmt: skip
    return y


@triton.jit
def _by_blocks(
    x,
    norm,
    weight,
    row,
    line,
    line_inside,
    rows,
    x_stride,
    eps,
    INPUTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_NORM: tl.constexpr,
):
    """On the tensor cores: a loop over the inputs with STAGES tiles of both on their way."""
    EVEN: tl.constexpr = INPUTS % BLOCK_I == 0
    column = tl.arange(0, BLOCK_I)
    source = weight + line.to(tl.int64)[:, None] * INPUTS + column[None, :]
    x_source = x + row.to(tl.int64)[:, None] * x_stride + column[None, :]
    mask, x_mask = line_inside[:, None], (row < rows)[:, None]
    total = tl.zeros((ROWS, BLOCK_O), tl.float32)
    squares = tl.zeros((ROWS, BLOCK_I), tl.float32)
    for start in tl.range(0, INPUTS, BLOCK_I, num_stages=STAGES):
        inside = start + column < INPUTS
        if EVEN:
            tile = tl.load(source + start, mask=mask, other=0.0)
            value = tl.load(x_source + start, mask=x_mask, other=0.0)
        else:
            tile = tl.load(source + start, mask=mask & inside[None, :], other=0.0)
            value = tl.load(x_source + start, mask=x_mask & inside[None, :], other=0.0)
        if HAS_NORM:
            squares += value * value
            value = (value * tl.load(norm + start + column, mask=inside, other=0.0)[None, :]).to(tile.dtype)
        total = tl.dot(value, tl.trans(tile), total, input_precision="ieee")
    if HAS_NORM:
        total *= tl.rsqrt(tl.sum(squares, axis=1) / INPUTS + eps)[:, None]
    return total


@triton.jit
def _add_part(total, squares, tile, value, norm, column, INPUTS: tl.constexpr, HAS_NORM: tl.constexpr):
    """Return both sums with some inputs of x added, those from `column` on."""
    if HAS_NORM:
        squares += value * value
        value = (value * tl.load(norm + column, mask=column < INPUTS, other=0.0)).to(tile.dtype)
    return tl.dot(value, tl.permute(tile, (0, 2, 1)), total, input_precision="ieee"), squares


@triton.jit
def _by_parts(
    tile,
    value,
    x,
    norm,
    weight,
    row,
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
    column = _columns(BLOCK_I, PARTS)
    source = weight + line.to(tl.int64)[None, :, None] * INPUTS + column
    x_source = x + row.to(tl.int64)[None, :, None] * x_stride + column
    total = tl.zeros((PARTS, ROWS, BLOCK_O), tl.float32)
    squares = tl.zeros((PARTS, ROWS, BLOCK_I // PARTS), tl.float32)
    ahead_inside = line_inside[None, :, None] & (BLOCK_I + column < INPUTS)
    next_tile = tl.load(source + BLOCK_I, mask=ahead_inside, other=0.0, eviction_policy="evict_first")
    total, squares = _add_part(total, squares, tile, value, norm, column, INPUTS, HAS_NORM)
    for start in range(BLOCK_I, INPUTS, BLOCK_I):
        tile = next_tile
        ahead = start + BLOCK_I
        ahead_inside = line_inside[None, :, None] & (ahead + column < INPUTS)
        next_tile = tl.load(source + ahead, mask=ahead_inside, other=0.0, eviction_policy="evict_first")
        inside = start + column < INPUTS
        value = tl.load(x_source + start, mask=(row < rows)[None, :, None] & inside, other=0.0)
        total, squares = _add_part(total, squares, tile, value, norm, start + column, INPUTS, HAS_NORM)
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
    row,
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
