"""How many tokens a second does the engine give when all requests are there at once, and how near is that to physics?

    python bench/offline.py --model smollm2-135m-instruct --workload single nano
    python bench/offline.py --shape llama-8b --workload single small prefill mixed      (random weights)

One engine, one JSON line a workload:

    single    1 request of 128 tokens in and 256 out        output tokens a second
    small     8 such                                        output tokens a second
    nano      256 of 100 to 1024 in and out, seed 0         output tokens a second
    prefill   128 of 2048 in and 8 out                      all tokens a second
    mixed     512 of 1024 in and 256 out                    all tokens a second

The limit is what this device could give if nothing but physics held it back: the larger of all bytes over the bandwidth
and all floating-point operations over the peak, both measured here (by a large copy and a large matrix product). Bytes:
the weights once for each step that the longest answer needs, and every token's look at the KV before it. Beside the
peak stands what the same product gives for a second and a half on end ("sustained_tflops"): power and heat leave long
prefill no more. Prompts are random tokens, new ones in each round, so that no prefix is found in a cache. Doubt it as
you doubt any single run on a shared machine: it shows the spread over the rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from overlap import AsyncEngine, SamplingParams
from overlap.config import LANES
from overlap.models.config import ModelConfig

_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        **_LLAMA, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 8192, "rope_theta": 100000.0,
        "tie_word_embeddings": True, "eos_token_id": 2,
    },
    "qwen3-0.6b": {
        **_LLAMA, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 1024, "head_dim": 128,
        "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8,
        "vocab_size": 151936, "max_position_embeddings": 40960, "rope_theta": 1000000.0, "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True, "eos_token_id": 151645,
    },
    "llama-8b": {
        **_LLAMA, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "max_position_embeddings": 8192,
        "rope_theta": 500000.0, "tie_word_embeddings": False, "eos_token_id": 128001,
    },
    "tiny": {
        **_LLAMA, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 500, "max_position_embeddings": 4096, "rope_theta": 10000.0,
        "tie_word_embeddings": True, "eos_token_id": 2,
    },
}  # fmt: skip


SUSTAINED_S = 1.5
"""For how long a product runs on end."""
WARM_REQUESTS = 48
"""So many of a workload's requests are answered, shortly, before it is measured."""


@dataclass(frozen=True)
class Workload:
    """Requests that are there at once: (tokens in, tokens out) of each."""

    name: str
    lengths: tuple[tuple[int, int], ...]
    counts_all: bool = False
    """Whether the figure counts the tokens in, too."""

    def scaled(self, scale: int) -> Workload:
        """Return the same with fewer requests and shorter ones."""
        kept = self.lengths[: max(1, len(self.lengths) // scale)]
        shorter = tuple((max(1, inp // scale), max(2, out // scale)) for inp, out in kept)
        return Workload(self.name, shorter, self.counts_all)

    @property
    def num_out(self) -> int:
        """Tokens of all answers."""
        return sum(out for _, out in self.lengths)

    @property
    def counted(self) -> int:
        """Tokens that the figure counts."""
        return self.num_out + self.counts_all * sum(inp for inp, _ in self.lengths)

    @property
    def context(self) -> int:
        """Tokens of the longest request."""
        return max(inp + out for inp, out in self.lengths)


def workloads() -> dict[str, Workload]:
    """The five, by name."""
    chance = random.Random(0)
    nano = tuple((chance.randint(100, 1024), chance.randint(100, 1024)) for _ in range(256))
    found = (
        Workload("single", ((128, 256),)),
        Workload("small", ((128, 256),) * 8),
        Workload("nano", nano),
        Workload("prefill", ((2048, 8),) * 128, counts_all=True),
        Workload("mixed", ((1024, 256),) * 512, counts_all=True),
    )
    return {workload.name: workload for workload in found}


@dataclass(frozen=True)
class Device:
    """What a device gives at best, as measured."""

    bandwidth: float
    """Bytes a second read and written by a large copy."""
    flops: float
    """Floating-point operations a second in a large matrix product."""
    sustained: float
    """The same over SUSTAINED_S: what power and heat leave of it."""


def measure_device(device: torch.device, dtype: torch.dtype) -> Device:
    """Measure bandwidth and peak."""
    large = device.type == "cuda"
    source = torch.empty(2**30 if large else 2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copied = _best_seconds(lambda: target.copy_(source), device)
    size = 8192 if large else 768
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    flops, runs = 2.0 * size**3, 0
    once_s = _best_seconds(lambda: left @ right, device)
    began = time.perf_counter()
    while time.perf_counter() - began < SUSTAINED_S:
        for _ in range(max(1, int(0.05 / once_s))):
            left @ right
            runs += 1
        _sync(device)
    return Device(2 * source.nbytes / copied, flops / once_s, runs * flops / (time.perf_counter() - began))


def _best_seconds(run: Callable[[], object], device: torch.device) -> float:
    best = float("inf")
    for _ in range(6):
        _sync(device)
        start = time.perf_counter()
        run()
        _sync(device)
        best = min(best, time.perf_counter() - start)
    return best


def _sync(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def limit(workload: Workload, model: ModelConfig, device: Device, itemsize: int) -> tuple[float, str]:
    """Return (the figure that physics allows, "memory" or "compute", whichever bounds it).

    Everything that can overlap is taken to overlap, so no engine can be faster, and none will quite get there.
    """
    heads, kv_heads = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    layer = model.hidden_size * (2 * heads + 2 * kv_heads + 3 * model.intermediate_size)
    layers, head = model.num_layers * layer, model.vocab_size * model.hidden_size
    steps = max(out for _, out in workload.lengths)
    moved, flops = float(steps * (layers + head) * itemsize), 0.0
    for inp, out in workload.lengths:
        run = inp + out - 1  # the last token is never run
        seen = run * (run + 1) / 2
        flops += 2.0 * (run * layers + out * head) + 4.0 * model.num_layers * heads * seen
        # Each decode step reads the row's KV; the prompt's own KV may stay on the chip. Each token's KV is written.
        read = seen - inp * (inp + 1) / 2
        moved += (read + run) * 2 * model.num_layers * kv_heads * itemsize
    memory_s, compute_s = moved / device.bandwidth, flops / device.flops
    return workload.counted / max(memory_s, compute_s), "memory" if memory_s > compute_s else "compute"


async def run_once(engine: AsyncEngine, workload: Workload, vocabulary: int, salt: str, *, cut: int = 0) -> float:
    """Answer all requests of a workload and return the seconds; `cut` makes the answers that short."""
    chance = random.Random(salt)
    prompts = [[chance.randrange(3, vocabulary) for _ in range(inp)] for inp, _ in workload.lengths]
    outs = [min(out, cut) if cut else out for _, out in workload.lengths]
    params = [SamplingParams(max_tokens=out, temperature=0, ignore_eos=True) for out in outs]
    start = time.perf_counter()
    got = 0
    async for output in engine.generate_batch(prompts, params, progress=False):
        got += output.usage.completion_tokens
    seconds = time.perf_counter() - start
    if got != sum(outs):
        raise SystemExit(f"asked for {sum(outs)} tokens and got {got}")
    return seconds


async def settled(engine: AsyncEngine, most_s: float = 120.0) -> None:
    """Return once nothing is left to be captured in idle moments."""
    deadline = time.monotonic() + most_s
    await asyncio.sleep(0.2)  # for the engine to look
    while engine.statistics().graphs.get("incomplete") and time.monotonic() < deadline:  # noqa: ASYNC110  # a figure
        await asyncio.sleep(0.2)


async def measure(asked: argparse.Namespace, model: str, options: dict[str, Any], todo: list[Workload]) -> None:
    """Open the engine once and print a line for each workload."""
    cuda = asked.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda" if asked.device == "auto" and cuda else asked.device if cuda else "cpu")
    # Before the engine opens: it captures graphs beside what comes after.
    best = measure_device(device, torch.bfloat16 if cuda else torch.float32)
    start = time.perf_counter()
    async with AsyncEngine(model, **options) as engine:
        opened = time.perf_counter() - start
        shape = engine._opened.model  # type: ignore[union-attr]
        dtype = getattr(torch, engine.config.dtype)
        first = await run_once(engine, Workload("first", ((128 // asked.scale or 1, 1),)), shape.vocab_size, "first")
        for workload in todo:
            rounds = asked.rounds or (3 if len(workload.lengths) <= 8 else 1)
            part = Workload("warm", workload.lengths[:WARM_REQUESTS])
            for number in range(2):  # a size is captured when it comes for the second time
                await run_once(engine, part, shape.vocab_size, f"warm {number}", cut=asked.warm_tokens)
                await settled(engine)
            took = [await run_once(engine, workload, shape.vocab_size, f"round {n}") for n in range(rounds)]
            seconds = statistics.median(took)
            allowed, bound = limit(workload, shape, best, dtype.itemsize)
            figure = workload.counted / seconds
            total = workload.num_out + sum(inp for inp, _ in workload.lengths)
            line = {
                "bench": "offline", "workload": workload.name, "model": asked.shape or asked.model,
                "requests": len(workload.lengths), "tokens_per_s": round(figure, 1),
                "counts": "in + out" if workload.counts_all else "out",
                "spread": [round(workload.counted / max(took), 1), round(workload.counted / min(took), 1)],
                "limit_tokens_per_s": round(allowed, 1), "share_of_limit": round(figure / allowed, 4),
                "bound": bound, "output_tokens_per_s": round(workload.num_out / seconds, 1),
                "total_tokens_per_s": round(total / seconds, 1), "seconds": round(seconds, 3), "rounds": rounds,
                "ms_per_output_token": round(1e3 * seconds * len(workload.lengths) / workload.num_out, 3),
                "open_s": round(opened, 2), "first_answer_s": round(first, 3),
                "bandwidth_gb_per_s": round(best.bandwidth / 1e9, 1), "peak_tflops": round(best.flops / 1e12, 2),
                "sustained_tflops": round(best.sustained / 1e12, 2),
                "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
                "dtype": engine.config.dtype, "lanes": engine.config.lanes,
                "tensor_parallel": asked.tensor_parallel, "torch": torch.__version__, "scale": asked.scale,
            }  # fmt: skip
            print(json.dumps(line), flush=True)
        if asked.explain:
            print(engine.explain())


def main() -> None:
    """Read the command line, measure, print."""
    known = workloads()
    arguments = argparse.ArgumentParser(description="tokens a second, offline")
    arguments.add_argument("--model", default="smollm2-135m-instruct")
    arguments.add_argument("--shape", choices=SHAPES, help="random weights of this shape instead of a model")
    arguments.add_argument("--workload", choices=known, nargs="+", default=["single", "small"])
    arguments.add_argument("--rounds", type=int, default=0, help="default: 3 of single and small, 1 of the others")
    arguments.add_argument("--scale", type=int, default=1, help="divide requests and lengths by this, to try it out")
    arguments.add_argument("--warm-tokens", type=int, default=8, help="length of each answer of the two warm-up rounds")
    arguments.add_argument("--max-rows", type=int)
    arguments.add_argument("--token-budget", type=int)
    arguments.add_argument("--kv-cache")
    arguments.add_argument("--lanes", choices=LANES, default="auto")
    arguments.add_argument("--tensor-parallel", type=int, default=1, help="on so many GPUs")
    arguments.add_argument("--no-overlap", action="store_true")
    arguments.add_argument("--device", default="auto")
    arguments.add_argument("--explain", action="store_true", help="print what runs as what at the end")
    asked = arguments.parse_args()
    todo = [known[name].scaled(asked.scale) if asked.scale > 1 else known[name] for name in asked.workload]
    given = {name: value for name in ("max_rows", "token_budget", "kv_cache") if (value := getattr(asked, name))}
    options: dict[str, Any] = {"device": asked.device, "overlap": not asked.no_overlap, "lanes": asked.lanes, **given}
    if asked.tensor_parallel > 1:
        options["tensor_parallel"] = asked.tensor_parallel
    options["context"] = max(one.context for one in todo) + 16
    with tempfile.TemporaryDirectory() as folder:
        model = asked.model
        if asked.shape:
            (Path(folder) / "config.json").write_text(json.dumps(SHAPES[asked.shape]))
            model, options["load_format"] = folder, "dummy"
        asyncio.run(measure(asked, model, options, todo))


if __name__ == "__main__":
    main()
