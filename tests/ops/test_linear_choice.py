from __future__ import annotations

from typing import get_args

import pytest

from overlap.ops import linear_choice
from overlap.ops.linear_choice import FEW_ROWS, MAX_ROWS, MEASURED, Op, Tiles, bucket, choose, guess

SHAPES = [(576, 576), (960, 576), (1536, 576), (49152, 576), (4096, 14336), (14336, 4096), (1, 8), (1024, 2048)]


def test_rows_are_rounded_up_to_a_power_of_two() -> None:
    few, more = (1, 2, 3, 4, 5, 8, 9, 16), (17, 32, 33, 64, 100, 200, 256)
    assert [bucket(rows) for rows in few] == [1, 2, 4, 4, 8, 8, 16, 16]
    assert [bucket(rows) for rows in more] == [32, 32, 64, 64, 128, 256, 256]


@pytest.mark.parametrize("op", get_args(Op))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_guess_is_a_cut_that_the_kernels_can_take(op: Op, shape: tuple[int, int]) -> None:
    for rows in (1, 2, 4, 8, 16):
        tiles = guess(op, *shape, rows)
        if tiles is None:  # a large weight, or the norm apart, and then one of ours
            assert op == "rope" or "norm" in op
            assert rows > 4 or shape[0] * shape[1] > 1 << 22
            continue
        for size in (tiles.block_o, tiles.block_i, tiles.warps):
            assert size & (size - 1) == 0
        assert takes(tiles, op, rows)
        if tiles.kernel == "gemv":  # a thread has 8 inputs side by side, and no two warps share a row's piece
            assert tiles.block_i in (256 * tiles.warps, 512 * tiles.warps)
            assert tiles.block_o >= 2  # a gate and its up
        elif tiles.kernel == "split":
            assert tiles.block_o >= 8  # the tensor cores' least
            assert tiles.block_i >= 16 * tiles.warps
        else:
            assert min(tiles.block_o, tiles.block_i) >= 16


def test_what_is_too_wide_or_not_aligned_goes_to_the_library() -> None:
    assert choose("plain", 960, 576, FEW_ROWS) is not None
    assert choose("plain", 960, 576, MAX_ROWS + 1) is None
    assert choose("plain", 960, 576, 0) is None
    assert choose("plain", 960, 577, 1) is None


def test_what_was_measured_goes_before_what_is_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Tiles("dot", 16, 64, 2, 3)
    table: dict[tuple[Op, int, int, int], Tiles | None] = {("plain", 7, 8, 4): found, ("add", 7, 8, 4): None}
    monkeypatch.setattr(linear_choice, "MEASURED", table)
    assert choose("plain", 7, 8, 3) == found
    assert choose("add", 7, 8, 4) is None
    assert choose("plain", 7, 8, 2) == guess("plain", 7, 8, 2)


def test_more_than_16_rows_are_the_librarys_unless_ours_was_measured_to_win(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Tiles("blocks", 32, 64, 4, 4, 64)
    table: dict[tuple[Op, int, int, int], Tiles | None] = {("rope", 64, 8, 64): found, ("plain", 64, 8, 512): found}
    monkeypatch.setattr(linear_choice, "MEASURED", table)
    assert choose("rope", 64, 8, 33) == choose("rope", 64, 8, 64) == found
    assert choose("rope", 64, 8, 32) is choose("rope", 64, 8, 65) is choose("plain", 64, 8, 64) is None
    assert choose("plain", 64, 8, 512) is None


def test_only_a_program_of_a_heads_rows_can_norm_it() -> None:
    assert Tiles("blocks", 128, 64, 8, 4, 64).owns_heads(128)
    assert not Tiles("blocks", 64, 64, 8, 4, 64).owns_heads(128)
    assert not Tiles("split", 128, 64, 8).owns_heads(128)


def takes(tiles: Tiles, op: Op, rows: int) -> bool:
    """Whether a kernel knows the op, and so many rows."""
    if tiles.kernel == "dot":
        return op in ("plain", "add", "gated") and rows <= FEW_ROWS
    return tiles.kernel in ("split", "blocks") or rows <= FEW_ROWS


def test_the_table_names_only_what_can_be_asked() -> None:
    for (op, outputs, inputs, rows), tiles in MEASURED.items():
        assert op in get_args(Op)
        assert outputs > 0
        assert inputs % 8 == 0
        assert rows == bucket(rows) <= MAX_ROWS
        assert tiles is None or takes(tiles, op, rows)


def test_a_product_that_lost_with_what_stands_around_it_is_the_librarys() -> None:
    assert MEASURED["gated", 14336, 4096, 4] is None
    assert choose("plain", 2 * 14336, 4096, 4) is None
    assert MEASURED["add", 4096, 14336, 8] is None
    assert choose("plain", 4096, 14336, 8) is None
    assert choose("plain", 6144, 4096, 8) == MEASURED["plain", 6144, 4096, 8]
