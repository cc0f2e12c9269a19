"""A replayed decode step's state changes. As a program with TRITON_INTERPRET=1, this file checks the kernels of it."""

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
from overlap.schedule.plan import StepPlan
from overlap.state import replay
from overlap.state.inputs import StepInputs, build_inputs, empty_inputs, settle_tokens
from overlap.state.mail import DEPTH, EMPTY, Mail
from overlap.state.packing import capacity, pack
from overlap.state.rows import SlotRows


def column(values: list[int]) -> Ints:
    return np.array(values, dtype=np.int32)


def decode_plan(chance: random.Random, slots: int, most: int, width: int) -> StepPlan:
    """A step of up to `most` decode rows that gives pages to some of them, and to slots that have no row."""
    chosen = chance.sample(range(slots), chance.randint(1, most))
    updates = [
        (slot, chance.randrange(width), chance.randint(0, 999)) for slot in range(slots) if chance.random() < 0.4
    ]
    return StepPlan(
        number=1,
        slots=column(chosen),
        counts=column([1] * len(chosen)),
        starts=column([0] * len(chosen)),
        num_decode=len(chosen),
        prompt=column([]),
        emits=column(list(range(len(chosen)))),
        sampled=column([row for row in range(len(chosen)) if chance.random() < 0.5]),
        truncated=False,
        admissions=(),
        page_slots=column([slot for slot, _, _ in updates]),
        page_indices=column([index for _, index, _ in updates]),
        page_ids=column([page for _, _, page in updates]),
        chunk_pages=column([]),
    )


def fresh_rows(slots: int, width: int) -> SlotRows:
    """Rows in the middle of their answers; the same at each call. The scratch slot is as it was made."""
    numbers = np.random.default_rng(7)
    rows = SlotRows(slots, width, "cpu")
    rows.last_token[:slots] = torch.from_numpy(numbers.integers(0, 1000, slots))
    rows.seq_len[:slots] = torch.from_numpy(numbers.integers(0, 16 * width - 1, slots))
    rows.page_table[:slots] = torch.from_numpy(numbers.integers(0, 1000, (slots, width)))
    return rows


def mail_with(plan: StepPlan, place: int, slots: int, width: int) -> Mail:
    """Mail with the plan at each place of the host, and `place` the one whose turn it is."""
    mail = Mail(capacity(slots, slots, slots * width), slots, "cpu")
    for words in mail.plan_words[:EMPTY]:
        pack(plan, words)
    mail.turn.fill_(place)
    return mail


def compare_kernels(chance: random.Random) -> None:
    """Run the references and the kernels on the same plan, and compare all that they wrote."""
    from overlap.state import replay_triton

    slots, width = chance.choice([1, 6, 40, 100]), chance.choice([3, 130])  # 100 rows: a plan for several programs
    size = chance.randint(1, slots) if chance.random() < 0.8 else slots + 3
    place = chance.choice([*range(DEPTH), EMPTY])
    plan = decode_plan(chance, slots, min(size, slots), width)
    results = []
    for kind in (replay, replay_triton):
        rows, mail = fresh_rows(slots, width), mail_with(plan, place, slots, width)
        out = empty_inputs(size, size, width, "cpu")
        out.emit_tokens.zero_()
        kind.take_plan(mail, rows, size)
        kind.build_decode_inputs(mail.packed, rows, out)
        kind.settle_decode(mail, rows, torch.arange(100, 100 + size))
        results.append((rows, mail, out))
    (rows, mail, out), (other_rows, other_mail, other_out) = results
    for name in SlotRows.COLUMNS:
        assert torch.equal(getattr(rows, name), getattr(other_rows, name)), name
    for name in ("packed", "landings", "turn"):
        assert torch.equal(getattr(mail, name), getattr(other_mail, name)), name
    for name in StepInputs.__slots__:
        assert torch.equal(getattr(out, name), getattr(other_out, name)), name


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_the_kernels_agree_with_their_references_over_random_plans() -> None:
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


def test_a_replayed_step_does_what_a_launched_one_does_and_its_padding_does_nothing() -> None:
    for seed in range(60):
        chance = random.Random(seed)
        slots, width = chance.choice([1, 6, 40]), chance.choice([3, 20])
        plan = decode_plan(chance, slots, slots, width)
        num_rows = plan.num_rows
        size, place = num_rows + chance.choice([0, 1, 5]), chance.randrange(DEPTH)
        tokens = torch.arange(100, 100 + size)

        rows, mail = fresh_rows(slots, width), mail_with(plan, place, slots, width)
        packed = mail.plans[0].clone()
        expected = build_inputs(packed, pack(plan, packed.numpy()), rows)
        settle_tokens(rows, expected.emit_slots, tokens[:num_rows].int())

        own, out = fresh_rows(slots, width), empty_inputs(size, size, width, "cpu")
        replay.take_plan(mail, own, size)
        replay.build_decode_inputs(mail.packed, own, out)
        replay.settle_decode(mail, own, tokens)

        for name in StepInputs.__slots__:
            if name != "emit_tokens":  # every row emits
                assert torch.equal(getattr(out, name)[:num_rows], getattr(expected, name)), name
        for name in SlotRows.COLUMNS:
            assert torch.equal(getattr(own, name), getattr(rows, name)), name
        padding = slice(num_rows, size)
        assert (out.kv_index[padding] == -1).all()
        assert (out.seq_lens[padding] == 1).all()
        assert (out.emit_slots[padding] == own.scratch).all()
        for column_name in ("token_ids", "positions", "page_table"):
            assert (getattr(out, column_name)[padding] == 0).all(), column_name
        assert mail.landed_words[place][:num_rows].tolist() == tokens[:num_rows].tolist()
        assert mail.landings.count_nonzero() == num_rows
        assert mail.turn.tolist() == [(place + 1) % DEPTH]


def test_the_empty_plan_changes_nothing_but_the_turn() -> None:
    rows, before = fresh_rows(5, 4), fresh_rows(5, 4)
    mail = mail_with(decode_plan(random.Random(0), 5, 5, 4), EMPTY, 5, 4)
    out = empty_inputs(8, 8, 4, "cpu")
    replay.take_plan(mail, rows, 8)
    replay.build_decode_inputs(mail.packed, rows, out)
    replay.settle_decode(mail, rows, torch.arange(8))
    for name in SlotRows.COLUMNS:
        assert torch.equal(getattr(rows, name), getattr(before, name)), name
    assert (out.kv_index == -1).all()
    assert mail.landings.count_nonzero() == 0
    assert mail.turn.item() in range(DEPTH)


if __name__ == "__main__":
    for seed in range(12):
        compare_kernels(random.Random(seed))
    sys.stdout.write("compared\n")
