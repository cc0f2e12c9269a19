"""Compares kernels with references; run by test_kernels_interpreted.py with TRITON_INTERPRET=1. Prints each name."""

from __future__ import annotations

import random
import sys
from typing import Literal

import numpy as np
import torch

from overlap.ops import (
    activation,
    activation_triton,
    embedding,
    embedding_triton,
    fused,
    linear_triton,
    norm,
    norm_triton,
    qkv_triton,
    rope,
    rope_triton,
)
from overlap.ops.linear import Linear
from overlap.ops.linear_choice import Op, Tiles
from overlap.sample import mask_triton, philox, philox_triton
from overlap.sample.shaping import mask_logits
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
        head_norm = torch.randn(num_heads + num_kv_heads, head_dim) if chance.random() < 0.5 else None
        rest = (layer, kv_index, num_heads, num_kv_heads, head_norm, 1e-5)
        got = rope_triton.rope_and_write(qkv, positions, table, got_kv, *rest)
        close(got, rope.rope_and_write(qkv, positions, table, expected_kv, *rest))
        close(got_kv, expected_kv)


def check_embedding(chance: random.Random) -> None:
    for dtype in DTYPES:
        table = torch.randn(50, chance.choice([8, 576, 1030])).to(dtype)
        token_ids = torch.randint(0, 50, (chance.randint(1, 9),), dtype=torch.int32)
        assert torch.equal(embedding_triton.embed(token_ids, table), embedding.embed(token_ids, table))


def random_tiles(chance: random.Random, kernel: Literal["gemv", "dot"]) -> Tiles:
    if kernel == "dot":
        return Tiles("dot", chance.choice([16, 32]), chance.choice([16, 32, 64]), 4, 3)
    return Tiles("gemv", chance.choice([2, 4, 8]), chance.choice([16, 64, 256]), 4)


def check_linear(chance: random.Random) -> None:
    """Plain, biased, added, normed, gated, and their mixtures, in both kernels, against float64."""
    kernels: tuple[Literal["gemv", "dot"], ...] = ("gemv", "gemv", "dot")
    for kernel in kernels:
        # The interpreter multiplies the bits of bfloat16 as whole numbers in `tl.dot` (Triton 3.6).
        dtype = chance.choice([torch.float32, torch.bfloat16 if kernel == "gemv" else torch.float16])
        rows, outputs, inputs = chance.randint(1, 16), chance.choice([1, 30, 64, 100]), 8 * chance.randint(1, 20)
        gated, normed = chance.random() < 0.5, kernel == "gemv" and chance.random() < 0.5
        added = not gated and chance.random() < 0.5
        x = torch.randn(rows, inputs + 8)[:, :inputs].to(torch.float32 if normed else dtype)
        weight = torch.randn(2 * outputs if gated else outputs, inputs).to(dtype)
        bias = torch.randn(len(weight)).to(dtype) if chance.random() < 0.5 else None
        residual, factor = torch.randn(rows, outputs), torch.randn(inputs)
        expected = norm.rms_norm(x, factor, 1e-5, torch.float32) if normed else x
        expected = expected.double() @ weight.double().T + (0.0 if bias is None else bias.double())
        if gated:
            expected = torch.nn.functional.silu(expected[:, :outputs]) * expected[:, outputs:]
        if added:
            expected = expected + residual
        got = linear_triton.linear(
            x,
            weight,
            bias,
            random_tiles(chance, kernel),
            norm=(factor, 1e-5) if normed else None,
            residual_TO=residual if added else None,
            gated=gated,
        )
        assert got.dtype is (torch.float32 if added else dtype)
        tolerance = 1e-4 if got.dtype is torch.float32 else 2**-6
        torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance * inputs**0.5)


def check_qkv(chance: random.Random) -> None:
    """Norm, product, rotation and write in one kernel against one after the other."""
    for dtype in DTYPES:
        num_kv_heads = chance.choice([1, 2, 3])
        num_heads, head_dim, hidden = num_kv_heads * chance.choice([1, 3]), chance.choice([4, 16, 48]), 40
        tokens, layers, pages = chance.randint(1, 9), 3, 5
        residual, factor = torch.randn(tokens, hidden), torch.randn(hidden)
        weight = torch.randn((num_heads + 2 * num_kv_heads) * head_dim, hidden).to(dtype)
        bias = torch.randn(len(weight)).to(dtype) if chance.random() < 0.5 else None
        table = rope.rope_table(head_dim, 100, 1e4, None, "cpu")
        positions = torch.randint(0, 100, (tokens,), dtype=torch.int32)
        kv_index = torch.randperm(pages * 16)[:tokens].int()
        kv_index[chance.randrange(tokens)] = -1
        layer = chance.randrange(layers)
        got_kv = torch.randn(pages, layers, 2, 16, num_kv_heads, head_dim).to(dtype)
        expected_kv = got_kv.float()
        tiles = Tiles("gemv", chance.choice([2, 4, 8]), chance.choice([16, 64]), 4)
        rest = (layer, kv_index, num_heads, num_kv_heads)
        got = qkv_triton.norm_qkv(residual, factor, 1e-5, weight, bias, tiles, positions, table, got_kv, *rest)
        qkv = norm.rms_norm(residual, factor, 1e-5, torch.float32) @ weight.float().T
        qkv = qkv if bias is None else qkv + bias.float()
        expected = rope.rope_and_write(qkv, positions, table, expected_kv, *rest)
        tolerance = 1e-4 if dtype is torch.float32 else 2**-6
        torch.testing.assert_close(got.float(), expected, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(got_kv.float(), expected_kv, rtol=tolerance, atol=tolerance)


class Skinny(Linear):
    """A Linear that takes kernels of ours at any number of rows, on any device."""

    unfused = ""

    def tiles(self, op: Op, rows: int) -> Tiles | None:
        return None if op == self.unfused else Tiles("gemv", 4, 64, 4)


def check_fused(chance: random.Random) -> None:
    """A layer by fused kernels against the same by separate torch ops."""
    hidden, inner, num_heads, num_kv_heads, head_dim, tokens = 40, 24, 4, 2, 8, chance.randint(1, 5)
    sizes = ((num_heads + 2 * num_kv_heads) * head_dim, hidden), (2 * inner, hidden), (hidden, inner), (99, hidden)
    weights = [torch.randn(size) * 0.2 for size in sizes]
    residual, factor = torch.randn(tokens, hidden), torch.randn(hidden)
    head_norm = torch.randn(num_heads + num_kv_heads, head_dim) if chance.random() < 0.5 else None
    table, index = rope.rope_table(head_dim, 50, 1e4, None, "cpu"), torch.randperm(32)[:tokens].int()
    found = []
    for kind in (Linear, Skinny):
        qkv, gate_up, down, head = (kind(weight, None) for weight in weights)
        if isinstance(qkv, Skinny) and isinstance(gate_up, Skinny) and isinstance(down, Skinny):
            qkv.unfused = chance.choice(["", "norm_rope", "norm"])
            gate_up.unfused = chance.choice(["", "norm_gated"])
            down.unfused = chance.choice(["", "add"])
        kv = torch.zeros(2, 1, 2, 16, num_kv_heads, head_dim)
        rotation = (index, table, kv, 0, index, num_heads, num_kv_heads, head_norm)
        q, total = fused.norm_qkv(qkv, (None, residual), factor, 1e-5, *rotation)
        gated, total = fused.norm_gated(gate_up, (None, total), factor, 1e-5)
        stream = fused.linear_add(down, gated, total)
        again, total = fused.norm_gated(gate_up, stream, factor, 1e-5)
        normed = fused.norm(stream, factor, 1e-5, torch.float32)
        found.append((q, kv, gated, again, total, normed, fused.greedy_head(normed, head), head.wide(normed)))
    for expected, got in zip(*found, strict=True):
        close(got, expected)


def check_greedy(chance: random.Random) -> None:
    kernels: tuple[Literal["gemv", "dot"], ...] = ("gemv", "dot")
    for kernel in kernels:
        rows, size, inputs = chance.randint(1, 16), chance.choice([1, 7, 100, 331]), 8 * chance.randint(1, 9)
        # Small whole numbers: sums are exact, and many are equal.
        x, weight = (torch.randint(-2, 3, (count, inputs)).half() for count in (rows, size))
        weight[chance.randrange(size) :] = weight[0]
        tiles = random_tiles(chance, kernel)
        got = linear_triton.greedy(x, weight, None, tiles)
        assert torch.equal(got, (x.double() @ weight.double().T).argmax(-1).int())
        logits = linear_triton.linear(x, weight, None, tiles, dtype=torch.float32)
        assert torch.equal(logits.double(), x.double() @ weight.double().T)


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
        rows.last_token.copy_(torch.arange(len(rows.last_token)))
    expected = build_inputs(packed, layout, one)
    got = empty_inputs(layout.num_tokens, layout.num_rows, width, "cpu")
    inputs_triton.build_inputs(packed, layout, other, got)
    for name in StepInputs.__slots__:
        want = getattr(expected, name)
        assert torch.equal(getattr(got, name)[: len(want)], want), name
    for name in SlotRows.COLUMNS:
        assert torch.equal(getattr(one, name), getattr(other, name)), name


def check_masks(chance: random.Random) -> None:
    rows, size = chance.randint(1, 9), chance.choice([1, 31, 64, 5000])
    chosen = chance.sample(range(rows), chance.randint(1, rows))
    words = torch.randint(-(2**31), 2**31, (len(chosen), 1 + -(-size // 32))).int()
    words[:, 0] = torch.tensor(chosen)
    logits = torch.randn(rows, size)
    assert torch.equal(mask_triton.mask_logits(logits, words), mask_logits(logits, words))


CHECKS = {
    "norm": check_norm,
    "activation": check_activation,
    "rope": check_rope,
    "embedding": check_embedding,
    "linear": check_linear,
    "qkv": check_qkv,
    "fused": check_fused,
    "greedy": check_greedy,
    "philox": check_philox,
    "inputs": check_inputs,
    "masks": check_masks,
}

if __name__ == "__main__":
    for name, check in CHECKS.items():
        for seed in range(6):
            torch.manual_seed(seed)
            check(random.Random(seed))
        sys.stdout.write(name + "\n")
