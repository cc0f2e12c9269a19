from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pydantic
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response, ResponseStreamEvent

from overlap import AsyncEngine, Output, SamplingParams
from overlap.messages import Usage
from overlap.serve import ServeOptions, serving

HELLO: Any = [{"role": "user", "content": "How many tokens are there?"}]
GREEDY: dict[str, Any] = {"model": "tiny", "temperature": 0}
TOOL: Any = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
SCRIPT = '<think>hm</think>Yes.\n<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'


class Scripted:
    """A door whose answers are a script: what a model that knows tools would write."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self.prompts: list[Any] = []

    chat_template = "{{ tools }}<tool_call></think>"

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    async def encode_chat(self, messages: Any, tools: Any = None, **_: Any) -> list[int]:
        self.prompts.append((messages, tools))
        return [3, 4, 5]

    async def generate(self, prompt: Any, params: Any = None, **_: Any) -> AsyncIterator[Output]:
        for end in range(7, len(SCRIPT) + 7, 7):
            yield Output(
                request_id="r", index=0, tokens=[7] * end, text=SCRIPT[:end], text_delta=SCRIPT[end - 7 : end],
                finish_reason="stop" if end >= len(SCRIPT) else None, stop_reason=None,
                usage=Usage(prompt_tokens=3, completion_tokens=end),
            )  # fmt: skip


@pytest.fixture
async def engine(tiny_llama_dir: Path) -> AsyncIterator[AsyncEngine]:
    async with AsyncEngine(tiny_llama_dir, device="cpu", dtype="float32", max_rows=4) as engine:
        yield engine


@pytest.fixture
async def address(engine: AsyncEngine) -> AsyncIterator[str]:
    async with serving(engine, port=0, model_name="tiny") as address:
        yield address


@pytest.fixture
async def client(address: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
async def http(address: str) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(address) as session:
        yield session


async def post(http: aiohttp.ClientSession, path: str, body: Any, status: int = 200) -> Any:
    async with http.post(path, json=body) as response:
        assert response.status == status, await response.text()
        return await response.json()


async def events(http: aiohttp.ClientSession, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    async with http.post(path, json={**body, "stream": True}) as response:
        assert response.status == 200, await response.text()
        lines = (await response.text()).splitlines()
    return [json.loads(line[6:]) for line in lines if line.startswith("data: ") and line != "data: [DONE]"]


async def test_n_answers_have_seeds_of_their_own_and_the_prompt_counts_once(
    engine: AsyncEngine, http: aiohttp.ClientSession
) -> None:
    body = {"prompt": "The quick brown", "max_tokens": 6, "seed": 5, "n": 3, "ignore_eos": True}
    whole = await post(http, "/v1/completions", body)
    Completion.model_validate(whole, strict=True)
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2]
    for number, choice in enumerate(whole["choices"]):
        params = SamplingParams(max_tokens=6, seed=5 + number, ignore_eos=True)
        alone = [output async for output in engine.generate("The quick brown", params)][-1]
        assert choice["text"] == alone.text
    assert whole["usage"]["completion_tokens"] == 18
    assert whole["usage"]["prompt_tokens"] == alone.usage.prompt_tokens
    texts = ["", "", ""]
    for event in await events(http, "/v1/completions", body):
        for choice in event["choices"]:
            texts[choice["index"]] += choice["text"]
    assert texts == [choice["text"] for choice in whole["choices"]]


async def test_token_id_prompts_come_back_as_echo_and_ids(http: aiohttp.ClientSession) -> None:
    ids = (await post(http, "/tokenize", {"prompt": "Paris is", "add_special_tokens": False}))["tokens"]
    body = {"prompt": [ids, ids], "max_tokens": 3, "echo": True, "return_token_ids": True, **GREEDY}
    answer = await post(http, "/v1/completions", body)
    assert [choice["text"].startswith("Paris is") for choice in answer["choices"]] == [True, True]
    assert answer["prompt_token_ids"] == ids
    assert len(answer["choices"][0]["token_ids"]) <= 3
    streamed = await events(http, "/v1/completions", {**body, "prompt": [ids]})
    assert "".join(event["choices"][0]["text"] for event in streamed) == answer["choices"][0]["text"]
    told = [token for event in streamed for token in event["choices"][0].get("token_ids", ())]
    assert told == answer["choices"][0]["token_ids"]


async def test_usage_says_what_came_from_the_prefix_cache_whole_and_streamed(http: aiohttp.ClientSession) -> None:
    ids = [3 + at * 7 % 200 for at in range(50)]
    body = {"prompt": [ids, ids], "max_tokens": 2, "n": 2, "ignore_eos": True, **GREEDY}
    whole = [(await post(http, "/v1/completions", body))["usage"] for _ in range(2)]
    streamed = await events(http, "/v1/completions", {**body, "stream_options": {"include_usage": True}})
    assert streamed[-1]["choices"] == []
    assert all(event["usage"] is None for event in streamed[:-1])
    for usage in (whole[1], streamed[-1]["usage"]):
        assert usage["prompt_tokens_details"] == {"cached_tokens": 2 * 48}
        assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (100, 8, 108)
    chat = {"messages": HELLO * 9, "max_tokens": 2, **GREEDY}
    told = [(await post(http, "/v1/chat/completions", chat))["usage"] for _ in range(2)][1]
    assert told["prompt_tokens_details"]["cached_tokens"] == (told["prompt_tokens"] - 1) // 16 * 16 > 0


async def test_tokens_go_to_text_and_back(http: aiohttp.ClientSession) -> None:
    told = await post(http, "/tokenize", {"prompt": "naïve 🙂", "add_special_tokens": False, "return_token_strs": True})
    assert told["count"] == len(told["tokens"]) == len(told["token_strs"])
    assert (await post(http, "/detokenize", {"tokens": told["tokens"]}))["prompt"] == "naïve 🙂"
    assert (await post(http, "/tokenize", {"messages": HELLO}))["max_model_len"] == 512
    for path, body in (("detokenize", {"tokens": [10**9]}), ("tokenize", {}), ("tokenize", {"prompt": 3})):
        assert (await post(http, f"/{path}", body, status=400))["error"]["message"]


async def test_responses_are_what_the_client_expects_whole_and_streamed(
    client: openai.AsyncOpenAI, http: aiohttp.ClientSession
) -> None:
    whole = await client.responses.create(model="tiny", input="Hello", temperature=0, max_output_tokens=6)
    Response.model_validate(whole.model_dump(exclude_unset=True), strict=True)
    chat = await client.chat.completions.create(messages=[{"role": "user", "content": "Hello"}], max_tokens=6, **GREEDY)
    assert whole.output_text == chat.choices[0].message.content
    body = {"input": [{"role": "user", "content": [{"type": "input_text", "text": "Hello"}]}], "max_output_tokens": 6}
    streamed = await events(http, "/v1/responses", {**body, **GREEDY})
    oracle: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(ResponseStreamEvent)
    for number, event in enumerate(streamed):
        assert event["sequence_number"] == number
        oracle.validate_python(event, strict=True)
    kinds = [event["type"].removeprefix("response.") for event in streamed]
    around = [kind for kind in kinds if kind != "output_text.delta"]
    assert around == [
        "created", "in_progress", "output_item.added", "content_part.added", "output_text.done", "content_part.done",
        "output_item.done", whole.status,
    ]  # fmt: skip
    assert streamed[-1]["response"]["output"][0]["content"][0]["text"] == whole.output_text
    async with client.responses.stream(model="tiny", input="Hello", temperature=0, max_output_tokens=6) as stream:
        texts = [event.delta async for event in stream if event.type == "response.output_text.delta"]
    assert "".join(texts) == whole.output_text
    refused = await post(http, "/v1/responses", {"input": "x", "previous_response_id": "r"}, status=400)
    assert refused["error"]["param"] == "previous_response_id"


async def test_reasoning_and_tool_calls_are_told_apart_from_text(engine: AsyncEngine) -> None:
    door = Scripted(engine)
    async with serving(door, port=0, model_name="tiny") as address, aiohttp.ClientSession(address) as http:  # type: ignore[arg-type]
        body = {"messages": HELLO, "tools": [TOOL]}
        whole = await post(http, "/v1/chat/completions", body)
        ChatCompletion.model_validate(whole, strict=True)
        message, reason = whole["choices"][0]["message"], whole["choices"][0]["finish_reason"]
        assert (message["content"], message["reasoning_content"], reason) == ("Yes.", "hm", "tool_calls")
        assert message["tool_calls"][0]["function"] == {"name": "add", "arguments": '{"a": 1}'}
        chunks = await events(http, "/v1/chat/completions", body)
        for chunk in chunks:
            ChatCompletionChunk.model_validate(chunk, strict=True)
        deltas = [call for chunk in chunks for call in chunk["choices"][0]["delta"].get("tool_calls", ())]
        assert set(deltas[0]) == {"index", "id", "type", "function"}
        assert deltas[0]["function"] == {"name": "add", "arguments": ""}
        assert "".join(delta["function"]["arguments"] for delta in deltas) == '{"a": 1}'
        assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
        back = [*HELLO, message, {"role": "tool", "tool_call_id": "c", "content": "2"}]
        await post(http, "/v1/chat/completions", {**body, "messages": back})
        assert door.prompts[-1][0][1]["tool_calls"][0]["function"]["arguments"] == {"a": 1}
        assert door.prompts[-1][1] == [TOOL] or list(door.prompts[-1][1]) == [TOOL]
        flat = {"type": "function", "name": "add", "parameters": {"type": "object"}, "strict": False}
        response = await post(http, "/v1/responses", {"input": "Hello", "tools": [flat]})
        Response.model_validate(response, strict=True)
        assert [item["type"] for item in response["output"]] == ["reasoning", "message", "function_call"]
        oracle: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(ResponseStreamEvent)
        for event in await events(http, "/v1/responses", {"input": "Hello", "tools": [flat]}):
            oracle.validate_python(event, strict=True)
        for choice in ("must", {"type": "function", "function": {"name": "sub"}}, {"type": "custom"}):
            error = (await post(http, "/v1/chat/completions", {**body, "tool_choice": choice}, status=400))["error"]
            assert error["param"] == "tool_choice"


async def test_a_template_without_tools_and_a_form_are_refused_by_name(http: aiohttp.ClientSession) -> None:
    for more, param in (
        ({"tools": [TOOL]}, "tools"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
    ):
        error = (await post(http, "/v1/chat/completions", {"messages": HELLO, **more}, status=400))["error"]
        assert error["param"] == param


async def test_ids_logs_keys_and_browsers(engine: AsyncEngine) -> None:
    log = io.StringIO()
    options = ServeOptions(api_keys=("one", "two"), cors_origins=("https://a.example",), log=log)
    async with serving(engine, options, port=0, model_name="tiny") as address:
        headers = {"Authorization": "Bearer two", "X-Request-Id": "mine-1", "Origin": "https://a.example"}
        async with aiohttp.ClientSession(address, headers=headers) as http:
            response = await http.post("/v1/completions", json={"prompt": "secret words", "max_tokens": 2})
            assert response.status == 200
            assert response.headers["X-Request-Id"] == "mine-1"
            assert response.headers["Access-Control-Allow-Origin"] == "https://a.example"
        async with aiohttp.ClientSession(address) as http:
            assert (await http.get("/ready")).status == 401
            asks = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
            assert (await http.options("/v1/completions", headers=asks)).status == 204
            asks["Origin"] = "https://b.example"
            refused = await http.options("/v1/completions", headers=asks)
            assert refused.status == 401
            assert "Access-Control-Allow-Origin" not in refused.headers
    lines = [json.loads(line) for line in log.getvalue().splitlines()]
    assert lines[0]["request_id"] == "mine-1"
    assert lines[0]["prompt_tokens"] > 0
    assert [line["status"] for line in lines] == [200, 401, 204, 401]
    assert "secret" not in log.getvalue()


async def test_a_full_queue_is_a_429_that_says_when_to_come_back(tiny_llama_dir: Path) -> None:
    async with (
        AsyncEngine(tiny_llama_dir, device="cpu", dtype="float32", max_rows=1, max_waiting=1) as engine,
        serving(engine, port=0) as address,
        aiohttp.ClientSession(address) as http,
    ):
        body = {"prompt": "x", "max_tokens": 400, "ignore_eos": True}
        asked = [asyncio.create_task(http.post("/v1/completions", json=body)) for _ in range(6)]
        answers = await asyncio.gather(*asked)
        full = [answer for answer in answers if answer.status == 429]
        assert full
        assert {answer.headers["Retry-After"] for answer in full} == {"1"}
        assert [answer.status for answer in answers].count(200) >= 1


async def test_the_openapi_document_describes_what_is_taken(http: aiohttp.ClientSession) -> None:
    async with http.get("/openapi.json") as response:
        document = await response.json()
    assert {"/v1/chat/completions", "/v1/responses", "/tokenize", "/health"} <= set(document["paths"])
    text = json.dumps(document)
    for name in document["components"]["schemas"]:
        assert name in text
    chat = document["components"]["schemas"]["ChatRequest"]
    assert "logit_bias" in chat["properties"]
    assert chat["properties"]["model"]["enum"] == ["tiny", None]
    assert chat["properties"]["temperature"]["maximum"] == 2
    assert chat["additionalProperties"] is False


HOSTILE: list[tuple[str, Any]] = [
    ("completions", {"prompt": "x", "logit_bias": {"999999": 1}}),
    ("completions", {"prompt": "x", "logit_bias": {"a": 1}}),
    ("completions", {"prompt": "x", "top_k": 2**40}),
    ("completions", {"prompt": "x", "seed": 2**64}),
    ("completions", {"prompt": "x", "echo": False, "max_tokens": 0}),
    ("completions", {"prompt": "x", "echo": True, "max_tokens": -1}),
    ("completions", {"prompt": "", "echo": True, "max_tokens": 0, "logprobs": 1}),
    ("completions", {"prompt": [[]], "echo": True, "max_tokens": 0, "logprobs": 1}),
    ("completions", {"prompt": [[5] * 512], "echo": True, "max_tokens": 0, "logprobs": 1}),
    ("completions", {"prompt": [[5, 512]], "echo": True, "max_tokens": 0, "logprobs": 1}),
    ("completions", {"prompt": [5] * 513}),
    ("completions", {"prompt": ["a"] * 257}),
    ("completions", {"prompt": ["a"] * 100, "n": 100}),
    ("completions", {"prompt": "x", "n": 10**30}),
    ("completions", {"prompt": "x", "priority": 10**30}),
    ("completions", {"prompt": "x", "stop_token_ids": [-1]}),
    ("completions", {"prompt": "x", "stop_token_ids": [2**31]}),
    ("completions", {"prompt": "x", "stop_token_ids": [3] * 257}),
    ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "text"}]}]}),
    ("chat/completions", {"messages": [[]]}),
    ("chat/completions", {"messages": [{"role": "assistant", "tool_calls": [{"id": 3}]}]}),
    ("chat/completions", {"messages": [{"role": "user", "content": "\ud800"}]}),
    ("responses", {"input": [{"type": "computer_call"}]}),
    ("responses", {"input": []}),
]


async def test_hostile_requests_are_refused_and_the_next_one_says_the_same(
    engine: AsyncEngine, http: aiohttp.ClientSession
) -> None:
    normal = {"prompt": "The quick brown fox", "max_tokens": 8, **GREEDY}
    before = await post(http, "/v1/completions", normal)
    deep: Any = []
    for _ in range(200):
        deep = [deep]
    many = {"messages": HELLO, "tools": [{"type": "function", "function": {"name": "f", "parameters": {"x": deep}}}]}
    for path, body in [*HOSTILE, ("chat/completions", many)]:
        async with asyncio.timeout(5):
            error = (await post(http, f"/v1/{path}", body, status=400))["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert len(error["message"]) <= 600
    after = await post(http, "/v1/completions", normal)
    assert after["choices"] == before["choices"]
    figures = engine.statistics()
    assert (figures.running, figures.waiting) == (0, 0)


async def test_broken_connections_harm_nobody(engine: AsyncEngine, address: str, http: aiohttp.ClientSession) -> None:
    host, port = address.removeprefix("http://").split(":")
    body = json.dumps({"prompt": "x", "max_tokens": 400, "ignore_eos": True}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"
    for sent in (
        b"\x00\xff" * 100 + b"\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        head + b"X-Long: " + b"a" * 20_000 + b"\r\n\r\n",
        head + b"".join(b"X-%d: a\r\n" % number for number in range(500)) + b"\r\n",
        head + b"Content-Length: -5\r\n\r\n",
        head + b"Content-Encoding: gzip\r\nContent-Length: 4\r\n\r\nabcd",
        head + b"Content-Length: 500\r\n\r\n" + body,  # half of a body, then silence and an end
        head + b"Content-Length: %d\r\n\r\n" % len(body) + body,  # leaves without reading
    ):
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(sent)
        if writer.can_write_eof() and b"500" not in sent:
            await writer.drain()
        if not sent.endswith(body):
            async with asyncio.timeout(5):
                answer = await reader.read(2000)
            assert answer.startswith((b"HTTP/1.1 4", b"HTTP/1.0 4")) or not answer
        writer.close()
    async with asyncio.timeout(10):
        while engine.statistics().running:
            await asyncio.sleep(0.01)
    assert (await post(http, "/v1/completions", {"prompt": "x", "max_tokens": 1}))["choices"]


async def test_a_body_that_comes_too_slowly_is_a_408(engine: AsyncEngine) -> None:
    async with serving(engine, ServeOptions(body_seconds=0.2), port=0) as address:
        host, port = address.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 500\r\n\r\n{")
        async with asyncio.timeout(5):
            assert b" 408 " in await reader.readline()
        writer.close()


async def test_log_probabilities_have_the_shapes_of_both_apis(http: aiohttp.ClientSession) -> None:
    body = {"messages": HELLO, "max_tokens": 4, "logprobs": True, "top_logprobs": 2, "ignore_eos": True, **GREEDY}
    whole = await post(http, "/v1/chat/completions", body)
    ChatCompletion.model_validate(whole, strict=True)
    content = whole["choices"][0]["logprobs"]["content"]
    assert len(content) == 4
    for entry in content:
        assert entry["logprob"] == entry["top_logprobs"][0]["logprob"] >= entry["top_logprobs"][1]["logprob"]
        assert bytes(entry["bytes"]).decode() == entry["token"]
    chunks = await events(http, "/v1/chat/completions", body)
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk, strict=True)
    told = [entry for chunk in chunks for entry in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert [entry["token"] for entry in told] == [entry["token"] for entry in content]
    text = await post(
        http, "/v1/completions", {"prompt": "x", "max_tokens": 3, "logprobs": 1, "ignore_eos": True, **GREEDY}
    )
    Completion.model_validate(text, strict=True)
    columns = text["choices"][0]["logprobs"]
    assert [len(columns[name]) for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")] == [3] * 4
