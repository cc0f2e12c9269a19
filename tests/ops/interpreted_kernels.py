"""Compares kernels with references; run by test_kernels_interpreted.py with TRITON_INTERPRET=1. Prints each name."""

from __future__ import annotations

import random
import sys

import numpy as np
import torch

from overlap.ops import activation, activation_triton, norm, norm_triton, rope, rope_triton
from overlap.sample import philox, philox_triton
from overlap.schedule.plan import Admission, StepPlan
from overlap.state import inputs_triton
from overlap.state.inputs import StepInputs, build_inputs, empty_inputs
from overlap.state.packing import capacity, pack
from overlap.state.rows import SlotRows

DTYPES = (torch.float32, torch.bfloat16)


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    """The interpreter truncates to bfloat16 where devices round, up to twice in a row."""
    tolerance = 1e-5 if expected.dtype is torch.float32 else 2**-5
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def check_norm(chance: random.Random) -> None:
    for dtype in DTYPES:
        tokens, channels = chance.randint(1, 5), chance.choice([8, 100, 576])
        x, residual = torch.randn(tokens, channels).to(dtype), torch.randn(tokens, channels)
        weight = torch.randn(channels)
        close(norm_triton.rms_norm(residual, weight, 1e-5, dtype), norm.rms_norm(residual, weight, 1e-5, dtype))
        for got, expected in zip(
            norm_triton.add_rms_norm(x, residual, weight, 1e-5),
            norm.add_rms_norm(x, residual, weight, 1e-5),
            strict=True,
        ):
            close(got, expected)


def check_activation(chance: random.Random) -> None:
    for dtype in DTYPES:
        gate_up = torch.randn(chance.randint(1, 4), 2 * chance.choice([7, 1024, 1536])).to(dtype)
        close(activation_triton.silu_mul(gate_up), activation.silu_mul(gate_up))


def check_rope(chance: random.Random) -> None:
    for dtype in DTYPES:
        num_kv_heads = chance.choice([1, 2, 3])
        num_heads, head_dim = num_kv_heads * chance.choice([1, 3, 4]), chance.choice([16, 48, 64])
        tokens, layers, pages = chance.randint(1, 9), 3, 5
        qkv = torch.randn(tokens, (num_heads + 2 * num_kv_heads) * head_dim).to(dtype)
        table = rope.rope_table(head_dim, 100, 1e4, None, "cpu")
        positions = torch.randint(0, 100, (tokens,), dtype=torch.int32)
        kv_index = torch.randperm(pages * 16)[:tokens].int()
        kv_index[chance.randrange(tokens)] = -1
        layer = chance.randrange(layers)
        got_kv = torch.randn(pages, layers, 2, 16, num_kv_heads, head_dim).to(dtype)
        expected_kv = got_kv.clone()
        got = rope_triton.rope_and_write(qkv, positions, table, got_kv, layer, kv_index, num_heads, num_kv_heads)
        close(got, rope.rope_and_write(qkv, positions, table, expected_kv, layer, kv_index, num_heads, num_kv_heads))
        close(got_kv, expected_kv)


def check_philox(chance: random.Random) -> None:
    rows, size = 3, chance.choice([1, 5, 1023, 1500])
    lo, hi = torch.randint(-(2**31), 2**31, (2, rows)).int()
    positions = torch.randint(0, 2**31 - 1, (rows,)).int()
    got = philox_triton.random_bits(lo, hi, positions, size)
    assert torch.equal(got, philox.random_bits(lo, hi, positions, size))


def random_step(chance: random.Random, slots: int, width: int) -> StepPlan:
    """A mixed step over random slots, most of them admitted with it."""

    def column(values: list[int]) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
        return np.array(values, dtype=np.int32)

    num_rows = chance.randint(1, slots)
    num_decode = chance.randint(0, num_rows)
    chosen = chance.sample(range(slots), num_rows)
    counts = [1] * num_decode + [chance.choice([1, 2, 40, 200]) for _ in range(num_rows - num_decode)]
    starts = [chance.randint(0, 16 * width - count) for count in counts]
    emits = [*range(num_decode), *(row for row in range(num_decode, num_rows) if chance.random() < 0.5)]
    prompt = sum(counts[num_decode:])
    updates = [(slot, index, chance.randint(0, 999)) for slot in chosen for index in range(width)]
    return StepPlan(
        number=1,
        slots=column(chosen),
        counts=column(counts),
        starts=column(starts),
        num_decode=num_decode,
        prompt=column([chance.randint(0, 999) for _ in range(prompt)]),
        emits=column(emits),
        sampled=column([index for index in range(len(emits)) if chance.random() < 0.5]),
        truncated=False,
        admissions=tuple(
            Admission(
                slot=slot,
                start=start,
                temperature=chance.random(),
                top_k=chance.randint(0, 99),
                top_p=chance.random(),
                min_p=chance.random(),
                seed=chance.getrandbits(64),
            )
            for slot, start in zip(chosen, starts, strict=True)
        ),
        page_slots=column([slot for slot, _, _ in updates]),
        page_indices=column([index for _, index, _ in updates]),
        page_ids=column([page for _, _, page in updates]),
        chunk_pages=column([]),
    )


def check_inputs(chance: random.Random) -> None:
    slots, width = 6, 13
    plan = random_step(chance, slots, width)
    words = np.zeros(capacity(slots, 2000, slots * width), dtype=np.int32)
    layout = pack(plan, words)
    packed = torch.from_numpy(words)
    one, other = SlotRows(slots, width, "cpu"), SlotRows(slots, width, "cpu")
    for rows in (one, other):
        rows.last_token.copy_(torch.arange(slots))
    expected = build_inputs(packed, layout, one)
    got = empty_inputs(layout.num_tokens, layout.num_rows, width, "cpu")
    inputs_triton.build_inputs(packed, layout, other, got)
    for name in StepInputs.__slots__:
        want = getattr(expected, name)
        assert torch.equal(getattr(got, name)[: len(want)], want), name
    for name in SlotRows.__slots__:
        assert torch.equal(getattr(one, name), getattr(other, name)), name


CHECKS = {
    "norm": check_norm,
    "activation": check_activation,
    "rope": check_rope,
    "philox": check_philox,
    "inputs": check_inputs,
}

if __name__ == "__main__":
    for name, check in CHECKS.items():
        for seed in range(6):
            torch.manual_seed(seed)
            check(random.Random(seed))
        sys.stdout.write(name + "\n")
