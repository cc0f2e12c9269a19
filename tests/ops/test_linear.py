from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from overlap.ops.linear import Linear, padded_rows

SIZES = [(1, 1), (1, 7), (7, 1), (5, 3), (33, 65), (96, 64), (960, 576), (40, 1536), (3, 769)]


def filled(
    out_features: int, in_features: int, *, bias: bool, dtype: torch.dtype
) -> tuple[Linear, torch.Tensor, torch.Tensor | None]:
    """A finished Linear, and copies of its weight and bias."""
    generator = torch.Generator().manual_seed(0)
    linear = Linear.empty(out_features, in_features, bias=bias, device="cpu", dtype=dtype)
    weight = linear.weight_rows(0, out_features).normal_(generator=generator).clone()
    kept = linear.bias_rows(0, out_features).normal_(generator=generator).clone() if bias else None
    return linear.finish(), weight, kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("out_features", "in_features"), SIZES)
def test_it_is_the_product_and_the_bias(out_features: int, in_features: int, bias: bool, dtype: torch.dtype) -> None:
    linear, weight, kept = filled(out_features, in_features, bias=bias, dtype=dtype)
    for rows in (0, 1, 3, 16, 65):
        x = torch.randn(rows, in_features, generator=torch.Generator().manual_seed(rows)).to(dtype)
        y = linear(x)
        expected = F.linear(x.double(), weight.double(), None if kept is None else kept.double())
        assert y.dtype == dtype
        tolerance = 1e-5 if dtype is torch.float32 else 1e-2
        torch.testing.assert_close(y.double(), expected, atol=tolerance * in_features**0.5, rtol=tolerance)


def test_in_float32_a_row_alone_has_the_bits_that_it_has_in_a_batch() -> None:
    for out_features, in_features in ((960, 576), (576, 1536), (64, 2100), (131, 65), (40, 769)):
        linear, _, _ = filled(out_features, in_features, bias=False, dtype=torch.float32)
        if linear.kind != "onednn packed":
            pytest.skip("promised only of packed weights")
        x = torch.randn(70, in_features, generator=torch.Generator().manual_seed(1))
        alone = torch.cat([linear(row) for row in torch.split(x, 1)])
        for rows in (2, 3, 16, 33, 70):
            assert torch.equal(linear(x[:rows]), alone[:rows])


def test_any_number_of_rows_runs_as_one_of_few_and_with_little_more() -> None:
    run = {rows: padded_rows(rows) for rows in range(8193)}
    assert len(set(run.values())) <= 80
    assert all(rows <= padded <= max(rows + 7, rows * 9 / 8) for rows, padded in run.items())
    assert all(padded_rows(padded) == padded for padded in run.values())
    linear, weight, kept = filled(33, 40, bias=True, dtype=torch.float32)
    assert kept is not None
    for rows in (15, 16, 17, 24, 100, 129):
        x = torch.randn(rows, 40, generator=torch.Generator().manual_seed(rows))
        torch.testing.assert_close(linear(x), x @ weight.T + kept)
        assert linear(x).is_contiguous()


def test_a_view_of_a_larger_matrix_is_taken_as_it_is() -> None:
    linear, weight, _ = filled(33, 40, bias=False, dtype=torch.float32)
    wide = torch.randn(6, 100, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(linear(wide[:, 20:60]), wide[:, 20:60] @ weight.T)
    torch.testing.assert_close(linear(wide[::2, :40]), wide[::2, :40] @ weight.T)


def test_its_kind_is_what_the_processor_offers() -> None:
    linear, _, _ = filled(8, 8, bias=False, dtype=torch.float64)
    assert linear.kind == "plain"
    linear, _, _ = filled(8, 8, bias=False, dtype=torch.float32)
    offered = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    assert linear.kind == ("onednn packed" if offered else "plain")


def test_without_onednn_the_plain_product_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    linear, weight, kept = filled(33, 65, bias=True, dtype=torch.float32)
    assert linear.kind == "plain"
    x = torch.ones(3, 65)
    assert torch.equal(linear(x), F.linear(x, weight, kept))


def test_finish_twice_is_finish_once_and_ends_the_writing() -> None:
    linear, _, _ = filled(8, 8, bias=False, dtype=torch.float32)
    x = torch.ones(1, 8)
    before = linear(x)
    assert torch.equal(linear.finish()(x), before)
    with pytest.raises(RuntimeError, match="has no bias"):
        linear.bias_rows(0, 1)
    if linear.kind == "onednn packed":
        with pytest.raises(RuntimeError, match="packed already"):
            linear.weight_rows(0, 1)


def test_a_shared_weight_stays_and_is_counted_only_if_packed() -> None:
    weight = torch.randn(12, 8, generator=torch.Generator().manual_seed(0))
    linear = Linear.sharing(weight)
    assert linear.num_bytes == 0
    linear.finish()
    assert linear.num_bytes == (12 * 8 * 4 if linear.kind == "onednn packed" else 0)
    torch.testing.assert_close(linear(torch.eye(8)), weight.T)
    assert Linear.empty(3, 5, bias=True, device="cpu", dtype=torch.bfloat16).num_bytes == 2 * (15 + 3)
