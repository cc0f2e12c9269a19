from __future__ import annotations

import pytest

from overlap.graphs.buckets import bucket_for, row_buckets, token_buckets


@pytest.mark.parametrize("most", [1, 2, 3, 8, 31, 32, 100, 256, 300, 1024])
def test_every_row_count_has_a_bucket_within_twice_its_size(most: int) -> None:
    buckets = row_buckets(most)
    assert list(buckets) == sorted(set(buckets))
    assert buckets[-1] == most
    for count in range(1, most + 1):
        bucket = bucket_for(count, buckets)
        assert bucket is not None
        assert bucket == min(size for size in buckets if size >= count)
        assert bucket <= 2 * count
    assert bucket_for(most + 1, buckets) is None


def test_row_buckets_grow_in_steps_of_8_16_and_32() -> None:
    assert row_buckets(320) == (
        1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64, 72, 80, 88, 96, 104, 112, 120, 128, 144, 160, 176, 192, 208, 224, 240,
        256, 288, 320,
    )  # fmt: skip


@pytest.mark.parametrize("most", [8, 16, 17, 400, 4096, 16384])
def test_token_buckets_end_with_a_full_step_and_waste_little(most: int) -> None:
    buckets = token_buckets(most)
    assert list(buckets) == sorted(set(buckets))
    assert buckets[-1] == most
    assert all(size % 16 == 0 for size in buckets[:-1])
    for count in range(64, most + 1, 7):
        bucket = bucket_for(count, buckets)
        assert bucket is not None
        assert bucket < 1.45 * count
    assert len(buckets) < 30


def test_a_step_that_a_graph_would_more_than_double_has_no_bucket() -> None:
    assert bucket_for(7, token_buckets(512)) is None
    assert bucket_for(8, token_buckets(512)) == 16
    assert bucket_for(1, token_buckets(512, smallest=1)) == 1
    assert token_buckets(64, smallest=1) == (1, 2, 4, 8, 16, 32, 48, 64)
