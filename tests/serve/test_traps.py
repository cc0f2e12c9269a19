"""What has killed servers like this one. After each a request says what it said before, and every page is there."""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from overlap import AsyncEngine
from overlap.serve import serving

NORMAL: dict[str, Any] = {"prompt": "The quick brown fox", "max_tokens": 8, "temperature": 0, "logprobs": 2}
SAMPLED: tuple[dict[str, Any], ...] = (
    {"top_k": 9_999_999}, {"temperature": 1e-4}, {"top_p": 1e-4}, {"temperature": 2.0, "min_p": 1.0},
    {"temperature": 0.0, "top_p": 1e-300}, {"seed": 2**64 - 1}, {"seed": -(2**63)}, {"temperature": 1e-300},
    {"logit_bias": {str(token): -100 for token in range(512)}}, {"repetition_penalty": 1e6}, {"min_tokens": 8},
    {"logit_bias": {"2": 100}, "min_tokens": 3}, {"frequency_penalty": -2, "presence_penalty": 2}, {"logprobs": 20},
    {"n": 5, "seed": 1}, {"echo": True, "logprobs": 3}, {"stop_token_ids": list(range(256))}, {"top_k": 1, "n": 2},
)  # fmt: skip


@pytest.fixture
async def engine(tiny_llama_dir: Path) -> AsyncIterator[AsyncEngine]:
    async with AsyncEngine(tiny_llama_dir, device="cpu", dtype="float32", max_rows=4, prefill_chunk=32) as engine:
        yield engine


@pytest.fixture
async def http(engine: AsyncEngine) -> AsyncIterator[aiohttp.ClientSession]:
    """A server that says after the test what it said before, and has every page."""
    async with serving(engine, port=0, model_name="tiny") as address, aiohttp.ClientSession(address) as session:
        before = await completion(session, NORMAL)
        yield session
        async with asyncio.timeout(10):
            while (figures := engine.statistics()).running or figures.waiting or figures.draining:
                await asyncio.sleep(0.01)
            assert figures.free_pages + figures.evictable_pages == figures.num_pages
            assert (await completion(session, NORMAL))["choices"] == before["choices"]
        assert engine.statistics().failed_steps == 0


async def completion(http: aiohttp.ClientSession, body: dict[str, Any], status: int = 200) -> Any:
    async with http.post("/v1/completions", json=body) as response:
        assert response.status == status, await response.text()
        return await response.json()


async def leave(http: aiohttp.ClientSession, body: dict[str, Any], after: float) -> None:
    """Ask, and hang up a moment later."""
    async with asyncio.timeout(after):
        await completion(http, body)


@pytest.mark.parametrize("asked", SAMPLED, ids=lambda asked: ",".join(asked))
async def test_unusual_sampling_gets_an_answer(http: aiohttp.ClientSession, asked: dict[str, Any]) -> None:
    async with asyncio.timeout(10):
        answer = await completion(http, {"prompt": "Paris is", "max_tokens": 8, **asked})
    assert answer["usage"]["completion_tokens"] >= 1


async def test_unusual_sampling_all_in_one_batch_gets_the_answers_that_it_gets_alone(
    http: aiohttp.ClientSession,
) -> None:
    bodies = [{"prompt": "Nobody knows", "max_tokens": 12, "seed": 7, **asked} for asked in SAMPLED]
    alone = [await completion(http, body) for body in bodies]
    async with asyncio.timeout(60):
        together = await asyncio.gather(*(completion(http, body) for body in bodies))
    texts = [[[choice["text"] for choice in one["choices"]] for one in each] for each in (alone, together)]
    assert texts[0] == texts[1]


async def test_an_answer_that_is_cut_inside_a_character_is_text(
    engine: AsyncEngine, http: aiohttp.ClientSession
) -> None:
    lead = (await engine.encode("🙂", add_special_tokens=False))[0]
    body = {"prompt": "x", "max_tokens": 3, "logit_bias": {str(lead): 100}, "temperature": 0, "logprobs": 1}
    answer = await completion(http, body)
    assert answer["choices"][0]["text"].strip("�") == ""
    assert len(answer["choices"][0]["logprobs"]["tokens"]) == 3


@pytest.mark.parametrize("more", [{}, {"n": 4}, {"n": 3, "stream": True}, {"echo": True, "logprobs": 1}], ids=str)
async def test_who_leaves_while_prompts_are_read_decoded_or_queued_is_forgotten(
    http: aiohttp.ClientSession, more: dict[str, Any]
) -> None:
    bodies = [
        {"prompt": [3 + (number * 31 + at) % 250 for at in range(200)], "max_tokens": 300, "ignore_eos": True, **more}
        for number in range(12)  # more than there are slots
    ]
    waits = [leave(http, body, 0.01 + 0.05 * number) for number, body in enumerate(bodies)]
    left = await asyncio.gather(*waits, return_exceptions=True)
    assert all(isinstance(one, TimeoutError) for one in left)


HOSTILE: dict[str, tuple[bytes, dict[str, str], tuple[int, ...]]] = {
    "no body": (b"", {}, (400,)),
    "deep": (b'{"prompt": ' + b"[" * 100_000, {}, (400,)),
    "deep and closed": (b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", {}, (400,)),
    "deep in an unknown field": (b'{"x": ' + b'{"a":' * 50_000 + b"1" + b"}" * 50_001, {}, (400,)),
    "bytes": (b'{"prompt": "\xff\xfe"}', {}, (400,)),
    "bomb": (gzip.compress(b" " * (64 << 20)), {"Content-Encoding": "gzip"}, (400, 413)),
    "unknown coding": (b"{}", {"Content-Encoding": "snappy"}, (400, 415)),
    "half a bomb": (gzip.compress(b" " * 1000)[:-12], {"Content-Encoding": "gzip"}, (400,)),
    "long header": (b"{}", {"X-Long": "a" * 9000}, (400, 431)),
    "huge number": (b'{"prompt": "x", "n": 1' + b"0" * 5000 + b"}", {}, (400,)),
    "huge exponent": (b'{"prompt": "x", "temperature": 1e999999}', {}, (400,)),
}


@pytest.mark.parametrize("name", HOSTILE)
async def test_hostile_bodies_are_refused(http: aiohttp.ClientSession, name: str) -> None:
    data, headers, statuses = HOSTILE[name]
    for path in ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/tokenize"):
        async with asyncio.timeout(10), http.post(path, data=data, headers=headers) as response:
            assert response.status in statuses, await response.text()
            error = (await response.json())["error"]
        assert 0 < len(error["message"]) <= 600


TEMPLATES = (
    "{{ 7 * 7 }}",
    "{% for x in range(10**9) %}{% endfor %}",
    "{{ ''.__class__.__mro__ }}",
    "{{ raise_exception('x') }}",
)


@pytest.mark.parametrize("text", TEMPLATES)
async def test_a_template_in_a_message_is_text(http: aiohttp.ClientSession, text: str) -> None:
    messages = [{"role": "user", "content": text}]
    async with http.post("/tokenize", json={"messages": messages}) as response:
        tokens = (await response.json())["tokens"]
    async with http.post("/detokenize", json={"tokens": tokens}) as response:
        assert text in (await response.json())["prompt"]
    for field in ("chat_template", "chat_template_kwargs"):
        body = {"messages": messages, field: {"a": text}}
        async with http.post("/v1/chat/completions", json=body) as response:
            assert (response.status, (await response.json())["error"]["param"]) == (400, field)


@pytest.mark.parametrize("pattern", ["(", "(a+)+$" * 50, "\\", "[" * 5000, "(?P<x>a)(?P<x>b)"])
async def test_a_pattern_in_a_tools_parameters_is_nothing_that_is_run(
    http: aiohttp.ClientSession, pattern: str
) -> None:
    parameters = {"type": "object", "properties": {"a": {"type": "string", "pattern": pattern}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    body = {"messages": [{"role": "user", "content": "Hi"}], "tools": [tool], "max_tokens": 2}
    async with asyncio.timeout(10), http.post("/v1/chat/completions", json=body) as response:
        assert response.status in (200, 400), await response.text()
