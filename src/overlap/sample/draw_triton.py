"""Drawing tokens in two sweeps over the logits (and the search of a filter). Imported only where Triton is.

The first kernel finds the peak of each part of each row, and with it the greedy token; the second adds the noise of
`philox_triton` to the scaled logits and takes the best. Each row is cut into parts, so that one row fills the GPU too.
The maximum must be known before the second sweep: `(logits - max) / temperature` is rounded twice, and no single sweep
rounds so. By the second the logits are in the L2 cache.

The noise lies between -2.82 and 22.88, and the peak itself has a scaled logit of 0. So a token more than 26 under the
peak cannot win, and a tile with none above that (most tiles, once a filter is asked for) costs no noise.

Legend: E emitting rows, V vocabulary.
"""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from overlap.ops import launch_triton
from overlap.sample import truncate_triton
from overlap.sample.philox_triton import noise_of, row_bits
from overlap.sample.row_triton import (
    MOST_PARTS,
    best_key,
    best_of,
    best_token,
    is_last,
    key_value,
    order_key,
    pack_best,
    scaled,
)
from overlap.sample.truncate_triton import begin_search, border_of, survivors
from overlap.state.rows import SlotRows

_TILE: Final = 1024
_PROGRAMS: Final = 264
"""How many programs to cut a step into, where its rows alone are fewer: two for each SM of an H100 or H200."""
_LOWEST_KEY: Final = tl.constexpr(-0x80000000)
_NO_TOKEN: Final = tl.constexpr(0x7FFFFFFF)
_HOPELESS: Final = tl.constexpr(-26.0)


@triton.jit(do_not_specialize=["parts", "tiles"])
def _peaks_kernel(
    logits,
    stride,
    size,
    parts,
    tiles,
    slots,
    temperature,
    top_k,
    top_p,
    peaks,
    state,
    arrivals,
    TRUNCATED: tl.constexpr,
    TILE: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    first = part * tiles * TILE
    end = tl.minimum(first + tiles * TILE, size)
    highest = tl.full((TILE,), _LOWEST_KEY, dtype=tl.int32)
    winner = tl.full((TILE,), _NO_TOKEN, dtype=tl.int32)
    while first < end:
        token = first + tl.arange(0, TILE)
        key = order_key(tl.load(logits + row * stride + token, mask=token < end, other=-float("inf")).to(tl.float32))
        better = (key > highest) & (token < end)
        highest = tl.where(better, key, highest)
        winner = tl.where(better, token, winner)
        first += TILE
    tl.store(peaks + row * parts + part, tl.max(pack_best(highest, winner)))
    if part == 0:
        tl.store(arrivals + row, 0)
        if TRUNCATED:
            slot = tl.load(slots + row)
            heat, k, p = tl.load(temperature + slot), tl.load(top_k + slot), tl.load(top_p + slot)
            begin_search(state, row, heat, k, p, size)


@triton.jit(do_not_specialize=["parts", "tiles"])
def _draw_kernel(
    logits,
    stride,
    size,
    parts,
    tiles,
    slots,
    positions,
    temperature,
    min_p,
    seed_lo,
    seed_hi,
    peaks,
    state,
    arrivals,
    bests,
    tokens,
    TRUNCATED: tl.constexpr,
    TILE: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    slot = tl.load(slots + row)
    heat = tl.load(temperature + slot)
    peak_best = best_of(peaks, row, parts)
    peak = key_value(best_key(peak_best))
    broken = peak - peak != 0
    if heat > 0:
        low, high, position = tl.load(seed_lo + slot), tl.load(seed_hi + slot), tl.load(positions + row)
        first = part * tiles * TILE
        end = tl.minimum(first + tiles * TILE, size)
        if TRUNCATED:
            least_p = tl.load(min_p + slot)
            near, far, limit = border_of(state, row)
        highest = tl.full((TILE,), _LOWEST_KEY, dtype=tl.int32)
        winner = tl.full((TILE,), _NO_TOKEN, dtype=tl.int32)
        while first < end:
            token = first + tl.arange(0, TILE)
            value = scaled(tl.load(logits + row * stride + token, mask=token < end, other=-float("inf")), peak, heat)
            if TRUNCATED:
                value = tl.where(survivors(value, token, near, far, limit, least_p), value, -float("inf"))
            if (tl.max(tl.where(value != value, 0.0, value)) > _HOPELESS) | broken:
                bits = row_bits(low, high, position, first // 4, TILE // 4)
                key = order_key(noise_of(bits) + value)
                better = (key > highest) & (token < end)
                highest = tl.where(better, key, highest)
                winner = tl.where(better, token, winner)
            first += TILE
        tl.store(bests + row * parts + part, tl.max(pack_best(highest, winner)))
        if is_last(arrivals, row, parts):
            token = best_token(best_of(bests, row, parts))
            if TRUNCATED:  # as the reference: no filter keeps anything of logits that are not finite
                token = tl.where(broken | (token >= size), 0, token)
            tl.store(tokens + row, token)
    elif part == 0:
        tl.store(tokens + row, best_token(peak_best))


def draw(logits_EV: Tensor, rows: SlotRows, emit_slots: Tensor, emit_positions: Tensor, truncated: bool) -> Tensor:
    """Return the token of each emitting row, int64 [E]: what `sampler.sample_all` returns, in 2 launches (or 18).

    `logits` is float32 or bfloat16 [E, V], its rows dense (bfloat16 is computed in float32); `emit_slots` and
    `emit_positions` are int32 [E]. Rows whose slot has a temperature of 0 take the most likely token, the lowest id of
    equals. `truncated` says whether any row may use top-k, top-p or min-p: without it they are not looked at.
    The random bits are those of `philox.random_bits`; temperatures, filters and seeds are read by slot in the kernels.
    """
    num_rows, size = logits_EV.shape
    tokens = torch.empty(num_rows, dtype=torch.int64, device=logits_EV.device)
    if num_rows == 0:
        return tokens
    assert logits_EV.stride(1) == 1 or size == 1
    num_parts, part_size = parts = cut(num_rows, size)
    peaks, bests = tokens.new_empty((2, num_rows, num_parts))
    state = tokens.new_empty((num_rows, truncate_triton.STATE))
    arrivals = torch.empty(num_rows, dtype=torch.int32, device=logits_EV.device)
    options = launch_triton.early(logits_EV.device)
    columns = (rows.temperature, rows.top_k, rows.top_p)
    sweep = (logits_EV, logits_EV.stride(0), size, num_parts, part_size // _TILE, emit_slots)
    grid = (num_rows, num_parts)
    _peaks_kernel[grid](
        *sweep, *columns, peaks, state, arrivals,
        TRUNCATED=truncated, TILE=_TILE, num_warps=4, **options,
    )  # fmt: skip
    if truncated:
        truncate_triton.narrow(logits_EV, parts, emit_slots, columns, peaks, state, arrivals, options)
    _draw_kernel[grid](
        *sweep, emit_positions, rows.temperature, rows.min_p, rows.seed_lo, rows.seed_hi, peaks, state, arrivals,
        bests, tokens,
        TRUNCATED=truncated, TILE=_TILE, num_warps=4, **options,
    )  # fmt: skip
    return tokens


def cut(num_rows: int, size: int) -> tuple[int, int]:
    """Return into how many parts to cut each of some rows of `size` logits, and the tokens of a part: whole tiles."""
    wanted = min(MOST_PARTS, triton.cdiv(size, _TILE), triton.cdiv(_PROGRAMS, num_rows))
    part_size = triton.cdiv(triton.cdiv(size, wanted), _TILE) * _TILE
    return triton.cdiv(size, part_size), part_size
