"""What is done to logits before a token is drawn, against the definition a token at a time."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from overlap.sample.shaping import mask_logits, shape_logits, told_words, unpacked
from overlap.schedule.plan import Admission
from overlap.schedule.shaping import MOST_ALTERNATIVES, Shaped, Shaping
from overlap.state.shapes import ShapeRows, ShapeRowsOwner, seen_words

VOCABULARY = 77
CPU = torch.device("cpu")


def admission(slot: int, shaping: Shaping | None, tokens: list[int], made: int = 0) -> Admission:
    shaped = None if shaping is None else Shaped(shaping=shaping, tokens=np.array(tokens, dtype=np.int32), made=made)
    return Admission(slot=slot, start=0, temperature=0, top_k=0, top_p=1, min_p=0, seed=0, shaped=shaped)


def column(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def defined(logits: torch.Tensor, asked: Shaping | None, prompt: list[int], answer: list[int]) -> torch.Tensor:
    out = logits.clone()
    if asked is None:
        return out
    for token, value in asked.logit_bias:
        out[token] += value
    if len(answer) < asked.min_tokens:
        out[list(asked.banned)] = -torch.inf
    for token in range(VOCABULARY):
        times = answer.count(token)
        if token in prompt or times:
            out[token] = (
                out[token] / asked.repetition_penalty if out[token] > 0 else out[token] * asked.repetition_penalty
            )
        out[token] -= asked.frequency_penalty * times
        out[token] -= asked.presence_penalty * (times > 0)
    return out


@pytest.mark.parametrize("seed", range(8))
def test_slots_that_come_and_go_are_shaped_by_what_their_owners_ask_and_have(seed: int) -> None:
    chance = random.Random(seed)
    torch.manual_seed(seed)
    shapes = ShapeRows(5, VOCABULARY, CPU)
    owners: dict[int, tuple[Shaping | None, list[int], list[int]]] = {}

    def tokens(count: int) -> list[int]:
        return [chance.randrange(VOCABULARY // 2) for _ in range(count)]

    for _ in range(40):
        coming = chance.sample(range(5), chance.randrange(3))
        for slot in coming:
            asked = Shaping(
                presence_penalty=chance.choice([0.0, 0.5, -2.0]),
                frequency_penalty=chance.choice([0.0, 0.25, -1.5]),
                repetition_penalty=chance.choice([1.0, 2.0, 0.5]),
                logit_bias=tuple((token, chance.choice([-4.0, 8.0])) for token in set(tokens(chance.randrange(9)))),
                min_tokens=(least := chance.randrange(6)),
                banned=tuple(set(tokens(3))) if least else (),
            )
            owners[slot] = (asked if chance.random() < 0.7 else None, tokens(chance.randrange(1, 30)), tokens(least))
        admitted = [admission(s, owners[s][0], owners[s][1] + owners[s][2], len(owners[s][2])) for s in coming]
        if admitted:
            shapes.admit(admitted)
        rows = chance.sample(sorted(owners), len(owners))
        if not rows:
            continue
        logits = torch.randn(len(rows), VOCABULARY) * 3
        drafted = [tokens(chance.randrange(4)) for _ in rows]
        positions = [len(owners[s][1]) + len(owners[s][2]) + len(d) for s, d in zip(rows, drafted, strict=True)]
        got = shape_logits(
            logits, shapes, column(rows), column(positions),
            drafted_NK=torch.tensor([(d + [-1] * 3)[:3] for d in drafted], dtype=torch.int32),
        )  # fmt: skip
        for row, slot in enumerate(rows):
            asked_, prompt, answer = owners[slot]
            want = defined(logits[row], asked_, prompt, answer + drafted[row])
            assert torch.equal(got[row], want)
        chosen = tokens(len(rows))
        shapes.note(column(rows), column(chosen))
        for slot, token in zip(rows, chosen, strict=True):
            owners[slot][2].append(token)


def test_only_what_a_mask_allows_keeps_its_logit() -> None:
    words = np.random.default_rng(2).integers(-(2**31), 2**31, (4, 3)).astype(np.int32)
    words[3] = -1
    bits = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")[:, :VOCABULARY].astype(bool)
    mask = torch.from_numpy(words)
    assert torch.equal(unpacked(mask, VOCABULARY), torch.from_numpy(bits))
    logits, slots = torch.randn(6, VOCABULARY), column([0, 0, 0, 0, 0, 0])
    rows = [5, 1, 0, 3]
    want = logits.clone()
    want[rows] = torch.where(torch.from_numpy(bits), logits[rows], -torch.inf)
    got = mask_logits(logits, torch.cat((column(rows)[:, None], mask), dim=1))
    assert torch.equal(got, want)
    shapes = ShapeRows(1, VOCABULARY, CPU)
    shapes.admit([admission(0, Shaping(logit_bias=((0, 100.0),), frequency_penalty=-2.0), [1])])
    assert torch.equal(shape_logits(got, shapes, slots, slots).isneginf(), want.isneginf())


def test_an_engine_that_is_never_asked_keeps_nothing() -> None:
    owner = ShapeRowsOwner(4)
    owner.admit([admission(0, None, [])], VOCABULARY, CPU)
    assert owner.nbytes == 0
    owner.admit([admission(1, Shaping(presence_penalty=1.0), [3, 3, 5, 3], 2)], VOCABULARY, CPU)
    assert owner.rows is not None
    assert owner.nbytes > 5 * VOCABULARY * 4
    assert owner.rows.seen[1].nonzero()[:, 0].tolist() == [3, 5]


def test_prompt_and_answer_are_told_apart() -> None:
    tokens, words = seen_words(Shaped(shaping=Shaping(), tokens=column([4, 9, 4, 9, 9, 2]).numpy(), made=3))
    assert dict(zip(tokens.tolist(), words.tolist(), strict=True)) == {2: 2, 4: 1, 9: 5}


def test_a_vocabulary_smaller_than_the_alternatives_is_told_whole() -> None:
    logits = torch.randn(2, 7)
    words = told_words(logits, column([3, 0]))
    assert sorted(words[0, 1:8].tolist()) == list(range(7))
    assert set(words[:, 8 : 1 + MOST_ALTERNATIVES].flatten().tolist()) == {-1}
    torch.testing.assert_close(words[:, 0].view(torch.float32), logits.log_softmax(-1)[[0, 1], [3, 0]])
