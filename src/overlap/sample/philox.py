"""Philox4x32-10: the random numbers of sampling, as a pure function of (seed, position, token id).

The noise of a token needs nothing but these three, so a seeded request draws the same noise alone or in any batch,
after a preemption, and under speculation. Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3"
(SC 2011), with the constants and test vectors of Random123.

Legend: E rows, V vocabulary.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

MULTIPLIERS: Final = (0xD2511F53, 0xCD9E8D57)
WEYL: Final = (0x9E3779B9, 0xBB67AE85)
ROUNDS: Final = 10
LOW: Final = 0xFFFFFFFF
LARGEST: Final = 1 - 2**-24
"""The largest float32 under 1: what a uniform number is clamped to, so that its logarithms stay finite."""


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Return the four output words of each counter, as int64 in [0, 2**32).

    Counters and keys are int64 tensors of 32-bit words in [0, 2**32) that broadcast against each other.
    """
    a, b, c, d = counter
    low, high = key
    for number in range(ROUNDS):
        if number:
            low, high = (low + WEYL[0]) & LOW, (high + WEYL[1]) & LOW
        # int64 products wrap around, which keeps all 64 bits of the unsigned product; the shift must not keep the sign
        first, second = a * MULTIPLIERS[0], c * MULTIPLIERS[1]
        a = (second >> 32).bitwise_and_(LOW) ^ b ^ low
        c = (first >> 32).bitwise_and_(LOW) ^ d ^ high
        b, d = second.bitwise_and_(LOW), first.bitwise_and_(LOW)
    return a, b, c, d


def random_bits(seed_lo: Tensor, seed_hi: Tensor, positions: Tensor, size: int) -> Tensor:
    """Return int64 [E, size]: for each row its first `size` 32-bit words.

    Word i of a row is word i % 4 of the counter (i // 4, position, 0, 0) under the key (seed_lo, seed_hi). Seeds are
    int32 [E] bit patterns, positions int32 [E].
    """
    blocks = torch.arange(-(-size // 4), dtype=torch.int64, device=positions.device)[None, :]
    words = _row_words(seed_lo, seed_hi, positions, blocks)
    return torch.stack(words, dim=-1).flatten(1)[:, :size]


def _row_words(seed_lo: Tensor, seed_hi: Tensor, positions: Tensor, blocks: Tensor) -> tuple[Tensor, ...]:
    zero = torch.zeros((1, 1), dtype=torch.int64, device=positions.device)
    key = (seed_lo.long()[:, None] & LOW, seed_hi.long()[:, None] & LOW)
    return philox((blocks, positions.long()[:, None] & LOW, zero, zero), key)


def uniform(bits: Tensor) -> Tensor:
    """Return float32 numbers in (0, 1) for 32-bit words: (bits + 0.5) / 2**32, and never 1."""
    return bits.float().add_(0.5).mul_(2.0**-32).clamp_(max=LARGEST)


def gumbel(seed_lo: Tensor, seed_hi: Tensor, positions: Tensor, size: int, base: Tensor | None = None) -> Tensor:
    """Return standard Gumbel noise, float32 [E, size], plus `base` [E, size] if one is given.

    The argmax of logits plus this noise is a draw from their softmax. Seeds are int32 [E] bit patterns, positions
    int32 [E]; entry i belongs to token i (see `random_bits`). The random bits are the same on every device; the two
    logarithms are the device's own, so the noise agrees between devices to a few units in the last place.
    """
    if positions.is_cuda:
        from overlap.sample import philox_triton

        return philox_triton.gumbel(seed_lo, seed_hi, positions, size, base)
    out = torch.zeros((positions.shape[0], size)) if base is None else base.clone()
    for row in range(positions.shape[0]):  # one row's words fit in the cache, a batch's do not
        one = slice(row, row + 1)
        seeds = seed_lo[one], seed_hi[one], positions[one]
        tokens = None if base is None else (base[row] > -torch.inf).nonzero()[:, 0]
        if tokens is None or 4 * len(tokens) > size:
            out[row] += _noise(random_bits(*seeds, size)[0])
        else:  # what a filter left out needs no noise; a word costs as much as the four of its block
            words = torch.stack(_row_words(*seeds, tokens // 4), dim=-1)[0]
            out[row, tokens] += _noise(words.gather(1, (tokens % 4)[:, None])[:, 0])
    return out


def _noise(bits: Tensor) -> Tensor:
    return uniform(bits).neg_().log1p_().neg_().log_().neg_()
