from __future__ import annotations

import math
import random
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from overlap.sample.philox import gumbel
from overlap.sample.sampler import sample, sample_all, scale, truncate
from overlap.state.rows import SlotRows


@dataclass
class Row:
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    position: int = 0


def draw(logits: Tensor, rows: list[Row]) -> list[int]:
    state = SlotRows(len(rows), 1, "cpu")
    for slot, row in enumerate(rows):
        state.temperature[slot], state.top_k[slot] = row.temperature, row.top_k
        state.top_p[slot], state.min_p[slot], state.seed_lo[slot] = row.top_p, row.min_p, row.seed
    slots = torch.arange(len(rows), dtype=torch.int32)
    sampled = torch.tensor([i for i, row in enumerate(rows) if row.temperature > 0], dtype=torch.int32)
    truncated = any(row.top_k > 0 or row.top_p < 1 or row.min_p > 0 for row in rows)
    positions = torch.tensor([row.position for row in rows], dtype=torch.int32)
    tokens: list[int] = sample(logits, state, slots, positions, sampled, truncated).tolist()
    return tokens


def oracle(logits: list[float], row: Row) -> set[int]:
    """The tokens that the filters leave, the slow and obvious way."""
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    if row.top_k > 0:
        kth = logits[order[min(row.top_k, len(order)) - 1]]
        order = [token for token in order if logits[token] >= kth]
    weights = {token: math.exp((logits[token] - max(logits)) / row.temperature) for token in order}
    kept, reached = [], 0.0
    for token in order:
        if row.top_p < 1 and reached >= row.top_p * sum(weights.values()):
            break
        kept.append(token)
        reached += weights[token]
    return {token for token in kept if weights[token] >= row.min_p * weights[order[0]]}


def test_filters_keep_what_the_slow_way_keeps_over_many_seeds() -> None:
    for seed in range(300):
        chance = random.Random(seed)
        size = chance.randint(1, 40)
        spread = chance.choice([0.5, 2.0, 8.0])
        logits = [chance.choice([chance.gauss(0, spread), float(chance.randint(-3, 3))]) for _ in range(size)]
        row = Row(
            temperature=chance.choice([0.3, 1.0, 2.0]),
            top_k=chance.choice([0, 1, 5, 100]),
            top_p=chance.choice([1.0, 0.97, 0.53, 0.11]),
            min_p=chance.choice([0.0, 0.051, 0.49]),
        )
        values = torch.tensor([logits])
        scaled = scale(values, torch.tensor([row.temperature]))
        left = truncate(scaled, torch.tensor([row.top_k]), torch.tensor([row.top_p]), torch.tensor([row.min_p]))
        assert set((left[0] > -torch.inf).nonzero()[:, 0].tolist()) == oracle(values[0].tolist(), row), seed


@pytest.mark.parametrize(
    "row",
    [Row(), Row(temperature=0.6), Row(top_k=5), Row(top_p=0.7), Row(min_p=0.2), Row(1.3, 7, 0.8, 0.1)],
    ids=["plain", "temperature", "top_k", "top_p", "min_p", "all"],
)
def test_sampled_frequencies_are_the_exact_probabilities(row: Row) -> None:
    torch.manual_seed(0)
    draws, size = 4000, 12
    logits = torch.randn(1, size) * 1.5
    rows = [Row(row.temperature, row.top_k, row.top_p, row.min_p, seed, seed % 7) for seed in range(draws)]
    counts = torch.bincount(torch.tensor(draw(logits.expand(draws, -1), rows)), minlength=size).double()
    kept = sorted(oracle(logits[0].tolist(), row))
    expected = (logits[0, kept].double() / row.temperature).softmax(0) * draws
    assert counts[kept].sum() == draws
    chi_square = float(((counts[kept] - expected) ** 2 / expected).sum())
    freedom = len(kept) - 1
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5 + 4  # about one chance in ten thousand


def test_a_row_draws_the_same_token_alone_and_in_any_batch() -> None:
    torch.manual_seed(1)
    chance = random.Random(1)
    logits = torch.randn(24, 3001) * 3
    rows = [
        Row(
            temperature=chance.choice([0.0, 0.7, 1.5]),
            top_k=chance.choice([0, 20]),
            top_p=chance.choice([1.0, 0.9]),
            min_p=chance.choice([0.0, 0.05]),
            seed=chance.getrandbits(31),
            position=index,
        )
        for index in range(24)
    ]
    together = draw(logits, rows)
    for index, row in enumerate(rows):
        assert draw(logits[index : index + 1], [row]) == [together[index]]
    some = chance.sample(range(24), 9)
    assert draw(logits[some], [rows[index] for index in some]) == [together[index] for index in some]


def test_greedy_takes_the_lowest_id_of_equals() -> None:
    logits = torch.zeros(2, 1000)
    logits[1, [400, 7, 900]] = 5
    assert draw(logits, [Row(0.0), Row(0.0)]) == [0, 7]


def test_a_tiny_temperature_is_greedy_and_a_huge_one_is_even() -> None:
    logits = torch.randn(3, 500) * 30
    top = logits.argmax(dim=-1).tolist()
    assert draw(logits, [Row(1e-6), Row(1e-30, top_p=0.9), Row(1e-44, top_k=3)]) == top
    hot = torch.randn(1, 500) * 30
    seed, zero = torch.tensor([[3], [0]], dtype=torch.int32)
    noise = gumbel(seed, zero, zero, 500)
    assert draw(hot, [Row(1e30, seed=3)]) == [int(noise.argmax())]


def test_logits_that_are_not_finite_harm_their_row_only() -> None:
    torch.manual_seed(2)
    logits = torch.randn(6, 700)
    kinds = [Row(0.0), Row(1.0, seed=1), Row(0.8, 5, 0.9, 0.1, seed=2)]
    clean = draw(logits, kinds * 2)
    for bad in (torch.nan, torch.inf, -torch.inf):
        broken = logits.clone()
        broken[:3] = bad
        tokens = draw(broken, kinds * 2)
        assert tokens[3:] == clean[3:]
        assert all(0 <= token < 700 for token in tokens)
        broken = logits.clone()
        broken[:3, 350] = bad
        tokens = draw(broken, kinds * 2)
        assert tokens[3:] == clean[3:]
        assert all(0 <= token < 700 for token in tokens)


def test_sampling_all_rows_in_one_way_gives_the_tokens_of_sampling_only_those_that_need_it() -> None:
    torch.manual_seed(3)
    logits = torch.randn(12, 999) * 2
    logits[0, [5, 700]] = 50  # equals, in a greedy row
    state = SlotRows(12, 1, "cpu")
    slots, positions = torch.arange(12, dtype=torch.int32), torch.arange(12, dtype=torch.int32) * 3
    nothing = torch.zeros(0, dtype=torch.int32)
    greedy = sample(logits, state, slots, positions, nothing, False)
    assert greedy[0] == 5
    assert torch.equal(sample_all(logits, state, slots, positions, "greedy").int(), greedy)
    sampled = torch.tensor([1, 2, 3, 7, 8, 11], dtype=torch.int32)
    state.temperature[sampled] = torch.tensor([0.5, 1.0, 1.5, 1e-30, 2.0, 1.0])
    state.top_p.fill_(1.0)
    state.seed_lo.copy_(torch.arange(13))
    for truncated in (False, True):
        state.top_k[sampled[::2]] = 4 * truncated
        state.top_p[sampled[::3]] = 0.6 if truncated else 1.0
        expected = sample(logits, state, slots, positions, sampled, truncated)
        got = sample_all(logits, state, slots, positions, "truncated" if truncated else "sampled")
        assert torch.equal(got.int(), expected)
    assert torch.equal(sample_all(logits, state, slots, positions, "truncated").int(), expected)
