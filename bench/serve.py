"""How much of the engine's own speed do clients of `overlap serve` get, and how calm does the server stay?

    python bench/serve.py --model MODEL --streams 256 --fronts 2

First the engine runs the same requests in this process, with no server (`offline`; `--offline-tokens-per-s X` takes X
for it). Then processes of clients stream them from `overlap serve`, once to warm up. One JSON line a figure; the last
has the ratio. Tokens are counted as the server's `usage` has them. TTFT is from asking for the connection to the first
token, ITL the time between two reads that brought tokens over the tokens of the later one. Clients share this machine's
cores with the server, so on a small machine the ratio is a lower bound; `clients_busy` is the share of a round that the
busiest of their processes computed: near 1, they are what was measured. `health` is one GET /health after another,
while the load is on. With `--leave` every second client leaves in the middle of its answer. `--soak-minutes M` repeats
the load for so long, with a line each round; the last line says how each process' memory went. `cpu_s` is what each
process computed for during a round: on a machine where they share cores, it says who took them.

What it is at is told on stderr, with the seconds since the start and those that each phase took. After `--limit`
seconds it says what it was at, prints what clients have seen so far, and ends with the exit code 1.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import sys
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import psutil

sys.path.insert(0, str(Path(__file__).parent))
from serve_clients import MOST_LINE, Load, Seen, percentile, prompt_of  # type: ignore[import-not-found]

HARD_SECONDS = 20.0
"""How long behind its limit the bench may take to say what it has seen; then it ends without."""


class Phases:
    """Says on stderr what goes on, and how long it has taken."""

    def __init__(self) -> None:
        self._began = self._since = time.perf_counter()
        self.at = "starting"

    def begin(self, what: str) -> None:
        """Something else goes on from now on."""
        self.at, self._since = what, time.perf_counter()

    def end(self, more: str = "") -> None:
        """Say that it is done."""
        now = time.perf_counter()
        self.say(f"{self.at}: {now - self._since:.1f} s{more}")

    def say(self, text: str) -> None:
        """Print a line."""
        print(f"[{time.perf_counter() - self._began:6.1f} s] {text}", file=sys.stderr, flush=True)

    def over(self) -> None:
        """Say what went on when the time was over."""
        self.say(f"the limit is over; it was at: {self.at}, for {time.perf_counter() - self._since:.1f} s")


class Server:
    """`overlap serve` as a process."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._said: deque[str] = deque(maxlen=20)
        self._reading: asyncio.Task[None] | None = None
        self.address = ""

    async def wait_up(self) -> None:
        """Return once it has an address. What it says later is read on: a full pipe would stop it."""
        up = asyncio.Event()

        async def read() -> None:
            assert self._process.stderr is not None
            while line := (await self._process.stderr.readline()).decode(errors="replace"):
                self._said.append(line.rstrip())
                if not self.address and (found := re.search(r"(http://\S+)/v1", line)):
                    self.address = found[1]
                    up.set()
            up.set()

        self._reading = asyncio.create_task(read())
        await up.wait()
        if not self.address:
            raise SystemExit("the server did not start:\n" + "\n".join(self._said))

    def said(self) -> list[str]:
        """Return the last lines of its stderr."""
        return list(self._said)

    def family(self) -> dict[str, psutil.Process]:
        """Return its processes, by what they are."""
        first = psutil.Process(self._process.pid)
        each = (first, *sorted(first.children(), key=lambda child: child.pid))
        return {f"{one.cmdline()[2].rpartition('.')[2]}:{one.pid}": one for one in each}

    def memory(self) -> dict[str, float]:
        """Return the MiB that each of its processes holds."""
        return {name: round(one.memory_info().rss / 2**20, 1) for name, one in self.family().items()}

    def computed(self) -> dict[str, float]:
        """Return the seconds that each of its processes has computed for."""
        return {name: sum(one.cpu_times()[:2]) for name, one in self.family().items()}

    def kill(self) -> None:
        """End it at once. Its children end with it."""
        with suppress(ProcessLookupError):
            self._process.kill()

    async def close(self) -> None:
        """End it."""
        with suppress(ProcessLookupError):
            self._process.terminate()
        try:
            await asyncio.wait_for(self._process.wait(), 10)
        except TimeoutError:
            self.kill()


class Clients:
    """The processes of clients."""

    def __init__(self, processes: Sequence[asyncio.subprocess.Process]) -> None:
        self._processes = processes
        self._answers: list[asyncio.Task[Seen | None]] = []

    async def wait_ready(self) -> None:
        """Return once all of them listen."""
        for process in self._processes:
            assert process.stdout is not None
            await process.stdout.readline()

    async def run(self, address: str, asked: argparse.Namespace, first: int, *, leave: bool) -> tuple[Seen, float]:
        """Run the load once; return what was seen and how long it took."""
        each, began = -(-asked.streams // len(self._processes)), time.perf_counter()
        where = urlsplit(address)
        assert where.hostname is not None
        assert where.port is not None
        for number, process in enumerate(self._processes):
            count = max(0, min(each, asked.streams - number * each))
            load = Load(
                where.hostname, where.port, first + number * each, count, asked.prompt, asked.tokens, leave
            )  # fmt: skip
            if count:
                self._tell(process, asdict(load))
                self._answers.append(asyncio.create_task(self._hear(process)))
        return await self._seen(), time.perf_counter() - began

    async def stop(self) -> Seen:
        """End the load that runs; return what was seen of it."""
        for process in self._processes:
            self._tell(process, {"stop": True})
        return await self._seen()

    async def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    async def _seen(self) -> Seen:
        total = Seen()
        await asyncio.wait(self._answers) if self._answers else None
        answers, self._answers = self._answers, []
        for answer in answers:
            if (seen := answer.result()) is None:
                raise SystemExit("a process of clients has ended")
            total.add(seen)
        return total

    @staticmethod
    def _tell(process: asyncio.subprocess.Process, what: dict[str, Any]) -> None:
        assert process.stdin is not None
        process.stdin.write(json.dumps(what).encode() + b"\n")

    @staticmethod
    async def _hear(process: asyncio.subprocess.Process) -> Seen | None:
        assert process.stdout is not None
        line = await process.stdout.readline()
        return Seen(**json.loads(line)) if line else None


async def offline(asked: argparse.Namespace, phases: Phases) -> float:
    """Return the engine's own tokens a second for the same requests."""
    phases.begin("offline: opening the engine")
    from overlap import AsyncEngine, SamplingParams  # brings torch, which nothing else here needs

    params = SamplingParams(temperature=0, max_tokens=asked.tokens, ignore_eos=True)
    async with AsyncEngine(asked.model, **options_of(asked), progress=False) as engine:
        phases.end()
        rate = 0.0
        for number, first in enumerate((0, asked.streams)):  # the first warms up
            phases.begin("offline: a round" if number else "offline: warming up")
            prompts = [prompt_of(first + number, asked.prompt) for number in range(asked.streams)]
            began, tokens = time.perf_counter(), 0
            async for output in engine.generate_batch(prompts, params, progress=False):
                tokens += output.usage.completion_tokens
            rate = tokens / (time.perf_counter() - began)
            phases.end(f", {rate:.0f} tokens/s")
        phases.begin("offline: closing the engine")
    phases.end()
    return rate


def options_of(asked: argparse.Namespace) -> dict[str, Any]:
    """Return the options that the engine and the server get alike."""
    names = ("device", "dtype", "max_rows", "load_format", "kv_cache", "context")
    return {name: value for name in names if (value := getattr(asked, name)) is not None}


async def start(asked: argparse.Namespace) -> Server:
    """Start the server's process."""
    options = [
        part for name, value in options_of(asked).items() for part in ("--" + name.replace("_", "-"), str(value))
    ]
    return Server(
        await asyncio.create_subprocess_exec(
            sys.executable, "-m", "overlap", "serve", asked.model, "--port", "0", "--fronts", str(asked.fronts),
            *options, stderr=asyncio.subprocess.PIPE, limit=MOST_LINE,
        )
    )  # fmt: skip


async def start_clients(asked: argparse.Namespace) -> Clients:
    """Start the processes of clients."""
    program = str(Path(__file__).with_name("serve_clients.py"))
    pipe = asyncio.subprocess.PIPE
    return Clients(
        [
            await asyncio.create_subprocess_exec(sys.executable, program, stdin=pipe, stdout=pipe, limit=MOST_LINE)
            for _ in range(asked.clients)
        ]
    )


@asynccontextmanager
async def watched_health(address: str) -> AsyncIterator[list[tuple[float, int]]]:
    """Ask for /health, again and again; the list has how long each took, in seconds."""
    took: list[tuple[float, int]] = []

    async def watch() -> None:
        async with aiohttp.ClientSession() as http:
            while True:
                began = time.perf_counter()
                async with http.get(f"{address}/health") as response:
                    await response.read()
                took.append((time.perf_counter() - began, 1))
                await asyncio.sleep(0.02)

    watching = asyncio.create_task(watch())
    try:
        yield took
    finally:
        watching.cancel()
        with suppress(asyncio.CancelledError, aiohttp.ClientError):
            await watching


def report(asked: argparse.Namespace, seen: Seen, seconds: float, offline_rate: float) -> dict[str, Any]:
    """Return what clients saw as a line of figures."""
    rate = seen.tokens / seconds
    return {
        "bench": "serve", "streams": asked.streams, "fronts": asked.fronts, "tokens_per_s": round(rate, 1),
        "ratio_to_offline": round(rate / offline_rate, 3), "seconds": round(seconds, 2), "answers": seen.answers,
        "left": seen.left, "lost": seen.lost, "errors": seen.errors,
        "tokens_per_event": round(seen.tokens / max(1, seen.events), 3),
        "ttft_p50_ms": percentile([(one, 1) for one in seen.ttft_s], 0.5),
        "ttft_p99_ms": percentile([(one, 1) for one in seen.ttft_s], 0.99),
        "itl_p50_ms": percentile(seen.itl, 0.5), "itl_p99_ms": percentile(seen.itl, 0.99), "clients_busy": seen.busy,
    }  # fmt: skip


async def serve(asked: argparse.Namespace, server: Server, clients: Clients, phases: Phases, rate: float) -> None:
    """Load a server and print what came of it."""
    held: list[dict[str, float]] = []
    first, lost = 10 * asked.streams, 0
    phases.begin("the load, to warm up")
    warm, seconds = await clients.run(server.address, asked, first, leave=False)
    phases.end(f", {warm.tokens / seconds:.0f} tokens/s, {warm.lost} lost")
    began = time.monotonic()
    while True:
        first += asked.streams
        phases.begin(f"round {len(held) + 1}")
        before = server.computed()
        async with watched_health(server.address) as health:
            seen, seconds = await clients.run(server.address, asked, first, leave=asked.leave)
        after = server.computed()
        phases.end(f", {seen.tokens / seconds:.0f} tokens/s, {seen.lost} lost")
        await asyncio.sleep(0.5)
        async with aiohttp.ClientSession() as http, http.get(f"{server.address}/live") as response:
            live = await response.json()
        held.append(server.memory())
        print(json.dumps({
            **report(asked, seen, seconds, rate), "health_p99_ms": percentile(health, 0.99),
            "running_at_end": live["running"], "kv_usage_at_end": live["kv_usage"], "memory_mib": held[-1],
            "cpu_s": {name: round(value - before[name], 2) for name, value in after.items()},
        }), flush=True)  # fmt: skip
        lost += seen.lost
        if time.monotonic() > began + 60 * asked.soak_minutes:
            break
    print(json.dumps({
        "bench": "serve soak", "minutes": round((time.monotonic() - began) / 60, 1), "rounds": len(held),
        "lost": lost, "memory_mib_first": held[0], "memory_mib_after_a_quarter": held[len(held) // 4],
        "memory_mib_last": held[-1],
    }), flush=True)  # fmt: skip


async def measure(asked: argparse.Namespace, phases: Phases) -> int:
    """Measure the engine alone, then the server; return the exit code."""
    server: Server | None = None
    clients: Clients | None = None
    began, rate = time.perf_counter(), asked.offline_tokens_per_s

    def give_up() -> None:  # on a thread of its own, for when the event loop is what hangs
        phases.say(f"it could not be ended in {HARD_SECONDS:.0f} s, and is ended now")
        if server is not None:
            server.kill()
        os._exit(1)

    hard = threading.Timer((asked.limit or 0.0) + HARD_SECONDS, give_up)
    hard.daemon = True
    if asked.limit is not None:
        hard.start()
    try:
        async with asyncio.timeout(asked.limit):
            if rate is None:
                rate = await offline(asked, phases)
                line = {"bench": "offline", "streams": asked.streams, "tokens_per_s": round(rate, 1)}
                print(json.dumps(line), flush=True)
            phases.begin("starting the server and its clients")
            server = await start(asked)
            clients = await start_clients(asked)
            await server.wait_up()
            await clients.wait_ready()
            phases.end()
            began = time.perf_counter()
            await serve(asked, server, clients, phases, rate)
    except TimeoutError:
        phases.over()
        if clients is not None and server is not None and rate is not None:
            seconds = time.perf_counter() - began
            with suppress(TimeoutError):
                seen = await asyncio.wait_for(clients.stop(), 5)
                line = report(asked, seen, seconds, rate) | {"open": seen.open, "limit_over_at": phases.at}
                print(json.dumps(line), flush=True)
            for said in server.said():
                phases.say(f"the server said: {said}")
        return 1
    finally:
        if clients is not None:
            await clients.close()
        if server is not None:
            await server.close()
        hard.cancel()
    return 0


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--streams", type=int, default=256, help="answers at once")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of an answer")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--fronts", type=int, default=2)
    parser.add_argument("--clients", type=int, default=2, help="processes of clients")
    parser.add_argument("--leave", action="store_true", help="every second client leaves in the middle")
    parser.add_argument("--soak-minutes", type=float, default=0.0, metavar="M", help="repeat for so long")
    parser.add_argument("--offline-tokens-per-s", type=float, metavar="X", help="the engine's own speed, if known")
    parser.add_argument("--limit", type=float, metavar="SECONDS", help="for all of it")
    for name in ("device", "dtype", "load-format", "kv-cache"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--max-rows", type=int)
    parser.add_argument("--context", type=int)
    asked = parser.parse_args()
    sys.exit(asyncio.run(measure(asked, Phases())))


if __name__ == "__main__":
    main()
