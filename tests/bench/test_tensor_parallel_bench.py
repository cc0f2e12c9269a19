"""The bench of several ranks, tiny, with gloo: its figures are not looked at, its arithmetic is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "bench" / "tensor_parallel.py"
TINY = ["--shape", "tiny", "--device", "cpu", "--prefill", "4", "20", "--decode", "6", "--context", "40"]


def bench(*more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *more], capture_output=True, text=True, timeout=90, check=False)


def test_each_load_prints_both_ways_on_each_number_of_ranks_and_what_was_hidden(tmp_path: Path) -> None:
    run = bench(*TINY, "--rounds", "2", "--picture", str(tmp_path / "halves.svg"))
    assert run.returncode == 0, run.stderr
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    steps = [line for line in lines if "step_ms" in line]
    assert [(line["ranks"], line["load"], line["way"]) for line in steps] == [
        (ranks, load, way) for ranks in (1, 2) for load in ("prefill", "decode 6") for way in ("serial", "halves")
    ]
    for line in steps:
        assert line["tokens_per_s"] == pytest.approx(1e3 * line["tokens"] / line["step_ms"], rel=0.01)
    hidden = [line for line in lines if line.get("figure") == "sums hidden"]
    assert [line["load"] for line in hidden] == ["prefill", "decode 6"]
    for line in hidden:
        ms = line["ms"]
        assert line["same_tokens"] == 1.0
        assert line["hidden"] == pytest.approx((ms["serial"] - ms["halves"]) / ms["serial sums"], abs=0.02)
    picture = (tmp_path / "halves.svg").read_text()
    for words in ("serial: ", "halves: ", "compute of A", "compute of B", "sum of B"):
        assert words in picture


def test_one_rank_alone_has_no_sums_to_tell_of() -> None:
    run = bench(*TINY, "--rounds", "1", "--ranks", "1", "--decode")
    assert run.returncode == 0, run.stderr
    assert [json.loads(line)["way"] for line in run.stdout.splitlines()] == ["serial", "halves"]


def test_too_few_gpus_are_told_with_their_number() -> None:
    run = bench("--device", "cuda", "--ranks", str(torch.cuda.device_count() + 1))
    assert run.returncode == 1
    assert f"needs {torch.cuda.device_count() + 1} GPUs, and this machine has" in run.stderr


def test_a_rank_that_fails_ends_the_others_and_is_named() -> None:
    run = bench(*TINY, "--rounds", "1", "--ranks", "3", "--decode")  # which the tiny shape cannot be cut into
    assert run.returncode == 1
    assert "of 3 ended with status 1" in run.stderr
    assert "tensor_parallel is 3" in run.stderr


@pytest.mark.slow
def test_one_rank_and_two_say_the_same() -> None:
    run = bench("--device", "cpu", "--check")
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["same"] is True
