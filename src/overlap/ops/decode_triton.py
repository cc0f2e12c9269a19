"""Attention of decode rows over paged KV in one Triton kernel: split over the SMs, put together by whoever ends last.

The keys of a row and key head are cut into parts of at least BLOCK_N, as many as the device has room for; each program
takes one part. Of several the last to end, told by a counter, adds the parts up, so there is no second kernel. All
positions of a verify and all query heads of a key head share one tile of queries, so a row's KV is read once however
many drafts it verifies. (Split keys: Flash-Decoding, Dao et al. 2023; the counter in place of a second kernel:
stream-K, Osama et al. 2023.)

Legend: N rows, J positions of each, H query heads, K key/value heads, G = H / K, D head size, M = J * G padded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from overlap.cache.pages import PAGE
from overlap.ops import launch_triton

MAX_QUERIES: Final = 64
"""The most J * G of one tile."""
_MAX_SPLITS: Final = 32


@dataclass(frozen=True, slots=True)
class Cut:
    """How the kernel cuts the keys."""

    programs: int = 528
    """Programs at most, if splitting makes them: a few for each SM."""
    block_n: int = 64
    """Keys that a program takes at a time."""
    stages: int = 3
    """Blocks in flight."""
    warps: int = 4


@triton.jit
def _attended(
    query, kv, table, first, end, limit_M, layer_offset, page_stride, side_stride, token_stride, scale,
    M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PAGE_TOKENS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Return (weighted sum of values [M, D], highest score [M], sum of weights [M]) over the keys first to end."""
    column = tl.arange(0, BLOCK_D)
    highest = tl.full((M,), float("-inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    value = tl.zeros((M, BLOCK_D), tl.float32)
    for start in tl.range(first, end, BLOCK_N, num_stages=STAGES):
        token = start + tl.arange(0, BLOCK_N)
        inside = token < end
        page = tl.load(table + token // PAGE_TOKENS, mask=inside, other=0).to(tl.int64)
        place = page * page_stride + layer_offset + (token % PAGE_TOKENS) * token_stride
        whole = inside[:, None] & (column < D)[None, :]
        keys = tl.load(kv + place[:, None] + column[None, :], mask=whole, other=0.0)
        values = tl.load(kv + (place + side_stride)[:, None] + column[None, :], mask=whole, other=0.0)
        score = tl.dot(query, tl.trans(keys), input_precision="ieee") * scale
        score = tl.where(token[None, :] < tl.minimum(limit_M, end)[:, None], score, float("-inf"))
        above = tl.maximum(highest, tl.max(score, axis=1))
        base = tl.where(above == float("-inf"), 0.0, above)
        weight = tl.exp2(score - base[:, None])
        shrink = tl.exp2(highest - base)
        total = total * shrink + tl.sum(weight, axis=1)
        value = value * shrink[:, None] + tl.dot(weight.to(values.dtype), values, input_precision="ieee")
        highest = above
    return value, highest, total


@triton.jit
def _store_answer(out, value, total, query_place, query_inside, D: tl.constexpr, BLOCK_D: tl.constexpr):
    column = tl.arange(0, BLOCK_D)
    answer = value / tl.where(total > 0.0, total, 1.0)[:, None]
    inside = query_inside[:, None] & (column < D)[None, :]
    tl.store(out + query_place[:, None] + column[None, :], answer.to(out.dtype.element_ty), mask=inside)


# Not specialised on the layer: 0 and multiples of 16 would each be compiled anew.
@triton.jit(do_not_specialize=["layer", "most_pages", "table_stride"])
def _decode_kernel(
    q, kv, table, lengths, out, parts, peaks, sums, counters, layer, most_pages, table_stride, page_stride, scale,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    M: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr, PAGE_TOKENS: tl.constexpr, STAGES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    pair, split = tl.program_id(0), tl.program_id(1)
    row, kv_head = pair // KV_HEADS, pair % KV_HEADS
    told = tl.load(lengths + row)
    length = tl.minimum(told, most_pages * PAGE_TOKENS)
    share = tl.cdiv(tl.cdiv(length, SPLITS), BLOCK_N) * BLOCK_N
    active = tl.maximum(tl.cdiv(length, tl.maximum(share, 1)), 1)

    if split < active:
        line = tl.arange(0, M)
        position, head = line // GROUP, kv_head * GROUP + line % GROUP
        query_inside = line < WIDTH * GROUP
        query_place = ((row * WIDTH + position).to(tl.int64) * (KV_HEADS * GROUP) + head) * D
        column = tl.arange(0, BLOCK_D)
        query = tl.load(
            q + query_place[:, None] + column[None, :],
            mask=query_inside[:, None] & (column < D)[None, :],
            other=0.0,
        )
        limit_M = told - (WIDTH - 1) + position
        token_stride = KV_HEADS * D
        side_stride = PAGE_TOKENS * token_stride
        value, highest, total = _attended(
            query, kv, table + row.to(tl.int64) * table_stride, split * share, tl.minimum((split + 1) * share, length),
            limit_M, layer * (2 * side_stride) + kv_head * D, page_stride, side_stride, token_stride, scale,
            M, BLOCK_N, D, BLOCK_D, PAGE_TOKENS, STAGES,
        )  # fmt: skip
        if active == 1:
            _store_answer(out, value, total, query_place, query_inside, D, BLOCK_D)
        else:
            place = (pair * SPLITS + split) * M + line
            tl.store(peaks + place, highest)
            tl.store(sums + place, total)
            tl.store(parts + place[:, None] * BLOCK_D + column[None, :], value)
            tl.debug_barrier()  # all threads of the program have stored before one of them counts it
            if tl.atomic_add(counters + pair, 1, sem="acq_rel") == active - 1:
                top = tl.full((M,), float("-inf"), tl.float32)
                for other in range(active):
                    place = (pair * SPLITS + other) * M + line
                    top = tl.maximum(top, tl.load(peaks + place, cache_modifier=".cg"))
                top = tl.where(top == float("-inf"), 0.0, top)
                total = tl.zeros((M,), tl.float32)
                value = tl.zeros((M, BLOCK_D), tl.float32)
                for other in range(active):
                    place = (pair * SPLITS + other) * M + line
                    weight = tl.exp2(tl.load(peaks + place, cache_modifier=".cg") - top)
                    total += weight * tl.load(sums + place, cache_modifier=".cg")
                    part = tl.load(parts + place[:, None] * BLOCK_D + column[None, :], cache_modifier=".cg")
                    value += weight[:, None] * part
                _store_answer(out, value, total, query_place, query_inside, D, BLOCK_D)
                tl.store(counters + pair, 0)


class DecodeKernel:
    """The kernel and its scratch memory: one a lane, since two steps that run at once must not share it."""

    def __init__(self, kv: Tensor, num_heads: int, max_rows: int, max_width: int = 1, cut: Cut | None = None) -> None:
        """`kv` is [pages, layers, 2, PAGE, K, D], contiguous. Takes steps of up to `max_rows` rows."""
        self._kv = kv
        self._num_heads = num_heads
        num_kv_heads, head_dim = kv.shape[4], kv.shape[5]
        self._group = num_heads // num_kv_heads
        self._most = max_rows, max_width
        self._cut = cut or Cut()
        many = [rows * num_kv_heads for rows in range(1, max_rows + 1) if self._splits(rows * num_kv_heads) > 1]
        most = max((pairs * self._splits(pairs) for pairs in many), default=1)  # one part needs no adding up
        lines = most * self._tile(min(max_width, MAX_QUERIES // self._group))
        self._counters = torch.zeros(max_rows * num_kv_heads, dtype=torch.int32, device=kv.device)
        self._peaks = torch.empty(lines, dtype=torch.float32, device=kv.device)
        self._sums = torch.empty_like(self._peaks)
        self._parts = torch.empty(lines * triton.next_power_of_2(head_dim), dtype=torch.float32, device=kv.device)

    @property
    def nbytes(self) -> int:
        """Bytes of device memory."""
        return self._counters.nbytes + 2 * self._peaks.nbytes + self._parts.nbytes

    def takes(self, num_rows: int, width: int) -> bool:
        """Whether it can run a step of so many rows with so many positions each."""
        return num_rows <= self._most[0] and width <= self._most[1] and width * self._group <= MAX_QUERIES

    def _tile(self, width: int) -> int:
        return max(16, 1 << (width * self._group - 1).bit_length())

    def attend(
        self, layer: int, q_THD: Tensor, page_table: Tensor, lengths: Tensor, out_THD: Tensor, width: int = 1
    ) -> None:
        """Write softmax(q k / sqrt(D)) v of N rows of `width` positions into `out_THD` [N * width, H, D], contiguous.

        `lengths` int32 [N] counts a row's tokens with its last position; one past `page_table` [N, P] sees what is
        there. `q_THD` is contiguous.
        """
        num_rows, (_, _, _, _, num_kv_heads, head_dim) = len(lengths), self._kv.shape
        pairs, tile = num_rows * num_kv_heads, self._tile(width)
        splits = self._splits(pairs)
        options: dict[str, Any] = launch_triton.early(self._kv.device)
        _decode_kernel[(pairs, splits)](
            q_THD, self._kv, page_table, lengths, out_THD, self._parts, self._peaks, self._sums, self._counters,
            layer, page_table.shape[1], page_table.stride(0), self._kv.stride(0), head_dim**-0.5 * 1.4426950408889634,
            GROUP=self._group, WIDTH=width, KV_HEADS=num_kv_heads, D=head_dim,
            BLOCK_D=max(16, triton.next_power_of_2(head_dim)), M=tile, BLOCK_N=self._cut.block_n, SPLITS=splits,
            PAGE_TOKENS=PAGE, STAGES=self._cut.stages, num_warps=self._cut.warps, **options,
        )  # fmt: skip

    def _splits(self, pairs: int) -> int:
        """Return into how many parts the keys of each row and key head are cut at most: a power of two."""
        return max(1, min(_MAX_SPLITS, 1 << (max(1, self._cut.programs // pairs).bit_length() - 1)))
