"""How many tokens a second does the engine give when all requests are there at once?

    python bench/offline.py --model smollm2-135m-instruct --rows 64 --in 128 --out 256
    python bench/offline.py --shape llama-8b --rows 64 --in 128 --out 128      (random weights)

The physical limit is the memory's: a decode step reads all weights once and each row's KV; `--bandwidth` is what the
memory gives in GB/s (measured by a copy if not told). Prompt tokens are not counted. The last line is JSON. Doubt it
as you doubt any single run on a shared machine: it shows the spread over rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from overlap import AsyncEngine, SamplingParams

SHAPES: dict[str, dict[str, Any]] = {
    "llama-8b": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "vocab_size": 128256, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
        "hidden_act": "silu", "tie_word_embeddings": False, "torch_dtype": "bfloat16", "eos_token_id": 128001,
    },
}  # fmt: skip


def copy_bandwidth(device: torch.device) -> float:
    """Return bytes a second read and written by a large copy."""
    source = torch.empty(2**30 if device.type == "cuda" else 2**27, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = 0.0
    for _ in range(5):
        _sync(device)
        start = time.perf_counter()
        target.copy_(source)
        _sync(device)
        best = max(best, 2 * source.nbytes / (time.perf_counter() - start))
    return best


def _sync(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


async def run(asked: argparse.Namespace, model: str, options: dict[str, Any]) -> dict[str, Any]:
    """Open the engine and measure."""
    start = time.perf_counter()
    async with AsyncEngine(model, **options) as engine:
        opened = time.perf_counter() - start
        device = torch.device(engine.config.device)
        params = SamplingParams(max_tokens=asked.out, temperature=0, ignore_eos=True)
        prompts = [[(31 * i + 7 * j) % 40000 + 100 for j in range(asked.inp)] for i in range(asked.rows)]
        speeds, first_tokens = [], []
        for _ in range(asked.rounds + 1):
            start = time.perf_counter()
            async for _ in engine.generate_batch(prompts, params, progress=False):
                pass
            speeds.append(asked.rows * asked.out / (time.perf_counter() - start))
            start = time.perf_counter()
            await anext(engine.generate(prompts[0], params))
            first_tokens.append(time.perf_counter() - start)
            await asyncio.sleep(0.05)
        speeds, first_tokens = speeds[1:], first_tokens[1:]
        shape = engine._opened.model  # type: ignore[union-attr]
        weights = (
            next(int(note.split()[1]) for note in engine.explain().splitlines() if note.startswith("weights")) * 2**20
        )
        kv = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * 2 * (asked.inp + asked.out / 2)
        bandwidth = asked.bandwidth * 1e9 if asked.bandwidth else copy_bandwidth(device)
        limit = asked.rows * bandwidth / (weights + asked.rows * kv)
        return {
            "bench": "offline", "model": model if not asked.shape else asked.shape, "rows": asked.rows,
            "in": asked.inp, "out": asked.out, "tokens_per_s": round(statistics.median(speeds), 1),
            "spread": [round(min(speeds), 1), round(max(speeds), 1)], "limit_tokens_per_s": round(limit, 1),
            "share_of_limit": round(statistics.median(speeds) / limit, 3),
            "ttft_ms": round(1e3 * statistics.median(first_tokens), 2), "open_s": round(opened, 2),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "dtype": engine.config.dtype, "torch": torch.__version__,
        }  # fmt: skip


def main() -> None:
    """Read the command line, measure, print."""
    arguments = argparse.ArgumentParser(description="tokens a second, offline")
    arguments.add_argument("--model", default="smollm2-135m-instruct")
    arguments.add_argument("--shape", choices=SHAPES, help="random weights of this shape instead of a model")
    arguments.add_argument("--rows", type=int, default=1)
    arguments.add_argument("--in", dest="inp", type=int, default=128)
    arguments.add_argument("--out", type=int, default=128)
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--bandwidth", type=float, default=0.0, help="GB/s of the memory")
    arguments.add_argument("--no-overlap", action="store_true")
    arguments.add_argument("--device", default="auto")
    asked = arguments.parse_args()
    options: dict[str, Any] = {"device": asked.device, "overlap": not asked.no_overlap}
    with tempfile.TemporaryDirectory() as folder:
        model = asked.model
        if asked.shape:
            (Path(folder) / "config.json").write_text(json.dumps(SHAPES[asked.shape]))
            model, options["load_format"] = folder, "dummy"
        result = asyncio.run(run(asked, model, options))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
