"""What must not disturb a server: bytes that are no HTTP, readers who do not read, clients who leave, its own end."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from overlap import AsyncEngine
from overlap.serve import ServeOptions, make_app
from overlap.serve.app import make_runner

POST = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"
NO_HTTP = {
    "garbage": (b"GARBAGE\r\n\r\n", 400, "first line"),
    "tls": (b"\x16\x03\x01\x02\x00\x01", 400, "first line"),
    "version": (b"GET /health HTTP/3.9\r\n\r\n", 400, "first line"),
    "flood": (POST + b"".join(b"X-%d: a\r\n" % number for number in range(500)) + b"\r\n", 400, "Too many headers"),
    "long header": (POST + b"X: " + b"a" * 20_000 + b"\r\n\r\n", 431, "too long"),
    "header": (POST + b"a b: c\r\n\r\n", 400, "header"),
    "length": (POST + b"Content-Length: -5\r\n\r\n", 400, "Content-Length"),
    "two lengths": (
        POST + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        400,
        "Transfer-Encoding",
    ),
    "chunk": (POST + b"Transfer-Encoding: chunked\r\n\r\nSECRET\r\n{}\r\n", 400, "chunk size"),
    "late chunk": (POST + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\nSECRET\r\n", 400, "chunk size"),
}
BUFFER = 64 * 2**10
"""Where asyncio's transports begin to make a writer wait."""


@pytest.fixture
async def engine(tiny_llama_dir: Path) -> AsyncIterator[AsyncEngine]:
    async with AsyncEngine(tiny_llama_dir, device="cpu", dtype="float32", max_rows=16) as engine:
        yield engine


@asynccontextmanager
async def running(engine: AsyncEngine, options: ServeOptions | None = None) -> AsyncIterator[web.AppRunner]:
    runner = make_runner(make_app(engine, options, model_name="tiny"))
    await runner.setup()
    listening = socket.create_server(("127.0.0.1", 0), backlog=256)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16384)  # of whoever connects: the kernel holds little
    await web.SockSite(runner, listening).start()
    try:
        yield runner
    finally:
        await runner.cleanup()


@pytest.fixture
async def runner(engine: AsyncEngine) -> AsyncIterator[web.AppRunner]:
    async with running(engine) as runner:
        yield runner


@pytest.fixture
async def http(runner: web.AppRunner) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(
        f"http://127.0.0.1:{port_of(runner)}", connector=aiohttp.TCPConnector(limit=0)
    ) as http:
        yield http


def port_of(runner: web.AppRunner) -> int:
    port: int = runner.addresses[0][1]
    return port


async def nothing_is_left(engine: AsyncEngine) -> None:
    async with asyncio.timeout(20):
        while True:
            figures = engine.statistics()
            pages = figures.free_pages + figures.evictable_pages
            if pages == figures.num_pages and not (figures.running or figures.waiting or figures.draining):
                return
            await asyncio.sleep(0.01)


def body(**more: Any) -> dict[str, Any]:
    fields = {"prompt": "Paris is", "max_tokens": 40, "temperature": 0, "ignore_eos": True, "stream": True}
    return {**fields, "stream_options": {"include_usage": True, "continuous_usage_stats": True}, **more}


async def tokens_of(http: aiohttp.ClientSession, asked: dict[str, Any], leave_after: int | None = None) -> int:
    """Read an answer, or leave it after so many tokens; return how many tokens came."""
    tokens = 0
    async with http.post("/v1/completions", json=asked) as response:
        assert response.status == 200, await response.text()
        async for line in response.content:
            if line.startswith(b"data: {"):
                event = json.loads(line[6:])
                assert "error" not in event
                tokens = event["usage"]["completion_tokens"]
            if leave_after is not None and tokens >= leave_after:
                response.close()
                return tokens
    return tokens


@pytest.mark.parametrize("name", NO_HTTP)
async def test_bytes_that_are_no_http_get_an_error_object_and_are_counted(
    runner: web.AppRunner, http: aiohttp.ClientSession, name: str
) -> None:
    sent, status, words = NO_HTTP[name]
    reader, writer = await asyncio.open_connection("127.0.0.1", port_of(runner))
    writer.write(sent)
    async with asyncio.timeout(10):
        head, _, told = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    assert head.split()[1] == b"%d" % status
    assert b"Content-Type: application/json" in head
    error = json.loads(told)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert words in error["message"]
    assert "SECRET" not in error["message"], "nothing of what was sent comes back"
    async with http.get("/metrics") as response:
        assert f'overlap_http_responses_total{{route="none",status="{status}"}} 1.0' in await response.text()
    assert await tokens_of(http, body(max_tokens=2)) == 2


async def test_a_server_that_ends_is_alive_and_not_ready(
    engine: AsyncEngine, runner: web.AppRunner, http: aiohttp.ClientSession
) -> None:
    assert [(await http.get(path)).status for path in ("/health", "/ready")] == [200, 200]
    answer = asyncio.create_task(tokens_of(http, body(max_tokens=400)))
    async with asyncio.timeout(10):
        while not engine.statistics().running:
            await asyncio.sleep(0.001)
    ending = asyncio.create_task(engine.aclose(drain=True))
    await asyncio.sleep(0)
    assert (await http.get("/health")).status == 200
    ready = await http.get("/ready")
    assert ready.status == 503
    assert await ready.json() == {"status": "ending", "reason": "It is ending: it finishes what it has begun."}
    assert await answer == 400
    await ending
    assert [(await http.get(path)).status for path in ("/health", "/ready")] == [503, 503]


async def test_the_engines_own_figures_reach_metrics(http: aiohttp.ClientSession) -> None:
    assert await tokens_of(http, body(n=3)) == 120
    async with http.get("/metrics") as response:
        lines = (await response.text()).splitlines()
    found = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert float(found["overlap_request_queue_time_seconds_count"]) == 3
    assert 0 < float(found["overlap_request_queue_time_seconds_sum"]) < 60
    assert float(found['overlap_graph_steps_total{path="full_replays"}']) >= 0
    assert float(found["overlap_graph_captures_total"]) >= 0


async def test_a_reader_who_stops_holds_64_kib_and_nobody_up_and_may_go_on_later(
    engine: AsyncEngine, runner: web.AppRunner, http: aiohttp.ClientSession
) -> None:
    reader, writer = await stop_reading(runner)
    whole = await asyncio.gather(*(tokens_of(http, body(max_tokens=400)) for _ in range(6)))
    assert whole == [400] * 6
    async with asyncio.timeout(60):
        while engine.statistics().running:  # the engine makes the stalled answer to its end, too
            await asyncio.sleep(0.01)
    waiting = max(
        one.transport.get_write_buffer_size()
        for one in runner.server.connections  # type: ignore[union-attr]
        if one.transport is not None
    )
    events, longest, tokens, last = 0, 0, 0, b""
    rest = b""
    async with asyncio.timeout(60):
        while part := await reader.read(1 << 16):
            *lines, rest = (rest + part).split(b"\n\n")
            for each in lines:
                event = each[each.find(b"data: ") :]
                longest, last = max(longest, len(event)), event
                if event.startswith(b"data: {"):
                    events += 1
                    tokens = json.loads(event[6:].split(b"\r\n")[0])["usage"]["completion_tokens"]
    writer.close()
    assert b"[DONE]" in last + rest
    assert tokens == 4 * 480
    assert waiting <= BUFFER + longest
    assert events < 4 * 480 / 2, "what waited came in fewer events"
    await nothing_is_left(engine)


async def test_a_reader_who_never_goes_on_is_cut_off(engine: AsyncEngine) -> None:
    async with running(engine, ServeOptions(stall_seconds=0.3)) as runner:
        _, writer = await stop_reading(runner)
        await nothing_is_left(engine)
        async with asyncio.timeout(20):
            while runner.server.connections:  # type: ignore[union-attr]
                await asyncio.sleep(0.01)
        writer.close()


async def stop_reading(runner: web.AppRunner) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Ask for an answer of megabytes, with a small receive buffer, and read its first line."""
    text = json.dumps({**body(n=4, max_tokens=480), "logprobs": 20}).encode()
    line = socket.socket()
    line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # before it connects, or the window is larger
    line.setblocking(False)
    await asyncio.get_running_loop().sock_connect(line, ("127.0.0.1", port_of(runner)))
    reader, writer = await asyncio.open_connection(sock=line, limit=2048)
    writer.write(POST + b"Content-Length: %d\r\nConnection: close\r\n\r\n" % len(text) + text)
    assert b" 200 " in await reader.readline()
    return reader, writer


async def test_half_of_64_clients_leave_in_mid_stream_and_no_page_is_left(
    engine: AsyncEngine, http: aiohttp.ClientSession
) -> None:
    asked = [body(prompt=[3 + (number * 31 + at) % 250 for at in range(40)]) for number in range(64)]
    leave = [None if number % 2 else 1 + number % 20 for number in range(64)]
    got = await asyncio.gather(*(tokens_of(http, one, after) for one, after in zip(asked, leave, strict=True)))
    assert [tokens for tokens, after in zip(got, leave, strict=True) if after is None] == [40] * 32
    await nothing_is_left(engine)
    assert engine.statistics().tokens_out < 64 * 40
    async with http.get("/metrics") as response:
        text = await response.text()
    assert "overlap_http_answers_open 0.0" in text
