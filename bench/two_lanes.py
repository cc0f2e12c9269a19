"""What does it bring to read prompts beside decode steps, in a lane of their own?

    python bench/two_lanes.py                                             SmolLM2's shape and Llama-8B's, random weights
    python bench/two_lanes.py --shape llama-8b --picture lanes.svg

One engine for each shape, in which the ways take turns: how prompts and decode rows share the device is switched while
nothing runs, so weights, KV memory and graphs are the same for all.

    serial     prompt chunks and decode rows in steps of their own, in turn
    mixed      in one step (chunked prefill)
    streams    at the same time, in two lanes that compete for the SMs
    sm:N       the same, with N SMs the decode rows' own and the rest the prompts': the smallest and the largest share
               that the policy has; not where SMs cannot be shared out
    auto       the policy chooses for each step by what steps took; with --target-itl-ms under the Poisson load also
               "target", which keeps that

Two loads, JSON lines: `offline`, many requests at once, tokens in and out over the seconds; `poisson`, long prompts at
random moments (the same for every way) over answers that run already: time between two tokens of those (one that
brought several counts as several), time to the first token of the prompts, and all tokens over the seconds until the
last prompt is done. Then a line each of how the policy compares with the best fixed way. Before any figure the graphs
of all shares are captured, all ways run a part of the load, for kernels to be there, and the policy is calibrated
(`AsyncEngine.calibrate`, a line says how long that took; `--no-calibrate` lets it begin with nothing, `--learn N` gives
it N whole loads before it is measured). A way that fails or takes more than `--limit` seconds has a line that says so,
and the others go on. Doubt it as you doubt one round on a shared machine: `--rounds` more of them shows the spread.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from two_lanes_cases import CASES, Case  # type: ignore[import-not-found]

from overlap import AsyncEngine, ConfigError, SamplingParams
from overlap.graphs.policy import Kind, Shape
from overlap.microbatch.cost import CostModel, Nominal
from overlap.microbatch.policy import SplitPolicy
from overlap.observe.picture import picture
from overlap.observe.progress import bar
from overlap.observe.trace import Tracing
from overlap.schedule.split import Always, Choice, Outlook, Splitter

WAYS = ("serial", "mixed", "streams", "shares", "auto")
"""What can be asked for; "shares" are two ways, "sm:N" each."""


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
        self.shares: tuple[int, ...] = policy.shares
        edges = dict.fromkeys([*self.shares[:1], *self.shares[-1:]])
        self.ways: dict[str, Splitter | None] = {
            "serial": Always("serial"), "mixed": None, "streams": Always("lanes"),
            **{f"sm:{share}": Always("lanes", share=share) for share in edges}, "auto": policy,
        }  # fmt: skip
        if target_itl_ms is not None:
            self.ways["target"] = SplitPolicy(
                policy.cost,
                token_budget=engine.config.token_budget,
                target_itl_s=target_itl_ms / 1e3,
                shares=self.shares,
            )
        self._salt = 0

    async def switch(self, way: str) -> None:
        """Let steps be planned this way from now on. Waits until nothing runs."""
        await asyncio.wrap_future(self.core.idle())
        lanes = self.core.parts[0]._lanes

        def turn() -> None:
            lanes.splitter, lanes.side_tokens = self.ways[way], 0

        await asyncio.wrap_future(self.core.call(turn))

    async def prepare(self) -> None:
        """Let idle moments capture what lanes run at each share: decode rows in the main lane, prompts in the other."""

        def want() -> None:
            wanted: tuple[tuple[Kind, tuple[int, ...]], ...] = (("greedy", self.shares), ("pieces", (0, *self.shares)))
            for lane, (kind, shares) in zip(self.core._runner._lanes, wanted, strict=True):
                for share in shares:
                    lane.turn_to(share)
                    if lane._graphs is not None:
                        policy = lane._graphs.policy
                        policy._missed.update(Shape(kind, size) for size in policy._buckets[kind, 1])
                lane.turn_to(0)

        await asyncio.wrap_future(self.core.call(want))
        await asyncio.wrap_future(self.core.idle())

    async def settled(self, limit_s: float) -> float:
        """Wait until no more graphs are captured, so many seconds at most; return how long that took."""
        began = time.perf_counter()
        await asyncio.sleep(min(0.2, limit_s))  # for the engine to look
        while self.core._runner.statistics().incomplete and time.perf_counter() - began < limit_s:  # noqa: ASYNC110
            await asyncio.sleep(0.2)
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

    async def traced_choices(self, path: Path) -> None:
        """Record the policy under the offline load: a trace, and beside it a JSON line for each choice."""
        await self.switch("auto")
        policy: Any = self.ways["auto"]
        choose, lines = policy.choose, list[str]()

        def noted(outlook: Outlook) -> Choice:
            choice: Choice = choose(outlook)
            lines.append(json.dumps({"at": time.perf_counter(), **asdict(outlook), **asdict(choice)}) + "\n")
            return choice

        policy.choose = noted
        try:
            async with self.engine.trace(path):
                await self.offline()
        finally:
            del policy.choose
        path.with_suffix(".choices.jsonl").write_text("".join(lines))

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
            with bar((1 + asked.rounds) * len(bench.ways) * len(asked.load), shape, "run", asked=None) as progress:
                await warm_up(bench, asked, shape, progress)
                for load in asked.load:
                    await turns(bench, asked, shape, load, progress)
            if (choices := of_shape(asked.trace_choices, shape, asked)) is not None:
                await bench.traced_choices(choices)
            if asked.explain:
                await bench.switch("auto")
                print(engine.explain())
            if asked.trace or asked.picture:
                trace, drawn = (of_shape(path, shape, asked) for path in (asked.trace, asked.picture))
                await bench.traced(shape, trace or Path(folder) / "trace.json", drawn)


def of_shape(path: Path | None, shape: str, asked: argparse.Namespace) -> Path | None:
    """Return where a shape's file goes: as asked, with its name if there are several."""
    return path.with_stem(f"{path.stem}-{shape}") if path is not None and len(asked.shape) > 1 else path


def ways_of(bench: Bench, asked: argparse.Namespace, load: str) -> list[str]:
    """Return the ways that run under a load."""
    wanted = [*asked.lanes, *(["target"] if load == "poisson" else [])]
    return [way for way in bench.ways if way in wanted or (way.startswith("sm:") and "shares" in wanted)]


async def warm_up(bench: Bench, asked: argparse.Namespace, shape: str, progress: Any) -> None:
    """Run a part of each load each way, and wait for the graphs that were missing."""
    await bench.prepare()
    await bench.settled(3 * asked.settle)
    if asked.calibrate and "auto" in asked.lanes:
        await bench.switch("auto")
        began, failed = time.perf_counter(), {}
        try:
            await bench.engine.calibrate(progress=False)
        except ConfigError as failure:  # the policy knows what could be measured
            failed = {"failed": str(failure)}
        for policy in bench.ways.values():
            if isinstance(policy, SplitPolicy):  # all of them share what was measured
                policy.end()
        line = {"bench": "two_lanes", "shape": shape, "figure": "calibration"}
        print(json.dumps({**line, "seconds": round(time.perf_counter() - began, 2), **failed}), flush=True)
    for load in asked.load:
        for way in ways_of(bench, asked, load):
            learns = asked.learn if way in ("auto", "target") else 0
            for share in [asked.warm, *[1.0] * learns]:
                with suppress(Exception):  # told when it is measured
                    await run_way(bench, asked, load, way, share)
            await bench.settled(asked.settle)
            progress.update()


async def run_way(bench: Bench, asked: argparse.Namespace, load: str, way: str, share: float) -> dict[str, Any]:
    """Run a load, or a share of it, one way; return the figures. Raises what fails, TimeoutError past the limit."""
    async with asyncio.timeout(asked.limit):
        await bench.switch(way)
        policy, before = bench.ways[way], bench.engine.statistics()
        trials = policy.trials if isinstance(policy, SplitPolicy) else 0
        figures = await (bench.offline(share) if load == "offline" else bench.poisson(bench.case.seconds * share))
        after = bench.engine.statistics()
    steps = {name: getattr(after, name) - getattr(before, name) for name in ("steps", "side_steps")}
    chosen = Counter(after.lane_choices) - Counter(before.lane_choices)
    more = {"bubble_s": round(after.bubble_s - before.bubble_s, 4), "choices": dict(chosen)}
    more |= {"trials": policy.trials - trials} if isinstance(policy, SplitPolicy) else {}
    captured = after.graphs.get("captures", 0) - before.graphs.get("captures", 0)
    return {**figures, **steps, **more, "captures": captured}


async def turns(bench: Bench, asked: argparse.Namespace, shape: str, load: str, progress: Any) -> None:
    """Measure a load all ways in turns; print a line each as soon as it is known, and one that compares."""
    found: dict[str, list[dict[str, Any]]] = {}
    device = bench.engine.config.device
    about = {"bench": "two_lanes", "load": load, "shape": shape}
    about_run = {
        "rounds": asked.rounds, "max_rows": bench.engine.config.max_rows,
        "token_budget": bench.engine.config.token_budget, "dtype": bench.engine.config.dtype,
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu",
        "torch": torch.__version__,
    }  # fmt: skip
    ways = ways_of(bench, asked, load)
    for number in range(asked.rounds):
        for way in [*ways[number % len(ways) :], *ways[: number % len(ways)]]:  # nobody is always the last
            target = {"target_itl_ms": asked.target_itl_ms} if way == "target" else {}
            try:
                found.setdefault(way, []).append(await run_way(bench, asked, load, way, 1.0))
            except Exception as failure:
                error = f"{type(failure).__name__}: {failure}"[:500]
                print(json.dumps({**about, "lanes": way, **target, "error": error, **about_run}), flush=True)
            if number == asked.rounds - 1 and found.get(way):
                print(
                    json.dumps({**about, "lanes": way, **target, **middle(load, found[way]), **about_run}), flush=True
                )
            progress.update()
    found = {way: each for way, each in found.items() if each}
    print(json.dumps({**about, "figure": "compared", **compared(load, found), **about_run}), flush=True)


def middle(load: str, each: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the median round, and how far the others were from it."""
    inside = sorted(each, key=lambda one: float(one["total_tokens_per_s"]))
    rates = [one["total_tokens_per_s"] for one in inside]
    line = {**inside[len(inside) // 2], "spread": [rates[0], rates[-1]]}
    line["each"] = [(one["total_tokens_per_s"], one["choices"]) for one in each]
    if load == "poisson":
        line["itl_p99_ms_each"] = [one["itl_ms"].get("p99") for one in each]
    return line


def compared(load: str, found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Return what the ways are to each other, by medians."""
    rate = {way: statistics.median(one["total_tokens_per_s"] for one in each) for way, each in found.items()}
    line: dict[str, Any] = {}
    fixed = {way: value for way, value in rate.items() if way not in ("auto", "target")}
    if "auto" in rate and fixed:
        best = max(fixed, key=lambda way: fixed[way])
        line |= {"best_fixed": best, "auto_over_best_fixed": round(rate["auto"] / fixed[best], 4)}
    alone = [rate[way] for way in ("serial", "mixed") if way in rate]
    if alone:
        others = {way: round(value / max(alone), 4) for way, value in rate.items() if way not in ("serial", "mixed")}
        line["over_best_of_serial_and_mixed"] = others
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
    arguments.add_argument("--limit", type=float, default=60.0, metavar="S", help="for one way under one load")
    arguments.add_argument("--warm", type=float, default=0.3, help="share of a load that each way runs before")
    arguments.add_argument("--calibrate", action=argparse.BooleanOptionalAction, default=True)
    arguments.add_argument("--learn", type=int, default=0, metavar="N", help="loads that the policy runs before")
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
    arguments.add_argument("--trace-choices", type=Path, help="a .json of the policy offline; beside it its choices")
    arguments.add_argument("--explain", action="store_true", help="print what runs as what at the end")
    asked = arguments.parse_args()
    for shape in asked.shape:
        asyncio.run(measure(asked, shape))


if __name__ == "__main__":
    main()
