"""What the sampling kernels share: how values are ordered, and a row's scaled logits. Imported only where Triton is.

A row is cut into parts, one program each. The first kernel leaves the peak of each part; every later kernel finds the
row's peak from those, so it can compute `(logits - peak) / temperature` as `sampler.scale` does, to the bit.
"""

from __future__ import annotations

from typing import Final

import triton
import triton.language as tl

from overlap.sample.sampler import COLDEST

MOST_PARTS: Final = 256
"""A row is cut into no more. How many there are is no constant of the kernels, so any number of rows shares them."""
_MOST_PARTS: Final = tl.constexpr(MOST_PARTS)
_COLDEST: Final = tl.constexpr(COLDEST)


@triton.jit
def order_key(value) -> tl.tensor:
    """Return int32 that order as the float32 do: 0 and -0 are equals, NaN is above all (as torch's argmax has it)."""
    bits = tl.where(value == 0.0, 0.0, value).to(tl.int32, bitcast=True)
    return tl.where(value != value, 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit
def key_value(key) -> tl.tensor:
    """Return the float32 that has an order key."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def pack_best(key, token) -> tl.tensor:
    """Return int64 whose maximum is the highest key's, and of equals the lowest token's."""
    return (key.to(tl.int64) << 32) | (0x7FFFFFFF - token).to(tl.int64)


@triton.jit
def best_of(bests, row, parts) -> tl.tensor:
    """Return the highest of a row's packed bests."""
    part = tl.arange(0, _MOST_PARTS)
    lowest = -0x7FFFFFFFFFFFFFFF - 1
    return tl.max(tl.load(bests + row * parts + part, mask=part < parts, other=lowest, cache_modifier=".cg"))


@triton.jit
def best_key(best) -> tl.tensor:
    """Return the key in a packed best."""
    return (best >> 32).to(tl.int32)


@triton.jit
def best_token(best) -> tl.tensor:
    """Return the token in a packed best."""
    return 0x7FFFFFFF - (best & 0x7FFFFFFF)


@triton.jit
def scaled(value, peak, temperature) -> tl.tensor:
    """Return `(value - peak) / temperature` with the two roundings of `sampler.scale`."""
    shifted = value.to(tl.float32) - peak
    return tl.div_rn(shifted, tl.maximum(temperature, _COLDEST) + tl.zeros_like(shifted))


@triton.jit
def distance(scaled_value) -> tl.tensor:
    """Return how far under the peak a scaled value is, int32: the bits of its size, as no scaled value is above 0."""
    return scaled_value.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def is_last(arrivals, row, parts) -> tl.tensor:
    """Return whether this is the last of a row's programs: it sees what the others stored. Resets the count."""
    tl.debug_barrier()  # all threads of this program have stored before one of them says so
    last = tl.atomic_add(arrivals + row, 1, sem="acq_rel") == parts - 1
    if last:
        tl.store(arrivals + row, 0)
    return last
