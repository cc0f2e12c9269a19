"""Every Triton kernel against its torch reference, on the CPU, by Triton's interpreter in a process of its own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKS = Path(__file__).parent / "interpreted_kernels.py"


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_each_kernel_agrees_with_its_reference_over_random_shapes() -> None:
    run = subprocess.run(
        [sys.executable, str(CHECKS)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.split() == [
        "norm", "activation", "rope", "embedding", "linear", "linear_add", "qkv", "fused", "chain", "ahead", "greedy",
        "philox", "inputs", "masks", "decode",
        "runs", "places", "pair",
    ]  # fmt: skip


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_each_kernel_compiles_for_hopper_on_a_machine_without_a_gpu() -> None:
    run = subprocess.run(
        [sys.executable, str(CHECKS.with_name("compile_kernels.py"))],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert set(run.stdout.split()) == {
        "_rms_norm_kernel", "_silu_mul_kernel", "_rope_and_write_kernel", "_gumbel_kernel", "_apply_changes_kernel",
        "_build_inputs_kernel", "_embed_kernel", "_linear_kernel", "_dot_kernel", "_best_kernel", "_qkv_kernel",
        "_take_plan_kernel", "_update_pages_kernel", "_build_decode_inputs_kernel", "_settle_decode_kernel",
        "_peaks_kernel", "_narrow_kernel", "_draw_kernel", "_mask_kernel", "_decode_kernel",
        "_build_runs_kernel", "_settle_runs_kernel", "_keep_drafts_kernel", "_land_runs_kernel",
        "_chain_places_kernel", "_normed_pair_kernel", "_forget_runs_kernel",
        "_apply_plan_kernel", "_begin_rows_kernel", "_fill_strips_kernel",
    }  # fmt: skip
