"""What does it bring to read prompts beside decode steps, in a lane of their own?

    python bench/two_lanes.py                                             SmolLM2's shape and Llama-8B's, random weights
    python bench/two_lanes.py --shape llama-8b --picture lanes.svg

One engine for each shape, in which the ways take turns: how prompts and decode rows share the device is switched while
nothing runs, so weights, KV memory and graphs are the same for all.

    serial     prompt chunks and decode rows in steps of their own, in turn
    mixed      in one step (chunked prefill)
    streams    at the same time, in two lanes
    auto       the policy chooses for each step by what steps took; with --target-itl-ms also "target", which keeps that

Two loads, JSON lines: `offline`, many requests at once, tokens in and out over the seconds; `poisson`, long prompts at
random moments (the same for every way) over answers that run already: time between two tokens of those (one that
brought several counts as several), time to the first token of the prompts, and all tokens over the seconds until the
last prompt is done. Then a line each of how the policy compares with the best fixed way. Before any figure all ways
run a part of the load, for graphs, kernels and the policy to settle. Doubt it as you doubt one round on a shared
machine: `--rounds` more of them shows the spread.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from overlap import AsyncEngine, SamplingParams
from overlap.microbatch.cost import CostModel, Nominal
from overlap.microbatch.policy import SplitPolicy
from overlap.observe.picture import picture
from overlap.observe.progress import bar
from overlap.observe.trace import Tracing
from overlap.schedule.split import Always, Splitter

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16", "rope_theta": 100000.0, "max_position_embeddings": 32768, "eos_token_id": 2,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A shape, and loads that fit it."""

    config: dict[str, Any]
    max_rows: int
    requests: int
    """Of the offline load, `tokens_in` and `tokens_out` each."""
    tokens_in: int
    tokens_out: int
    running: int
    """Answers that run under the Poisson load."""
    prompt: int
    """Tokens of each of its prompts."""
    rate: float
    """Prompts a second."""
    seconds: float
    """How long prompts come."""


CASES = {
    "smollm2-135m": Case(
        {**LLAMA, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
         "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True},
        256, 768, 1024, 128, 192, 4096, 12.0, 5.0,
    ),
    "llama-8b": Case(
        {**LLAMA, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
         "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False},
        64, 128, 1024, 128, 48, 4096, 2.0, 6.0,
    ),
    "tiny": Case(
        {**LLAMA, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 500, "tie_word_embeddings": True, "max_position_embeddings": 2048},
        6, 12, 40, 8, 3, 200, 20.0, 0.4,
    ),
}  # fmt: skip
WAYS = ("serial", "mixed", "streams", "auto")


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Return p50, p99 and the most, in milliseconds."""
    if not values:
        return {}
    inside = sorted(values)
    found = {
        name: inside[min(int(len(inside) * share), len(inside) - 1)] for name, share in (("p50", 0.5), ("p99", 0.99))
    }
    return {name: round(1e3 * value, 2) for name, value in (*found.items(), ("max", inside[-1]))}


class Bench:
    """An engine, and what measures it."""

    def __init__(self, engine: AsyncEngine, case: Case, target_itl_ms: float | None) -> None:
        self.engine = engine
        self.case = case
        self.core: Any = engine._core
        policy = self.core.parts[0].splitter
        if not isinstance(policy, SplitPolicy):  # on a CPU, where "auto" is "mixed"
            cost = CostModel(Nominal(weights_s=1e-3, kv_token_s=1e-8, token_s=1e-5, step_s=1e-3), "bench")
            policy = SplitPolicy(cost, token_budget=engine.config.token_budget)
        self.ways: dict[str, Splitter | None] = {
            "serial": Always("serial"), "mixed": None, "streams": Always("lanes"), "auto": policy,
        }  # fmt: skip
        if target_itl_ms is not None:
            self.ways["target"] = SplitPolicy(
                policy.cost, token_budget=engine.config.token_budget, target_itl_s=target_itl_ms / 1e3
            )
        self._salt = 0

    async def switch(self, way: str) -> None:
        """Let steps be planned this way from now on. Waits until nothing runs."""
        await asyncio.wrap_future(self.core.idle())
        lanes = self.core.parts[0]._lanes

        def turn() -> None:
            lanes.splitter, lanes.side_tokens = self.ways[way], 0

        await asyncio.wrap_future(self.core.call(turn))

    async def settled(self, limit_s: float) -> float:
        """Wait until no more graphs are captured, so many seconds at most; return how long that took."""
        began, before = time.perf_counter(), -1
        while (now := self.core._runner.statistics().captures) != before and time.perf_counter() - began < limit_s:
            before = now
            await asyncio.sleep(min(0.5, limit_s))
        return time.perf_counter() - began

    def prompt(self, length: int) -> list[int]:
        """Return random tokens, new ones each time, so that no prefix is cached."""
        self._salt += 1
        chance = random.Random(self._salt)
        return chance.choices(range(3, self.case.config["vocab_size"]), k=length)

    # ── loads ────────────────────────────────────────────────────────────────────────────────────────────────────

    async def offline(self, share: float = 1.0) -> dict[str, Any]:
        """Answer all requests, or a share of them."""
        case, count = self.case, max(2, int(self.case.requests * share))
        chance = random.Random(0)  # answers of many lengths: so that prompts come beside decode steps all the time
        outs = [chance.randint(case.tokens_out // 2, case.tokens_out * 3 // 2) for _ in range(count)]
        prompts = [self.prompt(case.tokens_in) for _ in range(count)]
        params = [SamplingParams(max_tokens=out, temperature=0, ignore_eos=True) for out in outs]
        began = time.perf_counter()
        async for _ in self.engine.generate_batch(prompts, params, progress=False):
            pass
        took = time.perf_counter() - began
        total = count * case.tokens_in + sum(outs)
        return {
            "total_tokens_per_s": round(total / took, 1), "output_tokens_per_s": round(sum(outs) / took, 1),
            "seconds": round(took, 3), "requests": count,
        }  # fmt: skip

    async def poisson(self, seconds: float) -> dict[str, Any]:
        """Send long prompts over running answers."""
        chance, at, moments = random.Random(0), 0.0, [0.0]
        while (at := at + chance.expovariate(self.case.rate)) < seconds:
            moments.append(at)
        return await self.beside([self.prompt(self.case.prompt) for _ in moments], moments)

    async def beside(
        self, prompts: list[list[int]], moments: list[float], watch: Tracing | None = None
    ) -> dict[str, Any]:
        """Run answers, and send prompts at these moments meanwhile; measure from the first to the last one's token.

        `watch` is on while that is measured.
        """
        events: list[tuple[float, int, float]] = []  # when, tokens, since the one before
        began_all = asyncio.Event()
        waiting = self.case.running

        async def run() -> None:
            nonlocal waiting
            last, tokens = 0.0, 0
            params = SamplingParams(max_tokens=100_000, temperature=0, ignore_eos=True)
            limit = self.engine.context - 64
            async for out in self.engine.generate(self.prompt(48), replace(params, max_tokens=limit)):
                now, new = time.perf_counter(), len(out.token_ids) - tokens
                if tokens:
                    events.append((now, new, now - last))
                else:
                    waiting -= 1
                    if not waiting:
                        began_all.set()
                last, tokens = now, len(out.token_ids)

        async def ask(prompt: list[int], moment: float) -> float:
            await asyncio.sleep(max(0.0, began + moment - time.perf_counter()))
            sent = time.perf_counter()
            params = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)
            async for _ in self.engine.generate(prompt, params):
                break
            return time.perf_counter() - sent

        running = [asyncio.create_task(run()) for _ in range(self.case.running)]
        try:
            await began_all.wait()
            await asyncio.sleep(0.1)
            began = time.perf_counter()
            async with watch or nullcontext():
                ttft = await asyncio.gather(*(ask(*pair) for pair in zip(prompts, moments, strict=True)))
            ended = time.perf_counter()
        finally:
            for task in running:
                task.cancel()
            for task in running:
                with suppress(asyncio.CancelledError):
                    await task
        inside = [(new, since) for when, new, since in events if began <= when <= ended]
        out = sum(new for new, _ in inside)
        return {
            "itl_ms": percentiles([since / new for new, since in inside for _ in range(new)]),
            "ttft_ms": percentiles(ttft),
            "total_tokens_per_s": round((out + sum(map(len, prompts))) / (ended - began), 1),
            "output_tokens_per_s": round(out / (ended - began), 1), "seconds": round(ended - began, 3),
            "prompts": len(prompts), "prompt": len(prompts[0]), "running": self.case.running,
        }  # fmt: skip

    async def traced(self, shape: str, path: Path, drawn: Path | None) -> None:
        """Record a few prompts in a lane of their own over running answers."""
        await self.switch("streams")
        prompts = [self.prompt(self.case.prompt) for _ in range(3)]
        watch = self.engine.trace(path)
        await self.beside(prompts, [0.0] * 3, watch)
        if drawn is not None:
            record = replace(watch._trace.record(), engine=f"{shape}, two lanes")
            await asyncio.to_thread(drawn.write_text, picture(record, steps=16), encoding="utf-8")


def on_cuda(asked: argparse.Namespace) -> bool:
    """Return whether this is to run on a GPU."""
    return str(asked.device).startswith("cuda") or (asked.device == "auto" and torch.cuda.is_available())


async def measure(asked: argparse.Namespace, shape: str) -> None:
    """Open an engine of a shape; let the ways take turns, and print."""
    case = CASES[shape]
    case = replace(case, **{name: value for name in asdict(case) if (value := getattr(asked, name, None)) is not None})
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(case.config))
        options: dict[str, Any] = {
            "device": asked.device, "lanes": "auto" if on_cuda(asked) else "streams", "load_format": "dummy",
            "max_rows": case.max_rows, "cache_dir": folder,
            "context": min(asked.context, case.config["max_position_embeddings"]),
            **({"kv_cache": asked.kv_cache} if asked.kv_cache else {}),
            **({"token_budget": asked.token_budget} if asked.token_budget else {}),
        }  # fmt: skip
        async with AsyncEngine(folder, **options) as engine:
            bench = Bench(engine, case, asked.target_itl_ms)
            ways = [way for way in bench.ways if way in asked.lanes or way == "target"]
            with bar((1 + asked.rounds) * len(ways) * len(asked.load), shape, "run", asked=None) as progress:
                await warm_up(bench, asked, ways, progress)
                for load in asked.load:
                    await turns(bench, asked, shape, load, ways, progress)
            if asked.trace or asked.picture:
                await bench.traced(shape, asked.trace or Path(folder) / "trace.json", asked.picture)
            if asked.explain:
                print(engine.explain())


async def warm_up(bench: Bench, asked: argparse.Namespace, ways: list[str], progress: Any) -> None:
    """Run a part of each load each way, and wait for the graphs that were missing."""
    await bench.settled(asked.settle)
    for load in asked.load:
        for way in ways:
            await bench.switch(way)
            await (bench.offline(asked.warm) if load == "offline" else bench.poisson(bench.case.seconds * asked.warm))
            await bench.settled(asked.settle)
            progress.update()


async def turns(bench: Bench, asked: argparse.Namespace, shape: str, load: str, ways: list[str], progress: Any) -> None:
    """Measure a load all ways in turns and print a line each, and one that compares."""
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    for _ in range(asked.rounds):
        for way in ways:
            await bench.switch(way)
            before = bench.engine.statistics()
            figures = await (bench.offline() if load == "offline" else bench.poisson(bench.case.seconds))
            after = bench.engine.statistics()
            steps = {name: getattr(after, name) - getattr(before, name) for name in ("steps", "side_steps")}
            found[way].append({**figures, **steps, "bubble_s": round(after.bubble_s - before.bubble_s, 4)})
            progress.update()
    device = bench.engine.config.device
    about = {"bench": "two_lanes", "load": load, "shape": shape}
    about_run = {
        "rounds": asked.rounds, "max_rows": bench.engine.config.max_rows,
        "token_budget": bench.engine.config.token_budget, "dtype": bench.engine.config.dtype,
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu",
        "torch": torch.__version__,
    }  # fmt: skip
    middle: dict[str, dict[str, Any]] = {}
    for way, each in found.items():
        rates = [one["total_tokens_per_s"] for one in each]
        middle[way] = sorted(each, key=lambda one: float(one["total_tokens_per_s"]))[len(each) // 2]
        chosen = {"target_itl_ms": asked.target_itl_ms} if way == "target" else {}
        line = {**about, "lanes": way, **chosen, **middle[way], "spread": [min(rates), max(rates)], **about_run}
        if load == "poisson":
            line["itl_p99_ms_each"] = [one["itl_ms"].get("p99") for one in each]
        print(json.dumps(line), flush=True)
    print(json.dumps({**about, "figure": "compared", **compared(load, found), **about_run}), flush=True)


def compared(load: str, found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Return what the ways are to each other, by medians."""
    rate = {way: statistics.median(one["total_tokens_per_s"] for one in each) for way, each in found.items()}
    line: dict[str, Any] = {}
    fixed = {way: value for way, value in rate.items() if way in WAYS[:3]}
    if "auto" in rate and fixed:
        best = max(fixed, key=lambda way: fixed[way])
        line |= {"best_fixed": best, "auto_over_best_fixed": round(rate["auto"] / fixed[best], 4)}
    alone = [rate[way] for way in ("serial", "mixed") if way in rate]
    if alone and "streams" in rate:
        line["streams_over_best_of_serial_and_mixed"] = round(rate["streams"] / max(alone), 4)
    if load == "poisson" and "mixed" in found:
        p99 = {way: statistics.median(one["itl_ms"].get("p99", 0.0) for one in each) for way, each in found.items()}
        line["itl_p99_over_mixed"] = {way: round(one / p99["mixed"], 4) for way, one in p99.items() if p99["mixed"]}
        line["tokens_over_mixed"] = {way: round(one / rate["mixed"], 4) for way, one in rate.items()}
    return line


def main() -> None:
    """Read the command line, measure, print."""
    arguments = argparse.ArgumentParser(description="prompts beside decode steps, in two lanes or not")
    arguments.add_argument("--shape", choices=CASES, nargs="+", default=["smollm2-135m", "llama-8b"])
    arguments.add_argument("--lanes", choices=WAYS, nargs="+", default=list(WAYS))
    arguments.add_argument("--load", choices=("offline", "poisson"), nargs="+", default=["offline", "poisson"])
    arguments.add_argument("--target-itl-ms", type=float, help="measure the policy with this target, too")
    arguments.add_argument("--rounds", type=int, default=1)
    arguments.add_argument("--warm", type=float, default=0.3, help="share of a load that each way runs before")
    arguments.add_argument("--settle", type=float, default=15.0, metavar="S", help="wait for graphs so long at most")
    for name, kind in (("requests", int), ("tokens-in", int), ("tokens-out", int), ("running", int), ("prompt", int),
                       ("rate", float), ("seconds", float), ("max-rows", int)):  # fmt: skip
        arguments.add_argument(f"--{name}", type=kind, help="instead of the shape's own")
    arguments.add_argument("--token-budget", type=int)
    arguments.add_argument("--kv-cache", type=int, help="tokens")
    arguments.add_argument("--context", type=int, default=20480, help="tokens of a request at most")
    arguments.add_argument("--device", default="auto")
    arguments.add_argument("--trace", type=Path, help="a .json of two lanes at work, for ui.perfetto.dev")
    arguments.add_argument("--picture", type=Path, help="an .svg of it")
    arguments.add_argument("--explain", action="store_true", help="print what runs as what at the end")
    asked = arguments.parse_args()
    for shape in asked.shape:
        asyncio.run(measure(asked, shape))


if __name__ == "__main__":
    main()
