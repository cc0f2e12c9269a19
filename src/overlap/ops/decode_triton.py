"""Attention of decode rows over paged KV in one Triton kernel: split over the SMs, put together by whoever ends last.

The keys of a row and key head are cut into blocks, which take turns over as many programs as the device has room for.
Of several programs the last to end, told by a counter, adds the parts up, all at once, so there is no second kernel.
The query heads of a key head, and as many positions of a verify as a program takes (`Cut.queries`), share one tile of
queries, so where rows are many a row's KV is read once however many drafts it verifies. (Split keys: Flash-Decoding,
Dao et al. 2023; the counter in place of a second kernel: stream-K, Osama et al. 2023.)

At few rows all of this is waiting for one answer of the memory after another: how long the row is, which page, its
keys. So a program asks for its first pages before it knows the length, for keys and values at once, and always for a
block ahead, in registers, and the pages of the one behind that. (Triton does not pipeline loads whose place is loaded.)
And it asks for its first block before it waits for the kernel in front (`launch_triton`): of all that it reads, only
the queries and the keys and values of this step's own positions come from there, and it asks for those behind the wait.

Legend: N rows, J positions of each, H query heads, K key/value heads, G = H / K, D head size, L = J * G padded,
M = L padded for the tensor cores.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import torch
import triton
import triton.language as tl
from torch import Tensor

from overlap.cache.pages import PAGE
from overlap.ops import launch_triton
from overlap.schedule.plan import STRIP, STRIPS

_SMS: Final = 132
"""SMs of the GPUs that `cut_of` was measured on."""


@dataclass(frozen=True, slots=True)
class Cut:
    """How the kernel cuts the keys."""

    programs: int
    """Programs at most, if splitting makes them, on 132 SMs."""
    block_n: int
    """Keys that a program takes at a time."""
    warps: int
    ahead: bool = True
    """Whether a program asks for the next block before it works on one: worth its registers where programs are few."""
    queries: int = 32
    """Queries that a program takes at most, if one position has no more; the positions of a row share programs."""
    keys: int = 0
    """Keys for which a row is given one program more, a multiple of `block_n`; 0 for that."""
    splits: int = 32
    """Programs of a row and key head at most."""


def cut_of(pairs: int, head_dim: int, queries: int) -> Cut:
    """Return the cut for so many rows times key heads, and so many queries of each (`python bench/attention.py`)."""
    if head_dim > 128:
        return Cut(264, 32, 4, ahead=False, queries=16)
    if queries <= 8:
        cuts = _DECODE_64 if head_dim <= 64 else _DECODE_128
    else:
        cuts = _VERIFY_64 if head_dim <= 64 else _VERIFY_128
    return next(cut for most, cut in cuts if pairs <= most)


_Cuts: TypeAlias = tuple[tuple[int, Cut], ...]
_ANY: Final = 1 << 31
# Rows are of different lengths. Where each has one program, the longest would be read by it alone in the end: so long
# rows get several, of which those of short rows end at once. (`python bench/in_step.py --part attention`)
_DECODE_64: Final[_Cuts] = (
    (6, Cut(264, 64, 2)),
    (36, Cut(132, 128, 8)),
    (64, Cut(528, 64, 2)),
    (256, Cut(528, 128, 4, ahead=False)),
    (_ANY, Cut(_ANY, 128, 4, ahead=False, keys=1024, splits=4)),
)
_DECODE_128: Final[_Cuts] = (
    (16, Cut(264, 64, 4)),
    (64, Cut(132, 128, 8)),
    (256, Cut(_ANY, 64, 4, keys=512, splits=4)),
    (_ANY, Cut(_ANY, 64, 4, ahead=False, keys=4096, splits=4)),
)
_VERIFY_64: Final[_Cuts] = ((6, Cut(264, 64, 2, queries=4)), *_DECODE_64[1:])
_VERIFY_128: Final[_Cuts] = (
    (16, Cut(264, 64, 4, queries=8)),
    (64, Cut(132, 128, 8)),
    (_ANY, Cut(_ANY, 64, 4, ahead=False, keys=512, splits=4)),
)
"""(Rows times key heads up to which a cut is the best, the cut), for up to 8 queries of each and for more."""
_LINE_BYTES: Final = 128
_SCRATCH: Final = 1 << 24
"""Numbers of all parts at most."""


@triton.jit
def _ask_page(table, token, most_pages, PAGE_TOKENS: tl.constexpr):
    """Return the pages of some tokens, past the row's last one, too: those entries are pages as well."""
    return tl.load(table + token // PAGE_TOKENS, mask=token < most_pages * PAGE_TOKENS, other=0)


@triton.jit
def _ask_block(
    kv, page, token, begin, end, page_stride, side_stride, token_stride, D: tl.constexpr, BLOCK_D: tl.constexpr,
    PAGE_TOKENS: tl.constexpr, FRESH: tl.constexpr,
):  # fmt: skip
    """Return keys and values [BLOCK_N, D] of the tokens from `begin` on in front of `end`, zeros for others.

    FRESH ones are fetched past the L1 cache, whose lines may be older than the wait.
    """
    CACHE: tl.constexpr = ".cg" if FRESH else ""
    column = tl.arange(0, BLOCK_D)
    place = page.to(tl.int64) * page_stride + (token % PAGE_TOKENS) * token_stride
    inside = ((token >= begin) & (token < end))[:, None] & (column < D)[None, :]
    keys = tl.load(kv + place[:, None] + column[None, :], mask=inside, other=0.0, cache_modifier=CACHE)
    source = kv + (place + side_stride)[:, None] + column[None, :]
    values = tl.load(source, mask=inside, other=0.0, cache_modifier=CACHE)
    return keys, values


@triton.jit
def _take_block(value, highest, total, query, keys, values, token, limit_M, scale):
    """Return (weighted sum of values [M, D], highest score [M], sum of weights [M]) with these keys, too."""
    score = tl.dot(query, tl.trans(keys), input_precision="ieee") * scale
    score = tl.where(token[None, :] < limit_M[:, None], score, float("-inf"))
    above = tl.maximum(highest, tl.max(score, axis=1))
    base = tl.where(above == float("-inf"), 0.0, above)
    weight = tl.exp2(score - base[:, None])
    shrink = tl.exp2(highest - base)
    total = total * shrink + tl.sum(weight, axis=1)
    value = value * shrink[:, None] + tl.dot(weight.to(values.dtype), values, input_precision="ieee")
    return value, above, total


@triton.jit
def _add_parts(parts, peaks, sums, unit, active, L: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr):
    """Return (weighted sum of values [L, D], sum of weights [L]) of all parts of what one program would do."""
    line, column, split = tl.arange(0, L), tl.arange(0, BLOCK_D), tl.arange(0, SPLITS)[:, None]
    place = (unit * SPLITS + split) * L + line
    there = split < active
    source = parts + place[:, :, None] * BLOCK_D + column[None, None, :]
    value = tl.load(source, mask=there[:, :, None], other=0.0, cache_modifier=".cg")
    peak = tl.load(peaks + place, mask=there, other=float("-inf"), cache_modifier=".cg")
    total = tl.load(sums + place, mask=there, other=0.0, cache_modifier=".cg")
    top = tl.max(peak, axis=0)
    weight = tl.exp2(peak - tl.where(top == float("-inf"), 0.0, top))
    return tl.sum(weight[:, :, None] * value, axis=0), tl.sum(weight * total, axis=0)


@triton.jit
def _store_answer(
    out, value, total, line, lines, first_head, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK_D)
    head = first_head + line // GROUP * (KV_HEADS * GROUP) + line % GROUP
    answer = value / tl.where(total > 0.0, total, 1.0)[:, None]
    inside = (line < lines)[:, None] & (column < D)[None, :]
    tl.store(out + head[:, None] * D + column[None, :], answer.to(out.dtype.element_ty), mask=inside)


# Not specialised on the layer: 0 and multiples of 16 would each be compiled anew.
@triton.jit(do_not_specialize=["layer", "most_pages", "table_stride", "width"])
def _decode_kernel(
    q, kv, table, lengths, out, parts, peaks, sums, counters, layer, most_pages, table_stride, page_stride, scale,
    width, GROUP: tl.constexpr, WIDTH: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    L: tl.constexpr, M: tl.constexpr, BLOCK_N: tl.constexpr, KEYS: tl.constexpr, SPLITS: tl.constexpr,
    PAGE_TOKENS: tl.constexpr, AHEAD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """`width` is the positions of a row; a program takes WIDTH of them."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        if not AHEAD:
            tl.extra.cuda.gdc_wait()
    unit, split = tl.program_id(0), tl.program_id(1)
    turns = tl.cdiv(width, WIDTH)
    pair, first = unit // turns, unit % turns * WIDTH
    row, kv_head = pair // KV_HEADS, pair % KV_HEADS
    told = tl.load(lengths + row)
    table += row.to(tl.int64) * table_stride
    token = split * BLOCK_N + tl.arange(0, BLOCK_N)
    if AHEAD:
        page = _ask_page(table, token, most_pages, PAGE_TOKENS)
    length = tl.minimum(told, most_pages * PAGE_TOKENS)
    active = tl.maximum(tl.minimum(tl.cdiv(length, KEYS), SPLITS), 1)
    stride = active * BLOCK_N
    token_stride = KV_HEADS * D
    side_stride = PAGE_TOKENS * token_stride
    kv += layer.to(tl.int64) * (2 * side_stride) + kv_head * D
    if AHEAD:
        known = tl.where(split < active, tl.minimum(told - width, length), 0)  # in front of this step's own positions
        old_keys, old_values = _ask_block(
            kv, page, token, 0, known, page_stride, side_stride, token_stride, D, BLOCK_D, PAGE_TOKENS, False
        )
        if PDL:
            tl.extra.cuda.gdc_wait()

    line, lines = tl.arange(0, M), tl.minimum(width - first, WIDTH) * GROUP
    column = tl.arange(0, BLOCK_D)
    first_head = (row * width + first).to(tl.int64) * (KV_HEADS * GROUP) + kv_head * GROUP
    head = first_head + line // GROUP * (KV_HEADS * GROUP) + line % GROUP
    inside = (line < lines)[:, None] & (column < D)[None, :]
    query = tl.load(q + head[:, None] * D + column[None, :], mask=inside, other=0.0)

    if split < active:
        limit_M = tl.minimum(told - (width - 1) + first + line // GROUP, length)
        highest = tl.full((M,), float("-inf"), tl.float32)
        total = tl.zeros((M,), tl.float32)
        value = tl.zeros((M, BLOCK_D), tl.float32)
        if AHEAD:
            keys, values = _ask_block(
                kv, page, token, known, length, page_stride, side_stride, token_stride, D, BLOCK_D, PAGE_TOKENS, True
            )
            keys, values = keys + old_keys, values + old_values  # one of the two is zero
            next_page = _ask_page(table, token + stride, most_pages, PAGE_TOKENS)
            for _ in tl.range(split * BLOCK_N, length, stride, num_stages=1):
                next_token = token + stride
                next_keys, next_values = _ask_block(
                    kv, next_page, next_token, 0, length, page_stride, side_stride, token_stride, D, BLOCK_D,
                    PAGE_TOKENS, False,
                )  # fmt: skip
                next_page = _ask_page(table, next_token + stride, most_pages, PAGE_TOKENS)
                value, highest, total = _take_block(value, highest, total, query, keys, values, token, limit_M, scale)
                keys, values, token = next_keys, next_values, next_token
        else:
            for start in tl.range(split * BLOCK_N, length, stride, num_stages=3):
                block_token = start + tl.arange(0, BLOCK_N)
                block_page = tl.load(table + block_token // PAGE_TOKENS, mask=block_token < length, other=0)
                keys, values = _ask_block(
                    kv, block_page, block_token, 0, length, page_stride, side_stride, token_stride, D, BLOCK_D,
                    PAGE_TOKENS, False,
                )  # fmt: skip
                value, highest, total = _take_block(
                    value, highest, total, query, keys, values, block_token, limit_M, scale
                )
        if active == 1:
            _store_answer(out, value, total, line, lines, first_head, KV_HEADS, GROUP, D, BLOCK_D)
        else:
            place = (unit * SPLITS + split) * L + line
            tl.store(peaks + place, highest, mask=line < L)
            tl.store(sums + place, total, mask=line < L)
            tl.store(parts + place[:, None] * BLOCK_D + column[None, :], value, mask=(line < L)[:, None])
            tl.debug_barrier()  # all threads of the program have stored before one of them counts it
            if tl.atomic_add(counters + unit, 1, sem="acq_rel") == active - 1:
                sum_LD, total_L = _add_parts(parts, peaks, sums, unit, active, L, BLOCK_D, SPLITS)
                _store_answer(out, sum_LD, total_L, tl.arange(0, L), lines, first_head, KV_HEADS, GROUP, D, BLOCK_D)
                tl.store(counters + unit, 0)


class DecodeKernel:
    """The kernel and its scratch memory: one a lane, since two steps that run at once must not share it."""

    def __init__(self, kv: Tensor, num_heads: int, max_rows: int, max_width: int = 1, cut: Cut | None = None) -> None:
        """`kv` is [pages, layers, 2, PAGE, K, D], contiguous, with G <= 64. Takes steps of up to `max_rows` rows.

        `max_width` is the most positions of a row. Short steps fit in any case. `cut` is for all steps; None takes what
        is best for each.
        """
        self._kv = kv
        self._num_kv_heads, self._head_dim = kv.shape[4], kv.shape[5]
        self._group = num_heads // self._num_kv_heads
        self._whole_lines = kv.stride(3) * kv.element_size() % _LINE_BYTES == 0  # a token's keys are
        self._block_d = max(16, triton.next_power_of_2(self._head_dim))
        self._limits = (max_rows, max_width), (STRIPS[-1], STRIP)
        self._sms = torch.cuda.get_device_properties(kv.device).multi_processor_count if kv.is_cuda else _SMS
        self._cut = cut
        units = lines = 1
        sizes = {
            (rows, width) for most, wide in self._limits for rows in range(1, most + 1) for width in range(1, wide + 1)
        }
        for rows, width in sizes:
            _, at_once, splits, each = self._cut_for(rows, width, self._sms)
            if splits > 1:
                needed = rows * self._num_kv_heads * -(-width // at_once)
                units, lines = max(units, needed), max(lines, needed * splits * each)
        self._counters = torch.zeros(units, dtype=torch.int32, device=kv.device)
        self._peaks = torch.empty(lines, dtype=torch.float32, device=kv.device)
        self._sums = torch.empty_like(self._peaks)
        self._parts = torch.empty(lines * self._block_d, dtype=torch.float32, device=kv.device)

    def attend(
        self,
        layer: int,
        q_THD: Tensor,
        page_table: Tensor,
        lengths: Tensor,
        out_THD: Tensor,
        width: int = 1,
        sms: int = 0,
        *,
        strips: bool = False,
    ) -> None:
        """Write softmax(q k / sqrt(D)) v of N rows of `width` positions into `out_THD` [N * width, H, D], contiguous.

        `lengths` int32 [N] counts a row's tokens with its last position; one past `page_table` [N, P] sees what is
        there. `q_THD` is contiguous. `sms` is how many SMs there are to fill, 0 for all. With `strips` rows may read
        what others of them write in this step: so nothing is read before that is there.
        """
        num_rows, kv = len(lengths), self._kv
        assert any(num_rows <= most and width <= wide for most, wide in self._limits)
        cut, at_once, splits, lines = self._cut_for(num_rows, width, sms or self._sms)
        options: dict[str, Any] = launch_triton.early(kv.device)
        # Behind an early start old keys are read before new ones are there: no cache line must have both.
        ahead = cut.ahead and not strips and (self._whole_lines or not options["PDL"])
        _decode_kernel[(num_rows * self._num_kv_heads * -(-width // at_once), splits)](
            q_THD, kv, page_table, lengths, out_THD, self._parts, self._peaks, self._sums, self._counters, layer,
            page_table.shape[1], page_table.stride(0), kv.stride(0), self._head_dim**-0.5 * 1.4426950408889634, width,
            GROUP=self._group, WIDTH=at_once, KV_HEADS=self._num_kv_heads, D=self._head_dim, BLOCK_D=self._block_d,
            L=lines, M=max(16, lines), BLOCK_N=cut.block_n, KEYS=cut.keys or cut.block_n, SPLITS=splits,
            PAGE_TOKENS=PAGE, AHEAD=ahead, num_warps=cut.warps, **options,
        )  # fmt: skip

    def _cut_for(self, num_rows: int, width: int, sms: int) -> tuple[Cut, int, int, int]:
        """Return (the cut, a program's positions, into how many parts its keys are cut at most, its lines)."""
        pairs = num_rows * self._num_kv_heads
        cut = self._cut or cut_of(pairs, self._head_dim, width * self._group)
        turns = -(-width // max(1, cut.queries // self._group))
        at_once = -(-width // turns)  # as many in each turn
        lines = 1 << (at_once * self._group - 1).bit_length()
        # So many that all parts are added up in one go, in registers.
        most = 2048 * cut.warps // (lines * self._block_d), _SCRATCH // (pairs * turns * lines * self._block_d)
        splits = min(cut.splits, cut.programs * sms // (_SMS * pairs), *most)
        return cut, at_once, 1 << (max(1, splits).bit_length() - 1), lines
