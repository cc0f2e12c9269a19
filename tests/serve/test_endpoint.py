from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from overlap import AsyncEngine, Output, SamplingParams
from overlap.messages import Prompt
from overlap.serve import MAX_BODY_BYTES, make_app, serving

HELLO: Any = [{"role": "user", "content": "How many tokens are there?"}]
GREEDY: dict[str, Any] = {"model": "tiny", "temperature": 0}


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


async def events(http: aiohttp.ClientSession, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The raw events of a stream, which must close with [DONE]."""
    async with http.post(path, json={**body, "stream": True}) as response:
        assert response.status == 200
        assert response.content_type == "text/event-stream"
        lines = (await response.text()).split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


async def refused(http: aiohttp.ClientSession, path: str, body: object, status: int = 400) -> dict[str, Any]:
    async with http.post(path, json=body) as response:
        assert response.status == status, await response.text()
        error: dict[str, Any] = (await response.json())["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


async def last(engine: AsyncEngine, prompt: Prompt, params: SamplingParams) -> Output:
    return [output async for output in engine.generate(prompt, params)][-1]


async def last_chunk(stream: openai.AsyncStream[ChatCompletionChunk]) -> ChatCompletionChunk:
    return [chunk async for chunk in stream][-1]


def pages_in_use(engine: AsyncEngine) -> int:
    figures = engine.statistics()
    return figures.num_pages - figures.free_pages - figures.evictable_pages


async def no_page_is_left(engine: AsyncEngine) -> None:
    async with asyncio.timeout(5):
        while pages_in_use(engine):
            await asyncio.sleep(0.01)


async def test_a_chat_answer_is_what_the_engine_says(engine: AsyncEngine, client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(messages=HELLO, max_tokens=8, **GREEDY)
    expected = await last(engine, HELLO, SamplingParams(temperature=0, max_tokens=8))
    assert answer.choices[0].message.content == expected.text
    assert answer.choices[0].finish_reason == expected.finish_reason
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == expected.usage.prompt_tokens
    assert answer.usage.total_tokens == expected.usage.total_tokens
    ChatCompletion.model_validate(answer.model_dump(exclude_unset=True), strict=True)


async def test_a_streamed_chat_has_the_shapes_that_clients_expect(
    http: aiohttp.ClientSession, client: openai.AsyncOpenAI
) -> None:
    chunks = await events(http, "/v1/chat/completions", {"messages": HELLO, "max_tokens": 8, **GREEDY})
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk, strict=True)
        assert "usage" not in chunk
    assert len({chunk["id"] for chunk in chunks}) == 1
    choices = [chunk["choices"][0] for chunk in chunks]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert choices[-1]["delta"] == {}
    assert [choice["finish_reason"] for choice in choices[:-1]] == [None] * (len(choices) - 1)
    whole = await client.chat.completions.create(messages=HELLO, max_tokens=8, **GREEDY)
    assert "".join(choice["delta"].get("content", "") for choice in choices) == whole.choices[0].message.content
    assert choices[-1]["finish_reason"] == whole.choices[0].finish_reason


async def test_usage_is_streamed_only_to_who_asked(client: openai.AsyncOpenAI) -> None:
    options: Any = {"include_usage": True}
    stream = await client.chat.completions.create(
        messages=HELLO, max_tokens=3, stream=True, stream_options=options, extra_body={"ignore_eos": True}, **GREEDY
    )
    chunks = [chunk async for chunk in stream]
    assert all(chunk.usage is None and "usage" in chunk.model_fields_set for chunk in chunks[:-1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 3


async def test_a_streamed_completion_says_the_same_as_a_whole_one(
    http: aiohttp.ClientSession, client: openai.AsyncOpenAI
) -> None:
    body = {"prompt": "The quick brown fox", "max_tokens": 12, **GREEDY}
    whole = await client.completions.create(**body)
    Completion.model_validate(whole.model_dump(exclude_unset=True), strict=True)
    chunks = await events(http, "/v1/completions", body)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole.choices[0].text
    assert chunks[-1]["choices"][0]["finish_reason"] == whole.choices[0].finish_reason
    for chunk in chunks:
        reason = chunk["choices"][0].pop("finish_reason")  # the client's type, unlike the API, has no null for it
        chunk["choices"][0]["finish_reason"] = reason or "stop"
        Completion.model_validate(chunk, strict=True)


async def test_a_completion_is_16_tokens_long_unless_said_otherwise(client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(prompt="The quick", extra_body={"ignore_eos": True}, **GREEDY)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16


@pytest.mark.parametrize("stream", [False, True])
async def test_several_prompts_are_answered_each_as_if_alone(client: openai.AsyncOpenAI, stream: bool) -> None:
    prompts = ["The quick brown", "Paris is", "Nobody knows"]
    alone = [await client.completions.create(prompt=prompt, max_tokens=6, **GREEDY) for prompt in prompts]
    texts = ["", "", ""]
    if stream:
        async for chunk in await client.completions.create(prompt=prompts, max_tokens=6, stream=True, **GREEDY):
            texts[chunk.choices[0].index] += chunk.choices[0].text
    else:
        together = await client.completions.create(prompt=prompts, max_tokens=6, **GREEDY)
        texts = [choice.text for choice in together.choices]
    assert texts == [answer.choices[0].text for answer in alone]


async def test_token_ids_are_a_prompt_in_both_ways_of_writing_them(
    engine: AsyncEngine, client: openai.AsyncOpenAI
) -> None:
    ids = [5, 17, 200, 41]
    flat = await client.completions.create(prompt=ids, max_tokens=4, **GREEDY)
    nested = await client.completions.create(prompt=[ids], max_tokens=4, **GREEDY)
    expected = await last(engine, ids, SamplingParams(temperature=0, max_tokens=4))
    assert flat.choices[0].text == nested.choices[0].text == expected.text


async def test_content_in_parts_is_read_as_text(client: openai.AsyncOpenAI) -> None:
    parts: Any = [{"role": "user", "content": [{"type": "text", "text": HELLO[0]["content"]}]}]
    plain = await client.chat.completions.create(messages=HELLO, max_tokens=6, **GREEDY)
    in_parts = await client.chat.completions.create(messages=parts, max_tokens=6, **GREEDY)
    assert in_parts.choices[0].message.content == plain.choices[0].message.content


async def test_the_model_is_listed_and_an_unknown_one_is_a_404(client: openai.AsyncOpenAI) -> None:
    models = await client.models.list()
    assert [model.id for model in models.data] == ["tiny"]
    Model.model_validate(models.data[0].model_dump(exclude_unset=True), strict=True)
    assert (await client.models.retrieve("tiny")).id == "tiny"
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-4'"):
        await client.chat.completions.create(model="gpt-4", messages=HELLO)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_frees_its_pages(
    engine: AsyncEngine, http: aiohttp.ClientSession, client: openai.AsyncOpenAI, stream: bool
) -> None:
    body = {"prompt": "Nobody", "max_tokens": 400, "ignore_eos": True, "stream": stream, **GREEDY}
    if stream:
        response = await http.post("/v1/completions", json=body)
        await response.content.readline()
        response.close()
    else:
        asking = asyncio.create_task(http.post("/v1/completions", json=body))
        async with asyncio.timeout(5):
            while not pages_in_use(engine):
                await asyncio.sleep(0.001)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
    await no_page_is_left(engine)
    assert (await client.completions.create(prompt="The quick", max_tokens=2, **GREEDY)).choices[0].text is not None


async def test_an_aborted_stream_ends_in_an_error_and_not_as_if_it_were_whole(
    engine: AsyncEngine, client: openai.AsyncOpenAI
) -> None:
    stream = await client.chat.completions.create(
        messages=HELLO, max_tokens=400, stream=True, extra_body={"ignore_eos": True}, **GREEDY
    )
    first = await anext(stream)
    assert await engine.abort(first.id)
    with pytest.raises(openai.APIError, match="aborted"):
        await last_chunk(stream)
    await no_page_is_left(engine)


async def test_health_turns_when_the_engine_is_closed(tiny_llama_dir: Path) -> None:
    engine = AsyncEngine(tiny_llama_dir, device="cpu", dtype="float32")
    await engine.start()
    async with serving(engine, port=0, model_name="tiny") as address, aiohttp.ClientSession(address) as http:
        assert (await http.get("/health")).status == 200
        await engine.aclose()
        assert (await http.get("/health")).status == 503
        error = await refused(http, "/v1/completions", {"prompt": "x"}, status=503)
        assert error["code"] == "engine_closed"


async def test_every_route_but_health_asks_for_the_key(engine: AsyncEngine) -> None:
    async with serving(engine, port=0, model_name="tiny", api_key="secret") as address:
        async with aiohttp.ClientSession(address) as http:
            assert (await http.get("/health")).status == 200
            assert (await http.get("/v1/models")).status == 401
            assert (await http.get("/nowhere")).status == 401
            error = await refused(http, "/v1/chat/completions", {"messages": HELLO}, status=401)
            assert error["code"] == "invalid_api_key"
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="secret") as client:
            assert [model.id async for model in client.models.list()] == ["tiny"]


async def test_the_application_can_be_mounted_in_another_one(engine: AsyncEngine) -> None:
    outer = aiohttp.web.Application()
    outer.add_subapp("/llm/", make_app(engine, model_name="tiny", api_key="secret"))
    runner = aiohttp.web.AppRunner(outer, handler_cancellation=True)
    await runner.setup()
    await aiohttp.web.TCPSite(runner, "127.0.0.1", 0).start()
    address = f"http://127.0.0.1:{runner.addresses[0][1]}"
    async with aiohttp.ClientSession(address) as http:
        assert (await http.get("/llm/health")).status == 200
    async with openai.AsyncOpenAI(base_url=f"{address}/llm/v1", api_key="secret") as client:
        assert (await client.completions.create(prompt="Paris", max_tokens=1, **GREEDY)).object == "text_completion"
    await runner.cleanup()


IMAGE: Any = {"role": "user", "content": [{"type": "image_url"}]}
TWO_LIMITS = {"max_tokens": 3, "max_completion_tokens": 4}
BAD: list[tuple[str, dict[str, Any], str, str]] = [
    ("chat/completions", {"messages": []}, "messages", "empty"),
    ("chat/completions", {}, "messages", "missing required field"),
    ("chat/completions", {"messages": [{"role": "user"}]}, "messages[0].content", "missing"),
    ("chat/completions", {"messages": [{"role": "user", "content": 3}]}, "messages[0].content", "text"),
    ("chat/completions", {"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", "'robot'"),
    ("chat/completions", {"messages": [IMAGE]}, "messages[0].content", "text"),
    ("chat/completions", {"messages": HELLO, "tools": [{}]}, "tools[0]", "required field"),
    ("chat/completions", {"messages": HELLO, "top_logprobs": 2}, "top_logprobs", "logprobs=true"),
    ("chat/completions", {"messages": HELLO, **TWO_LIMITS}, "max_completion_tokens", "differ"),
    ("completions", {"prompt": "x", "n": 0}, "n", "from 1 to 128"),
    ("completions", {"prompt": "x", "n": 10**9}, "n", "from 1 to 128"),
    ("completions", {"prompt": "x", "logprobs": 21}, "logprobs", "20"),
    ("completions", {"prompt": "x", "echo": True, "logprobs": 21}, "logprobs", "20"),
    ("completions", {"prompt": "x", "prompt_logprobs": -1}, "prompt_logprobs", "20"),
    ("completions", {"prompt": "x", "prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "stream=false"),
    ("completions", {"prompt": "x", "temprature": 1}, "temprature", "'temperature'"),
    ("completions", {"prompt": "x", "temperature": -1}, "temperature", "-1"),
    ("completions", {"prompt": "x", "temperature": "hot"}, "temperature", "float"),
    ("completions", {"prompt": "x", "top_p": 0}, "top_p", "(0, 1]"),
    ("completions", {"prompt": "x", "top_k": 1.5}, "top_k", "int"),
    ("completions", {"prompt": "x", "max_tokens": 0}, "max_tokens", "1 or more"),
    ("completions", {"prompt": "x", "seed": 2**64}, "seed", "64 bits"),
    ("completions", {"prompt": "x", "stop": [""]}, "stop", "non-empty"),
    ("completions", {"prompt": "x", "stop": list("abcde")}, "stop", "4 at most"),
    ("completions", {"prompt": "x", "stream_options": {}}, "stream_options", "stream=true"),
    ("completions", {"prompt": []}, "prompt", "empty"),
    ("completions", {"prompt": ["a", 1]}, "prompt", "mixes"),
    ("completions", {"prompt": [["a"]]}, "prompt", "int"),
]


@pytest.mark.parametrize(("path", "body", "param", "words"), BAD)
async def test_a_bad_field_is_refused_by_name(
    http: aiohttp.ClientSession, path: str, body: dict[str, Any], param: str, words: str
) -> None:
    error = await refused(http, f"/v1/{path}", body)
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert words in error["message"]


@pytest.mark.parametrize("prompt", ["", [10**6], [-1], [3] * 600])
async def test_what_the_engine_refuses_is_a_400_even_for_a_stream(http: aiohttp.ClientSession, prompt: Prompt) -> None:
    assert (await refused(http, "/v1/completions", {"prompt": prompt}))["message"]
    assert (await refused(http, "/v1/completions", {"prompt": prompt, "stream": True}))["message"]


NOT_JSON = [b"", b"null", b"[]", b'{"a": NaN}', b'{"a": 1e400}', b'{"a": "\xff"}', b"{" * 9, b"[" * 100_000]


@pytest.mark.parametrize("raw", NOT_JSON, ids=lambda raw: repr(raw[:9]))
async def test_a_body_that_is_no_json_object_is_a_400_and_the_next_request_works(
    http: aiohttp.ClientSession, client: openai.AsyncOpenAI, raw: bytes
) -> None:
    async with http.post("/v1/completions", data=raw) as response:
        assert response.status == 400
        assert "JSON" in (await response.json())["error"]["message"]
    assert (await client.completions.create(prompt="Paris", max_tokens=1, **GREEDY)).usage is not None


async def test_a_body_over_the_bound_is_a_413(http: aiohttp.ClientSession) -> None:
    async with http.post("/v1/completions", data=io.BytesIO(b" " * (MAX_BODY_BYTES + 1))) as response:
        assert response.status == 413
        assert (await response.json())["error"]["code"] == "body_too_large"


async def test_unknown_routes_and_methods_get_an_error_object(http: aiohttp.ClientSession) -> None:
    for response, status in ((await http.get("/v1/nothing"), 404), (await http.get("/v1/completions"), 405)):
        assert response.status == status
        assert set((await response.json())["error"]) == {"message", "type", "param", "code"}
    assert response.headers["Allow"] == "POST"


async def test_fields_that_mean_nothing_or_ask_for_nothing_pass(client: openai.AsyncOpenAI) -> None:
    harmless: Any = {
        "user": "u", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "safety_identifier": "s",
        "prompt_cache_key": "k", "n": 1, "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {},
        "response_format": {"type": "text"}, "logprobs": False, "tools": [], "seed": None, "stop": None,
    }  # fmt: skip
    answer = await client.chat.completions.create(
        messages=HELLO, max_completion_tokens=2, extra_body={"ignore_eos": True, **harmless}, **GREEDY
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 2


async def test_a_whole_answer_can_be_sent_back_as_a_message(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(messages=HELLO, max_tokens=4, **GREEDY)
    again = [*HELLO, answer.choices[0].message.model_dump(), {"role": "user", "content": None}]
    assert (await client.chat.completions.create(messages=again, max_tokens=1, **GREEDY)).choices[0].message


@pytest.mark.slow
async def test_smollm2_answers_through_the_openai_client(smollm2_path: Path) -> None:
    async with (
        AsyncEngine(smollm2_path, device="cpu") as engine,
        serving(engine, port=0) as address,
        openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none") as client,
    ):
        model = (await client.models.list()).data[0].id
        question: Any = [{"role": "user", "content": "What is the capital of France?"}]
        stream = await client.chat.completions.create(
            model=model, messages=question, temperature=0, max_tokens=24, stream=True
        )
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
    assert "Paris" in text
