"""Runs the sampling kernels in Triton's interpreter, beside `sampler`. Run by test_draw_interpreted.py.

The interpreter has no libdevice, so this process gives the kernels stand-ins for its three functions. They differ from
torch's in last bits: so the noise is close, not equal, and no case here hangs on such a bit.
"""

from __future__ import annotations

import random
import sys
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from overlap.sample import draw_triton, philox_triton, truncate_triton
from overlap.sample.philox import gumbel
from overlap.sample.sampler import sample_all, scale, truncate
from overlap.state.rows import SlotRows


class Device:
    """What libdevice has, by numpy."""

    @staticmethod
    def exp(x: Any) -> Any:
        return tl.exp(x)

    @staticmethod
    def log(x: Any) -> Any:
        return tl.log(x)

    @staticmethod
    def log1p(x: Any) -> Any:
        return tl.log(1.0 + x.to(tl.float64)).to(tl.float32)


def install() -> None:
    """Give the kernels the stand-ins, and tiles so small that a few hundred tokens are many."""
    for module in (philox_triton, truncate_triton):
        vars(module)["libdevice"] = Device
    vars(draw_triton)["_TILE"], vars(truncate_triton)["_TILE"] = 128, 64


def state_of(chance: random.Random, num_rows: int, filters: bool) -> tuple[SlotRows, Tensor, Tensor]:
    """Slots in a random order, with random settings and positions."""
    rows = SlotRows(num_rows + 3, 1, "cpu")
    for slot in range(num_rows + 3):
        rows.temperature[slot] = chance.choice([0.0, 0.3, 1.0, 1.0, 5.0])
        rows.seed_lo[slot], rows.seed_hi[slot] = chance.getrandbits(31), -chance.getrandbits(31)
        if filters:
            rows.top_k[slot] = chance.choice([0, 0, 1, 3, 20, 40, 1000])
            rows.top_p[slot] = chance.choice([1.0, 1.0, 0.97, 0.53, 0.11, 1e-9])
            rows.min_p[slot] = chance.choice([0.0, 0.0, 0.051, 0.49])
        else:
            rows.top_p[slot] = 1.0
    slots = torch.tensor(chance.sample(range(num_rows + 3), num_rows), dtype=torch.int32)
    return rows, slots, torch.randint(0, 2**31 - 1, (num_rows,)).int()


def logits_of(chance: random.Random, num_rows: int, size: int) -> Tensor:
    """Smooth rows, rows of many ties, rows with tokens that are ruled out."""
    lines = []
    for _ in range(num_rows):
        line = torch.randn(size) * chance.choice([0.5, 3.0, 9.0])
        kind = chance.choice(["smooth", "ties", "masked", "even"])
        if kind == "ties":
            line = line.round()
        elif kind == "masked":
            line[torch.rand(size) < 0.7] = -torch.inf
            line[chance.randrange(size)] = 1.0
        elif kind == "even":
            line = torch.full((size,), float(chance.choice([0.0, -7.5])))
        lines.append(line)
    return torch.stack(lines)


def check_kept(chance: random.Random) -> None:
    """The same tokens stay as in the reference, to the last id among equals."""
    num_rows, size = 4, chance.choice([1, 7, 100, 128, 128, 129, 300])
    rows, slots, positions = state_of(chance, num_rows, filters=True)
    rows.temperature.clamp_(min=0.3)
    logits = logits_of(chance, num_rows, size)
    columns = (column.index_select(0, slots) for column in (rows.temperature, rows.top_k, rows.top_p, rows.min_p))
    temperature, *filters = columns
    expected = truncate(scale(logits, temperature), *filters) > -torch.inf
    got = torch.zeros_like(expected)
    survivors, row = truncate_triton.survivors, -1

    def listen(value: Any, token: Any, *border: Any) -> Any:
        nonlocal row
        kept = survivors(value, token, *border)
        ids = token.handle.data
        row += int(ids[0]) == 0  # the interpreter runs the programs one after the other, a row's in order
        inside = ids < size
        got[row, torch.from_numpy(ids[inside]).long()] = torch.from_numpy(
            (kept.handle.data & (value.handle.data > -torch.inf))[inside]
        )
        return kept

    vars(draw_triton)["survivors"] = listen
    try:
        draw_triton.draw(logits, rows, slots, positions, True)
    finally:
        vars(draw_triton)["survivors"] = survivors
    assert torch.equal(got, expected), (got != expected).nonzero()


def check_tokens(chance: random.Random) -> None:
    """The same tokens as the reference draws, a row's own whatever stands beside it."""
    for filters in (False, True):
        num_rows, size = chance.randint(1, 4), chance.choice([1, 30, 128, 129, 300])
        rows, slots, positions = state_of(chance, num_rows, filters)
        wide = logits_of(chance, num_rows, size + 5)
        logits = wide[:, :size]  # a row need not begin where the one before ends
        logits[:, 0] = logits[:, 0].clamp(min=-9.0)
        expected = sample_all(logits, rows, slots, positions, "truncated" if filters else "sampled")
        got = draw_triton.draw(logits, rows, slots, positions, filters)
        assert got.dtype is torch.int64
        assert torch.equal(got, expected), (got, expected)
    narrow = logits.bfloat16()
    expected = sample_all(narrow.float(), rows, slots, positions, "truncated")
    assert torch.equal(draw_triton.draw(narrow, rows, slots, positions, True), expected)


def check_broken(chance: random.Random) -> None:
    """A row that is not finite gets the token that the reference gives it, and harms no other."""
    size = chance.choice([5, 100, 150])
    for filters in (False, True):
        rows, slots, positions = state_of(chance, 5, filters)
        logits = torch.randn(5, size)
        sane = draw_triton.draw(logits, rows, slots, positions, filters)
        logits[0, chance.randrange(size)] = torch.nan
        logits[2] = -torch.inf
        logits[3, chance.randrange(size)] = torch.inf
        got = draw_triton.draw(logits, rows, slots, positions, filters)
        assert got[[1, 4]].tolist() == sane[[1, 4]].tolist()
        expected = sample_all(logits, rows, slots, positions, "truncated" if filters else "sampled")
        assert torch.equal(got, expected), (got, expected)


def check_noise(chance: random.Random) -> None:
    """The kernel's noise is the reference's, whatever the part that draws it; far under the peak it counts as well."""
    rows, slots, positions = state_of(chance, 4, filters=False)
    rows.temperature.fill_(1.0)
    low, high = (column.index_select(0, slots) for column in (rows.seed_lo, rows.seed_hi))
    logits = torch.zeros(4, 700)
    logits[2:, 0] = 6.0
    expected = gumbel(low, high, positions, 700, logits).argmax(dim=-1)
    assert (expected[2:] >= 128).any(), "a token won whose tile has no likely one"
    assert torch.equal(draw_triton.draw(logits, rows, slots, positions, False), expected)


CHECKS = {"kept": (check_kept, 20), "tokens": (check_tokens, 2), "broken": (check_broken, 1), "noise": (check_noise, 1)}

if __name__ == "__main__":
    install()
    for name, (check, seeds) in CHECKS.items():
        for seed in range(seeds):
            torch.manual_seed(seed)
            check(random.Random(seed))
        sys.stdout.write(name + "\n")
