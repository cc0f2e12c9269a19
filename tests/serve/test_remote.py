"""An engine behind a socket, in one process here: what a front says and hears is the same."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from overlap import AsyncEngine, SamplingParams, StructuredOutput
from overlap.config import EngineConfig
from overlap.core import Core
from overlap.errors import EngineClosed, EngineDead
from overlap.messages import Prompt, TokenLogprob
from overlap.serve.engine_process import Hub, welcome_of
from overlap.serve.remote import RemoteEngine

OPTIONS = {"device": "cpu", "dtype": "float32", "max_rows": 4}
PROMPTS: list[Prompt] = ["How many tokens are there?", [5, 9, 12, 5, 9], [{"role": "user", "content": "Hello"}]]


@asynccontextmanager
async def listening(model: Path, socket: Path) -> AsyncIterator[list[str]]:
    """An engine behind `socket`; the list has a word for each front that came and each that went."""
    asked = EngineConfig.from_options(model, OPTIONS)
    core = Core(asked)
    opened = await asyncio.wrap_future(core.start())
    hub = Hub(core, opened, welcome_of(asked, opened))
    seen: list[str] = []

    async def attend(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append("came")
        await hub.attend(reader, writer)
        seen.append("went")

    server = await asyncio.start_unix_server(attend, socket)
    beating = asyncio.create_task(hub.beat())
    try:
        yield seen
    finally:
        beating.cancel()
        server.close()
        await asyncio.wrap_future(core.close())
        await asyncio.sleep(0)
        for _ in range(100):
            if seen.count("came") == seen.count("went"):
                break
            await asyncio.sleep(0.01)


def flat(scores: Sequence[TokenLogprob | None] | None) -> list[float]:
    """The numbers in them, one behind the other."""
    given = [score for score in scores or () if score is not None]
    return [
        number for score in given for pair in ((score.token, score.logprob), *score.alternatives) for number in pair
    ]


async def test_an_engine_behind_a_socket_answers_as_one_in_this_process(tiny_llama_dir: Path, tmp_path: Path) -> None:
    asks = [
        SamplingParams(max_tokens=24, temperature=0, logprobs=2),
        SamplingParams(max_tokens=24, temperature=1, seed=7, stop_token_ids=[3], repetition_penalty=1.2),
        SamplingParams(max_tokens=24, temperature=0, ignore_eos=True, prompt_logprobs=1),
        SamplingParams(max_tokens=24, temperature=0, structured=StructuredOutput.choice(["yes", "no"])),
    ]
    async with AsyncEngine(tiny_llama_dir, **OPTIONS) as near:
        wanted = [await near.generate(prompt, params) for prompt in PROMPTS for params in asks]
    async with listening(tiny_llama_dir, tmp_path / "s"), RemoteEngine("tiny", str(tmp_path / "s")) as far:
        found = await asyncio.gather(*(far.generate(prompt, params) for prompt in PROMPTS for params in asks))
    for one, other in zip(wanted, found, strict=True):
        assert (one.text, one.token_ids, one.finish_reason) == (other.text, other.token_ids, other.finish_reason)
        for mine, theirs in ((one.logprobs, other.logprobs), (one.prompt_logprobs, other.prompt_logprobs)):
            assert flat(theirs) == pytest.approx(flat(mine), abs=1e-4), "a batch of another size rounds otherwise"


async def test_tasks_that_start_one_engine_connect_once(tiny_llama_dir: Path, tmp_path: Path) -> None:
    async with listening(tiny_llama_dir, tmp_path / "s") as seen:
        far = RemoteEngine("tiny", str(tmp_path / "s"))
        await asyncio.gather(*(far.start() for _ in range(5)))
        assert seen == ["came"]
        await far.aclose()
    assert seen == ["came", "went"]


@pytest.mark.parametrize("turns", range(6))
async def test_who_starts_an_engine_that_is_closed_meanwhile_hears_so(
    tiny_llama_dir: Path, tmp_path: Path, turns: int
) -> None:
    async with listening(tiny_llama_dir, tmp_path / "s") as seen:
        far = RemoteEngine("tiny", str(tmp_path / "s"))
        starting = asyncio.create_task(far.start())
        for _ in range(turns):
            await asyncio.sleep(0)
        await far.aclose()
        with suppress(EngineClosed):
            await asyncio.wait_for(starting, 10)
        with pytest.raises(EngineClosed):
            await far.start()
    assert seen.count("came") == seen.count("went"), "no connection is left open"


async def test_an_engine_that_is_not_there_is_said_to_be_out_of_reach(tmp_path: Path) -> None:
    far = RemoteEngine("tiny", str(tmp_path / "nobody"))
    with pytest.raises(EngineDead, match="cannot be reached"):
        await far.start()
    await far.aclose()
