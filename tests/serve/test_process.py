"""A server of several processes, on a tiny model: real processes, real sockets, real clients."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
import openai
import psutil
import pytest

from overlap import AsyncEngine, SamplingParams

ENGINE, FRONT = "overlap.serve.engine_process", "overlap.serve.front_process"
PROMPTS = ("Paris is", "How many", "The quick brown", "Nobody knows", "Pack my box", "Rome")
SOON = 60.0


class Server:
    """`overlap serve` with fronts."""

    def __init__(self, model: Path, scratch: Path, more: Sequence[str] = ()) -> None:
        self.scratch = scratch
        command = [sys.executable, "-m", "overlap", "serve", str(model), "--port", "0", "--fronts", "2", *more]
        self.program = subprocess.Popen(
            [*command, "--device", "cpu", "--dtype", "float32", "--max-rows", "8"],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "TMPDIR": str(scratch), "OMP_NUM_THREADS": "1"},
        )
        assert self.program.stderr is not None
        found = re.search(r"(http://127\.0\.0\.1:\d+)/v1", self.program.stderr.readline())
        assert found
        self.address = found[1]
        self.name = str(model)
        self.family = psutil.Process(self.program.pid).children(recursive=True)

    def children(self, module: str) -> list[psutil.Process]:
        return [child for child in psutil.Process(self.program.pid).children() if module in command_of(child)]

    def socket_path(self) -> str:
        (path,) = self.scratch.glob("overlap-*/engine")
        return str(path)

    def nothing_is_left(self) -> bool:
        _, alive = psutil.wait_procs(self.family, timeout=10)
        return not alive and not list(self.scratch.glob("overlap-*"))


def command_of(process: psutil.Process) -> list[str]:
    """Its command line; empty for one that has ended, whether or not its parent has read that."""
    with suppress(psutil.ZombieProcess, psutil.NoSuchProcess):
        command: list[str] = process.cmdline()
        return command
    return []


@contextmanager
def served(model: Path, scratch: Path, *more: str) -> Iterator[Server]:
    server = Server(model, scratch, more)
    try:
        yield server
    finally:
        server.program.kill()
        server.program.wait()
        assert server.program.stderr is not None
        server.program.stderr.close()
        psutil.wait_procs(server.family, timeout=10)


@pytest.fixture(scope="module")
def server(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with served(tiny_llama_dir, tmp_path_factory.mktemp("s")) as server:
        yield server


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as http:
        yield http


def long_answer(server: Server, **more: Any) -> dict[str, Any]:
    body = {"model": server.name, "prompt": "Paris is", "max_tokens": 480, "temperature": 0, "ignore_eos": True}
    return {**body, "stream": True, **more}


async def until(true: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(SOON):
        while not await true():
            await asyncio.sleep(0.05)


async def live(http: aiohttp.ClientSession, server: Server) -> dict[str, Any]:
    async with http.get(f"{server.address}/live") as response:
        figures: dict[str, Any] = await response.json()
        return figures


async def is_idle(http: aiohttp.ClientSession, server: Server) -> bool:
    try:
        figures = await live(http, server)
    except aiohttp.ClientError:
        return False
    return bool(figures["running"] == figures["waiting"] == 0 and figures["kv_usage"] == 0)


async def begin(http: aiohttp.ClientSession, server: Server, **more: Any) -> aiohttp.ClientResponse:
    """Ask for a long answer and wait for its first event."""
    response = await http.post(f"{server.address}/v1/completions", json=long_answer(server, **more))
    assert response.status == 200, await response.text()
    assert (await response.content.readline()).startswith(b"data: ")
    return response


async def test_two_fronts_give_the_text_of_an_engine_in_the_program(server: Server, tiny_llama_dir: Path) -> None:
    params = SamplingParams(temperature=1.0, seed=3, max_tokens=24, ignore_eos=True)
    async with AsyncEngine(tiny_llama_dir, device="cpu", dtype="float32", max_rows=8) as engine:
        wanted = [[out.text async for out in engine.generate(prompt, params)][-1] for prompt in PROMPTS]

    async def ask(prompt: str) -> str:
        async with openai.AsyncOpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0) as client:
            stream = await client.completions.create(
                model=server.name, prompt=prompt, stream=True, temperature=1.0, seed=3, max_tokens=24,
                extra_body={"ignore_eos": True},
            )  # fmt: skip
            return "".join([chunk.choices[0].text async for chunk in stream])

    assert await asyncio.gather(*map(ask, PROMPTS * 2)) == wanted * 2


async def test_a_client_that_leaves_in_mid_stream_ends_its_answer_and_leaves_no_page(
    server: Server, http: aiohttp.ClientSession
) -> None:
    before = made = (await live(http, server))["generation_tokens"]
    for response in await asyncio.gather(*(begin(http, server) for _ in range(4))):
        response.close()

    async def have_ended() -> bool:
        nonlocal made
        made = (await live(http, server))["generation_tokens"]
        return made > before and await is_idle(http, server)  # figures of a moment before they began do not count

    await until(have_ended)
    assert made - before < 4 * 480, "the answers did not run to their end"


async def test_a_reader_who_stops_reading_slows_nobody(server: Server, http: aiohttp.ClientSession) -> None:
    stuck = await begin(http, server)
    whole = await begin(http, server)
    assert (await whole.content.read()).endswith(b"data: [DONE]\n\n")
    stuck.close()
    await until(lambda: is_idle(http, server))


async def test_hostile_bytes_on_the_engines_socket_end_that_connection_only(
    server: Server, http: aiohttp.ClientSession
) -> None:
    path = Path(server.socket_path())
    assert [os.stat(each).st_mode & 0o777 for each in (path, path.parent)] == [0o600, 0o700]  # noqa: PTH116
    for hostile in (b"\xff" * 64, b"\0\0\0\4\x93\x93\x93\x93", b"GET / HTTP/1.1\r\n\r\n", b"\0\0\0\1"):
        with socket.socket(socket.AF_UNIX) as line:
            line.settimeout(SOON)
            line.connect(str(path))
            line.sendall(hostile)
            line.shutdown(socket.SHUT_WR)
            while await asyncio.to_thread(line.recv, 1 << 16):
                pass
    assert (await (await begin(http, server)).content.read()).endswith(b"data: [DONE]\n\n")


async def test_a_killed_front_gives_its_pages_back_and_comes_again(server: Server, http: aiohttp.ClientSession) -> None:
    before = await served_so_far(http, server)
    readers = [await begin(http, server) for _ in range(4)]
    await asyncio.sleep(1)  # a front tells the others four times a second
    victim, other = server.children(FRONT)
    victim.kill()
    await until(lambda: asyncio.sleep(0, len(server.children(FRONT)) == 2 and victim not in server.children(FRONT)))
    assert other in server.children(FRONT)
    for reader in readers:
        reader.close()
    await until(lambda: is_idle(http, server))
    for _ in range(8):  # by both
        assert (await (await begin(http, server, max_tokens=4)).content.read()).endswith(b"data: [DONE]\n\n")
    await asyncio.sleep(1)
    assert before[0] >= 1
    after = await served_so_far(http, server)
    assert after[0] >= before[0] + 8, "what the dead front had counted is still there"
    assert after[1] == 2, "and it is not among the fronts"


async def served_so_far(http: aiohttp.ClientSession, server: Server) -> tuple[float, float]:
    """Return how many completions were answered, and how many fronts count."""
    async with http.get(f"{server.address}/metrics") as response:
        text = await response.text()
    answered = re.search(r'http_responses_total\{route="/v1/completions",status="200"\} (\S+)', text)
    fronts = re.search(r"^overlap_http_fronts (\S+)", text, re.MULTILINE)
    assert fronts
    return float(answered[1]) if answered else 0.0, float(fronts[1])


async def test_sigterm_lets_answers_end(server: Server, http: aiohttp.ClientSession) -> None:
    """The last that the shared server does."""
    reader = await begin(http, server)
    server.program.send_signal(signal.SIGTERM)
    assert (await reader.content.read()).endswith(b"data: [DONE]\n\n")
    assert await asyncio.to_thread(server.program.wait, SOON) == 0
    assert server.nothing_is_left()


async def test_every_front_has_the_options_of_the_command_line(tiny_llama_dir: Path, tmp_path: Path) -> None:
    more = ["--model-name", "tiny", "--api-key", "k", "--cors-origin", "https://a.example", "--log-requests",
            "--deadline-seconds", "0.2", "--body-seconds", "0.2"]  # fmt: skip
    with served(tiny_llama_dir, tmp_path, *more) as server:
        keyed = {"Authorization": "Bearer k", "Origin": "https://a.example"}
        for number in range(8):  # each on a connection of its own: both fronts get some
            connector = aiohttp.TCPConnector(force_close=True)
            async with aiohttp.ClientSession(server.address, connector=connector) as http:
                assert (await http.get("/v1/models")).status == 401
                response = await http.get("/v1/models", headers={**keyed, "X-Request-Id": f"mine-{number}"})
                assert response.headers["Access-Control-Allow-Origin"] == "https://a.example"
                assert [model["id"] for model in (await response.json())["data"]] == ["tiny"]
                late = {**long_answer(server, model="tiny", n=8), "stream": False}
                response = await http.post("/v1/completions", json=late, headers=keyed)
                assert (await response.json())["error"]["code"] == "deadline_exceeded"
        server.program.terminate()
        assert server.program.stderr is not None
        logged = [json.loads(line) for line in server.program.stderr if line.startswith("{")]
        named = {line["request_id"] for line in logged if line["status"] == 200}
        assert named == {f"mine-{number}" for number in range(8)}
        assert await asyncio.to_thread(server.program.wait, SOON) == 0


async def test_an_engine_that_dies_is_an_error_to_all_and_the_end(
    tiny_llama_dir: Path, tmp_path: Path, http: aiohttp.ClientSession
) -> None:
    with served(tiny_llama_dir, tmp_path) as server:
        reader = await begin(http, server)
        server.children(ENGINE)[0].kill()
        seen = b""
        with pytest.raises(aiohttp.ClientError):
            while part := await reader.content.readany():
                seen += part
        reader.close()
        last = [line for line in seen.split(b"\n\n") if line][-1].strip()
        assert "error" in json.loads(last.removeprefix(b"data: "))
        assert await asyncio.to_thread(server.program.wait, SOON) == 1
        assert server.nothing_is_left()


async def test_a_second_signal_ends_at_once_and_no_child_outlives_its_parent(
    tiny_llama_dir: Path, tmp_path: Path, http: aiohttp.ClientSession
) -> None:
    with served(tiny_llama_dir, tmp_path) as server:
        stopped = server.children(ENGINE)[0]
        reader = await begin(http, server)
        stopped.suspend()  # what runs would never end
        server.program.send_signal(signal.SIGTERM)
        await asyncio.sleep(0.3)
        assert server.program.poll() is None
        server.program.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(server.program.wait, 15) == 0
        assert server.nothing_is_left()
        reader.close()
