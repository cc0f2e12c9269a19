"""How much sooner does the first token come when the first 1,000 tokens of a prompt are cached?

Each round clears the cache, asks with a shared prefix and 16 tokens of its own (cold), then asks again with the same
prefix and 16 other tokens (warm). What it means: a cold prompt runs 1,016 tokens, a warm one 24 (the last part of the
prefix fills no page), so the limit is the time to the first token of a prompt of 24 tokens, measured in the same run.

    python bench/prefix.py [--model smollm2-135m-instruct] [--prefix 1000]        (the last line is JSON)

Reasons to doubt it: one request at a time, so nothing waits and nothing is evicted; on a busy server the gain depends
on how often prefixes are shared (`engine.statistics().hit_rate`). In bfloat16 a warm answer may differ from a cold one
where a choice is close (docs/architecture.md).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import time

import torch
from tqdm import tqdm

from overlap import AsyncEngine, SamplingParams

OWN = 16
FIRST = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)


async def first_token_ms(engine: AsyncEngine, prompt: list[int]) -> tuple[float, int]:
    """Return the time to the first token, and how much of the prompt was cached."""
    start = time.perf_counter()
    async for output in engine.generate(prompt, FIRST):
        return (time.perf_counter() - start) * 1e3, output.usage.cached_tokens
    raise AssertionError("an answer has a token")


async def measure(model: str, length: int, rounds: int, settle_s: float) -> dict[str, object]:
    """Return the medians and spreads of cold, warm, and the limit."""
    times: dict[str, list[float]] = {"cold": [], "warm": [], "limit": []}
    async with AsyncEngine(model, kv_cache=max(16384, 4 * length)) as engine:
        prefix = [100 + 7 * i % 900 for i in range(length)]
        await first_token_ms(engine, prefix)  # what is built or loaded at the first use is no part of it
        await asyncio.sleep(settle_s)  # nor is the capturing of graphs in idle gaps
        for number in tqdm(range(rounds), unit="round"):
            await engine.clear_cache()
            own = [[200 + number, which, *range(300, 300 + OWN - 2)] for which in (1, 2, 3)]
            cold, none = await first_token_ms(engine, prefix + own[0])
            warm, cached = await first_token_ms(engine, prefix + own[1])
            limit, _ = await first_token_ms(engine, own[2] + prefix[: length % 16])
            assert (none, cached) == (0, length // 16 * 16)
            for name, value in (("cold", cold), ("warm", warm), ("limit", limit)):
                times[name].append(value)
        device = torch.cuda.get_device_name() if engine.config.device.startswith("cuda") else "cpu"
    medians = {name: statistics.median(each) for name, each in times.items()}
    return {
        "bench": "prefix",
        "model": model,
        "device": device,
        "prefix": length,
        "ttft_ms": {name: round(median, 2) for name, median in medians.items()},
        "spread_ms": {name: [round(min(each), 2), round(max(each), 2)] for name, each in times.items()},
        "cold_over_warm": round(medians["cold"] / medians["warm"], 2),
        "rounds": rounds,
        "torch": torch.__version__,
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
        ).stdout.strip(),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Time to the first token with a shared prefix, warm against cold.")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--prefix", type=int, default=1000, help="tokens of the shared prefix")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--settle", type=float, default=5.0, help="seconds to wait for graphs to be captured")
    asked = parser.parse_args()
    result = asyncio.run(measure(asked.model, asked.prefix, asked.rounds, asked.settle))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
