"""A process of clients for `bench/serve.py`. Imports only what reads sockets, so it starts at once.

Orders come on stdin and what was seen goes to stdout, in lines of JSON: a `Load`, or `{"stop": true}`, which ends the
load that runs. The end of stdin ends the process.

A client counts events and reads one number off what it gets at a time, without parsing the events: at 100,000 a
second JSON would make the clients what is measured.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, cast

EVENT = b"\r\ndata: {"  # behind the size of its chunk; JSON has no bare line end, so no text looks like this
ERROR = b'\r\ndata: {"error"'
END = b"\r\ndata: [DONE]\n\n"
COUNT = b'"completion_tokens":'
MOST_LINE = 1 << 28


@dataclass
class Load:
    """What the clients of one process are to do."""

    host: str
    port: int
    first: int
    """The number of the first prompt."""
    count: int
    prompt: int
    tokens: int
    leave: bool
    """Whether every second client leaves in the middle of its answer."""


@dataclass
class Seen:
    """What some clients saw."""

    tokens: int = 0
    events: int = 0
    answers: int = 0
    left: int = 0
    lost: int = 0
    open: int = 0
    """Answers that went on when the load was stopped."""
    errors: list[str] = field(default_factory=list)
    ttft_s: list[float] = field(default_factory=list)
    itl: list[tuple[float, int]] = field(default_factory=list)
    """(seconds, tokens): the time between two reads that brought tokens, over the tokens that the later one brought."""
    busy: float = 0.0
    """The share of the time that the busiest process of clients computed."""

    def add(self, other: Seen) -> None:
        """Take in what others saw."""
        for name in ("tokens", "events", "answers", "left", "lost", "open"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.errors = (self.errors + other.errors)[:5]
        self.ttft_s += other.ttft_s
        self.itl += other.itl
        self.busy = max(self.busy, other.busy)


def percentile(values: Iterable[tuple[float, int]], share: float) -> float | None:
    """Return the seconds that `share` of all are below, in milliseconds. Each counts as often as its second says."""
    rising = sorted(values)
    below = share * sum(times for _, times in rising)
    for seconds, times in rising:
        below -= times
        if below < 0:
            return round(seconds * 1e3, 2)
    return round(rising[-1][0] * 1e3, 2) if rising else None


def prompt_of(number: int, length: int) -> list[int]:
    """Return the token ids of a prompt; no two of a run share a page."""
    return [3 + (number * 7919 + at * 31) % 250 for at in range(length)]


def request_of(load: Load, number: int) -> bytes:
    """Return what a client sends."""
    body = {
        "prompt": prompt_of(number, load.prompt), "max_tokens": load.tokens, "temperature": 0, "ignore_eos": True,
        "stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }  # fmt: skip
    data = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {load.host}:{load.port}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(data)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + data


class Client(asyncio.Protocol):
    """Streams one answer."""

    def __init__(
        self, request: bytes, tokens: int, seen: Seen, ended: Callable[[Client], None], *, leave_after: int = 0
    ) -> None:
        """`ended` is called once, however the answer ended. After `leave_after` tokens it leaves (0: never)."""
        self._request = request
        self._asked = tokens
        self._seen = seen
        self._ended = ended
        self._leave_after = leave_after
        self._transport: asyncio.Transport | None = None
        self._began = self._last = 0.0
        self._tokens = 0
        self._head = True
        self._rest = b""
        self._over = False

    def begin(self) -> None:
        """Start the clock: it is asked for now."""
        self._began = time.perf_counter()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the request."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's own kind is none of asyncio's
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        """Take in what came, up to the end of its last event."""
        data = self._rest + data
        if self._head and not self._pass_head(data):
            return
        whole = data.rfind(b"\n\n") + 2
        if whole == 1:  # not one
            self._rest = data
            return
        self._rest = data[whole:]
        if not self._over:
            self._take(data[:whole])

    def _pass_head(self, data: bytes) -> bool:
        head, found, _ = data.partition(b"\r\n\r\n")
        if not found:
            self._rest = data
            return False
        if b" 200 " not in head[:16]:
            self._lose(data[:300].decode(errors="replace"))
            return False
        self._head = False
        return True

    def _take(self, data: bytes) -> None:
        seen, now = self._seen, time.perf_counter()
        seen.events += data.count(EVENT)
        if (at := data.rfind(COUNT)) >= 0:
            total = int(data[at + len(COUNT) : data.index(b",", at)])
            if (new := total - self._tokens) > 0:
                if self._tokens:
                    seen.itl.append(((now - self._last) / new, new))
                else:
                    seen.ttft_s.append(now - self._began)
                self._tokens, self._last = total, now
                seen.tokens += new
        if self._leave_after and self._tokens >= self._leave_after:
            seen.left += 1
            self._end()
        elif data.endswith(END):
            seen.answers += 1
            seen.lost += self._tokens != self._asked
            self._end()
        elif (at := data.find(ERROR)) >= 0:
            self._lose(data[at + 2 :][:300].decode(errors="replace"))

    def connection_lost(self, exc: Exception | None) -> None:
        """Count an answer that had not come to its end."""
        self._lose(repr(exc) if exc else f"The connection ended behind {self._tokens} tokens.")

    def refuse(self, error: OSError) -> None:
        """Count an answer that could not be asked for."""
        self._lose(repr(error))

    def stop(self) -> None:
        """Leave: the load is over before the answer is."""
        self._seen.open += not self._over
        self._end()

    def _lose(self, why: str) -> None:
        if not self._over:
            self._seen.lost += 1
            self._seen.errors.append(why)
        self._end()

    def _end(self) -> None:
        if not self._over:
            self._over = True
            if self._transport is not None:
                self._transport.abort()
            self._ended(self)


async def run(load: Load, stopped: asyncio.Event) -> Seen:
    """Run the clients until each has ended, or until `stopped` is set; return what they saw."""
    seen, loop = Seen(), asyncio.get_running_loop()
    began, computed = time.perf_counter(), time.process_time()
    running: set[Client] = set()
    done = asyncio.Event()

    def ended(client: Client) -> None:
        running.discard(client)
        if not running:
            done.set()

    leave_after = max(1, load.tokens // 2) if load.leave else 0
    clients = [
        Client(
            request_of(load, number), load.tokens, seen, ended, leave_after=leave_after if number % 2 else 0
        )
        for number in range(load.first, load.first + load.count)
    ]  # fmt: skip
    running.update(clients)

    async def connect(client: Client) -> None:
        client.begin()
        try:
            await loop.create_connection(lambda: client, load.host, load.port)
        except OSError as error:
            client.refuse(error)

    connecting = [asyncio.create_task(connect(client)) for client in clients]
    waiting = {asyncio.create_task(done.wait()), asyncio.create_task(stopped.wait())}
    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    for task in (*waiting, *connecting):
        task.cancel()
    for client in tuple(running):
        client.stop()
    seen.busy = round((time.process_time() - computed) / (time.perf_counter() - began), 3)
    return seen


async def obey() -> None:
    """Do what comes on stdin."""
    reader = asyncio.StreamReader(limit=MOST_LINE)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    stopped = asyncio.Event()

    async def work(order: dict[str, Any]) -> None:
        print(json.dumps(asdict(await run(Load(**order), stopped))), flush=True)

    working: asyncio.Task[None] | None = None
    print(json.dumps({"ready": True}), flush=True)
    while line := await reader.readline():
        order = json.loads(line)
        if order.get("stop"):
            stopped.set()
        else:
            working = asyncio.create_task(work(order))
    if working is not None:
        working.cancel()


if __name__ == "__main__":
    try:
        import uvloop
    except ImportError:
        asyncio.run(obey())
    else:
        uvloop.run(obey())
