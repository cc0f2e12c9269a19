"""How much of the engine's own speed do clients of `overlap serve` get, and how calm does the server stay?

    python bench/serve.py --model MODEL --streams 256 --fronts 2

First the engine runs the same requests in this process, with no server (`offline`). Then processes of clients stream
them from `overlap serve`. One JSON line a figure; the last has the ratio. Tokens are counted as the server's `usage`
has them. TTFT is from sending a request to its first event, ITL the time between the events of a stream over the tokens
that the later one brings (one event may bring several). Clients share this machine's cores with the server, so on a
small machine the ratio is a lower bound. `health` is one GET /health after another, while the load is on. With
`--leave` every second client leaves in the middle of its answer. `--soak-minutes M` repeats the load for so long, with
a line each round; the last line says how each process' memory went. `cpu_s` is what each process computed for during
a round: on a machine where they share cores, it says who took them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import psutil

from overlap import AsyncEngine, SamplingParams


@dataclass
class Seen:
    """What some clients saw."""

    tokens: int = 0
    answers: int = 0
    left: int = 0
    lost: int = 0
    errors: list[str] = field(default_factory=list)
    ttft_s: list[float] = field(default_factory=list)
    itl_s: list[float] = field(default_factory=list)

    def add(self, other: Seen) -> None:
        """Take in what others saw."""
        self.tokens += other.tokens
        self.answers += other.answers
        self.left += other.left
        self.lost += other.lost
        self.errors = (self.errors + other.errors)[:5]
        self.ttft_s += other.ttft_s
        self.itl_s += other.itl_s


def percentile(values: Sequence[float], share: float) -> float | None:
    """Return the value that `share` of all are below, in milliseconds."""
    return round(sorted(values)[min(int(len(values) * share), len(values) - 1)] * 1e3, 2) if values else None


def prompt_of(number: int, length: int) -> list[int]:
    """Return the token ids of a prompt; no two of a run share a page."""
    return [3 + (number * 7919 + at * 31) % 250 for at in range(length)]


async def stream(http: aiohttp.ClientSession, url: str, body: dict[str, Any], leave_after: int, seen: Seen) -> None:
    """Read one answer, or the first `leave_after` tokens of it (0: all)."""
    began = last = time.perf_counter()
    tokens = 0
    try:
        async with http.post(url, json=body) as response:
            response.raise_for_status()
            async for line in response.content:
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    raise RuntimeError(event["error"]["message"])  # noqa: TRY301  # as what a socket raises
                now, total = time.perf_counter(), (event.get("usage") or {}).get("completion_tokens", tokens)
                if total > tokens:
                    if tokens:
                        seen.itl_s += [(now - last) / (total - tokens)] * (total - tokens)
                    else:
                        seen.ttft_s.append(now - began)
                    tokens, last = total, now
                if leave_after and tokens >= leave_after:
                    seen.left += 1
                    return
    except (aiohttp.ClientError, OSError, RuntimeError) as error:
        seen.lost += 1
        seen.errors.append(repr(error)[:200])
    else:
        seen.answers += 1
        seen.lost += tokens != body["max_tokens"]
    finally:
        seen.tokens += tokens


def clients(address: str, asked: argparse.Namespace, first: int, count: int) -> Seen:
    """Run `count` clients in this process."""

    async def run() -> Seen:
        seen = Seen()
        timeout = aiohttp.ClientTimeout(total=None)
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as http:

            async def one(number: int) -> None:
                body = {
                    "prompt": prompt_of(number, asked.prompt), "max_tokens": asked.tokens, "temperature": 0,
                    "ignore_eos": True, "stream": True,
                    "stream_options": {"include_usage": True, "continuous_usage_stats": True},
                }  # fmt: skip
                leave_after = max(1, asked.tokens // 2) if asked.leave and number % 2 else 0
                await stream(http, f"{address}/v1/completions", body, leave_after, seen)

            await asyncio.gather(*(one(number) for number in range(first, first + count)))
        return seen

    return asyncio.run(run())


async def offline(asked: argparse.Namespace) -> float:
    """Return the engine's own tokens a second for the same requests."""
    params = SamplingParams(temperature=0, max_tokens=asked.tokens, ignore_eos=True)
    async with AsyncEngine(asked.model, **options_of(asked), progress=False) as engine:
        rates = []
        for first in (0, asked.streams):  # the first also warms up
            prompts = [prompt_of(first + number, asked.prompt) for number in range(asked.streams)]
            began, tokens = time.perf_counter(), 0
            async for output in engine.generate_batch(prompts, params, progress=False):
                tokens += output.usage.completion_tokens
            rates.append(tokens / (time.perf_counter() - began))
    return rates[-1]


def options_of(asked: argparse.Namespace) -> dict[str, Any]:
    """Return the options that the engine and the server get alike."""
    names = ("device", "dtype", "max_rows", "load_format", "kv_cache", "context")
    return {name: value for name in names if (value := getattr(asked, name)) is not None}


def start(asked: argparse.Namespace) -> tuple[subprocess.Popen[str], str]:
    """Start the server and return it with its address."""
    options = [
        part for name, value in options_of(asked).items() for part in ("--" + name.replace("_", "-"), str(value))
    ]
    command = [sys.executable, "-m", "overlap", "serve", asked.model, "--port", "0", "--fronts", str(asked.fronts)]
    program = subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True)
    assert program.stderr is not None
    for line in program.stderr:
        if found := re.search(r"(http://\S+)/v1", line):
            return program, found[1]
    raise SystemExit(f"the server did not start: exit code {program.wait()}")


async def watch_health(address: str, done: asyncio.Event) -> list[float]:
    """Ask for /health, again and again; return how long each took, in seconds."""
    took = []
    async with aiohttp.ClientSession() as http:
        while not done.is_set():
            began = time.perf_counter()
            async with http.get(f"{address}/health") as response:
                await response.read()
            took.append(time.perf_counter() - began)
            await asyncio.sleep(0.02)
    return took


async def load(address: str, asked: argparse.Namespace, first: int) -> tuple[Seen, float, list[float]]:
    """Run the load once; return what clients saw, the seconds it took, and the seconds of each /health."""
    each = -(-asked.streams // asked.clients)
    done = asyncio.Event()
    watching = asyncio.create_task(watch_health(address, done))
    total = Seen()
    loop = asyncio.get_running_loop()
    began = time.perf_counter()
    with ProcessPoolExecutor(asked.clients, mp_context=multiprocessing.get_context("spawn")) as pool:
        await asyncio.gather(*(loop.run_in_executor(pool, os.getpid) for _ in range(asked.clients)))  # they exist
        began = time.perf_counter()
        parts = [
            loop.run_in_executor(pool, clients, address, asked, first + at, min(each, asked.streams - at))
            for at in range(0, asked.streams, each)
        ]
        for seen in await asyncio.gather(*parts):
            total.add(seen)
    seconds = time.perf_counter() - began
    done.set()
    return total, seconds, await watching


def family(program: subprocess.Popen[str]) -> dict[str, psutil.Process]:
    """Return the processes of the server, by what they are."""
    first = psutil.Process(program.pid)
    each = (first, *sorted(first.children(), key=lambda child: child.pid))
    return {f"{one.cmdline()[2].rpartition('.')[2]}:{one.pid}": one for one in each}


def memory(program: subprocess.Popen[str]) -> dict[str, float]:
    """Return the MiB that each process of the server holds."""
    return {name: round(one.memory_info().rss / 2**20, 1) for name, one in family(program).items()}


def computed(program: subprocess.Popen[str]) -> dict[str, float]:
    """Return the seconds that each process of the server has computed for."""
    return {name: sum(one.cpu_times()[:2]) for name, one in family(program).items()}


async def serve(asked: argparse.Namespace, offline_rate: float) -> None:
    """Load a server and print what came of it."""
    program, address = start(asked)
    try:
        first, lost, held = 10 * asked.streams, 0, []
        await load(address, argparse.Namespace(**{**vars(asked), "leave": False}), first)  # warms up
        began = time.monotonic()
        while True:
            first += asked.streams
            before = computed(program)
            seen, seconds, health = await load(address, asked, first)
            rate = seen.tokens / seconds
            after = computed(program)
            await asyncio.sleep(0.5)
            async with aiohttp.ClientSession() as http, http.get(f"{address}/live") as response:
                live = await response.json()
            print(json.dumps({
                "bench": "serve", "streams": asked.streams, "fronts": asked.fronts, "tokens_per_s": round(rate, 1),
                "ratio_to_offline": round(rate / offline_rate, 3), "answers": seen.answers, "left": seen.left,
                "lost": seen.lost, "errors": seen.errors, "ttft_p50_ms": percentile(seen.ttft_s, 0.5),
                "ttft_p99_ms": percentile(seen.ttft_s, 0.99), "itl_p50_ms": percentile(seen.itl_s, 0.5),
                "itl_p99_ms": percentile(seen.itl_s, 0.99), "health_p99_ms": percentile(health, 0.99),
                "running_at_end": live["running"], "kv_usage_at_end": live["kv_usage"], "memory_mib": memory(program),
                "cpu_s": {name: round(value - before[name], 2) for name, value in after.items()},
            }), flush=True)  # fmt: skip
            lost += seen.lost
            held.append(memory(program))
            if time.monotonic() > began + 60 * asked.soak_minutes:
                break
        tail = held[len(held) // 4 :]
        print(json.dumps({
            "bench": "serve soak", "minutes": round((time.monotonic() - began) / 60, 1), "rounds": len(held),
            "lost": lost, "memory_mib_first": held[0], "memory_mib_after_a_quarter": tail[0],
            "memory_mib_last": held[-1],
        }), flush=True)  # fmt: skip
    finally:
        program.terminate()
        program.wait()


def main() -> None:
    """Measure the engine alone, then the server."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--streams", type=int, default=256, help="answers at once")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of an answer")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--fronts", type=int, default=2)
    parser.add_argument("--clients", type=int, default=2, help="processes of clients")
    parser.add_argument("--leave", action="store_true", help="every second client leaves in the middle")
    parser.add_argument("--soak-minutes", type=float, default=0.0, metavar="M", help="repeat for so long")
    for name in ("device", "dtype", "load-format", "kv-cache"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--max-rows", type=int)
    parser.add_argument("--context", type=int)
    asked = parser.parse_args()
    rate = asyncio.run(offline(asked))
    print(json.dumps({"bench": "offline", "streams": asked.streams, "tokens_per_s": round(rate, 1)}), flush=True)
    asyncio.run(serve(asked, rate))


if __name__ == "__main__":
    main()
