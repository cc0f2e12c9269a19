"""Acceptance, the choice of K and prompt lookup against slow, obvious oracles over seeds."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from overlap.messages import SamplingParams
from overlap.sample.sampler import sample_all
from overlap.schedule.plan import SampleKind
from overlap.spec.accept import NOTHING, accept, target_choices
from overlap.spec.control import MARGIN, MEMORY, PRIOR_ACCEPTANCE, PRIOR_TRIES, PROBE_PRICE, DraftControl
from overlap.spec.ngram import NgramDrafter


def test_accepted_are_the_drafts_before_the_first_that_differs_and_the_bonus_is_the_choice_there() -> None:
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        rows, most = 6, seed % 5
        choices = torch.randint(0, 3, (rows, most + 1), generator=generator, dtype=torch.int32)
        drafts = torch.randint(0, 3, (rows, most), generator=generator, dtype=torch.int32)
        counts = torch.randint(0, most + 1, (rows,), generator=generator, dtype=torch.int32)
        found = accept(choices, drafts, counts)
        for row in range(rows):
            expected = 0
            while expected < int(counts[row]) and drafts[row, expected] == choices[row, expected]:
                expected += 1
            assert int(found.num_accepted_R[row]) == expected
            emitted = choices[row, : expected + 1].tolist()
            assert found.tokens_RJ[row].tolist() == emitted + [NOTHING] * (most - expected)
            assert int(found.bonus_R[row]) == emitted[-1]
            assert int(found.num_emitted[row]) == len(emitted)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_choice_is_what_a_plain_step_at_that_position_takes(temperature: float, spec: Any) -> None:
    rows = spec.slot_rows([SamplingParams(temperature=temperature, top_k=9, seed=seed) for seed in range(5)])
    logits = torch.randn(3, 4, 60, generator=torch.Generator().manual_seed(0))
    slots, starts = torch.tensor([4, 0, 2], dtype=torch.int32), torch.tensor([7, 100, 31], dtype=torch.int32)
    kind: SampleKind = "truncated" if temperature else "greedy"
    found = target_choices(logits, rows, slots, starts, kind)
    for row in range(3):
        for place in range(4):
            plain = sample_all(logits[row, place][None], rows, slots[row, None], starts[row, None] + place, kind)
            assert int(found[row, place]) == int(plain)


def test_the_number_of_drafts_follows_a_slow_oracle() -> None:
    slots, most, seed = 5, 6, random.Random(0)
    control = DraftControl(slots, most, "cpu")
    hits, tries, idle = [0.0] * slots, [0.0] * slots, [0] * slots
    for step in range(400):
        cost = seed.choice([0.02, 0.1, 0.3, 0.9, 1.5])
        some = sorted(seed.sample(range(slots), 3))
        chosen = control.choose(torch.tensor(some, dtype=torch.int32), cost).tolist()
        for slot, count in zip(some, chosen, strict=True):
            p = (hits[slot] + PRIOR_ACCEPTANCE * PRIOR_TRIES) / (tries[slot] + PRIOR_TRIES)
            worth = [
                sum(p**i for i in range(k + 1)) / (1 + k * cost) + (MARGIN if k == 0 else 0) for k in range(most + 1)
            ]
            best = max(range(most + 1), key=worth.__getitem__)
            probes = idle[slot] * PROBE_PRICE >= cost
            if probes and best == 0:
                assert count == 1
            else:
                assert worth[count] == pytest.approx(worth[best], abs=1e-5)
        accepted = [min(count, seed.choice([0, 0, 1, 3, 6])) for count in chosen]
        control.learn(*(torch.tensor(column, dtype=torch.int32) for column in (some, chosen, accepted)))
        for slot, count, right in zip(some, chosen, accepted, strict=True):
            idle[slot] = 0 if count else idle[slot] + 1
            if count:
                hits[slot] = hits[slot] * MEMORY + right
                tries[slot] = tries[slot] * MEMORY + min(right + 1, count)
        if step % 100 == 99:
            control.admit(torch.tensor([step % slots]))
            hits[step % slots], tries[step % slots], idle[step % slots] = 0.0, 0.0, 0
    torch.testing.assert_close(control.tries[:slots], torch.tensor(tries), rtol=1e-4, atol=1e-4)


def test_a_row_whose_drafts_are_never_right_stops_drafting_and_looks_again_now_and_then() -> None:
    control = DraftControl(1, 4, "cpu")
    slot = torch.tensor([0], dtype=torch.int32)
    drafted = []
    for _ in range(1000):
        count = control.choose(slot, 0.3)
        control.learn(slot, count, torch.zeros_like(count))
        drafted.append(int(count))
    assert drafted[0] > 0
    assert 0 < sum(drafted[500:]) * 0.3 / 500 <= 0.011  # what drafting cost, in plain steps
    for _ in range(400):  # the text gets easy
        count = control.choose(slot, 0.1)
        control.learn(slot, count, count)
    assert int(control.choose(slot, 0.1)) == 4


def slow_lookup(text: list[int], count: int, longest: int, shortest: int) -> list[int] | None:
    for size in range(min(longest, len(text)), shortest - 1, -1):
        for end in range(len(text) - 2, size - 2, -1):
            if text[end - size + 1 : end + 1] == text[len(text) - size :]:
                period = len(text) - 1 - end
                return [text[end + 1 + place % period] for place in range(count)]
    return None


def test_lookup_takes_the_longest_match_and_of_these_the_newest() -> None:
    found_some = 0
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(1, 40, (8,), generator=generator, dtype=torch.int32)
        drafter = NgramDrafter(8, 40, 5, "cpu", longest=1 + seed % 4, shortest=1 + seed % 2)
        texts = torch.randint(0, 2 + seed % 5, (9, 41), generator=generator, dtype=torch.int32)
        drafter.history_SL.copy_(texts)
        slots = torch.tensor([3, 1, 7, 0, 2, 6, 5, 4], dtype=torch.int32)
        found = drafter.lookup(slots, lengths)
        for row in range(8):
            text = texts[int(slots[row]), : int(lengths[row])].tolist()
            expected = slow_lookup(text, 5, 1 + seed % 4, 1 + seed % 2)
            if expected is None:
                assert int(found.num_R[row]) == 0
            else:
                found_some += 1
                assert int(found.num_R[row]) == 5
                assert found.tokens_RK[row].tolist() == expected
    assert found_some > 100
