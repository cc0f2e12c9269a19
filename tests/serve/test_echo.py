"""Prompts that come back with their log-probabilities: what scoring harnesses ask for."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import torch
from openai.types import Completion
from openai.types.chat import ChatCompletion

from overlap import AsyncEngine
from overlap.serve import serving

COLUMNS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
TEXT = "The quick brown fox, naïve 🙂"
IDS = [5, 300, 7, 7, 411, 12, *range(40, 70)]


@pytest.fixture
async def engine(tiny_llama_dir: Path) -> AsyncIterator[AsyncEngine]:
    async with AsyncEngine(tiny_llama_dir, device="cpu", dtype="float32", max_rows=4, prefill_chunk=16) as engine:
        yield engine


@pytest.fixture
async def http(engine: AsyncEngine) -> AsyncIterator[aiohttp.ClientSession]:
    async with serving(engine, port=0, model_name="tiny") as address, aiohttp.ClientSession(address) as session:
        yield session


async def complete(http: aiohttp.ClientSession, **body: Any) -> Any:
    async with http.post("/v1/completions", json={"temperature": 0, **body}) as response:
        assert response.status == 200, await response.text()
        answer = await response.json()
    check_shape(answer)
    return answer


def check_shape(answer: Any) -> None:
    """The client's types know no null, which the API has for the first token of a prompt."""
    answer = copy.deepcopy(answer)
    for choice in answer["choices"]:
        choice["finish_reason"] = choice["finish_reason"] or "stop"
        columns = choice["logprobs"] or {}
        for name, empty in (("token_logprobs", 0.0), ("top_logprobs", {})):
            if columns and columns[name][0] is None:
                columns[name][0] = empty
    Completion.model_validate(answer, strict=True)


def scores_by_transformers(path: Path, ids: list[int]) -> torch.Tensor:
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(path).eval()
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0].float().log_softmax(dim=-1)  # type: ignore[no-any-return]


async def test_a_scoring_harness_gets_the_log_probabilities_of_transformers(
    http: aiohttp.ClientSession, tiny_llama_dir: Path
) -> None:
    want = scores_by_transformers(tiny_llama_dir, IDS)
    body: dict[str, Any] = {"prompt": [IDS, IDS[:9], IDS[:1]], "logprobs": 1, "echo": True, "model": "tiny", "seed": 1}
    for max_tokens in (1, 0, 1):
        answer = await complete(http, **body, max_tokens=max_tokens)
        for choice, ids in zip(answer["choices"], body["prompt"], strict=True):
            columns = choice["logprobs"]
            assert [len(columns[name]) for name in COLUMNS] == [len(ids) + max_tokens] * 4
            assert columns["token_logprobs"][0] is columns["top_logprobs"][0] is None
            own = [float(want[place, token]) for place, token in enumerate(ids[1:])]
            assert columns["token_logprobs"][1 : len(ids)] == pytest.approx(own, abs=2e-5)
            for place in range(1, len(ids)):  # a harness takes the likeliest of these for the greedy choice
                top = columns["top_logprobs"][place]
                greedy = int(want[place - 1].argmax()) == ids[place]
                assert (max(top.values()) == columns["token_logprobs"][place]) == greedy
            assert columns["text_offset"][0] == 0
        assert answer["usage"]["completion_tokens"] == 3 * max_tokens
        assert answer["usage"]["prompt_tokens"] == sum(map(len, body["prompt"]))


async def test_an_echo_streams_what_it_says_whole(http: aiohttp.ClientSession) -> None:
    for max_tokens in (5, 0):
        body: dict[str, Any] = {"prompt": TEXT, "max_tokens": max_tokens, "logprobs": 2, "echo": True, "temperature": 0}
        (whole,) = (await complete(http, **body))["choices"]
        assert whole["text"].startswith(TEXT)
        assert len(whole["logprobs"]["tokens"]) > 5
        async with http.post("/v1/completions", json={**body, "stream": True}) as response:
            lines = (await response.text()).splitlines()
        chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        for chunk in chunks:
            check_shape(chunk)
        choices = [chunk["choices"][0] for chunk in chunks]
        assert "".join(choice["text"] for choice in choices) == whole["text"]
        for name in COLUMNS:
            told = [one for choice in choices if choice["logprobs"] for one in choice["logprobs"][name]]
            assert told == whole["logprobs"][name]
        assert choices[-1]["finish_reason"] == whole["finish_reason"] == "length"


async def test_offsets_say_where_a_token_begins_in_the_text(http: aiohttp.ClientSession) -> None:
    (choice,) = (await complete(http, prompt="Pack my box", max_tokens=4, logprobs=0, echo=True))["choices"]
    columns = choice["logprobs"]
    echoed = [offset for offset in columns["text_offset"] if offset < len("Pack my box")]
    starts = itertools.accumulate(map(len, columns["tokens"][: len(echoed)]), initial=0)
    assert [*echoed, len("Pack my box")] == list(starts)
    assert "".join(columns["tokens"][: len(echoed)]) == "Pack my box"
    assert columns["top_logprobs"][0] is None
    own = zip(columns["tokens"], columns["token_logprobs"], strict=True)
    assert columns["top_logprobs"][1:] == [{token: logprob} for token, logprob in own][1:]


async def test_nothing_but_the_prompt_comes_back_where_no_token_is_wanted(http: aiohttp.ClientSession) -> None:
    answer = await complete(http, prompt=TEXT, max_tokens=0, echo=True, n=2)
    assert [choice["text"] for choice in answer["choices"]] == [TEXT] * 2
    assert [choice["logprobs"] for choice in answer["choices"]] == [None] * 2
    assert answer["usage"]["completion_tokens"] == 0


async def test_the_table_of_vllm_has_each_token_of_the_prompt_by_its_id(
    http: aiohttp.ClientSession, tiny_llama_dir: Path
) -> None:
    want = scores_by_transformers(tiny_llama_dir, IDS)
    answer = await complete(http, prompt=[IDS], max_tokens=1, prompt_logprobs=2, logprobs=5, echo=True)
    (choice,) = answer["choices"]
    table = choice["prompt_logprobs"]
    assert table[0] is None
    assert len(table) == len(IDS)
    for place, (row, token) in enumerate(zip(table[1:], IDS[1:], strict=True)):
        assert row[str(token)]["logprob"] == pytest.approx(float(want[place, token]), abs=2e-5)
        best = want[place].topk(2).indices.tolist()
        assert set(row) == {str(one) for one in (token, *best)}
        assert [row[str(one)]["rank"] for one in best] == [1, 2]
    messages = [{"role": "user", "content": "Hello"}]
    body = {"messages": messages, "max_tokens": 1, "prompt_logprobs": 0, "temperature": 0}
    async with http.post("/v1/chat/completions", json=body) as response:
        chat = await response.json()
    ChatCompletion.model_validate(chat, strict=True)
    assert len(chat["prompt_logprobs"]) == chat["usage"]["prompt_tokens"]
    assert "prompt_logprobs" not in await complete(http, prompt=TEXT, max_tokens=1)
