"""What does a streamed token cost those who read it: in the program, and in a front of `overlap serve`?

    python bench/readers.py            (half a minute; no device and no model; a JSON line for each figure)

The engine is played by a script that brings each answer one token a step, so it costs nothing. `program`: so many
readers iterate over `AsyncEngine.generate` on one event loop; microseconds of that thread's CPU time a token.
`program, whole`: the same for `generate_batch`, whose answers are read at their ends. The others: a real front process
with an engine of script behind its Unix socket, and clients that read so many streams over sockets; microseconds of the
front's CPU time a token, the kernel's part of it apart. The next step comes when everybody has read the one before, so
no two tokens share an Output: the most a token can cost. ("not streamed": a step every 2 ms, and the answers' ends are
in the figure.)

What it means: at 1.9 ms a step, 256 readers in a program have 7.4 µs a token before their thread alone takes all of
Python's lock, which the engine's thread needs as well. A front has its step's time over its streams.

Reasons to doubt it: nobody else wants the lock or the cores; the readers do nothing with what they read; clients are on
the same machine, and the loopback's work counts as the front's. Look at the spread.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import secrets
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import psutil
import tokenizers

from overlap import AsyncEngine, SamplingParams
from overlap.cache.pages import Ints
from overlap.config import EngineConfig
from overlap.core import Core, Opened
from overlap.models.config import ModelConfig
from overlap.schedule.request import Request
from overlap.schedule.settled import End, Settled
from overlap.serve.child import FrontOrder
from overlap.serve.link import Step, Submit, TokenizerFrom, Welcome, frame, from_front, read_frame
from overlap.serve.remote import opened_of

VOCABULARY: Final = 4096
CONTEXT: Final = 8192
PROMPT: Final = (3, 4, 5, 6)
BODIES: Final[dict[str, dict[str, Any]]] = {
    "completions": {"prompt": PROMPT},
    "completions, usage in each": {
        "prompt": PROMPT, "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    },
    "completions, not streamed": {"prompt": PROMPT},
    "chat/completions": {"messages": [{"role": "user", "content": "Hello"}]},
}  # fmt: skip


def write_tokenizer(path: Path) -> None:
    """Train a byte-level BPE on this repository's pages."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    pages = sorted((Path(__file__).parents[1] / "docs").glob("*.md"))
    tokenizer.train_from_iterator([page.read_text() for page in pages], trainer)
    tokenizer.save(str(path))


def text_tokens(path: Path) -> list[int]:
    """Return the tokens of a text, which every answer repeats from a place of its own on."""
    page = Path(__file__).parents[1] / "docs" / "architecture.md"
    ids: list[int] = tokenizers.Tokenizer.from_file(str(path)).encode(page.read_text()).ids
    return ids


def welcome(tokenizer: Path) -> Welcome:
    """Return what a script says that it is."""
    resolved = {
        "model": "script", "device": "cpu", "dtype": "float32", "kv_budget": {},
        "max_rows": 1024, "token_budget": 1024, "prefill_chunk": 1024, "context": CONTEXT, "graphs": False,
        "lanes": "mixed", "target_itl_s": None, "overlap": True, "prefix_cache": True, "max_waiting": 4096,
        "step_limit": 60.0, "progress": False, "reasons": (),
    }  # fmt: skip
    model = ModelConfig(
        architecture="LlamaForCausalLM", vocab_size=VOCABULARY, hidden_size=64, num_layers=1, num_heads=1,
        num_kv_heads=1, head_dim=64, intermediate_size=64, rms_norm_eps=1e-5, rope_theta=1e4, rope_scaling=None,
        context=CONTEXT, tied_embeddings=True, attention_bias=False, mlp_bias=False, eos_token_ids=(0,),
        bos_token_id=None, dtype="float32",
    )  # fmt: skip
    return Welcome(
        resolved=resolved,
        model=model,
        tokenizer=TokenizerFrom(kind="json", path=str(tokenizer), fields={}),
        template="{% for message in messages %}{{ message['content'] }}{% endfor %}",
        notes=(),
        context=CONTEXT,
    )


def column(text: Sequence[int], keys: Sequence[int], step: int) -> Ints:
    """Return the tokens of a step: each answer is somewhere else in the text."""
    return np.array([text[(97 * key + step) % len(text)] for key in keys], dtype=np.int32)


# ── in the program ───────────────────────────────────────────────────────────────────────────────────────────────────


class Script(Core):
    """A Core that runs nothing. What it is asked for is in `requests`."""

    def __init__(self, asked: EngineConfig, opened: Opened) -> None:
        super().__init__(asked)
        self._opened.set_result(opened)
        self.requests: list[Request] = []

    def start(self) -> Future[Opened]:
        """Return what was opened."""
        return self._opened

    def submit(self, request: Request) -> None:
        """Note a request."""
        self.requests.append(request)

    def end(self, key: int) -> None:
        """Do nothing."""

    def close(self) -> Future[None]:
        """Do nothing."""
        if not self._stopped.done():
            self._stopped.set_result(None)
        return self._stopped


class ScriptEngine(AsyncEngine):
    """An engine of script."""

    def __init__(self, opened: Opened) -> None:
        super().__init__("script")
        self._core = self.script = Script(EngineConfig.from_options("script", {}), opened)


async def program(tokenizer: Path, readers: int, tokens: int, *, whole: bool = False) -> float:
    """Return the microseconds that a token costs its reader's thread. `whole` reads whole answers, as a batch."""
    text = text_tokens(tokenizer)
    made = ScriptEngine(opened_of(welcome(tokenizer)))
    async with made as engine:
        script, outputs = made.script, 0
        params = SamplingParams(max_tokens=tokens + 1, ignore_eos=True)

        async def read() -> None:
            nonlocal outputs
            async for _ in engine.generate(list(PROMPT), params):
                outputs += 1

        async def read_whole() -> None:
            async for _ in engine.generate_batch([list(PROMPT)] * readers, params, progress=False):
                pass

        tasks = [asyncio.create_task(read_whole() if whole else read()) for _ in range(1 if whole else readers)]
        while len(script.requests) < readers:  # noqa: ASYNC110  # nobody sets an event
            await asyncio.sleep(0)
        (front,) = engine._fronts.values()
        keys = [request.key for request in script.requests]
        key_column, fronts = np.array(keys, np.int64), np.zeros(readers, np.int32)
        steps = [Settled(key_column, fronts, column(text, keys, step), ()) for step in range(tokens)]
        ends = tuple(End(key, 0, "length", None) for key in keys)

        async def bring(settled: Settled, until: int) -> None:
            front.post_settled(settled)
            await asyncio.sleep(0)
            while outputs < until and not whole:  # noqa: ASYNC110  # an event would cost the readers something
                await asyncio.sleep(0)

        await bring(steps[0], readers)
        began = time.thread_time()
        for number, settled in enumerate(steps[1:], 2):
            await bring(settled, readers * number)
        spent = time.thread_time() - began
        front.post_settled(Settled(key_column, fronts, column(text, keys, tokens), ends))
        await asyncio.gather(*tasks)
        if whole:  # its text is made at the end
            spent = time.thread_time() - began
        return 1e6 * spent / (readers * (tokens - 1))


# ── in a front ───────────────────────────────────────────────────────────────────────────────────────────────────────


class Client(asyncio.Protocol):
    """Reads one answer and counts its events."""

    def __init__(self, request: bytes, counted: Callable[[int], None]) -> None:
        self._request = request
        self._counted = counted
        self.ended = asyncio.get_running_loop().create_future()
        self.first = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Ask."""
        assert isinstance(transport, asyncio.Transport)
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        """Count."""
        self.first = self.first or data
        self._counted(data.count(b"data: {"))

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002  # the count says what is missing
        """Tell."""
        self.ended.set_result(None)


class Hub:
    """Plays the engine's process to one front."""

    def __init__(self, said: Welcome) -> None:
        self._welcome = said
        self._writer: asyncio.StreamWriter | None = None
        self.keys: list[int] = []

    async def attend(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Hear what the front asks for."""
        self._writer = writer
        writer.write(frame(self._welcome))
        while (data := await read_frame(reader, 1 << 24)) is not None:
            message = from_front(data)
            if isinstance(message, Submit):
                self.keys.append(message.key)

    def send(self, step: Step) -> None:
        """Bring tokens."""
        assert self._writer is not None, "the front has connected"
        self._writer.write(frame(step))


def request_of(path: str, body: Mapping[str, Any], tokens: int, *, stream: bool) -> bytes:
    """Return a request in bytes."""
    whole = {**body, "max_tokens": tokens + 1, "stream": stream, "ignore_eos": True, "temperature": 0}
    data = msgspec.json.encode(whole)
    head = f"POST /v1/{path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(data)}\r\n\r\n"
    return head.encode() + data


async def front(tokenizer: Path, kind: str, streams: int, tokens: int) -> dict[str, float]:
    """Return the microseconds that a token costs a front, all of it and the kernel's part."""
    text = text_tokens(tokenizer)
    hub, listening = Hub(welcome(tokenizer)), socket.create_server(("127.0.0.1", 0), backlog=streams)
    path = tokenizer.with_name(f"engine-{secrets.token_hex(4)}")
    server = await asyncio.start_unix_server(hub.attend, str(path))
    order = FrontOrder(model="script", path=str(path), socket=listening.fileno(), app={}, drain_seconds=1.0)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "overlap.serve.front_process", stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        pass_fds=(listening.fileno(),),
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(msgspec.json.encode(order) + b"\n")
    assert b"true" in await process.stdout.readline()
    seen, news = 0, asyncio.Event()

    def counted(events: int) -> None:
        nonlocal seen
        seen += events
        news.set()

    async def wait_seen(events: int) -> None:
        while seen < events:
            news.clear()
            await news.wait()

    async def end() -> None:
        last = column(text, hub.keys, tokens).tobytes()
        hub.send(Step(keys, last, tuple((key, "length", None) for key in hub.keys), {}, None))
        await asyncio.gather(*(client.ended for client in clients))

    loop = asyncio.get_running_loop()
    streamed = not kind.endswith("not streamed")
    request = request_of(kind.partition(",")[0], BODIES[kind], tokens, stream=streamed)
    clients = [
        (await loop.create_connection(lambda: Client(request, counted), *listening.getsockname()))[1]
        for _ in range(streams)
    ]
    while len(hub.keys) < streams:  # noqa: ASYNC110  # nobody sets an event
        await asyncio.sleep(0.01)
    keys = np.array(hub.keys, np.int64).tobytes()
    steps = [Step(keys, column(text, hub.keys, step).tobytes(), (), {}, None) for step in range(tokens)]
    each = 2 if kind.startswith("chat") else 1  # of the first token: a chat opens with an event of its own
    hub.send(steps[0])
    if streamed:
        await wait_seen(each * streams)
    measured = psutil.Process(process.pid)
    began, before = time.perf_counter(), measured.cpu_times()
    for number, step in enumerate(steps[1:], each):
        hub.send(step)
        if streamed:
            await wait_seen(streams * (number + 1))
        else:  # nothing says that they were read: a step's time, then
            await asyncio.sleep(0.002)
    if not streamed:
        await end()
    after, seconds = measured.cpu_times(), time.perf_counter() - began
    if streamed:
        await end()
    process.stdin.close()
    await process.wait()
    server.close()
    listening.close()
    a_token = 1e6 / (streams * (tokens - 1))
    user, system = (after.user - before.user) * a_token, (after.system - before.system) * a_token
    return {"us": user + system, "kernel_us": system, "wall_us": seconds * a_token}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--readers", type=int, default=256, help="in the program")
    parser.add_argument("--streams", type=int, default=43, help="of one front")
    parser.add_argument("--tokens", type=int, default=400, help="of each answer")
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    about = {
        "cpu": platform.processor() or platform.machine(), "python": platform.python_version(),
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
        ).stdout.strip(),
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = Path(folder) / "tokenizer.json"
        write_tokenizer(tokenizer)
        rounds: dict[str, list[dict[str, float]]] = {}
        for _ in range(asked.rounds):  # in turns, so that a noisy moment is no one's alone
            us = asyncio.run(program(tokenizer, asked.readers, asked.tokens))
            rounds.setdefault("program", []).append({"us": us})
            us = asyncio.run(program(tokenizer, asked.readers, asked.tokens, whole=True))
            rounds.setdefault("program, whole", []).append({"us": us})
            for kind in BODIES:
                figures = asyncio.run(front(tokenizer, kind, asked.streams, asked.tokens))
                rounds.setdefault(kind, []).append(figures)
    for name, each in rounds.items():
        medians = {unit: round(statistics.median(one[unit] for one in each), 2) for unit in each[0]}
        spread = [round(min(one["us"] for one in each), 2), round(max(one["us"] for one in each), 2)]
        where = {"readers": asked.readers} if name.startswith("program") else {"streams": asked.streams}
        print(json.dumps({"bench": "readers", "what": name, **where, **medians, "spread": spread, **about}))


if __name__ == "__main__":
    main()
