"""Buckets: the row and token counts that graphs are captured for. Imports no torch."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Final

MOST_PADDING: Final = 2
"""A graph runs a step if it is at most so many times as large: past it, padding costs too much (sglang#31487)."""
_GROWTH: Final = 1.25
_TOKENS_STEP: Final = 16


def row_buckets(max_rows: int) -> tuple[int, ...]:
    """Return the row counts to capture decode steps for: 1, 2, 4, 8, then each 8th to 128, each 16th to 256, each 32nd.

    Ascending; the last is `max_rows`. Up to 4 a row more costs next to nothing; further up, matrices are cut in 8s.
    """
    sizes = [1, 2, 4, *range(8, 128, 8), *range(128, 256, 16), *range(256, max_rows, 32)]
    return (*(size for size in sizes if size < max_rows), max_rows)


def token_buckets(most: int, *, smallest: int = _TOKENS_STEP) -> tuple[int, ...]:
    """Return the token counts to capture pieces for: multiples of 16, each about a quarter larger than the one before.

    Ascending; the last is `most`, a full step. With `smallest` under 16, powers of two come first: for decode rows that
    have no graph of their own.
    """
    sizes = []
    size = smallest
    while size < most:
        sizes.append(size)
        larger = size * _GROWTH if size >= _TOKENS_STEP else min(size * 2, _TOKENS_STEP)
        size = int(larger) if size < _TOKENS_STEP else -int(-larger // _TOKENS_STEP) * _TOKENS_STEP
    return (*sizes, most)


def bucket_for(count: int, buckets: Sequence[int], padding: float = MOST_PADDING) -> int | None:
    """Return the smallest of the ascending `buckets` that holds `count`; None if none does within `padding` times."""
    place = bisect_left(buckets, count)
    if place == len(buckets) or buckets[place] > padding * count:
        return None
    return buckets[place]
