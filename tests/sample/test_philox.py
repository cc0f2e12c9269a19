from __future__ import annotations

import math
import random

import torch

from overlap.sample.philox import gumbel, philox, random_bits

# Random123's kat_vectors for philox4x32-10: counter, key, output.
KNOWN = (
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)


def plain_philox(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    a, b, c, d = counter
    low, high = key
    for _ in range(10):
        first, second = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (second >> 32) ^ b ^ low, second % 2**32, (first >> 32) ^ d ^ high, first % 2**32
        low, high = (low + 0x9E3779B9) % 2**32, (high + 0xBB67AE85) % 2**32
    return a, b, c, d


def signed(word: int) -> int:
    return word - 2**32 if word >= 2**31 else word


def test_philox_gives_the_published_vectors() -> None:
    for counter, key, output in KNOWN:
        assert plain_philox(counter, key) == output
        a, b, c, d = (torch.tensor([word]) for word in counter)
        got = philox((a, b, c, d), (torch.tensor([key[0]]), torch.tensor([key[1]])))
        assert tuple(int(word) for word in got) == output


def test_each_token_has_its_word_of_the_block_keyed_by_seed_and_position() -> None:
    chance = random.Random(0)
    for _ in range(5):
        rows = [(chance.getrandbits(32), chance.getrandbits(32), chance.getrandbits(31)) for _ in range(3)]
        lo, hi = (torch.tensor([signed(row[i]) for row in rows], dtype=torch.int32) for i in (0, 1))
        positions = torch.tensor([row[2] for row in rows], dtype=torch.int32)
        got = random_bits(lo, hi, positions, 11).tolist()
        for words, (low, high, position) in zip(got, rows, strict=True):
            assert words == [plain_philox((t // 4, position, 0, 0), (low, high))[t % 4] for t in range(11)]


def test_gumbel_noise_is_finite_has_the_right_mean_and_spread_and_skips_what_is_filtered_out() -> None:
    seeds = torch.arange(8, dtype=torch.int32)
    noise = gumbel(seeds, seeds, seeds, 50_001)
    assert noise.isfinite().all()
    assert abs(float(noise.mean()) - 0.57722) < 0.01
    assert abs(float(noise.std()) - math.pi / 6**0.5) < 0.01
    base = torch.full((8, 50_001), -torch.inf)
    base[:, 7:50_000:500] = 0
    some = gumbel(seeds, seeds, seeds, 50_001, base)
    assert torch.equal(some, torch.where(base == 0, noise, base))
