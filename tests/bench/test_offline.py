"""The bench of whole workloads, small enough for a CPU. Its figures are not looked at, its arithmetic is."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from overlap.models.config_json import read_config

SCRIPT = Path(__file__).parents[2] / "bench" / "offline.py"


@pytest.fixture(scope="module")
def offline() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_offline", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look up their own module
    spec.loader.exec_module(module)
    return module


def test_the_workloads_are_as_large_as_they_are_said_to_be(offline: ModuleType) -> None:
    known = offline.workloads()
    assert known["single"].lengths == ((128, 256),)
    assert known["small"].lengths == ((128, 256),) * 8
    assert known["prefill"].counted == 128 * (2048 + 8)
    assert known["mixed"].counted == 512 * (1024 + 256)
    nano = known["nano"].lengths
    assert len(nano) == 256
    assert all(100 <= length <= 1024 for pair in nano for length in pair)
    assert known["nano"].counted == sum(out for _, out in nano)
    assert nano == offline.workloads()["nano"].lengths


def test_the_limit_of_one_row_is_its_weights_over_the_bandwidth(offline: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(offline.SHAPES["llama-8b"]))
    model = read_config(tmp_path / "config.json")
    device = offline.Device(bandwidth=4e12, flops=800e12, sustained=700e12)
    figure, bound = offline.limit(offline.workloads()["single"], model, device, 2)
    matrices = 8.03e9 - 128256 * 4096  # the embedding is looked up, not read
    assert bound == "memory"
    assert figure == pytest.approx(4e12 / (2 * matrices), rel=0.01)
    figure, bound = offline.limit(offline.workloads()["prefill"], model, device, 2)
    assert bound == "compute"
    assert figure == pytest.approx(800e12 / (2 * (matrices - 128256 * 4096)), rel=0.1)  # attention is the tenth


def test_each_workload_prints_its_figure_its_limit_and_the_share() -> None:
    command = [sys.executable, str(SCRIPT), "--shape", "tiny", "--device", "cpu", "--scale", "32", "--rounds", "1"]
    names = ["single", "small", "nano", "prefill", "mixed"]
    run = subprocess.run([*command, "--workload", *names], capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    assert [line["workload"] for line in lines] == names
    for line in lines:
        assert line["tokens_per_s"] > 0
        assert 0 < line["share_of_limit"] < 1
        assert line["share_of_limit"] == pytest.approx(line["tokens_per_s"] / line["limit_tokens_per_s"], abs=2e-4)
