"""Answers of a certain form, as clients ask for them: response_format, tools that must be called, vLLM's extras."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Literal

import aiohttp
import openai
import pydantic
import pytest

from overlap import AsyncEngine, SamplingParams
from overlap.errors import RequestError
from overlap.grammar.compile import check
from overlap.serve import serving
from overlap.serve.errors import ApiError
from overlap.serve.grammar import held
from overlap.serve.tools import CallFormat

HELLO: Any = [{"role": "user", "content": "How many tokens are there?"}]
GREEDY: dict[str, Any] = {"model": "tiny", "temperature": 0}
TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "find",
            "description": "Find things.",
            "parameters": {
                "type": "object",
                "properties": {"what": {"$ref": "#/$defs/thing"}, "most": {"type": "integer", "maximum": 99}},
                "required": ["what", "most"],
                "additionalProperties": False,
                "$defs": {"thing": {"enum": ["a", "bc"]}},
            },
        },
    },
    {"type": "function", "function": {"name": "stop"}},
]
TEMPLATE = (
    "{% if tools %}<tool_call>{% endif %}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class Place(pydantic.BaseModel):
    name: str = pydantic.Field(max_length=5)
    kind: Literal["town", "river"]
    people: int = pydantic.Field(ge=0, le=999)


@pytest.fixture(scope="module")
def model(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a template that takes tools in the form of Hermes."""
    path = tmp_path_factory.mktemp("forms") / "model"
    shutil.copytree(tiny_llama_dir, path)
    settings = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": TEMPLATE}))
    return path


@pytest.fixture
async def engine(model: Path) -> AsyncIterator[AsyncEngine]:
    async with AsyncEngine(model, device="cpu", dtype="float32", max_rows=8) as engine:
        yield engine


@pytest.fixture
async def address(engine: AsyncEngine) -> AsyncIterator[str]:
    async with serving(engine, port=0, model_name="tiny") as address:
        yield address


@pytest.fixture
async def client(address: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


async def test_parse_returns_a_pydantic_model(client: openai.AsyncOpenAI) -> None:
    for seed in range(4):
        answer = await client.chat.completions.parse(
            model="tiny", messages=HELLO, response_format=Place, temperature=1.2, seed=seed, n=2
        )
        for choice in answer.choices:
            assert choice.finish_reason == "stop"
            assert isinstance(choice.message.parsed, Place)


async def test_a_stream_ends_in_the_same_model(client: openai.AsyncOpenAI) -> None:
    whole = await client.chat.completions.parse(messages=HELLO, response_format=Place, **GREEDY)
    async with client.chat.completions.stream(messages=HELLO, response_format=Place, **GREEDY) as stream:
        async for _ in stream:
            pass
        final = await stream.get_final_completion()
    assert final.choices[0].message.parsed == whole.choices[0].message.parsed


async def test_json_object_answers_in_an_object(client: openai.AsyncOpenAI) -> None:
    asked: Any = {"messages": HELLO, "response_format": {"type": "json_object"}, "max_tokens": 400}
    ends = []
    for seed in range(6):
        answer = await client.chat.completions.create(model="tiny", temperature=1.0, seed=seed, **asked)
        ends.append(answer.choices[0].finish_reason)
        if ends[-1] == "stop":
            assert isinstance(json.loads(answer.choices[0].message.content or ""), dict)
    assert "stop" in ends


async def test_responses_have_the_form_of_text_format(client: openai.AsyncOpenAI) -> None:
    response = await client.responses.parse(input="Hello", text_format=Place, **GREEDY)
    assert isinstance(response.output_parsed, Place)
    async with client.responses.stream(input="Hello", text_format=Place, **GREEDY) as stream:
        async for _ in stream:
            pass
        final = await stream.get_final_response()
    assert final.output_parsed == response.output_parsed


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "find"}}])
async def test_a_tool_that_must_be_called_is(client: openai.AsyncOpenAI, choice: Any) -> None:
    for seed in range(3):
        asked: Any = {
            "model": "tiny", "messages": HELLO, "tools": TOOLS, "tool_choice": choice, "temperature": 1.0, "seed": seed,
            "parallel_tool_calls": False, "max_tokens": 250,
        }  # fmt: skip
        answer = await client.chat.completions.create(**asked)
        message = answer.choices[0].message
        assert (answer.choices[0].finish_reason, message.content) == ("tool_calls", None)
        (call,) = message.tool_calls or []
        assert call.type == "function"
        arguments = json.loads(call.function.arguments)
        if call.function.name == "find":
            assert arguments["what"] in ("a", "bc")
            assert arguments["most"] <= 99
        else:
            assert (choice, call.function.name, arguments) == ("required", "stop", {})
        streamed = ["", ""]
        async for chunk in await client.chat.completions.create(stream=True, **asked):
            for delta in chunk.choices[0].delta.tool_calls or ():
                assert delta.function is not None
                streamed[0] += delta.function.name or ""
                streamed[1] += delta.function.arguments or ""
        assert streamed == [call.function.name, call.function.arguments]


async def test_responses_call_the_function_that_they_have_to(client: openai.AsyncOpenAI) -> None:
    flat: Any = [{"type": "function", "strict": True, **tool["function"]} for tool in TOOLS[:1]]
    choice: Any = {"type": "function", "name": "find"}
    response = await client.responses.create(input="Hello", tools=flat, tool_choice=choice, **GREEDY)
    assert [item.type for item in response.output] == ["function_call"]


async def test_a_response_format_beside_tools_is_that_of_an_answer_without_calls(client: openai.AsyncOpenAI) -> None:
    kinds = set()
    for seed in range(8):
        form: Any = {"type": "json_schema", "json_schema": {"name": "p", "schema": Place.model_json_schema()}}
        answer = await client.chat.completions.create(
            model="tiny", messages=HELLO, tools=TOOLS, response_format=form, temperature=1.5, seed=seed, max_tokens=250
        )
        message = answer.choices[0].message
        if answer.choices[0].finish_reason == "length":
            continue
        kinds.add("call" if message.tool_calls else "text")
        if not message.tool_calls:
            Place.model_validate_json(message.content or "")
    assert "text" in kinds or "call" in kinds


@pytest.mark.parametrize(
    ("extra", "fits"),
    [
        ({"guided_choice": ["yes", "no"]}, "yes|no"),
        ({"guided_regex": "[ab]{3}"}, "[ab]{3}"),
        ({"guided_json": {"enum": [1, 22]}}, "1|22"),
        ({"guided_json": '{"enum": [1, 22]}'}, "1|22"),
        ({"guided_grammar": 'start: "x" | "yy"'}, "x|yy"),
        ({"structured_outputs": {"choice": ["yes", "no"], "json": None}}, "yes|no"),
        ({"structured_outputs": {"regex": "[ab]{3}"}}, "[ab]{3}"),
    ],
)
async def test_the_extras_of_vllm_are_understood(client: openai.AsyncOpenAI, extra: Any, fits: str) -> None:
    chat = await client.chat.completions.create(messages=HELLO, extra_body=extra, **GREEDY)
    assert re.fullmatch(fits, chat.choices[0].message.content or "")
    text = await client.completions.create(prompt="Say", extra_body=extra, temperature=1.0, seed=3, model="tiny")
    assert re.fullmatch(fits, text.choices[0].text)


@pytest.mark.parametrize(
    ("more", "param", "message"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format", "an object with a name and a schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": 5}}}, "response_format",
         "must be a JSON schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "x"}}}}, None,
         "Invalid type: x"),
        ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "guided_regex", "Send one of them"),
        ({"guided_regex": "(a"}, None, "unclosed group"),
        ({"guided_regex": "a" * 70_000}, "guided_regex", "65536 are the most"),
        ({"guided_choice": []}, "guided_choice", "give 1 to 512"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs", "structural_tag is not supported"),
        ({"guided_choice": ["a"], "min_tokens": 3}, "min_tokens", "exclude each other"),
        ({"tools": TOOLS, "tool_choice": "required", "guided_regex": "a"}, "tool_choice", "exclude each other"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice", "none of"),
        ({"guided_decoding_backend": "x"}, "guided_decoding_backend", "Unknown field"),
    ],
)  # fmt: skip
async def test_a_form_that_cannot_be_is_a_400_that_names_its_field(
    address: str, more: Any, param: str | None, message: str
) -> None:
    async with aiohttp.ClientSession(address) as http:
        for stream in (False, True):
            body = {"messages": HELLO, **GREEDY, "stream": stream, **more}
            async with http.post("/v1/chat/completions", json=body) as response:
                error = (await response.json())["error"]
            assert (response.status, error["param"]) == (400, param)
            assert message in error["message"]


def test_a_form_begins_behind_the_reasoning_that_an_answer_begins_in() -> None:
    params = SamplingParams()
    made = held(params, TOOLS, ("find",), parallel=True, calls="hermes", thinking="inside").structured
    assert made is not None
    assert made.behind == "</think>"
    check(made)
    styles: tuple[CallFormat, ...] = ("hermes", "llama")
    for style in styles:
        whole = held(params, TOOLS, ("find", "stop"), parallel=True, calls=style, thinking="never").structured
        assert whole is not None
        check(whole)
    assert held(params, TOOLS, (), parallel=True, calls="hermes", thinking="inside") is params
    with pytest.raises((ApiError, RequestError), match="nested"):
        deep: Any = {}
        for _ in range(70):
            deep = {"items": deep}
        tool = {"type": "function", "function": {"name": "f", "parameters": deep}}
        held(params, [tool], ("f",), parallel=True, calls="hermes", thinking="never")


@pytest.mark.slow
async def test_forms_cross_to_an_engine_in_another_process(model: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "overlap", "serve", str(model), "--port", "0", "--fronts", "1"]
    program = subprocess.Popen(  # noqa: ASYNC220 - it returns at once
        [*command, "--device", "cpu", "--dtype", "float32", "--max-rows", "8"],
        stderr=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        assert program.stderr is not None
        found = re.search(r"(http://127\.0\.0\.1:\d+)/v1", await asyncio.to_thread(program.stderr.readline))
        assert found
        async with openai.AsyncOpenAI(base_url=f"{found[1]}/v1", api_key="none", max_retries=0) as client:
            asked: Any = {"model": str(model), "messages": HELLO}
            many = [client.chat.completions.parse(response_format=Place, seed=seed, **asked) for seed in range(6)]
            for answer in await asyncio.gather(*many):
                assert isinstance(answer.choices[0].message.parsed, Place)
            for bad in ("(a", "[^\\s\\S]"):  # the front refuses the first; the engine's process the second
                with pytest.raises(openai.BadRequestError, match="cannot be held to this regex"):
                    await client.chat.completions.create(extra_body={"guided_regex": bad}, **asked)
            again = await client.chat.completions.create(extra_body={"guided_choice": ["ok"]}, **asked)
            assert again.choices[0].message.content == "ok"
    finally:
        program.terminate()
        assert await asyncio.to_thread(program.wait) == 0
        assert program.stderr is not None
        program.stderr.close()
