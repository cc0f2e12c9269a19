"""The bench of first tokens, small enough for a CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "bench" / "first_token.py"


def test_it_times_prompts_of_each_length(tiny_llama_dir: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--model", str(tiny_llama_dir), "--device", "cpu", "--kv-cache", "64MB"]
    command += ["--lengths", "1", "20", "--rounds", "2", "--context", "256"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    assert [line["prompt"] for line in lines] == [1, 20]
    assert all(line["decode_ms"][0] > 0 for line in lines)
