"""The bench of two lanes, tiny, on a CPU: its figures are not looked at, its arithmetic is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "bench" / "two_lanes.py"
WAYS = ["serial", "mixed", "streams", "auto", "target"]


def test_all_ways_take_turns_in_one_engine_under_both_loads(tmp_path: Path) -> None:
    drawn, traced = tmp_path / "lanes.svg", tmp_path / "lanes.json"
    command = [sys.executable, str(SCRIPT), "--shape", "tiny", "--device", "cpu", "--settle", "0.1"]
    more = [
        "--kv-cache",
        "8192",
        "--token-budget",
        "64",
        "--target-itl-ms",
        "50",
        "--picture",
        str(drawn),
        "--trace",
        str(traced),
    ]
    run = subprocess.run([*command, *more], capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    steps = [line for line in lines if "lanes" in line]
    assert [line["lanes"] for line in steps if line["load"] == "offline"] == WAYS[:-1], "a target is for a load in time"
    assert [line["lanes"] for line in steps if line["load"] == "poisson"] == WAYS
    for line in steps:
        assert line["total_tokens_per_s"] > line["output_tokens_per_s"] > 0
        if line["lanes"] in ("serial", "mixed"):
            assert line["side_steps"] == 0
        elif line["lanes"] == "streams":
            assert line["side_steps"] > 0
        if line["load"] == "poisson":
            assert 0 < line["itl_ms"]["p50"] <= line["itl_ms"]["p99"] <= line["itl_ms"]["max"]
    prompts = {(line["prompts"], line["prompt"]) for line in steps if line["load"] == "poisson"}
    assert len(prompts) == 1
    rate = {line["lanes"]: line["total_tokens_per_s"] for line in steps if line["load"] == "offline"}
    compared = next(line for line in lines if line.get("figure") == "compared")
    best = max(rate[way] for way in ("serial", "mixed", "streams"))
    assert compared["auto_over_best_fixed"] == pytest.approx(rate["auto"] / best, abs=1e-3)
    assert 'data-lane="prompts"' in drawn.read_text()
    assert json.loads(traced.read_text())["traceEvents"]


def test_a_way_that_fails_is_reported_and_the_others_go_on() -> None:
    command = [
        sys.executable,
        str(SCRIPT),
        "--shape",
        "tiny",
        "--device",
        "cpu",
        "--settle",
        "0.1",
        "--load",
        "offline",
    ]
    more = ["--kv-cache", "8192", "--token-budget", "64", "--lanes", "serial", "mixed", "--limit", "1e-6"]
    run = subprocess.run([*command, *more], capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    assert [line["lanes"] for line in lines if "lanes" in line] == ["serial", "mixed"]
    assert all(line["error"].startswith("TimeoutError") for line in lines if "lanes" in line)
