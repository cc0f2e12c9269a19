"""What do more GPUs bring to one model, and how much of their sums do two halves of a batch hide?

    python bench/tensor_parallel.py                               Llama-8B's shape, 1 and 2 GPUs
    python bench/tensor_parallel.py --ranks 1                     on one
    python bench/tensor_parallel.py --shape tiny --device cpu     processes with gloo between them
    python bench/tensor_parallel.py --check                       do all numbers of ranks give the same tokens?

Random weights. Each rank is a process of its own, over NCCL (with NVLink multicast off: NCCL_NVLS_ENABLE=0) or gloo.
A step is what the engine runs: attention planned, the forward, the likeliest token of each row; decode steps are one
CUDA graph, prefill is launched by the host. Three ways take turns in one run:

    serial       one batch; each of the two sums of a layer is waited for
    halves       two halves of the same rows; while the ranks sum for one, the other computes
    (without)    both again with sums that do nothing: what is left is compute

JSON lines: a step's time for each load and way; then, of several ranks, how much of the sums was hidden:

    hidden              (serial - halves) / the time of the sums alone, run one behind the other
    hidden_in_halves    1 - (halves - halves without sums) / the time of the halves' sums alone

The second is the overlap alone; the first also pays for what halving costs (weights are read twice). Doubt it for this:
the ranks of a CPU share its cores, so a sum there takes compute away; spread is the least and the most of the rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

from overlap import AsyncEngine, SamplingParams

RANK = Path(__file__).with_name("tensor_parallel_rank.py")
SHAPES = ("llama-8b", "llama-1b", "small", "tiny")
SMALL: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5,
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8, "head_dim": 32,
    "num_key_value_heads": 8, "vocab_size": 1000, "max_position_embeddings": 1024, "rope_theta": 10000.0,
    "tie_word_embeddings": False, "eos_token_id": 2,
}  # fmt: skip
"""The model of --check: for 2, 4 or 8 ranks."""


def run(asked: argparse.Namespace, size: int) -> list[dict[str, Any]]:
    """Run a model on `size` ranks and return what was measured; each line is printed as it comes."""
    with tempfile.TemporaryDirectory() as folder:
        common = {**vars(asked), "size": size, "meet": f"{folder}/store"}
        commands = [[str(RANK), json.dumps({**common, "rank": rank})] for rank in range(size)]
        return watch(commands, environment(asked, size))


def environment(asked: argparse.Namespace, size: int) -> dict[str, str]:
    """Return the environment of a rank: NVLink multicast off, and its share of a CPU's cores."""
    cores = {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // size))} if asked.device == "cpu" else {}
    return {**os.environ, "NCCL_NVLS_ENABLE": "0", **cores}


def watch(commands: list[list[str]], environ: dict[str, str], *, show: bool = True) -> list[dict[str, Any]]:
    """Run programs until all end, or kill all once one fails; return the JSON lines of the first, and show them."""
    ranks = [
        subprocess.Popen([sys.executable, *command], env=environ, text=True, stdout=None if number else subprocess.PIPE)
        for number, command in enumerate(commands)
    ]
    said: list[dict[str, Any]] = []
    reader = threading.Thread(target=_repeat, args=(ranks[0].stdout, said, show))
    reader.start()
    try:
        running = True
        while running:
            time.sleep(0.05)
            running = any(rank.poll() is None for rank in ranks)
            for number, rank in enumerate(ranks):
                if rank.poll():
                    raise SystemExit(f"Rank {number} of {len(ranks)} ended with status {rank.returncode}: see above.")
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
        reader.join()
    return said


def _repeat(lines: Any, said: list[dict[str, Any]], show: bool) -> None:
    for line in lines:
        said.append(json.loads(line))
        if show:
            print(line, end="", flush=True)
    lines.close()


def compare(found: dict[int, list[dict[str, Any]]]) -> None:
    """Print how much faster more ranks are than the fewest."""
    least, *others = sorted(found)
    for size in others:
        for line in found[size]:
            base = [one for one in found[least] if (one["load"], one.get("way")) == (line["load"], "serial")]
            if "way" in line and base:
                times = round(base[0]["step_ms"] / line["step_ms"], 3)
                about = {key: line[key] for key in ("bench", "load", "ranks", "shape", "layers", "way", "device")}
                print(json.dumps({**about, "figure": f"times {least} rank(s), serial", "times": times}), flush=True)


def answer(asked: argparse.Namespace) -> None:
    """Be an engine in float32 on `asked.size` ranks, and print its greedy tokens."""
    options: dict[str, Any] = {
        "device": "cuda" if asked.device == "cuda" else "cpu", "dtype": "float32", "load_format": "dummy",
        "kv_cache": 8192, "tensor_parallel": asked.size,
    }  # fmt: skip
    prompts = [[3 + (i * k) % 990 for i in range(10 + 30 * k)] for k in range(1, 9)]
    params = SamplingParams(max_tokens=48, temperature=0, ignore_eos=True)

    async def answers() -> dict[int, list[int]]:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(SMALL))
            async with AsyncEngine(folder, **options) as engine:
                return {
                    out.index: out.token_ids async for out in engine.generate_batch(prompts, params, progress=False)
                }

    found = asyncio.run(answers())
    print(json.dumps({"ranks": asked.size, "greedy_tokens": [found[n] for n in sorted(found)]}))


def check(asked: argparse.Namespace) -> None:
    """Compare the greedy tokens of engines on all numbers of ranks; exit with 1 if they differ."""
    said: dict[int, Any] = {}
    for size in asked.ranks:
        command = [__file__, "--device", asked.device, "--answer", "--size", str(size)]
        said[size] = watch([command], environment(asked, size), show=False)[0]["greedy_tokens"]
    first, *others = said.values()
    same = all(other == first for other in others)
    line = {
        "bench": "tensor_parallel", "figure": "same greedy tokens", "ranks": asked.ranks, "same": same,
        "answers": len(first), "tokens": sum(map(len, first)), "dtype": "float32", "device": device_name(asked),
    }  # fmt: skip
    print(json.dumps(line))
    if not same:
        raise SystemExit(1)


def device_name(asked: argparse.Namespace) -> str:
    """Return the GPU's name, or "cpu"."""
    return torch.cuda.get_device_name() if asked.device == "cuda" else "cpu"


def main() -> None:
    """Read the command line; run, or compare."""
    arguments = argparse.ArgumentParser(description="one model on several GPUs, its sums hidden behind compute")
    arguments.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="numbers of GPUs, in turn")
    arguments.add_argument("--shape", choices=SHAPES, default="llama-8b")
    arguments.add_argument("--layers", type=int, default=0, help="fewer than the shape has")
    arguments.add_argument("--prefill", type=int, nargs=2, default=[8, 2048], metavar=("ROWS", "TOKENS"))
    arguments.add_argument("--decode", type=int, nargs="*", default=[64, 256], metavar="ROWS")
    arguments.add_argument("--context", type=int, default=1024, help="tokens of a decoding row")
    arguments.add_argument("--rounds", type=int, default=15)
    arguments.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    arguments.add_argument("--dtype", help="default: bfloat16 on a GPU, float32 on a CPU")
    arguments.add_argument("--eager", action="store_true", help="no graphs of decode steps")
    arguments.add_argument("--picture", help="an .svg of the first load, both ways, on the most ranks")
    arguments.add_argument("--check", action="store_true", help="compare greedy tokens instead")
    arguments.add_argument("--answer", action="store_true", help=argparse.SUPPRESS)
    arguments.add_argument("--size", type=int, help=argparse.SUPPRESS)
    asked = arguments.parse_args()
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    asked.device = ("cuda" if gpus else "cpu") if asked.device == "auto" else asked.device
    asked.dtype = asked.dtype or ("bfloat16" if asked.device == "cuda" else "float32")
    if asked.device == "cuda" and max(asked.ranks) > gpus:
        which = f"{gpus} ({torch.cuda.get_device_name()})" if gpus else "none"
        raise SystemExit(
            f"--ranks {max(asked.ranks)} needs {max(asked.ranks)} GPUs, and this machine has {which}. Ask for fewer, "
            "or try it with processes on the CPU: --device cpu --shape tiny."
        )
    if asked.answer:
        answer(asked)
    elif asked.check:
        check(asked)
    else:
        compare({size: run(asked, size) for size in sorted(asked.ranks)})


if __name__ == "__main__":
    main()
