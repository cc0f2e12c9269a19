"""How requests are served beside others: priority, deadline, fair turns, cached prefixes, the bound on the queue."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from overlap import (
    AsyncEngine,
    DeadlineExceeded,
    EngineClosed,
    Output,
    QueueFull,
    RequestError,
    SamplingParams,
)

OPTIONS: dict[str, Any] = {"device": "cpu", "dtype": "float32", "kv_cache": 4096, "max_rows": 8}
PREFIX = [7 + i % 90 for i in range(100)]


def params(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)


@pytest.fixture
async def engine(tiny_llama_dir: Path) -> AsyncIterator[AsyncEngine]:
    async with AsyncEngine(tiny_llama_dir, **OPTIONS) as engine:
        yield engine
        await asyncio.wrap_future(engine._core.idle())
        await asyncio.wrap_future(engine._core.call(engine._core.parts[0].check_idle))


async def last(engine: AsyncEngine, prompt: Any, max_tokens: int = 4, **terms: Any) -> Output:
    output = None
    async for output in engine.generate(prompt, params(max_tokens), **terms):
        pass
    assert output is not None
    return output


async def test_usage_says_how_much_of_a_prompt_was_cached(engine: AsyncEngine) -> None:
    cold = await last(engine, PREFIX)
    warm = await last(engine, PREFIX)
    longer = await last(engine, [*PREFIX, 5, 6, 7])
    assert [out.usage.cached_tokens for out in (cold, warm, longer)] == [0, 96, 96]
    assert warm.token_ids == cold.token_ids
    figures = engine.statistics()
    assert figures.cached_tokens == 192
    assert figures.hit_rate == pytest.approx(192 / 303)


async def test_the_next_turn_of_a_conversation_finds_the_answer_cached(engine: AsyncEngine) -> None:
    first = await last(engine, PREFIX, max_tokens=40)
    second = await last(engine, PREFIX + first.token_ids + [9, 9, 9])
    assert second.usage.cached_tokens == (100 + 39) // 16 * 16  # the last token's KV was never needed


async def test_a_full_hit_leaves_a_token_to_run(engine: AsyncEngine) -> None:
    cold = await last(engine, PREFIX[:96])
    warm = await last(engine, PREFIX[:96])
    assert warm.usage.cached_tokens == 80
    assert warm.token_ids == cold.token_ids


async def test_prefixes_are_shared_within_a_salt_only(engine: AsyncEngine) -> None:
    await last(engine, PREFIX, cache_salt="a")
    assert (await last(engine, PREFIX, cache_salt="b")).usage.cached_tokens == 0
    assert (await last(engine, PREFIX)).usage.cached_tokens == 0
    assert (await last(engine, PREFIX, cache_salt="a")).usage.cached_tokens == 96


async def test_the_cache_can_be_cleared_and_turned_off(engine: AsyncEngine, tiny_llama_dir: Path) -> None:
    await last(engine, PREFIX)
    assert await engine.clear_cache() == 6
    assert (await last(engine, PREFIX)).usage.cached_tokens == 0
    async with AsyncEngine(tiny_llama_dir, prefix_cache=False, **OPTIONS) as other:
        await last(other, PREFIX)
        assert (await last(other, PREFIX)).usage.cached_tokens == 0
        assert "prefix cache: off" in other.explain()


async def test_equal_prompts_at_the_same_time_are_computed_once(engine: AsyncEngine) -> None:
    outputs = await asyncio.gather(*(last(engine, [*PREFIX, i]) for i in range(8)))
    assert sorted(out.usage.cached_tokens for out in outputs) == [0] + 7 * [96]


async def test_a_higher_priority_goes_first(tiny_llama_dir: Path) -> None:
    ended: list[str] = []

    async def ask(engine: AsyncEngine, name: str, priority: int) -> None:
        await last(engine, [3, 4, 5], max_tokens=30, priority=priority)
        ended.append(name)

    async with AsyncEngine(tiny_llama_dir, **{**OPTIONS, "max_rows": 1}) as engine:
        running = engine.generate([1, 2], params(200))
        await anext(running)
        tasks = [asyncio.create_task(ask(engine, name, rank)) for name, rank in [("a", 0), ("b", 0), ("c", 1)]]
        alone = [out.token_ids async for out in running][-1]
        await asyncio.gather(*tasks)
        assert ended == ["c", "a", "b"]
        assert engine.statistics().preemptions > 0, "the running request made room"
        assert (await last(engine, [1, 2], max_tokens=200)).token_ids == alone, "and went on with the same tokens"


async def test_keys_get_fair_turns(tiny_llama_dir: Path) -> None:
    ended: list[str] = []

    async def ask(engine: AsyncEngine, key: str) -> None:
        await last(engine, [3, 4, 5], max_tokens=20, fairness_key=key)
        ended.append(key)

    async with AsyncEngine(tiny_llama_dir, **{**OPTIONS, "max_rows": 1}) as engine:
        greedy = [asyncio.create_task(ask(engine, "greedy")) for _ in range(6)]
        while engine.statistics().waiting < 5:
            await asyncio.sleep(0.001)
        await asyncio.gather(*greedy, *(asyncio.create_task(ask(engine, "modest")) for _ in range(3)))
    assert ended[:7].count("modest") == 3, ended


@pytest.mark.parametrize("rows", [1, 8], ids=["while it waits", "while it runs"])
async def test_a_deadline_ends_a_request_where_it_is(tiny_llama_dir: Path, rows: int) -> None:
    async with AsyncEngine(tiny_llama_dir, **{**OPTIONS, "max_rows": rows}) as engine:
        running = engine.generate([1, 2], params(400))
        await anext(running)
        with pytest.raises(DeadlineExceeded, match="deadline"):
            await last(engine, [3, 4], max_tokens=400, deadline=0.05)
        await running.aclose()
        await last(engine, [3, 4], deadline=60)
        await asyncio.wrap_future(engine._core.idle())
        assert engine.statistics().expired == 1
        assert not engine._core._loop._deadlines  # type: ignore[union-attr]


async def test_one_request_too_many_is_refused_and_the_others_are_served(tiny_llama_dir: Path) -> None:
    async with AsyncEngine(tiny_llama_dir, **{**OPTIONS, "max_rows": 1, "max_waiting": 2}) as engine:
        running = engine.generate([1, 2], params(400))
        await anext(running)
        outcomes = await asyncio.gather(*(last(engine, [3, 4 + i]) for i in range(3)), return_exceptions=True)
        refused = [outcome for outcome in outcomes if isinstance(outcome, QueueFull)]
        assert len(refused) == 1
        assert "2 requests wait already, and max_waiting is 2" in str(refused[0])
        assert sum(isinstance(outcome, Output) for outcome in outcomes) == 2


@pytest.mark.parametrize(
    ("terms", "words"),
    [
        ({"priority": 1.5}, "priority must be an integer, not 1.5"),
        ({"priority": 2**31}, "priority must be within ±2147483647, not 2147483648"),
        ({"priority": -(2**31)}, "priority must be within ±2147483647, not -2147483648"),
        ({"deadline": 0}, "deadline must be a number of seconds above 0, not 0"),
        ({"deadline": float("inf")}, "deadline"),
        ({"fairness_key": 3}, "fairness_key must be a string"),
        ({"cache_salt": None}, "cache_salt must be a string"),
        ({"fairness_key": "\ud800"}, "fairness_key has half of a surrogate pair"),
        ({"cache_salt": "a\ud800"}, "cache_salt has half of a surrogate pair"),
    ],
)
async def test_terms_out_of_range_are_refused(engine: AsyncEngine, terms: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        engine.generate([1], **terms)


async def test_an_engine_that_drains_takes_nothing_new(tiny_llama_dir: Path) -> None:
    engine = AsyncEngine(tiny_llama_dir, **OPTIONS)
    await engine.start()
    running = engine.generate([1, 2], params(100))
    await anext(running)
    closing = asyncio.create_task(engine.aclose(drain=True))
    await asyncio.sleep(0)
    with pytest.raises(EngineClosed, match="begins nothing new"):
        await last(engine, [3])
    assert len([out async for out in running][-1].token_ids) == 100
    await closing


async def test_a_second_model_opens_after_the_first(tiny_llama_dir: Path, tmp_path: Path) -> None:
    import json
    import shutil

    other = tmp_path / "wider"
    shutil.copytree(tiny_llama_dir, other)
    config = json.loads((other / "config.json").read_text())
    config["intermediate_size"] += 32
    (other / "config.json").write_text(json.dumps(config))
    async with AsyncEngine(tiny_llama_dir, **OPTIONS) as first:
        await last(first, PREFIX)
    async with AsyncEngine(other, load_format="dummy", **OPTIONS) as second:
        assert (await last(second, PREFIX)).usage.cached_tokens == 0
