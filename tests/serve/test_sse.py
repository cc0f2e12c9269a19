"""Events as bytes: what is written out once for all chunks of an answer, and what is encoded for each."""

from __future__ import annotations

import asyncio
import itertools
import json
import socket
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from overlap.engine import Health
from overlap.messages import Output, TokenLogprob, Usage
from overlap.serve import make_app
from overlap.serve.app import make_runner
from overlap.serve.chat import ChatAnswer
from overlap.serve.completions import TextAnswer
from overlap.serve.sse import UNHURRIED, EventWriter
from overlap.text import Tokenizer

PIECES = ("Say ", '"', "\\", "\n\n", "", "data: {", "é🙂", "<b>\u2028</b>", "\x00", " end")
THINKING = "{{ messages[0]['content'] }}{# <think></think> #}"
USAGES: dict[str, dict[str, Any]] = {
    "no usage": {},
    "usage at the end": {"stream_options": {"include_usage": True}},
    "usage in each": {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
}


class Script:
    """A door behind which every answer is the same."""

    model_name = "script"
    context = 512

    def __init__(self, tokenizer: Tokenizer, *, chat_template: str = "", logprobs: bool = False) -> None:
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self._logprobs = logprobs

    async def generate(self, _prompt: Any, _params: Any = None, **_: Any) -> AsyncIterator[Output]:
        for number in range(1, len(PIECES) + 1):
            tokens = list(range(3, 3 + number))
            yield Output(
                request_id="r", index=0, tokens=tokens, text="".join(PIECES[:number]), text_delta=PIECES[number - 1],
                finish_reason="length" if number == len(PIECES) else None, stop_reason=None,
                usage=Usage(prompt_tokens=3, completion_tokens=number, cached_tokens=2),
                logprobs=[TokenLogprob(token, -1.0) for token in tokens] if self._logprobs else None,
            )  # fmt: skip

    async def encode(self, text: str, **_: Any) -> list[int]:
        return self.tokenizer.encode(text)

    async def encode_chat(self, *_: Any, **__: Any) -> list[int]:
        return [3, 4, 5]

    def decode(self, ids: Any, **_: Any) -> str:
        return self.tokenizer.decode(ids)

    def health(self) -> Health:
        return Health(ok=True, reason="serving")

    def statistics(self) -> Any:
        return {}


@pytest.fixture(scope="module")
def tokenizer(tiny_llama_dir: Path) -> Tokenizer:
    return Tokenizer.from_json_file(tiny_llama_dir / "tokenizer.json")


async def raw(door: Any, path: str, body: dict[str, Any], *, version: str = "1.1") -> bytes:
    """Return all that comes back, but for the date and the request's id."""
    runner = make_runner(make_app(door))
    await runner.setup()
    listening = socket.create_server(("127.0.0.1", 0))
    await web.SockSite(runner, listening).start()
    data = json.dumps({**body, "stream": True}).encode()
    head = f"POST /v1/{path} HTTP/{version}\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(data)}\r\n\r\n"
    try:
        reader, writer = await asyncio.open_connection(*listening.getsockname())
        writer.write(head.encode() + data)
        async with asyncio.timeout(10):
            came = await reader.read()
        writer.close()
    finally:
        await runner.cleanup()
    lines = came.split(b"\r\n")
    return b"\r\n".join(line for line in lines if not line.startswith((b"Date:", b"X-Request-Id:")))


@pytest.fixture
def _same_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("overlap.serve.endpoint.uuid.uuid4", lambda: uuid.UUID(int=7))
    monkeypatch.setattr("overlap.serve.endpoint.time.time", lambda: 1_800_000_000.0)


def every_kind() -> list[Any]:
    bodies: dict[str, tuple[str, dict[str, Any]]] = {
        "text": ("completions", {"prompt": "Hi", "max_tokens": 10}),
        "two prompts": ("completions", {"prompt": ["Hi", "Ho"], "max_tokens": 10}),
        "echo": ("completions", {"prompt": "Hi", "max_tokens": 10, "echo": True}),
        "token ids": ("completions", {"prompt": "Hi", "max_tokens": 10, "return_token_ids": True}),
        "chat": ("chat/completions", {"messages": [{"role": "user", "content": "Hi"}]}),
    }
    return [
        pytest.param(path, {**body, **usage}, id=f"{kind}, {name}")
        for (kind, (path, body)), (name, usage) in itertools.product(bodies.items(), USAGES.items())
    ]


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize(("path", "body"), every_kind())
@pytest.mark.usefixtures("_same_every_time")
async def test_plain_text_comes_in_the_bytes_that_encoding_each_chunk_gives(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any], version: str
) -> None:
    written = await raw(Script(tokenizer), path, body, version=version)
    for shape in (TextAnswer, ChatAnswer):
        monkeypatch.setattr(shape, "plain", lambda _self, _output: None)
    monkeypatch.setattr(EventWriter, "write_nowait", lambda _self, _event: False)
    encoded = await raw(Script(tokenizer), path, body, version=version)
    assert written.endswith(b"data: [DONE]\n\n" if version == "1.0" else b"data: [DONE]\n\n\r\n0\r\n\r\n")
    assert written == encoded


async def test_what_is_not_only_text_is_never_written_as_if_it_were(tokenizer: Tokenizer) -> None:
    body = {"prompt": "Hi", "max_tokens": 10, "logprobs": 1}
    came = (await raw(Script(tokenizer, logprobs=True), "completions", body)).decode()
    events = [json.loads(line[6:]) for line in came.split("\r\n") if line.startswith("data: {")]
    told = [event["choices"][0]["logprobs"] for event in events if event["choices"][0]["finish_reason"] is None]
    assert [len(one["tokens"]) for one in told] == [1] * len(PIECES)


async def test_a_thought_is_told_from_text_and_the_text_behind_it_passes(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces = ("<think>", "hm", "</think>", "\n", "Yes", " sir", ".")
    monkeypatch.setitem(globals(), "PIECES", pieces)
    body = {"messages": [{"role": "user", "content": "Hi"}]}
    came = (await raw(Script(tokenizer, chat_template=THINKING), "chat/completions", body)).decode()
    deltas = [
        json.loads(line[6:])["choices"][0]["delta"] for line in came.split("\r\n") if line.startswith("data: {")
    ]  # fmt: skip
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "hm"
    assert "".join(delta.get("content", "") for delta in deltas) == "Yes sir."


class Transport:
    def __init__(self, waiting: int, *, closing: bool = False) -> None:
        self.waiting = waiting
        self.closing = closing
        self.written: list[bytes] = []

    def is_closing(self) -> bool:
        return self.closing

    def get_write_buffer_size(self) -> int:
        return self.waiting

    def write(self, data: bytes) -> None:
        self.written.append(data)


class Response:
    chunked = True

    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        self.written: list[bytes] = []

    async def write(self, data: bytes) -> None:
        self.written.append(data)


@pytest.mark.parametrize(("waiting", "closing"), [(UNHURRIED, False), (UNHURRIED - 3, False), (0, True)])
async def test_an_event_goes_by_aiohttp_where_there_may_be_something_to_wait_for(waiting: int, closing: bool) -> None:
    transport = Transport(0)
    response: Any = Response(transport)
    writer = EventWriter(response, response, 1.0)
    assert not writer.write_nowait(b"abc")  # the head has not gone out
    await writer.write(b"abc")
    assert writer.write_nowait(b"abc")
    transport.waiting, transport.closing = waiting, closing
    assert not writer.write_nowait(b"abc")
    assert (response.written, transport.written) == ([b"abc"], [b"3\r\nabc\r\n"])
