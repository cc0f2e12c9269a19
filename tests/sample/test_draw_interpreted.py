"""The sampling kernels against `sampler`, on the CPU, by Triton's interpreter in a process of its own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
CHECKS = Path(__file__).parent / "interpreted_draws.py"


def test_kernels_keep_and_draw_the_same_tokens_as_the_reference_over_random_shapes_ties_and_filters() -> None:
    run = subprocess.run(
        [sys.executable, str(CHECKS)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.split() == ["kept", "tokens", "broken", "noise"]


def test_a_step_is_cut_into_whole_tiles_that_cover_each_row_and_fill_the_device() -> None:
    from overlap.sample.draw_triton import _TILE, cut

    for num_rows in (1, 2, 7, 8, 64, 256, 1000):
        for size in (1, 5, 1023, 1024, 1025, 49152, 128256, 151936):
            parts, part_size = cut(num_rows, size)
            assert part_size % _TILE == 0
            assert parts * part_size >= size > (parts - 1) * part_size, "no part is empty"
            assert parts <= 256
            assert num_rows * parts >= min(132, num_rows * -(-size // _TILE))
