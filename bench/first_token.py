"""How long does a lone request wait for its first token, by how long its prompt is?

    python bench/first_token.py [--model smollm2-135m-instruct | --shape llama-8b] [--speculative eagle]

One engine, one request at a time, prompts of random tokens, new ones each time, so that no prefix is found in a cache.
A JSON line for each length: the median milliseconds until the first token is in the reader's hands, of `--rounds`
requests each way, which take turns:

    whole      as the engine does it: a short prompt is one launch (`overlap.state.strips`)
    pieces     the same engine without those graphs: captured pieces, attention in between
    decode     what one more token takes then

Doubt it as you doubt any figure of a host that others use, too: the spread between the quartiles is printed with it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from overlap import AsyncEngine, SamplingParams

sys.path.insert(0, str(Path(__file__).parent))
from offline import SHAPES, settled  # type: ignore[import-not-found]

LENGTHS = (1, 8, 16, 40, 100, 200, 400)
TOKENS = 9


@contextmanager
def in_pieces(engine: AsyncEngine) -> Iterator[None]:
    """Take the graphs of short steps from the engine's policy for a while."""
    graphs: Any = engine._core._runner._main._graphs  # type: ignore[union-attr]
    policies = [] if graphs is None else [graphs.policy]
    kept = [dict(policy._buckets) for policy in policies]
    for policy in policies:
        policy._buckets |= {family: () for family in policy._buckets if family[0].startswith("short")}
    try:
        yield
    finally:
        for policy, buckets in zip(policies, kept, strict=True):
            policy._buckets = buckets


async def answer(engine: AsyncEngine, prompt: list[int]) -> tuple[float, float]:
    """Return the seconds until the first token, and those of one more."""
    began, stamps = time.perf_counter(), list[float]()
    params = SamplingParams(max_tokens=TOKENS, temperature=0, ignore_eos=True)
    async for output in engine.generate(prompt, params):
        if output.token_ids:
            stamps.append(time.perf_counter() - began)
    return stamps[0], (stamps[-1] - stamps[0]) / (TOKENS - 1)


async def measure(asked: argparse.Namespace, model: str) -> None:
    """Open the engine and print a line for each length."""
    options: dict[str, Any] = {
        "context": asked.context,
        "max_rows": 4,
        "kv_cache": asked.kv_cache,
        "device": asked.device,
    }
    options |= {"speculative": asked.speculative} if asked.speculative else {}
    options |= {"load_format": "dummy"} if asked.shape else {}
    chance = random.Random(0)
    async with AsyncEngine(model, **options) as engine:
        vocabulary = engine._opened.model.vocab_size  # type: ignore[union-attr]
        for _ in range(3):
            for length in asked.lengths:
                await answer(engine, chance.choices(range(3, vocabulary), k=length))
        await settled(engine, most_s=asked.settle)
        for length in asked.lengths:
            found: dict[str, list[float]] = {"whole": [], "pieces": [], "decode": []}
            for _ in range(asked.rounds):
                for way in ("whole", "pieces"):
                    with in_pieces(engine) if way == "pieces" else nullcontext():
                        first, more = await answer(engine, chance.choices(range(3, vocabulary), k=length))
                    found[way].append(first)
                    found["decode"].append(more)
            line: dict[str, Any] = {"bench": "first_token", "model": asked.shape or asked.model, "prompt": length}
            for way, seconds in found.items():
                quarters = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
                line[f"{way}_ms"] = [round(1e3 * quarter, 3) for quarter in (quarters[1], quarters[0], quarters[2])]
            line |= {"speculative": asked.speculative, "device": engine.config.device, "torch": torch.__version__}
            if torch.cuda.is_available():
                line["gpu"] = torch.cuda.get_device_name()
            print(json.dumps(line), flush=True)


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--shape", choices=tuple(SHAPES), help="random weights of this shape in place of a model")
    parser.add_argument("--speculative", choices=("ngram", "eagle"))
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--kv-cache", default="4GiB")
    parser.add_argument("--settle", type=float, default=40, help="seconds to wait for captures (default: %(default)s)")
    parser.add_argument("--device", default="auto")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = asked.model
        if asked.shape:
            model = folder
            (Path(folder) / "config.json").write_text(json.dumps(SHAPES[asked.shape]))
        asyncio.run(measure(asked, model))
    return 0


if __name__ == "__main__":
    sys.exit(main())
