"""The CUDA side of every op against its float32 reference on the CPU. Run with `python -m pytest tests/gpu`."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import Tensor

from overlap.ops import activation, norm, rope
from overlap.ops.attention import Attention, AttentionRows, TorchAttention, choose_attention
from overlap.sample import philox
from overlap.sample.sampler import sample
from overlap.sample.shaping import mask_logits, shape_logits, told_words
from overlap.schedule.plan import Admission, StepPlan
from overlap.schedule.shaping import Shaped, Shaping
from overlap.state.inputs import StepInputs, build_inputs, settle_tokens
from overlap.state.packing import capacity, pack
from overlap.state.rows import SlotRows
from overlap.state.shapes import ShapeRows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:Synchronization debug mode"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DTYPES = (torch.float32, torch.bfloat16)
# (query heads, key heads, head size): SmolLM2-135M, Llama-8B
SHAPES = ((9, 3, 64), (32, 8, 128))


@contextmanager
def no_sync() -> Iterator[None]:
    """Let whatever waits for the device raise."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def close(got: Tensor, expected: Tensor) -> None:
    tolerance = 2e-5 if got.dtype is torch.float32 else 2e-2
    torch.testing.assert_close(got.float().cpu(), expected.float(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_and_activation_agree_with_float32(dtype: torch.dtype) -> None:
    for seed in range(10):
        torch.manual_seed(seed)
        chance = random.Random(seed)
        tokens, channels = chance.randint(1, 300), chance.choice([8, 100, 576, 4096, 14336])
        x, residual = torch.randn(tokens, channels).to(dtype), torch.randn(tokens, channels)
        weight = torch.randn(channels)
        on_device = x.cuda(), residual.cuda(), weight.cuda()
        with no_sync():
            alone = norm.rms_norm(on_device[1], on_device[2], 1e-5, dtype)
            normed, total = norm.add_rms_norm(*on_device, 1e-5)
            gated = activation.silu_mul(on_device[0])
        close(alone, norm.rms_norm(residual, weight, 1e-5, torch.float32))
        close(total, x.float() + residual)
        close(normed, norm.rms_norm(x.float() + residual, weight, 1e-5, torch.float32))
        close(gated, activation.silu_mul(x.float()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rope_and_write_agrees_with_float32_and_touches_no_other_page(dtype: torch.dtype) -> None:
    for seed in range(10):
        torch.manual_seed(seed)
        chance = random.Random(seed)
        num_heads, num_kv_heads, head_dim = chance.choice([*SHAPES, (4, 1, 48), (5, 5, 80)])
        tokens, layers, pages = chance.randint(1, 300), 3, 40
        qkv = torch.randn(tokens, (num_heads + 2 * num_kv_heads) * head_dim).to(dtype)
        table = rope.rope_table(head_dim, 4096, 1e4, None, "cpu")
        positions = torch.randint(0, 4096, (tokens,), dtype=torch.int32)
        kv_index = torch.randperm(pages * 16)[:tokens].int()
        kv_index[chance.randrange(tokens)] = -1
        kv = torch.randn(pages, layers, 2, 16, num_kv_heads, head_dim).to(dtype)
        on_device = (qkv.cuda(), positions.cuda(), table.cuda(), kv.cuda(), kv_index.cuda())
        layer = chance.randrange(layers)
        with no_sync():
            q = rope.rope_and_write(*on_device[:4], layer, on_device[4], num_heads, num_kv_heads)
        wide = kv.float()
        close(q, rope.rope_and_write(qkv.float(), positions, table, wide, layer, kv_index, num_heads, num_kv_heads))
        close(on_device[3], wide)


def random_rows(chance: random.Random, num_pages: int, num_decode: int, num_chunks: int, width: int) -> AttentionRows:
    """Rows of random lengths over random, unshared pages, on the device."""
    counts = [1] * num_decode + [chance.randint(1, 150) for _ in range(num_chunks)]
    starts = [chance.choice([0, chance.randint(0, width * 16 - count)]) for count in counts]
    lengths = np.array(starts, dtype=np.int32) + np.array(counts, dtype=np.int32)
    pages = chance.sample(range(num_pages), width * len(counts))
    table = np.array(pages, dtype=np.int32).reshape(-1, width)
    chunk_pages = [table[row, : -(-int(lengths[row]) // 16)] for row in range(num_decode, len(counts))]
    return AttentionRows(
        num_decode=num_decode,
        seq_lens=torch.from_numpy(lengths).cuda(),
        page_table=torch.from_numpy(table).cuda(),
        starts=np.array(starts, dtype=np.int32),
        counts=np.array(counts, dtype=np.int32),
        chunk_pages=np.concatenate(chunk_pages or [table[0, :0]]),
    )


def check_attention(attention: Attention, kv: Tensor, num_heads: int, tolerance: float) -> None:
    """Over random steps, one behind the other with nothing waiting, against float32 on the CPU."""
    reference = TorchAttention(kv.float().cpu(), num_heads)
    chance = random.Random(0)
    steps = []
    for num_decode, num_chunks in ((1, 0), (0, 1), (7, 0), (3, 2), (0, 3), (20, 4), (40, 0)):
        rows = random_rows(chance, kv.shape[0], num_decode, num_chunks, 40)
        q = torch.randn(int(rows.counts.sum()), num_heads, kv.shape[5]).to(kv.dtype)
        steps.append((rows, q, q.cuda()))
    got = []
    with no_sync():
        for number, (rows, _, q) in enumerate(steps):
            attention.plan(rows)
            out = torch.empty(len(q), q[0].numel(), dtype=q.dtype, device="cuda") if number % 2 else None
            got.append([attention.attend(layer, q, out).clone() for layer in range(kv.shape[1])])
    for (rows, host_q, _), layers in zip(steps, got, strict=True):
        reference.plan(
            AttentionRows(
                num_decode=rows.num_decode,
                seq_lens=rows.seq_lens.cpu(),
                page_table=rows.page_table.cpu(),
                starts=rows.starts,
                counts=rows.counts,
                chunk_pages=rows.chunk_pages,
            )
        )
        for layer, out in enumerate(layers):
            expected = reference.attend(layer, host_q.float())
            torch.testing.assert_close(out.float().cpu(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", SHAPES)
def test_flashinfer_agrees_with_float32_and_never_waits(shape: tuple[int, int, int]) -> None:
    pytest.importorskip("flashinfer")
    num_heads, num_kv_heads, head_dim = shape
    torch.manual_seed(0)
    kv = torch.randn(2000, 2, 2, 16, num_kv_heads, head_dim, device="cuda").bfloat16()
    attention, why = choose_attention(kv, num_heads, max_pages_per_row=40)
    assert "kernel of our own" in attention.name, why
    check_attention(attention, kv, num_heads, 2e-2)


def test_the_launch_of_a_prompts_attention_keeps_the_interpreters_lock_and_nobody_elses_does() -> None:
    pytest.importorskip("flashinfer")
    from overlap.ops.attention_flashinfer import FlashInferAttention, compiled_run, keeping_the_lock

    kv = torch.zeros(40, 2, 2, 16, 3, 64, dtype=torch.bfloat16, device="cuda")
    attention = FlashInferAttention(kv, 9, 40)
    functions = [compiled_run(wrapper) for wrapper in attention._wrappers]
    assert all(function.release_gil for function in functions), "found where FlashInfer keeps it, and as it was"
    with pytest.raises(ZeroDivisionError), keeping_the_lock(functions[0]):
        assert not functions[0].release_gil
        _ = 1 / 0
    assert functions[0].release_gil


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_attention_on_cuda_agrees_with_float32_and_never_waits(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    kv = torch.randn(2000, 2, 2, 16, 3, 64, device="cuda").to(dtype)
    check_attention(TorchAttention(kv, 9), kv, 9, 1e-4 if dtype is torch.float32 else 2e-2)


def test_a_float32_cache_falls_back_to_torch_and_says_why() -> None:
    attention, why = choose_attention(torch.zeros(2, 1, 2, 16, 1, 64, device="cuda"), 2, max_pages_per_row=2)
    assert attention.name == "torch"
    assert "not float32" in why


def column(values: list[int]) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    return np.array(values, dtype=np.int32)


def random_step(chance: random.Random, slots: int, width: int) -> StepPlan:
    """A mixed step over random slots, all of them admitted with it."""
    num_rows = chance.randint(1, slots)
    num_decode = chance.randint(0, num_rows)
    chosen = chance.sample(range(slots), num_rows)
    counts = [1] * num_decode + [chance.choice([1, 2, 40, 700]) for _ in range(num_rows - num_decode)]
    starts = [chance.randint(0, 16 * width - count) for count in counts]
    emits = [*range(num_decode), *(row for row in range(num_decode, num_rows) if chance.random() < 0.5)]
    updates = [(slot, index, chance.randint(0, 999)) for slot in chosen for index in range(width)]
    return StepPlan(
        number=1,
        slots=column(chosen),
        counts=column(counts),
        starts=column(starts),
        num_decode=num_decode,
        prompt=column([chance.randint(0, 999) for _ in range(sum(counts[num_decode:]))]),
        emits=column(emits),
        sampled=column([]),
        truncated=False,
        admissions=tuple(
            Admission(slot=slot, start=start, temperature=0.7, top_k=9, top_p=0.8, min_p=0.1, seed=2**63 + slot)
            for slot, start in zip(chosen, starts, strict=True)
        ),
        page_slots=column([slot for slot, _, _ in updates]),
        page_indices=column([index for _, index, _ in updates]),
        page_ids=column([page for _, _, page in updates]),
        chunk_pages=column([]),
    )


def test_inputs_and_rows_are_those_of_the_cpu_bit_for_bit() -> None:
    for seed in range(30):
        chance = random.Random(seed)
        slots, width = chance.choice([(1, 60), (40, 60), (300, 50)])
        plan = random_step(chance, slots, width)
        words = np.zeros(capacity(slots, 700 * slots, slots * width), dtype=np.int32)
        layout = pack(plan, words)
        packed = torch.from_numpy(words)
        host, device = SlotRows(slots, width, "cpu"), SlotRows(slots, width, "cuda")
        for rows in (host, device):
            rows.last_token.copy_(torch.arange(len(rows.last_token)))
        sent = packed.cuda()
        tokens = torch.arange(layout.num_emits, dtype=torch.int32, device="cuda")
        with no_sync():
            got = build_inputs(sent, layout, device)
            settle_tokens(device, got.emit_slots, tokens)
        expected = build_inputs(packed, layout, host)
        settle_tokens(host, expected.emit_slots, tokens.cpu())
        for name in StepInputs.__slots__:
            assert torch.equal(getattr(got, name).cpu(), getattr(expected, name)), name
        for name in SlotRows.COLUMNS:
            assert torch.equal(getattr(device, name).cpu(), getattr(host, name)), name


def test_random_bits_are_those_of_the_cpu_and_the_noise_agrees() -> None:
    from overlap.sample import philox_triton

    for seed in range(5):
        torch.manual_seed(seed)
        lo, hi = torch.randint(-(2**31), 2**31, (2, 4)).int()
        positions = torch.randint(0, 2**31 - 1, (4,)).int()
        on_device = lo.cuda(), hi.cuda(), positions.cuda()
        size = random.Random(seed).choice([1, 7, 1024, 49152])
        assert torch.equal(
            philox_triton.random_bits(*on_device, size).cpu(), philox.random_bits(lo, hi, positions, size)
        )
        noise = philox.gumbel(*on_device, size)
        torch.testing.assert_close(noise.cpu(), philox.gumbel(lo, hi, positions, size), rtol=1e-5, atol=1e-6)


def test_sampled_tokens_are_those_of_the_cpu_alone_and_in_a_batch_and_nothing_waits() -> None:
    torch.manual_seed(0)
    num_rows, vocabulary = 32, 49152
    logits = torch.randn(num_rows, vocabulary) * 3
    host = SlotRows(num_rows, 1, "cpu")
    for slot in range(num_rows):
        host.temperature[slot] = (0.0, 0.7, 1.3)[slot % 3]
        host.top_k[slot] = (0, 50)[slot % 2]
        host.top_p[slot] = (1.0, 0.9, 0.5, 1.0)[slot % 4]
        host.min_p[slot] = (0.0, 0.0, 0.0, 0.0, 0.02)[slot % 5]
        host.seed_lo[slot] = slot * 77
    device = SlotRows(num_rows, 1, "cuda")
    for name in SlotRows.COLUMNS:
        getattr(device, name).copy_(getattr(host, name))
    slots = torch.arange(num_rows, dtype=torch.int32)
    sampled = torch.tensor([slot for slot in range(num_rows) if slot % 3], dtype=torch.int32)
    expected = sample(logits, host, slots, slots, sampled, True)
    there = logits.cuda(), slots.cuda(), sampled.cuda()
    with no_sync():
        got = sample(there[0], device, there[1], there[1], there[2], True)
    assert (got.cpu() != expected).sum() <= 1  # the logarithms may differ in the last place
    for slot in range(num_rows):
        one = slice(slot, slot + 1)
        alone = there[2][:1] * 0 if slot % 3 else there[2][:0]
        assert sample(there[0][one], device, there[1][one], there[1][one], alone, True)[0] == got[slot]
    for bad in (torch.nan, torch.inf, -torch.inf):
        broken = there[0].clone()
        broken[:3] = bad
        broken[3:6, 100] = bad
        tokens = sample(broken, device, there[1], there[1], there[2], True)
        assert torch.equal(tokens[6:], got[6:])
        assert bool(((tokens >= 0) & (tokens < vocabulary)).all())


def test_shaped_logits_and_log_probabilities_are_those_of_the_cpu() -> None:
    torch.manual_seed(7)
    vocabulary, slots = 5000, torch.tensor([2, 0, 1], dtype=torch.int32)
    positions = torch.tensor([9, 40, 3], dtype=torch.int32)
    logits, mask = torch.randn(3, vocabulary) * 4, torch.randint(-(2**31), 2**31, (3, 157)).int()
    drafted = torch.tensor([[5, 5], [-1, -1], [7, -1]], dtype=torch.int32)
    shapings = (
        Shaping(repetition_penalty=1.3, frequency_penalty=0.7, presence_penalty=-0.3),
        Shaping(logit_bias=tuple((token, token / 50) for token in range(1000)), min_tokens=4, banned=(5, 7)),
        None,
    )
    tokens = np.arange(40, dtype=np.int32) % 7
    shaped = [None if one is None else Shaped(shaping=one, tokens=tokens, made=30) for one in shapings]
    admissions = [
        Admission(slot=slot, start=0, temperature=0, top_k=0, top_p=1, min_p=0, seed=0, shaped=one)
        for slot, one in enumerate(shaped)
    ]
    results = []
    for device in ("cpu", "cuda"):
        shapes = ShapeRows(3, vocabulary, torch.device(device))
        shapes.admit(admissions)
        shapes.note(slots.to(device), torch.tensor([1, 2, 3], device=device))
        rows = torch.tensor([[2], [0]], dtype=torch.int32)
        masked = mask_logits(logits.to(device), torch.cat((rows, mask[:2]), dim=1).to(device))
        out = shape_logits(masked, shapes, slots.to(device), positions.to(device), drafted_NK=drafted.to(device))
        told = told_words(logits.to(device), slots.to(device))
        results.append((out.cpu(), told.cpu()))
    (cpu, cpu_told), (cuda, cuda_told) = results
    torch.testing.assert_close(cuda, cpu, rtol=1e-6, atol=1e-6)
    assert torch.equal(cuda_told[:, 1:21], cpu_told[:, 1:21])
    torch.testing.assert_close(cuda_told[:, 21:].view(torch.float32), cpu_told[:, 21:].view(torch.float32))
