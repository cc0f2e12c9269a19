"""Products of few rows, and what stands around them, on the device. Run with `python -m pytest tests/gpu`."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from overlap.ops import fused
from overlap.ops.linear import Linear
from overlap.ops.linear_choice import Op, Tiles
from overlap.ops.norm import rms_norm
from overlap.ops.rope import rope_and_write, rope_table

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUTS = (
    (None, torch.bfloat16),
    (None, torch.float16),
    (Tiles("gemv", 4, 1024, 4), torch.bfloat16),
    (Tiles("split", 8, 1024, 8), torch.bfloat16),
    (Tiles("split", 16, 512, 4), torch.float16),
    (Tiles("split", 16, 512, 8, 1, 32), torch.bfloat16),
    (Tiles("dot", 16, 128, 4, 4), torch.bfloat16),
    (Tiles("dot", 64, 64, 4, 4), torch.bfloat16),
    (Tiles("blocks", 32, 128, 4, 4, 16), torch.bfloat16),
    (Tiles("blocks", 16, 64, 4, 6, 64), torch.bfloat16),
    (Tiles("blocks", 32, 64, 4, 4, 64), torch.float16),
    (Tiles("blocks", 64, 64, 8, 4, 128), torch.bfloat16),
)
"""None is whatever is chosen by itself."""


def take(cut: Tiles | None, monkeypatch: pytest.MonkeyPatch, *, never: tuple[Op, ...] = ()) -> None:
    """Have every Linear take this cut wherever its kernel knows the op and so many rows; None leaves all as it is."""
    if cut is None:
        return

    def same(op: Op, outputs: int, inputs: int, rows: int) -> Tiles | None:
        few = cut.kernel in ("gemv", "dot") and rows > (8 if cut.kernel == "gemv" else 16)
        unknown = cut.kernel == "dot" and op not in ("plain", "add", "gated")
        return None if few or unknown or op in never else cut

    monkeypatch.setattr("overlap.ops.linear.choose", same)


def linear_of(weight_OI: Tensor, bias_O: Tensor | None = None) -> Linear:
    linear = Linear(weight_OI.cuda(), None if bias_O is None else bias_O.cuda())
    return linear.finish()


def near(got: Tensor, expected: Tensor, tolerance: float) -> None:
    error = (got.double().cpu() - expected).norm() / expected.norm()
    assert error < tolerance, f"relative error {error:.2e}"


@pytest.mark.parametrize(("cut", "dtype"), CUTS, ids=str)
def test_each_way_of_multiplying_some_rows_agrees_with_float64(
    cut: Tiles | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    take(cut, monkeypatch)
    chance = random.Random(0)
    for rows in (1, 3, 7, 16, 17, 64, 200, 256):
        torch.manual_seed(rows)
        outputs, inputs = chance.choice([(960, 576), (576, 1536), (1001, 1024), (4096, 4096), (30, 8)])
        weight, bias = torch.randn(2 * outputs, inputs).mul(0.05).to(dtype), torch.randn(2 * outputs).to(dtype)
        x, residual = torch.randn(rows, inputs).to(dtype), torch.randn(rows, inputs)
        added, factor = torch.randn(rows, outputs), torch.rand(inputs) + 0.5
        normed = rms_norm(residual, factor, 1e-5, torch.float32).double()
        plain, gated = linear_of(weight[:outputs], bias[:outputs]), linear_of(weight)
        wide, wide_bias = weight.double(), bias.double()

        near(plain(x.cuda()), x.double() @ wide[:outputs].T + wide_bias[:outputs], 1e-2)
        near(plain.wide(x.cuda()), x.double() @ wide[:outputs].T + wide_bias[:outputs], 1e-2)
        total = fused.whole(fused.linear_add(plain, x.cuda(), added.cuda()))
        near(total, added + x.double() @ wide[:outputs].T + wide_bias[:outputs], 1e-2)
        y, _ = fused.norm_linear(plain, fused.Stream(None, residual.cuda()), factor.cuda(), 1e-5)
        near(y, normed @ wide[:outputs].T + wide_bias[:outputs], 1e-2)
        gate, up = (normed @ wide.T).chunk(2, dim=1)
        for left in (None, torch.zeros_like(residual, dtype=dtype).cuda()):
            stream = fused.Stream(left, residual.cuda())
            y, _ = fused.norm_gated(gated, stream, factor.cuda(), 1e-5)  # with the norm in it, and with it apart
            near(y, torch.nn.functional.silu(gate) * up, 2e-2)


@pytest.mark.parametrize("never", [(), ("norm_rope",)], ids=str)
@pytest.mark.parametrize(
    ("shape", "cut"),
    [
        ((9, 3, 64, 576), None),
        ((9, 3, 64, 576), Tiles("split", 16, 1024, 8)),
        ((9, 3, 64, 576), Tiles("blocks", 32, 64, 4, 4, 64)),
        ((9, 3, 64, 576), Tiles("blocks", 32, 128, 4, 4, 32)),
        ((32, 8, 128, 4096), None),
        ((32, 8, 128, 4096), Tiles("blocks", 64, 64, 8, 4, 128)),
        ((16, 8, 128, 1024), Tiles("blocks", 128, 64, 8, 4, 64)),
        ((16, 8, 128, 1024), Tiles("blocks", 128, 64, 4, 4, 16)),
    ],
    ids=str,
)
def test_norm_product_rotation_and_write_agree_with_float32(
    shape: tuple[int, int, int, int], cut: Tiles | None, never: tuple[Op, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    take(cut, monkeypatch, never=never)
    num_heads, num_kv_heads, head_dim, hidden = shape
    for rows in (1, 3, 5, 9, 16, 17, 64, 200, 256):
        torch.manual_seed(rows)
        weight = torch.randn((num_heads + 2 * num_kv_heads) * head_dim, hidden).mul(0.05).bfloat16()
        residual, factor = torch.randn(rows, hidden), torch.rand(hidden) + 0.5
        head_norm = torch.rand(num_heads + num_kv_heads, head_dim) + 0.5 if hidden == 1024 else None
        table = rope_table(head_dim, 999, 1e4, None, "cpu")
        positions, index = torch.randint(0, 999, (rows,)).int(), torch.randperm(320)[:rows].int()
        index[-1] = -1 if rows > 1 else index[-1]
        kv = torch.randn(20, 2, 2, 16, num_kv_heads, head_dim)
        device_kv, device_norm = kv.bfloat16().cuda(), None if head_norm is None else head_norm.cuda()
        rotation = (positions.cuda(), table.cuda(), device_kv, 1, index.cuda(), num_heads, num_kv_heads, device_norm)
        stream = fused.Stream(None, residual.cuda())
        got, _ = fused.norm_qkv(linear_of(weight), stream, factor.cuda(), 1e-5, *rotation)
        qkv = rms_norm(residual, factor, 1e-5, torch.float32) @ weight.float().T
        want = rope_and_write(qkv, positions, table, kv, 1, index, num_heads, num_kv_heads, head_norm, 1e-5)
        near(got, want.double(), 1e-2)
        near(device_kv, kv.double(), 1e-2)


@pytest.mark.parametrize("cut", [None, Tiles("blocks", 128, 64, 8, 4, 64), Tiles("split", 16, 1024, 8)], ids=str)
def test_the_greedy_head_takes_what_the_logits_say_at_any_number_of_rows(
    cut: Tiles | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    take(cut, monkeypatch)
    torch.manual_seed(0)
    for size, inputs in ((49152, 576), (1001, 1024)):
        head = linear_of(torch.randn(size, inputs).bfloat16())
        head.weight[size // 2 :] = head.weight[: size - size // 2].clone()  # every token has its equal
        for rows in (1, 5, 16, 17, 64, 200):
            hidden = torch.randn(rows, inputs).bfloat16().cuda()
            tokens = fused.greedy_head(hidden, head)
            assert torch.equal(tokens.long(), head.wide(hidden).argmax(-1))
            assert tokens.max() < -(-size // 2)


def replays_alike(chain: Callable[[Tensor, Callable[[], None]], Tensor], rows: int, hidden: int) -> None:
    """Have the chain, captured as a graph, give the bits that it gives kernel by kernel, on changing inputs.

    It calls what it is given between its kernels.
    """
    given = torch.randn(rows, hidden, device="cuda")
    chain(given, torch.cuda.synchronize)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = chain(given, lambda: None)
    inputs = [torch.randn(rows, hidden, device="cuda") for _ in range(20)]
    answers = [chain(one, torch.cuda.synchronize).clone() for one in inputs]
    for _ in range(20):
        for one, answer in zip(inputs, answers, strict=True):
            given.copy_(one)
            graph.replay()
            assert torch.equal(out, answer)
    assert torch.equal(chain(inputs[0].clone(), torch.cuda.synchronize), answers[0])


@pytest.mark.parametrize(
    ("rows", "cut", "never"),
    [
        (1, None, ()),
        (64, Tiles("blocks", 32, 64, 4, 4, 64), ()),
        (64, Tiles("blocks", 32, 64, 4, 6, 32), ("norm", "norm_gated")),
        (200, Tiles("blocks", 64, 64, 8, 4, 128), ("norm",)),
        (40, Tiles("split", 16, 1024, 8), ()),
    ],
    ids=str,
)
def test_kernels_that_start_early_never_read_too_early(
    rows: int, cut: Tiles | None, never: tuple[Op, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chain of small dependent kernels, in one graph, gives the same bits each of many times on changing inputs."""
    take(cut, monkeypatch, never=never)
    torch.manual_seed(0)
    hidden, inner = 576, 1536
    o, gate_up, down = (
        linear_of(torch.randn(lines, inputs).mul(0.03).bfloat16())
        for lines, inputs in ((hidden, hidden), (2 * inner, hidden), (hidden, inner))
    )
    factor = torch.ones(hidden, device="cuda")

    def chain(residual: Tensor, pause: Callable[[], None]) -> Tensor:
        stream = fused.Stream(None, residual)
        for _ in range(10):
            x, residual = fused.norm_linear(o, stream, factor, 1e-5)
            pause()
            stream = fused.linear_add(o, x, residual)
            pause()
            x, residual = fused.norm_gated(gate_up, stream, factor, 1e-5)
            pause()
            stream = fused.linear_add(down, x, residual)
            pause()
        return fused.norm(stream, factor, 1e-5, torch.float32)

    replays_alike(chain, rows, hidden)


NORM_INSIDE: tuple[Op, ...] = ("norm", "norm_rope", "norm_gated")


@pytest.mark.parametrize(
    ("rows", "cut"),
    [
        (5, None),
        (8, None),
        (16, None),
        (64, None),
        (1, Tiles("gemv", 4, 1024, 4)),
        (7, Tiles("gemv", 4, 1024, 4)),
        (13, Tiles("split", 8, 1024, 4)),
        (40, Tiles("split", 16, 1024, 8)),
        (11, Tiles("dot", 16, 128, 4, 4)),
        (64, Tiles("blocks", 32, 64, 4, 6, 64)),
        (200, Tiles("blocks", 64, 64, 8, 4, 128)),
    ],
    ids=str,
)
def test_a_norm_between_two_products_agrees_with_one_apart_and_starts_no_kernel_too_early(
    rows: int, cut: Tiles | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten layers of SmolLM2's sizes, the rotated queries in place of what attention would make of them."""
    take(cut, monkeypatch, never=NORM_INSIDE)
    torch.manual_seed(0)
    num_heads, num_kv_heads, head_dim, hidden, inner = 9, 3, 64, 576, 1536
    sizes = (960, hidden), (hidden, hidden), (2 * inner, hidden), (hidden, inner)
    qkv, o, gate_up, down = (linear_of(torch.randn(size).mul(0.03).bfloat16()) for size in sizes)
    attention_norm, mlp_norm = torch.rand(2, hidden, device="cuda") + 0.5
    table, index = rope_table(head_dim, 999, 1e4, None, "cuda"), torch.randperm(320)[:rows].int().cuda()
    kv = torch.zeros(20, 1, 2, 16, num_kv_heads, head_dim, dtype=torch.bfloat16, device="cuda")
    rotation = (index, table, kv, 0, index, num_heads, num_kv_heads, None)
    before_mlp = fused.Ahead(mlp_norm, gate_up, "gated")
    before_attention = fused.Ahead(attention_norm, qkv, "rope")
    scaled = list[bool]()

    def chain(residual: Tensor, pause: Callable[[], None], *, apart: bool = False) -> Tensor:
        stream = fused.Stream(None, residual)
        scaled.clear()
        for _ in range(10):
            q_THD, residual = fused.norm_qkv(qkv, stream, attention_norm, 1e-5, *rotation)
            pause()
            stream = fused.linear_add(o, q_THD.view(rows, hidden), residual, None if apart else before_mlp)
            scaled.append(stream.scaled is not None)
            pause()
            x, residual = fused.norm_gated(gate_up, stream, mlp_norm, 1e-5)
            pause()
            stream = fused.linear_add(down, x, residual, None if apart else before_attention)
            scaled.append(stream.scaled is not None)
            pause()
        return fused.whole(stream)

    residual = torch.randn(rows, hidden, device="cuda")
    expected, expected_kv = chain(residual, torch.cuda.synchronize, apart=True), kv.double().cpu()
    assert not any(scaled)
    near(chain(residual, torch.cuda.synchronize), expected.double().cpu(), 1e-2)
    near(kv, expected_kv, 2e-2)
    assert scaled == [True, cut is None or cut.kernel != "dot"] * 10, "that one knows no rotation"
    replays_alike(chain, rows, hidden)


def test_rope_with_head_norms_agrees_with_the_reference() -> None:
    for seed, dtype in enumerate((torch.float32, torch.bfloat16)):
        torch.manual_seed(seed)
        num_heads, num_kv_heads, head_dim, tokens = 16, 8, 128, 37
        qkv = torch.randn(tokens, (num_heads + 2 * num_kv_heads) * head_dim).to(dtype)
        table, norm = rope_table(head_dim, 999, 1e6, None, "cpu"), torch.rand(num_heads + num_kv_heads, head_dim)
        positions, index = torch.randint(0, 999, (tokens,)).int(), torch.randperm(64)[:tokens].int()
        kv = torch.zeros(4, 2, 2, 16, num_kv_heads, head_dim)
        device_kv = kv.to(dtype).cuda()
        columns = (qkv.cuda(), positions.cuda(), table.cuda())
        got = rope_and_write(*columns, device_kv, 1, index.cuda(), num_heads, num_kv_heads, norm.cuda(), 1e-6)
        want = rope_and_write(qkv.float(), positions, table, kv, 1, index, num_heads, num_kv_heads, norm, 1e-6)
        near(got, want.double(), 1e-5 if dtype is torch.float32 else 1e-2)
        near(device_kv, kv.double(), 1e-5 if dtype is torch.float32 else 1e-2)
