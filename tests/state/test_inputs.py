from __future__ import annotations

import random

import numpy as np
import torch

from overlap.cache.pages import Ints
from overlap.schedule.plan import Admission, StepPlan
from overlap.state.inputs import build_inputs, empty_inputs, sampled_rows, settle_tokens
from overlap.state.packing import capacity, pack
from overlap.state.rows import SlotRows


def column(values: list[int]) -> Ints:
    return np.array(values, dtype=np.int32)


def random_plan(chance: random.Random, lengths: dict[int, int], num_slots: int) -> StepPlan:
    """A step over the slots in `lengths` (decode) and some fresh ones (chunks), with all pages of fresh slots."""
    decoding = chance.sample(sorted(lengths), chance.randint(0 if len(lengths) < num_slots else 1, len(lengths)))
    free = sorted(set(range(num_slots)) - set(lengths))
    fresh = chance.sample(free, chance.randint(0 if decoding else 1, len(free)))
    counts = [1] * len(decoding) + [chance.randint(1, 30) for _ in fresh]
    emits = list(range(len(decoding))) + [len(decoding) + i for i in range(len(fresh)) if chance.random() < 0.7]
    updates = [(slot, index, chance.randint(0, 99)) for slot in fresh for index in range(8)]
    return StepPlan(
        number=1,
        slots=column(decoding + fresh),
        counts=column(counts),
        starts=column([lengths[slot] for slot in decoding] + fresh),
        num_decode=len(decoding),
        prompt=column([chance.randint(0, 999) for _ in range(sum(counts) - len(decoding))]),
        emits=column(emits),
        sampled=column(list(range(0, len(emits), 2))),
        truncated=False,
        admissions=tuple(
            Admission(slot=slot, start=slot, temperature=0.5, top_k=slot, top_p=0.5, min_p=0.25, seed=slot)
            for slot in fresh
        ),
        page_slots=column([slot for slot, _, _ in updates]),
        page_indices=column([index for _, index, _ in updates]),
        page_ids=column([page for _, _, page in updates]),
        chunk_pages=column([]),
    )


def test_inputs_are_what_a_dictionary_of_lists_says_over_many_steps() -> None:
    for seed in range(40):
        chance = random.Random(seed)
        rows = SlotRows(6, 8, "cpu")
        lengths: dict[int, int] = {}
        tables: dict[int, list[int]] = {}
        last: dict[int, int] = {}
        for _ in range(6):
            plan = random_plan(chance, lengths, 6)
            words = np.zeros(capacity(6, 200, 48), dtype=np.int32)
            layout = pack(plan, words)
            packed = torch.from_numpy(words)
            out = empty_inputs(220, 6, 8, "cpu") if chance.random() < 0.5 else None
            got = build_inputs(packed, layout, rows, out)
            for admission in plan.admissions:
                lengths[admission.slot], tables[admission.slot] = admission.start, [0] * 8
            for slot, index, page in zip(plan.page_slots, plan.page_indices, plan.page_ids, strict=True):
                tables[int(slot)][index] = int(page)
            tokens, positions, kv_index, ends = [], [], [], []
            prompt = iter(plan.prompt.tolist())
            for row, (slot, count) in enumerate(zip(plan.slots.tolist(), plan.counts.tolist(), strict=True)):
                for _ in range(count):
                    tokens.append(last[slot] if row < plan.num_decode else next(prompt))
                    positions.append(lengths[slot])
                    kv_index.append(tables[slot][lengths[slot] // 16] * 16 + lengths[slot] % 16)
                    lengths[slot] += 1
                ends.append(len(tokens) - 1)
            slots, emits = plan.slots.tolist(), plan.emits.tolist()
            assert got.token_ids.tolist()[: len(tokens)] == tokens
            assert got.positions.tolist()[: len(tokens)] == positions
            assert got.kv_index.tolist() == kv_index + [-1] * (len(got.kv_index) - len(tokens))
            assert got.seq_lens.tolist()[: len(slots)] == [lengths[slot] for slot in slots]
            assert got.page_table.tolist()[: len(slots)] == [tables[slot] for slot in slots]
            assert got.emit_tokens.tolist()[: len(emits)] == [ends[row] for row in emits]
            assert got.emit_slots.tolist()[: len(emits)] == [slots[row] for row in emits]
            assert got.emit_positions.tolist()[: len(emits)] == [lengths[slots[row]] for row in emits]
            assert sampled_rows(packed, layout).tolist() == plan.sampled.tolist()
            chosen = [chance.randint(0, 999) for _ in emits]
            settle_tokens(rows, got.emit_slots[: len(emits)], torch.tensor(chosen, dtype=torch.int32))
            last |= {slots[row]: token for row, token in zip(emits, chosen, strict=True)}
            for slot in [slot for slot in lengths if slot not in last or lengths[slot] > 90]:
                lengths.pop(slot)
                last.pop(slot, None)


def test_an_admission_writes_its_sampling_parameters_to_its_slot() -> None:
    plan = random_plan(random.Random(0), {}, 3)
    words = np.zeros(capacity(3, 200, 24), dtype=np.int32)
    rows = SlotRows(3, 8, "cpu")
    build_inputs(torch.from_numpy(words), pack(plan, words), rows)
    for slot in plan.slots.tolist():
        assert rows.temperature[slot] == 0.5
        assert rows.top_k[slot] == slot
        assert rows.min_p[slot] == 0.25
        assert rows.seed_lo[slot] == slot
    assert rows.statistics().num_slots == rows.scratch == 3
    assert rows.statistics().nbytes == 4 * (3 + 1) * (8 + 8)
