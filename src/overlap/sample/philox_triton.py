"""Gumbel noise from Philox in one Triton kernel. Imported only where Triton is; see `sample.philox`."""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from overlap.sample.philox import LARGEST, MULTIPLIERS, ROUNDS, WEYL

_BLOCKS_A_PROGRAM: Final = 256


@triton.jit
def _gumbel_kernel(
    seed_lo,
    seed_hi,
    positions,
    base,
    out,
    base_stride,
    size,
    HAS_BASE: tl.constexpr,
    ONLY_BITS: tl.constexpr,
    ROUNDS_: tl.constexpr,
    MULTIPLIER_0: tl.constexpr,
    MULTIPLIER_1: tl.constexpr,
    WEYL_0: tl.constexpr,
    WEYL_1: tl.constexpr,
    LARGEST_: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    low = tl.load(seed_lo + row).to(tl.uint32, bitcast=True)
    high = tl.load(seed_hi + row).to(tl.uint32, bitcast=True)
    nothing = tl.zeros((BLOCK,), dtype=tl.uint32)
    a = block.to(tl.uint32)
    b = nothing + tl.load(positions + row).to(tl.uint32, bitcast=True)
    c = nothing
    d = nothing
    multiplier_0 = tl.full((BLOCK,), MULTIPLIER_0, dtype=tl.uint32)
    multiplier_1 = tl.full((BLOCK,), MULTIPLIER_1, dtype=tl.uint32)
    weyl_0 = tl.full((), WEYL_0, dtype=tl.uint32)
    weyl_1 = tl.full((), WEYL_1, dtype=tl.uint32)
    for _ in tl.static_range(ROUNDS_):
        upper_a, upper_c = tl.umulhi(a, multiplier_0), tl.umulhi(c, multiplier_1)
        lower_a, lower_c = a * multiplier_0, c * multiplier_1
        a, b, c, d = upper_c ^ b ^ low, lower_c, upper_a ^ d ^ high, lower_a
        low += weyl_0
        high += weyl_1
    bits = tl.interleave(tl.interleave(a, c), tl.interleave(b, d))
    token = tl.program_id(1) * (4 * BLOCK) + tl.arange(0, 4 * BLOCK)
    inside = token < size
    target = out + row * size + token
    if ONLY_BITS:
        tl.store(target, bits.to(tl.int64), mask=inside)
    else:
        uniform = tl.minimum((bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10, LARGEST_)  # 2**-32
        noise = -libdevice.log(-libdevice.log1p(-uniform))
        if HAS_BASE:
            noise += tl.load(base + row * base_stride + token, mask=inside, other=0.0)
        tl.store(target, noise, mask=inside)


def gumbel(seed_lo: Tensor, seed_hi: Tensor, positions: Tensor, size: int, base: Tensor | None = None) -> Tensor:
    """See `sample.philox.gumbel`."""
    return _launch(seed_lo, seed_hi, positions, size, base, only_bits=False)


def random_bits(seed_lo: Tensor, seed_hi: Tensor, positions: Tensor, size: int) -> Tensor:
    """See `sample.philox.random_bits`: what the tests compare, as the two logarithms are each device's own."""
    return _launch(seed_lo, seed_hi, positions, size, None, only_bits=True)


def _launch(
    seed_lo: Tensor, seed_hi: Tensor, positions: Tensor, size: int, base: Tensor | None, *, only_bits: bool
) -> Tensor:
    rows = positions.shape[0]
    out = torch.empty((rows, size), dtype=torch.int64 if only_bits else torch.float32, device=positions.device)
    _gumbel_kernel[(rows, triton.cdiv(size, 4 * _BLOCKS_A_PROGRAM))](
        seed_lo,
        seed_hi,
        positions,
        out if base is None else base,
        out,
        0 if base is None else base.stride(0),
        size,
        HAS_BASE=base is not None,
        ONLY_BITS=only_bits,
        ROUNDS_=ROUNDS,
        MULTIPLIER_0=MULTIPLIERS[0],
        MULTIPLIER_1=MULTIPLIERS[1],
        WEYL_0=WEYL[0],
        WEYL_1=WEYL[1],
        LARGEST_=LARGEST,
        BLOCK=_BLOCKS_A_PROGRAM,
    )
    return out
