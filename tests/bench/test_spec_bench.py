"""The bench of drafters, small enough for a CPU. (tests/spec/test_prompts.py: nobody trains on its prompts.)"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "bench" / "spec.py"


def test_its_prompts_are_all_different() -> None:
    spec = importlib.util.spec_from_file_location("bench_spec", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    assert len(set(bench.questions_of(256))) == 256


def test_it_compares_each_engine_with_the_plain_one(tiny_llama_dir: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--model", str(tiny_llama_dir), "--speculative", "ngram", "--device", "cpu"]
    command += ["--dtype", "float32", "--rows", "1", "2", "--tokens", "12", "--rounds", "1", "--num-drafts", "3"]
    run = subprocess.run([*command, "--context", "256"], capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    lines = json.loads(run.stdout.splitlines()[-1])["lines"]
    assert [(line["engine"], line["rows"]) for line in lines] == [
        (name, rows) for name in ("none", "ngram", "ngram, waiting") for rows in (1, 2)
    ]
    assert all(line["same"] == 12 for line in lines)
    assert all("sync" in line for line in lines[4:])
    assert len(lines[2]["accepted"]) == 3
