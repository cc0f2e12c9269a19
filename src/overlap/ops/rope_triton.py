"""Rope and the write of keys and values in one Triton kernel. Imported only where Triton is; see `ops.rope`."""

from __future__ import annotations

from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from overlap.cache.pages import PAGE
from overlap.ops import launch_triton

_HEADS_A_PROGRAM: Final = 4


# Not specialised on the layer: 0, 1 and multiples of 16 would each be compiled anew, in the middle of a step.
@triton.jit(do_not_specialize=["layer"])
def _rope_and_write_kernel(
    qkv,
    positions,
    table,
    kv,
    kv_index,
    q_out,
    head_norm,
    row_stride,
    layer,
    layers,
    eps,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    HAS_NORM: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()  # only now: attention reads old keys before it waits (`launch_triton`)
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS_BLOCK + tl.arange(0, HEADS_BLOCK)[:, None]
    column = tl.arange(0, HALF_BLOCK)[None, :]
    inside = (head < HEADS + 2 * KV_HEADS) & (column < HALF)
    source = qkv + token * row_stride + head * (2 * HALF) + column
    first = tl.load(source, mask=inside, other=0.0)
    second = tl.load(source + HALF, mask=inside, other=0.0)
    turn = table + tl.load(positions + token).to(tl.int64) * (2 * HALF) + column
    cos = tl.load(turn, mask=column < HALF, other=0.0)
    sin = tl.load(turn + HALF, mask=column < HALF, other=0.0)
    wide_first, wide_second = first.to(tl.float32), second.to(tl.float32)
    turns = head < HEADS + KV_HEADS
    if HAS_NORM:
        squares = tl.sum(wide_first * wide_first + wide_second * wide_second, axis=1) / (2 * HALF)
        scale = tl.rsqrt(squares + eps)[:, None]
        factor = head_norm + head * (2 * HALF) + column
        wide_first *= scale * tl.load(factor, mask=inside & turns, other=0.0)
        wide_second *= scale * tl.load(factor + HALF, mask=inside & turns, other=0.0)
    first = tl.where(turns, (wide_first * cos - wide_second * sin).to(first.dtype), first)
    second = tl.where(turns, (wide_second * cos + wide_first * sin).to(second.dtype), second)

    is_q = inside & (head < HEADS)
    target = q_out + (token * HEADS + head) * (2 * HALF) + column
    tl.store(target, first, mask=is_q)
    tl.store(target + HALF, second, mask=is_q)

    index = tl.load(kv_index + token)
    is_kv = inside & (head >= HEADS) & (index >= 0)
    side = tl.where(turns, 0, 1)
    kv_head = head - HEADS - side * KV_HEADS
    page = (index // PAGE_TOKENS).to(tl.int64)
    block = (page * layers + layer) * 2 + side
    place = (block * PAGE_TOKENS + index % PAGE_TOKENS) * KV_HEADS + kv_head
    target = kv + place * (2 * HALF) + column
    tl.store(target, first, mask=is_kv)
    tl.store(target + HALF, second, mask=is_kv)


def rope_and_write(
    qkv_TX: Tensor,
    positions_T: Tensor,
    table: Tensor,
    kv: Tensor,
    layer: int,
    kv_index_T: Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_norm_ND: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """See `ops.rope.rope_and_write`."""
    options: dict[str, Any] = launch_triton.early(qkv_TX.device)
    tokens, head_dim = qkv_TX.shape[0], table.shape[1]
    q_THD = torch.empty((tokens, num_heads, head_dim), dtype=qkv_TX.dtype, device=qkv_TX.device)
    _rope_and_write_kernel[(tokens, triton.cdiv(num_heads + 2 * num_kv_heads, _HEADS_A_PROGRAM))](
        qkv_TX,
        positions_T,
        table,
        kv,
        kv_index_T,
        q_THD,
        table if head_norm_ND is None else head_norm_ND,
        qkv_TX.stride(0),
        layer,
        kv.shape[1],
        eps,
        HEADS=num_heads,
        KV_HEADS=num_kv_heads,
        HALF=head_dim // 2,
        PAGE_TOKENS=PAGE,
        HEADS_BLOCK=_HEADS_A_PROGRAM,
        HALF_BLOCK=triton.next_power_of_2(head_dim // 2),
        HAS_NORM=head_norm_ND is not None,
        num_warps=1 if head_dim <= 128 else 2,
        **options,
    )
    return q_THD
