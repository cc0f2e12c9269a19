"""Top-k and top-p with no sort: a search for each row's border. Imported only where Triton is; see `sampler.truncate`.

The tokens that a filter keeps are those above some border value, and of the tokens at the border the lowest ids. With
`distance` d (int32, smaller is more likely) and weights as in `sampler` (whole numbers, so sums are exact in any
order), the border of top-k is the largest x with "fewer than k tokens are nearer than x", that of top-p the largest x
with "what is nearer than x weighs less than p of all". Both are true up to some x and false behind it, so each launch
cuts the bracket [low, high) into 16, counts and weighs up to each cut, and keeps the piece in which the answer changes:
at most 8 launches a filter for 31 bits, fewer where one token is left. A row with both filters does top-k first, and
top-p then within what that kept. The programs of a row each sum over their part; the last to end decides.

The weights use `exp` of libdevice, which is also what torch's own kernel compiles to on CUDA. Should the two ever
differ in a last bit, a border of top-p or min-p can move by tokens whose sums of weights lie within 2**-22 of it.
"""

from __future__ import annotations

from typing import Any, Final

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from overlap.sample.row_triton import MOST_PARTS, best_key, best_of, distance, is_last, key_value, scaled

CUTS: Final = 16
MOST_STEPS: Final = 16
"""Launches that settle any row: 16**8 is more than all distances, for top-k and then for top-p."""
STATE: Final = 8
"""Columns of a row's search state, int64; see `begin_search`."""
_TILE: Final = 512
_WARPS: Final = 8
_CUTS: Final = tl.constexpr(CUTS)
_MOST_PARTS: Final = tl.constexpr(MOST_PARTS)
_STATE: Final = tl.constexpr(STATE)
_BEYOND: Final = tl.constexpr(0x7F800001)
"""One behind the largest distance, that of -inf."""
_DONE: Final = tl.constexpr(0)
_TOP_K: Final = tl.constexpr(1)
_TOP_P: Final = tl.constexpr(2)
_WEIGHT_ONE: Final = tl.constexpr(2.0**40)


@triton.jit
def begin_search(state, row, temperature, top_k, top_p, size) -> None:
    """Write a row's search state: [filter, low, high, tokens nearer than low, their weight, weight of all, id limit].

    When the filter is `_DONE`, the tokens nearer than `low` stay, and those nearer than `high` with an id under the
    limit. A weight of -1 is not known yet.
    """
    here = state + row * _STATE
    wanted = tl.where((top_k > 0) & (top_k < size), _TOP_K, tl.where(top_p < 1, _TOP_P, _DONE))
    wanted = tl.where(temperature > 0, wanted, _DONE)
    tl.store(here, wanted.to(tl.int64))
    tl.store(here + 1, tl.where(wanted == _DONE, _BEYOND, 0).to(tl.int64))
    tl.store(here + 2, _BEYOND)
    tl.store(here + 3, 0)
    tl.store(here + 4, 0)
    tl.store(here + 5, -1)
    tl.store(here + 6, size.to(tl.int64))


@triton.jit
def border_of(state, row) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Return a searched row's (low, high, id limit); see `begin_search`."""
    here = state + row * _STATE
    return tl.load(here + 1).to(tl.int32), tl.load(here + 2).to(tl.int32), tl.load(here + 6).to(tl.int32)


@triton.jit
def survivors(value, token, low, high, limit, min_p) -> tl.tensor:
    """Return which tokens with these scaled values the filters keep, for a row with this border."""
    far = distance(value)
    return ((far < low) | ((far < high) & (token < limit))) & (libdevice.exp(value) >= min_p)


@triton.jit(do_not_specialize=["parts", "tiles"])
def _narrow_kernel(
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
    sums,
    TILE: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    here = state + row * _STATE
    doing = tl.load(here)
    if doing != _DONE:
        peak = key_value(best_key(best_of(peaks, row, parts)))
        if peak - peak == 0:  # no filter is asked of logits that are not finite: `draw_triton` gives such a row 0
            slot = tl.load(slots + row)
            low, high = tl.load(here + 1).to(tl.int32), tl.load(here + 2).to(tl.int32)
            heat = tl.load(temperature + slot)
            cut = tl.minimum(low + (tl.arange(0, _CUTS) + 1) * ((high - low + _CUTS - 1) // _CUTS), high)
            values = logits + row * stride
            first = part * tiles * TILE
            end = tl.minimum(first + tiles * TILE, size)
            count, weight = _sums_up_to(values, first, end, peak, heat, low, high, cut, TILE)
            line = tl.arange(0, _CUTS)
            mine = sums + (row * parts + part) * (2 * _CUTS)
            tl.store(mine + line, count)
            tl.store(mine + _CUTS + line, weight)
            if is_last(arrivals, row, parts):
                each = tl.arange(0, _MOST_PARTS)[:, None]
                all_parts = sums + (row * parts + each) * (2 * _CUTS) + line[None, :]
                held = (each < parts) & (line[None, :] < _CUTS)
                count = tl.sum(tl.load(all_parts, mask=held, other=0, cache_modifier=".cg"), axis=0)
                weight = tl.sum(tl.load(all_parts + _CUTS, mask=held, other=0, cache_modifier=".cg"), axis=0)
                k, p = tl.load(top_k + slot), tl.load(top_p + slot)
                _decide(here, doing, low, cut, count, weight, k, p, values, size, peak, heat, TILE)


@triton.jit
def _sums_up_to(values, first, end, peak, heat, low, high, cut, TILE: tl.constexpr):
    """Return how many tokens from `low` up to each cut there are in a part, and their weights: int64 [CUTS] each."""
    counts = tl.zeros((_CUTS, TILE), dtype=tl.int32)
    weights = tl.zeros((_CUTS, TILE), dtype=tl.int64)
    while first < end:
        token = first + tl.arange(0, TILE)
        value = scaled(tl.load(values + token, mask=token < end, other=-float("inf")), peak, heat)
        far = distance(value)
        inside = (token < end) & (far >= low) & (far < high)
        if tl.max(inside.to(tl.int32)) > 0:  # after some cuts most tiles have nothing in the bracket
            weight = (libdevice.exp(value) * _WEIGHT_ONE).to(tl.int64)
            nearer = inside[None, :] & (far[None, :] < cut[:, None])
            counts += nearer.to(tl.int32)
            weights += tl.where(nearer, weight[None, :], 0)
        first += TILE
    return tl.sum(counts.to(tl.int64), axis=1), tl.sum(weights, axis=1)


@triton.jit
def _decide(here, doing, low, cut, count, weight, k, p, values, size, peak, heat, TILE: tl.constexpr):
    """Keep the piece of the bracket in which the answer changes; end the filter where one value is left."""
    line = tl.arange(0, _CUTS)
    nearer, lighter = tl.load(here + 3), tl.load(here + 4)
    count += nearer
    weight += lighter
    whole = tl.load(here + 5)
    whole = tl.where(whole < 0, tl.max(weight), whole)
    target = p.to(tl.float64) * whole.to(tl.float64)
    true = tl.where(doing == _TOP_K, count < k, weight.to(tl.float64) < target)
    kept = tl.minimum(tl.sum(true.to(tl.int32)), _CUTS - 1)
    below, above = line == kept - 1, line == kept
    nearer = tl.where(kept > 0, tl.sum(tl.where(below, count, 0)), nearer)
    lighter = tl.where(kept > 0, tl.sum(tl.where(below, weight, 0)), lighter)
    new_low = tl.where(kept > 0, tl.sum(tl.where(below, cut, 0)), low)
    new_high = tl.sum(tl.where(above, cut, 0))
    ties = tl.sum(tl.where(above, count, 0)) - nearer
    heavier = tl.sum(tl.where(above, weight, 0))
    limit = size.to(tl.int64)
    ended = (ties == 1) | (new_high - new_low == 1)
    after = doing
    if ended:
        if doing == _TOP_K:  # all at the border stay
            after = tl.where(p < 1, _TOP_P, _DONE).to(tl.int64)
            new_low = tl.where(p < 1, 0, new_high)
            nearer = nearer * 0
            lighter = lighter * 0
            whole = whole * 0 - 1  # weighed anew: what top-k left out is behind `high`
        else:
            after = doing * 0
            room = _room(lighter, (heavier - lighter) // tl.maximum(ties, 1), ties, target)
            if room < ties:
                limit = _id_limit(values, size, peak, heat, new_low, new_high, room, TILE)
    else:
        whole = tl.where(doing == _TOP_K, -1, whole).to(tl.int64)
    tl.debug_barrier()  # no thread may still have to read what the next lines overwrite
    tl.store(here, after)
    tl.store(here + 1, new_low.to(tl.int64))
    tl.store(here + 2, new_high.to(tl.int64))
    tl.store(here + 3, nearer)
    tl.store(here + 4, lighter)
    tl.store(here + 5, whole)
    tl.store(here + 6, limit)


@triton.jit
def _room(lighter, each, ties, target):
    """Return how many of equal tokens top-p keeps: those before which less than the target lies, and at least 1."""
    least = tl.full((), 1, dtype=tl.int64)
    most = ties
    while least < most:
        middle = (least + most + 1) // 2
        fits = (lighter + (middle - 1) * each).to(tl.float64) < target
        least = tl.where(fits, middle, least)
        most = tl.where(fits, most, middle - 1)
    return least


@triton.jit
def _id_limit(values, size, peak, heat, low, high, room, TILE: tl.constexpr):
    """Return one behind the id of the `room`-th token at the border. Rare, so one program reads the row for it."""
    limit = tl.full((), 0, dtype=tl.int64)
    left = room
    first = 0
    while left > 0:
        token = first + tl.arange(0, TILE)
        far = distance(scaled(tl.load(values + token, mask=token < size, other=-float("inf")), peak, heat))
        at_border = ((token < size) & (far >= low) & (far < high)).to(tl.int32)
        found = tl.sum(at_border).to(tl.int64)
        here = at_border * (tl.cumsum(at_border, axis=0) == left).to(tl.int32)
        limit = tl.where(found >= left, tl.max(here * (token + 1)).to(tl.int64), limit)
        left -= found
        first += TILE
    return limit


def narrow(
    logits_EV: Tensor,
    parts: tuple[int, int],
    slots: Tensor,
    columns: tuple[Tensor, Tensor, Tensor],
    peaks: Tensor,
    state: Tensor,
    arrivals: Tensor,
    options: dict[str, Any],
) -> None:
    """Bring the search state of every row to its end: `MOST_STEPS` launches, each one short for rows that are done.

    `parts` is (programs a row, tokens a program); `columns` are temperature, top_k and top_p by slot; `peaks` int64
    [E, parts] and `state` int64 [E, STATE] come from `draw_triton`, `arrivals` is int32 [E] of zeros.
    """
    rows, size = logits_EV.shape
    num_parts, part_size = parts
    sums = state.new_empty((rows, num_parts, 2, CUTS))
    for _ in range(MOST_STEPS):
        _narrow_kernel[(rows, num_parts)](
            logits_EV,
            logits_EV.stride(0),
            size,
            num_parts,
            part_size // _TILE,
            slots,
            *columns,
            peaks,
            state,
            arrivals,
            sums,
            TILE=_TILE,
            num_warps=_WARPS,
            **options,
        )
