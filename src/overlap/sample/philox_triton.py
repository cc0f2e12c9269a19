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


_MULTIPLIER_0: Final = tl.constexpr(MULTIPLIERS[0])
_MULTIPLIER_1: Final = tl.constexpr(MULTIPLIERS[1])
_WEYL_0: Final = tl.constexpr(WEYL[0])
_WEYL_1: Final = tl.constexpr(WEYL[1])
_ROUNDS: Final = tl.constexpr(ROUNDS)
_LARGEST: Final = tl.constexpr(LARGEST)


@triton.jit
def row_bits(seed_lo, seed_hi, position, first, BLOCK: tl.constexpr) -> tl.tensor:
    """Return the words of tokens 4 * first and on, uint32 [4 * BLOCK]; seeds and position are int32 scalars."""
    block = first + tl.arange(0, BLOCK)
    low = seed_lo.to(tl.uint32, bitcast=True)
    high = seed_hi.to(tl.uint32, bitcast=True)
    nothing = tl.zeros((BLOCK,), dtype=tl.uint32)
    a = block.to(tl.uint32)
    b = nothing + position.to(tl.uint32, bitcast=True)
    c = nothing
    d = nothing
    multiplier_0 = tl.full((BLOCK,), _MULTIPLIER_0, dtype=tl.uint32)
    multiplier_1 = tl.full((BLOCK,), _MULTIPLIER_1, dtype=tl.uint32)
    weyl_0 = tl.full((), _WEYL_0, dtype=tl.uint32)
    weyl_1 = tl.full((), _WEYL_1, dtype=tl.uint32)
    for _ in tl.static_range(_ROUNDS):
        upper_a, upper_c = tl.umulhi(a, multiplier_0), tl.umulhi(c, multiplier_1)
        lower_a, lower_c = a * multiplier_0, c * multiplier_1
        a, b, c, d = upper_c ^ b ^ low, lower_c, upper_a ^ d ^ high, lower_a
        low += weyl_0
        high += weyl_1
    return tl.interleave(tl.interleave(a, c), tl.interleave(b, d))


@triton.jit
def noise_of(bits) -> tl.tensor:
    """Return the Gumbel noise of random words: finite, from -2.82 to 22.88."""
    uniform = tl.minimum((bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10, _LARGEST)  # 2**-32
    return -libdevice.log(-libdevice.log1p(-uniform))


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
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    bits = row_bits(tl.load(seed_lo + row), tl.load(seed_hi + row), tl.load(positions + row), part * BLOCK, BLOCK)
    token = part * (4 * BLOCK) + tl.arange(0, 4 * BLOCK)
    inside = token < size
    target = out + row * size + token
    if ONLY_BITS:
        tl.store(target, bits.to(tl.int64), mask=inside)
    else:
        noise = noise_of(bits)
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
        BLOCK=_BLOCKS_A_PROGRAM,
    )
    return out
