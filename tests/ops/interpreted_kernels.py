"""Compares kernels with references; run by test_kernels_interpreted.py with TRITON_INTERPRET=1. Prints each name."""

from __future__ import annotations

import random
import sys
from typing import Any, Literal, TypeAlias

import numpy as np
import pytest
import torch
from triton.runtime import interpreter

from overlap.ops import (
    activation,
    activation_triton,
    decode_triton,
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
from overlap.ops.attention import AttentionRows, TorchAttention
from overlap.ops.linear import Linear
from overlap.ops.linear_choice import Op, Tiles
from overlap.sample import mask_triton, philox, philox_triton
from overlap.sample.shaping import mask_logits
from overlap.schedule.plan import Admission, StepPlan
from overlap.spec import pair, pair_triton, places, places_triton, runs, runs_triton
from overlap.spec.control import DraftControl
from overlap.spec.drafter import Drafts, Read
from overlap.spec.rows import DraftRows
from overlap.state import inputs_triton
from overlap.state.inputs import StepInputs, build_inputs, empty_inputs
from overlap.state.mail import Mail
from overlap.state.packing import capacity, pack
from overlap.state.rows import SlotRows

DTYPES = (torch.float32, torch.bfloat16)
Kernel: TypeAlias = Literal["gemv", "split", "dot", "blocks"]


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


def random_tiles(chance: random.Random, kernel: Kernel) -> Tiles:
    if kernel == "blocks":
        sizes = (chance.choice([16, 32, 64]), chance.choice([16, 32, 64]))
        return Tiles("blocks", *sizes, 4, 3, chance.choice([16, 32, 64]))
    if kernel == "split":
        return Tiles("split", chance.choice([8, 16]), chance.choice([64, 256]), 4, 1, chance.choice([16, 32]))
    if kernel == "dot":
        return Tiles("dot", chance.choice([16, 32]), chance.choice([16, 32, 64]), 4, 3)
    return Tiles("gemv", chance.choice([2, 4, 8]), chance.choice([16, 64, 256]), 4)


def most_rows(kernel: Kernel) -> int:
    return 16 if kernel in ("gemv", "dot") else 100


def check_linear(chance: random.Random) -> None:
    """Plain, biased, added, normed, gated, and their mixtures, in all kernels, against float64."""
    kernels: tuple[Kernel, ...] = ("gemv", "split", "dot", "blocks", "blocks")
    for kernel in kernels:
        # The interpreter multiplies the bits of bfloat16 as whole numbers in `tl.dot` (Triton 3.6).
        dtype = chance.choice([torch.float32, torch.bfloat16 if kernel == "gemv" else torch.float16])
        rows = chance.randint(1, most_rows(kernel))
        outputs, inputs = chance.choice([1, 30, 64, 100]), 8 * chance.randint(1, 20)
        gated, normed = chance.random() < 0.5, kernel != "dot" and chance.random() < 0.5
        squares = random_squares(chance, rows) if not normed and chance.random() < 0.5 else None
        added = not gated and chance.random() < 0.5
        x = torch.randn(rows, inputs + 8)[:, :inputs].to(torch.float32 if normed else dtype)
        weight = torch.randn(2 * outputs if gated else outputs, inputs).to(dtype)
        bias = torch.randn(len(weight)).to(dtype) if chance.random() < 0.5 else None
        residual, factor = torch.randn(rows, outputs), torch.randn(inputs)
        expected = norm.rms_norm(x, factor, 1e-5, torch.float32) if normed else x
        expected = expected.double() @ weight.double().T
        expected = expected * (1.0 if squares is None else norm_factor(squares, inputs).double())
        expected = expected + (0.0 if bias is None else bias.double())
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
            squares=None if squares is None else (squares, 1e-5),
            residual_TO=residual if added else None,
            gated=gated,
        )
        assert got.dtype is (torch.float32 if added else dtype)
        rounded = got.dtype is not torch.float32 or (normed and dtype is not torch.float32)
        tolerance = 2**-6 if rounded else 1e-4
        torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance * inputs**0.5)


def random_squares(chance: random.Random, rows: int) -> torch.Tensor:
    """Parts of the rows' sums of squares, as if a product in front had left them."""
    return torch.rand(rows, chance.choice([1, 3, 16, 36])) * 9


def norm_factor(squares: torch.Tensor, channels: int) -> torch.Tensor:
    return torch.rsqrt(squares.sum(1, keepdim=True) / channels + 1e-5)


def check_linear_add(chance: random.Random) -> None:
    """The new stream has the bits that it has alone, and what goes with it is made of it."""
    kernels: tuple[Kernel, ...] = ("gemv", "gemv", "split", "dot", "blocks")
    for place, kernel in enumerate(kernels):
        dtype = chance.choice([torch.float32, torch.bfloat16 if kernel == "gemv" else torch.float16])
        rows, inputs = chance.randint(1, most_rows(kernel)), 8 * chance.randint(1, 9)
        outputs, tiles = chance.choice([1, 30, 64, 100]), random_tiles(chance, kernel)
        x, weight = torch.randn(rows, inputs).to(dtype), torch.randn(outputs, inputs).to(dtype)
        bias = torch.randn(outputs).to(dtype) if place % 2 else None
        residual, factor = torch.randn(rows, outputs + 3)[:, :outputs], torch.randn(outputs)
        given = (x, weight, bias, tiles)
        total, scaled, squares = linear_triton.linear_add(*given, residual, factor)
        assert torch.equal(total, linear_triton.linear(*given, residual_TO=residual))
        assert scaled.dtype is dtype
        close(scaled, (total * factor).to(dtype))
        padded = torch.nn.functional.pad(total, (0, -outputs % tiles.block_o))
        close(squares, padded.view(rows, -1, tiles.block_o).square().sum(2))


def check_qkv(chance: random.Random) -> None:
    """Norm, product, rotation and write in one kernel against one after the other."""
    kinds: tuple[tuple[torch.dtype, Kernel], ...] = (
        (torch.float32, "gemv"), (torch.bfloat16, "gemv"), (torch.float32, "split"), (torch.float16, "split"),
        (torch.float32, "blocks"), (torch.float16, "blocks"), (torch.float32, "blocks"),
    )  # fmt: skip
    for dtype, kernel in kinds:
        head_dims = [16, 32, 48] if kernel == "blocks" else [4, 16, 48]
        num_kv_heads = chance.choice([1, 2, 3])
        num_heads, head_dim, hidden = num_kv_heads * chance.choice([1, 3]), chance.choice(head_dims), 40
        tokens, layers, pages = chance.randint(1, most_rows(kernel) // 2), 3, 5
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
        tiles = random_tiles(chance, kernel)
        head_norm = torch.randn(num_heads + num_kv_heads, head_dim) if tiles.owns_heads(head_dim) else None
        rest = (layer, kv_index, num_heads, num_kv_heads, head_norm)
        before = factor if chance.random() < 0.5 else None
        squares = random_squares(chance, tokens) if before is None and chance.random() < 0.7 else None
        x = residual if before is not None else residual.to(dtype)
        given = (x, before, 1e-5, weight, bias, tiles)
        got = qkv_triton.qkv(*given, positions, table, got_kv, *rest, squares_TP=squares)
        normed = x.float() if before is None else norm.rms_norm(x, before, 1e-5, torch.float32)
        qkv = normed @ weight.float().T
        qkv = qkv if squares is None else qkv * norm_factor(squares, hidden)
        qkv = qkv if bias is None else qkv + bias.float()
        expected = rope.rope_and_write(qkv, positions, table, expected_kv, *rest, 1e-5)
        tolerance = 1e-4 if dtype is torch.float32 else 2**-6
        torch.testing.assert_close(got.float(), expected, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(got_kv.float(), expected_kv, rtol=tolerance, atol=tolerance)


class Skinny(Linear):
    """A Linear that takes kernels of ours at any number of rows, on any device."""

    unfused: tuple[str, ...] = ()
    cut = Tiles("gemv", 4, 64, 4)
    rope_cut = Tiles("blocks", 8, 16, 4, 2, 16)

    def tiles(self, op: Op, rows: int) -> Tiles | None:
        if op in self.unfused:
            return None
        return self.rope_cut if "rope" in op else self.cut


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
            qkv.unfused = chance.choice([(), ("norm_rope",), ("norm_rope", "rope"), ("norm_rope", "rope", "norm")])
            gate_up.unfused = chance.choice([(), ("norm_gated",)])
            down.unfused = chance.choice([(), ("add",)])
        kv = torch.zeros(2, 1, 2, 16, num_kv_heads, head_dim)
        rotation = (index, table, kv, 0, index, num_heads, num_kv_heads, head_norm)
        q, total = fused.norm_qkv(qkv, fused.Stream(None, residual), factor, 1e-5, *rotation)
        gated, total = fused.norm_gated(gate_up, fused.Stream(None, total), factor, 1e-5)
        stream = fused.linear_add(down, gated, total)
        again, total = fused.norm_gated(gate_up, stream, factor, 1e-5)
        normed = fused.norm(stream, factor, 1e-5, torch.float32)
        turned_kv, ids = torch.zeros_like(kv), torch.arange(99, dtype=torch.int32).flip(0) * 3
        turned = fused.rotated(qkv, normed, index, table, turned_kv, 0, index, num_heads, num_kv_heads)
        heads = fused.greedy_head(normed, head), fused.greedy_head(normed, head, ids), head.wide(normed)
        from_stream = fused.norm_greedy_head(total, factor, 1e-5, head, ids)
        found.append((q, kv, gated, again, total, normed, turned, turned_kv, *heads, from_stream))
    for expected, got in zip(*found, strict=True):
        close(got, expected)


def check_chain(chance: random.Random) -> None:
    """o, gate and up, down, then q, k and v: each norm between two products, against separate torch ops."""
    hidden, inner, num_heads, num_kv_heads, head_dim, tokens = 40, 24, 3, 1, 8, chance.randint(1, 16)
    sizes = (hidden, hidden), (2 * inner, hidden), (hidden, inner), ((num_heads + 2 * num_kv_heads) * head_dim, hidden)
    weights = [torch.randn(size) * 0.2 for size in sizes]
    residual, attended = torch.randn(tokens, hidden), torch.randn(tokens, hidden)
    mlp_norm, attention_norm = torch.randn(2, hidden)
    head_norm = torch.randn(num_heads + num_kv_heads, head_dim) if chance.random() < 0.5 else None
    table, index = rope.rope_table(head_dim, 50, 1e4, None, "cpu"), torch.randperm(32)[:tokens].int()
    kernels: tuple[Kernel, ...] = ("gemv", "split", "dot", "blocks")
    found = []
    for kind in (Linear, Skinny):
        o, gate_up, down, qkv = (kind(weight, None) for weight in weights)
        for linear in (o, gate_up, down, qkv):
            if isinstance(linear, Skinny):
                linear.unfused = ("norm_rope", "norm_gated")
                linear.cut = random_tiles(chance, chance.choice(kernels))
                if head_norm is None:
                    linear.rope_cut = random_tiles(chance, chance.choice(("gemv", "split", "blocks")))
        kv = torch.zeros(2, 1, 2, 16, num_kv_heads, head_dim)
        rotation = (index, table, kv, 0, index, num_heads, num_kv_heads, head_norm)
        ahead = fused.Ahead(mlp_norm, gate_up, "gated")
        first = fused.linear_add(o, attended, residual, ahead)
        gated, total = fused.norm_gated(gate_up, first, mlp_norm, 1e-5)
        ahead = fused.Ahead(attention_norm, qkv, "rope", None if head_norm is None else head_dim)
        second = fused.linear_add(down, gated, total, ahead)
        q, total = fused.norm_qkv(qkv, second, attention_norm, 1e-5, *rotation)
        assert (first.scaled is not None) == (second.scaled is not None) == (kind is Skinny)
        found.append((fused.whole(first), gated, fused.whole(second), total, q, kv))
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def check_ahead(chance: random.Random) -> None:
    """A stream is scaled where the product behind reads it so, and for its norm alone."""
    weights, rows = torch.randn(3, 16, 16), chance.randint(1, 9)
    (x, residual), (mlp_norm, other_norm) = torch.randn(2, rows, 16), torch.randn(2, 16)

    def ready(ahead: fused.Ahead | None, *, o_cut: Tiles = Skinny.cut, unfused: tuple[str, ...] = ()) -> bool:
        o = Skinny(weights[0], None)
        o.cut, o.unfused = o_cut, unfused
        return fused.linear_add(o, x, residual, ahead).scaled is not None

    gate_up, qkv = Skinny(weights[1], None), Skinny(weights[2], None)
    gated, turned = fused.Ahead(mlp_norm, gate_up, "gated"), fused.Ahead(mlp_norm, qkv, "rope")
    assert not ready(gated), "the norm is inside the product behind"
    gate_up.unfused, qkv.unfused = ("norm_gated",), ("norm_rope",)
    assert ready(gated)
    assert ready(turned)
    assert ready(turned._replace(normed_head=8))
    assert not ready(turned._replace(normed_head=16)), "no program behind owns a head"
    assert not ready(None)
    assert not ready(gated, unfused=("add",)), "the product in front is the library's"
    many_rows = Tiles("blocks", 16, 16, 4, 2, 1024)
    gate_up.cut = many_rows
    assert ready(gated, o_cut=Tiles("gemv", 16, 64, 4))
    assert not ready(gated, o_cut=Tiles("gemv", 2, 64, 4)), "too many squares for the registers"
    gate_up.cut, gate_up.unfused = Skinny.cut, ("norm_gated", "gated")
    assert not ready(gated), "the product behind is the library's"
    gate_up.unfused = ("norm_gated",)
    large = Skinny(torch.empty(1 << 20, 16), None)
    large.unfused = ("norm_gated",)
    assert not ready(gated._replace(linear=large)), "a norm apart is nothing beside reading it"
    half = Skinny(weights[0].half(), None)
    assert fused.linear_add(half, x.half(), residual, gated).scaled is None, "float16 has no room for the stream"
    stream = fused.linear_add(Skinny(weights[0], None), x, residual, gated)
    with pytest.raises(AssertionError, match="another norm"):
        fused.norm_gated(gate_up, stream, other_norm, 1e-5)


def check_greedy(chance: random.Random) -> None:
    kernels: tuple[Kernel, ...] = ("gemv", "dot", "split", "blocks")
    for kernel in kernels:
        rows = chance.randint(1, most_rows(kernel))
        size, inputs = chance.choice([1, 7, 100, 331]), 8 * chance.randint(1, 9)
        # Small whole numbers: sums are exact, and many are equal.
        x, weight = (torch.randint(-2, 3, (count, inputs)).half() for count in (rows, size))
        weight[chance.randrange(size) :] = weight[0]
        tiles = random_tiles(chance, kernel)
        got = linear_triton.greedy(x, weight, None, tiles)
        best = (x.double() @ weight.double().T).argmax(-1)
        assert torch.equal(got, best.int())
        ids = torch.randperm(5000)[:size].int()
        assert torch.equal(linear_triton.greedy(x, weight, None, tiles, ids_O=ids), ids[best])
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


def check_decode(chance: random.Random) -> None:
    """Rows of all lengths, in one part and in many, decoding and verifying; one behind the other in one workspace."""
    for dtype in (torch.float32, torch.float16):  # of bfloat16 the interpreter multiplies the bits
        num_kv_heads, group, head_dim = chance.choice([(1, 3, 64), (2, 4, 16), (3, 3, 48), (2, 1, 32), (1, 24, 16)])
        pages, layers, table_width = 60, 2, chance.choice([3, 10])
        kv = torch.randn(pages, layers, 2, 16, num_kv_heads, head_dim).to(dtype)
        uneven = decode_triton.Cut(
            1 << 31, 16, 1, ahead=chance.random() < 0.5, queries=chance.choice([4, 64]), keys=48, splits=4
        )
        kernel = decode_triton.DecodeKernel(kv, num_kv_heads * group, 3, 5, chance.choice([None, uneven]))
        for _ in range(2):
            rows, width, layer = chance.randint(1, 3), chance.choice([1, 1, 2, 5]), chance.randrange(layers)
            table = torch.randint(0, pages, (rows, table_width), dtype=torch.int32)
            longest = table_width * 16
            lengths = [chance.choice([width, longest, chance.randint(width, longest)]) for _ in range(rows)]
            q = torch.randn(rows * width, num_kv_heads * group, head_dim).to(dtype)
            out = torch.full_like(q, float("nan"))
            kernel.attend(layer, q, table, torch.tensor(lengths, dtype=torch.int32), out, width)
            reference = TorchAttention(kv.float(), num_kv_heads * group)
            counts = np.full(rows, width, dtype=np.int32)
            told = torch.tensor(lengths, dtype=torch.int32)
            starts, none = np.array(lengths, dtype=np.int32) - counts, np.empty(0, np.int32)
            reference.plan(
                AttentionRows(
                    num_decode=rows, width=width, seq_lens=told, page_table=table, starts=starts, counts=counts,
                    chunk_pages=none,
                )
            )  # fmt: skip
            expected = reference.attend(layer, q.float()).view(q.shape)
            tolerance = 1e-4 if dtype is torch.float32 else 2e-2
            torch.testing.assert_close(out.float(), expected, rtol=tolerance, atol=tolerance)
        kernel.attend(0, q[:1], table[:1], torch.zeros(1, dtype=torch.int32), out[:1])
        assert not out[:1].any()  # padding
        assert not kernel._counters.any()


def let_ranges_end_where_tensors_say() -> None:
    """The interpreter (Triton 3.6) makes an index of an array of one element, which NumPy 2.4 refuses."""
    patch = interpreter._patch_lang_tensor

    def patch_and_mend(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_and_mend


def random_drafts(chance: random.Random, rows: SlotRows, width: int) -> DraftRows:
    drafts = DraftRows(rows.scratch, width, "cpu")
    slots = rows.scratch
    drafts.tokens_SK[:slots] = torch.randint(0, 3, (slots, width)).int()
    drafts.num_S[:slots] = torch.randint(0, width + 1, (slots,)).int()
    drafts.control.hits[:slots], drafts.control.tries[:slots] = torch.rand(slots), 1 + torch.rand(slots)
    drafts.control.idle[:slots] = torch.randint(0, 200, (slots,)).int()
    rows.last_token[:slots] = torch.randint(0, 999, (slots,)).int()
    rows.seq_len[:slots] = torch.randint(0, 16 * (rows.page_table.shape[1] - 1), (slots,)).int()
    rows.page_table[:slots] = torch.randint(0, 999, rows.page_table[:slots].shape).int()
    return drafts


def same(got: object, expected: object, names: tuple[str, ...]) -> None:
    for name in names:
        torch.testing.assert_close(getattr(got, name), getattr(expected, name), rtol=1e-6, atol=1e-6, msg=name)


def check_runs(chance: random.Random) -> None:
    """A verify of some rows and some padding: its inputs, what it settles, what it lands, and what is drafted next."""
    slots, table, most = 6, 13, chance.choice([1, 3, 4])
    width, size, real = chance.choice([1, most + 1]), chance.randint(1, 6), chance.randint(0, 6)
    words = np.zeros(100, dtype=np.int32)
    words[0], words[16 : 16 + slots] = real, chance.sample(range(slots), slots)
    packed = torch.from_numpy(words)
    found = []
    choices = torch.randint(0, 3, (size * width,)).to(chance.choice([torch.int32, torch.int64]))
    proposed = Drafts(
        tokens_RK=torch.randint(0, 999, (size, most)).int(), num_R=torch.full((size,), most, dtype=torch.int32)
    )
    seed = torch.get_rng_state()
    for module in (runs, runs_triton):
        torch.set_rng_state(seed)
        rows, mail = SlotRows(slots, table, "cpu"), Mail(100, 6 * 5, "cpu")
        drafts = random_drafts(chance, rows, most)
        mail.packed.copy_(packed)
        built = module.build_runs(packed, rows, drafts, size, width, 16 * (table - 1) - 5)
        outcome = module.settle_runs(built, choices, rows, drafts, 0.1)
        num_real = min(real, size)
        if num_real:
            some = Drafts(tokens_RK=proposed.tokens_RK[:num_real], num_R=proposed.num_R[:num_real])
            module.keep_drafts(built.slots_D[:num_real], some, outcome.most_D[:num_real], drafts)
        module.land_runs(mail, outcome.landing_DJ)
        found.append((built, outcome, rows, drafts, drafts.control, mail))
    names: tuple[tuple[str, ...], ...] = (
        tuple(name for name in runs.Runs.__slots__ if name not in ("packed", "width")),
        ("landing_DJ", "last_D", "most_D"),
        SlotRows.COLUMNS,
        ("tokens_SK", "num_S"),
        ("hits", "tries", "idle"),
        ("landings", "turn"),
    )
    for expected, got, some in zip(*found, names, strict=True):
        same(got, expected, some)
    assert isinstance(found[0][4], DraftControl)


def check_places(chance: random.Random) -> None:
    rows, table, steps = chance.randint(1, 5), 4, chance.randint(1, 7)
    tokens = rows * 3
    read = Read(
        token_ids=torch.zeros(tokens), next_tokens=torch.zeros(tokens), hidden=None,
        positions=torch.randint(0, 60, (tokens,)).int(), kv_index=torch.zeros(tokens),
        rows=None,  # type: ignore[arg-type]
        last=torch.randint(0, tokens, (rows,)), slots=torch.randint(0, 4, (rows,)).int(),
        token_slots=torch.zeros(tokens), page_table=torch.randint(0, 99, (rows, table)).int(), longest=99,
    )  # fmt: skip
    same(
        places.Places(*places_triton.chain_places(read, steps, 60, 2, 3)),
        places.chain_places(read, steps, 60, 2, 3),
        places.Places.__slots__,
    )


def check_pair(chance: random.Random) -> None:
    for dtype in DTYPES:
        tokens, channels = chance.randint(1, 5), chance.choice([8, 100, 576])
        ids, table = torch.randint(0, 50, (tokens,)).int(), torch.randn(50, channels).to(dtype)
        hidden = torch.randn(tokens, channels + 4).to(chance.choice([dtype, torch.float32]))[:, :channels]
        norms = torch.randn(channels), torch.randn(channels)
        expected = pair.normed_pair(ids, table, hidden, *norms, 1e-5)
        for got, want in zip(pair_triton.normed_pair(ids, table, hidden, *norms, 1e-5), expected, strict=True):
            close(got, want)


CHECKS = {
    "norm": check_norm,
    "activation": check_activation,
    "rope": check_rope,
    "embedding": check_embedding,
    "linear": check_linear,
    "linear_add": check_linear_add,
    "qkv": check_qkv,
    "fused": check_fused,
    "chain": check_chain,
    "ahead": check_ahead,
    "greedy": check_greedy,
    "philox": check_philox,
    "inputs": check_inputs,
    "masks": check_masks,
    "decode": check_decode,
    "runs": check_runs,
    "places": check_places,
    "pair": check_pair,
}

if __name__ == "__main__":
    let_ranges_end_where_tensors_say()
    for name, check in CHECKS.items():
        for seed in range(6):
            torch.manual_seed(seed)
            check(random.Random(seed))
        sys.stdout.write(name + "\n")
