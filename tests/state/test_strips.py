"""The inputs of short steps. As a program with TRITON_INTERPRET=1, this file checks the kernels that build them."""

from __future__ import annotations

import importlib.util
import os
import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from overlap.cache.pages import Ints
from overlap.schedule.plan import STRIP, STRIPS, Admission, StepPlan, is_short, strips_of
from overlap.state import replay, strips
from overlap.state.inputs import build_inputs
from overlap.state.mail import DEPTH, EMPTY, Mail
from overlap.state.packing import capacity, pack
from overlap.state.rows import SlotRows
from overlap.state.strips import Strips

SLOTS, WIDTH = 20, 12


def column(values: list[int]) -> Ints:
    return np.array(values, dtype=np.int32)


def short_plan(chance: random.Random) -> StepPlan:
    """Some decode rows and short prompts, new ones among them, with pages for some; 16 strips at most."""
    num_decode, num_chunks = chance.randint(0, 5), chance.randint(1, 4)
    chosen = chance.sample(range(SLOTS), num_decode + num_chunks)
    counts = [1] * num_decode + [chance.choice([1, 15, 16, 17, 33, chance.randint(1, 40)]) for _ in range(num_chunks)]
    if strips_of(column(counts)) > STRIPS[-1]:
        return short_plan(chance)
    updates = [(slot, chance.randrange(WIDTH), chance.randint(0, 999)) for slot in chosen if chance.random() < 0.6]
    updates += [(chosen[-1], index, 7 + index) for index in range(WIDTH)] * 8  # more than one block of them
    admissions = tuple(
        Admission(slot=slot, start=chance.randint(0, 99), temperature=chance.choice([0.0, 0.7]),
                  top_k=chance.randint(0, 9), top_p=0.9, min_p=0.1, seed=chance.getrandbits(64))
        for slot in chosen[num_decode:] if chance.random() < 0.7
    )  # fmt: skip
    return StepPlan(
        number=1,
        slots=column(chosen),
        counts=column(counts),
        starts=column([0] * len(chosen)),
        num_decode=num_decode,
        prompt=column([chance.randint(1, 999) for _ in range(sum(counts[num_decode:]))]),
        emits=column(list(range(len(chosen)))),
        sampled=column([row for row in range(len(chosen)) if chance.random() < 0.5]),
        truncated=False,
        admissions=admissions,
        page_slots=column([slot for slot, _, _ in updates]),
        page_indices=column([index for _, index, _ in updates]),
        page_ids=column([page for _, _, page in updates]),
        chunk_pages=column([]),
    )


def fresh_rows() -> SlotRows:
    """Rows in the middle of their answers; the same at each call. The scratch slot is as it was made."""
    numbers = np.random.default_rng(7)
    rows = SlotRows(SLOTS, WIDTH, "cpu")
    rows.last_token[:SLOTS] = torch.from_numpy(numbers.integers(0, 1000, SLOTS))
    rows.seq_len[:SLOTS] = torch.from_numpy(numbers.integers(0, 16 * WIDTH - 48, SLOTS))
    rows.page_table[:SLOTS] = torch.from_numpy(numbers.integers(0, 1000, (SLOTS, WIDTH)))
    return rows


def mail_with(plan: StepPlan, place: int) -> Mail:
    mail = Mail(capacity(SLOTS, 600, SLOTS * WIDTH), SLOTS, "cpu")
    for words in mail.plan_words[:EMPTY]:
        pack(plan, words)
    mail.turn.fill_(place)
    return mail


def test_strips_hold_what_the_rows_of_any_step_do_and_their_padding_is_written_nowhere() -> None:
    for seed in range(80):
        chance = random.Random(seed)
        plan, place = short_plan(chance), chance.randrange(DEPTH)
        num_rows, num_strips = plan.num_rows, strips_of(plan.counts) + chance.choice([0, 1, 6])
        tokens = torch.arange(100, 100 + num_strips)

        rows, mail = fresh_rows(), mail_with(plan, place)
        packed = mail.plans[0].clone()
        expected = build_inputs(packed, pack(plan, packed.numpy()), rows)
        own = fresh_rows()
        made = strips.take_strips(mail, own, num_strips)
        for name in SlotRows.COLUMNS:
            assert torch.equal(getattr(own, name), getattr(rows, name)), name

        real = made.kv_index_T >= 0
        for name in ("token_ids", "positions", "kv_index"):
            assert torch.equal(getattr(made, f"{name}_T")[real], getattr(expected, name)), name
        assert int(real.sum()) == plan.num_tokens
        assert (made.token_slots_T[~real] == own.scratch).all()
        assert (made.positions_T < 16 * WIDTH).all()
        assert torch.equal(made.slots_R[:num_rows], expected.emit_slots)
        assert (made.slots_R[num_rows:] == own.scratch).all()
        assert torch.equal(made.ends_R[:num_rows], expected.emit_positions)
        assert torch.equal(made.row_pages[:num_rows], expected.page_table)
        ends = made.last_R[:num_rows]
        assert torch.equal(made.token_ids_T[ends], expected.token_ids[expected.emit_tokens.long()])
        assert torch.equal(made.positions_T[ends] + 1, made.ends_R[:num_rows])
        behind = made.next_tokens(tokens[:num_strips])
        assert torch.equal(behind[ends], tokens[:num_rows].int())
        inside = real.clone()
        inside[ends] = False
        assert torch.equal(behind[inside], made.token_ids_T[1:][inside[:-1]])

        attention = made.attention_rows()
        assert attention.strips
        assert attention.width == STRIP
        lasts = made.seq_lens_S.view(-1, 1) - STRIP + torch.arange(STRIP, dtype=torch.int32)
        assert torch.equal(lasts.view(-1)[real], made.positions_T[real]), "a strip's positions are its last ones"
        strip_slots = made.token_slots_T.view(-1, STRIP)[:, 0].long()
        assert torch.equal(made.page_table, own.page_table[strip_slots])

        replay.settle_decode(mail, own, tokens)
        assert own.last_token[made.slots_R[:num_rows].long()].tolist() == tokens[:num_rows].tolist()
        assert mail.landed_words[place][:num_rows].tolist() == tokens[:num_rows].tolist()
        assert mail.turn.tolist() == [(place + 1) % DEPTH]


def test_strips_of_no_plan_change_nothing() -> None:
    rows, before = fresh_rows(), fresh_rows()
    made = strips.take_strips(mail_with(short_plan(random.Random(0)), EMPTY), rows, 4)
    assert (made.kv_index_T == -1).all()
    assert (made.slots_R == rows.scratch).all()
    for name in SlotRows.COLUMNS:
        assert torch.equal(getattr(rows, name), getattr(before, name)), name


def test_a_step_is_short_by_its_strips_and_by_how_often_its_longest_row_would_be_read() -> None:
    assert strips_of(column([1, 16, 17])) == 4
    assert is_short(STRIPS[-1], 1000)
    assert not is_short(STRIPS[-1] + 1, 100)
    assert not is_short(STRIPS[-1], 100_000)
    assert is_short(1, 10_000)


def compare_kernels(chance: random.Random) -> None:
    """Run the reference and the kernels on the same plan, and compare all that they wrote."""
    from overlap.state import strips_triton

    plan, place = short_plan(chance), chance.choice([*range(DEPTH), EMPTY])
    num_strips = strips_of(plan.counts) + chance.choice([0, 1, 3])
    found = []
    for take in (strips.take_strips, strips_triton.take_strips):
        rows, mail = fresh_rows(), mail_with(plan, place)
        found.append((rows, mail, take(mail, rows, num_strips)))
    (rows, mail, made), (other_rows, other_mail, other) = found
    for name in SlotRows.COLUMNS:
        assert torch.equal(getattr(rows, name), getattr(other_rows, name)), name
    assert torch.equal(mail.packed, other_mail.packed)
    for name in Strips.__slots__:
        assert torch.equal(getattr(made, name), getattr(other, name)), (name, getattr(made, name), getattr(other, name))


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_the_kernels_agree_with_their_reference_over_random_plans() -> None:
    run = subprocess.run(
        [sys.executable, __file__],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout == "compared\n"


if __name__ == "__main__":
    for seed in range(12):
        compare_kernels(random.Random(seed))
    sys.stdout.write("compared\n")
