"""A calibration measures every way, disturbs no answer, and is there for the next engine."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import pytest

from overlap import AsyncEngine, ConfigError, EngineClosed, SamplingParams
from overlap.calibrate import Cell, cells_of
from overlap.cli import main
from overlap.microbatch.policy import SplitPolicy

OPTIONS: dict[str, Any] = {
    "device": "cpu", "dtype": "float32", "max_rows": 6, "kv_cache": 2048, "token_budget": 48, "target_itl_ms": 5.0,
}  # fmt: skip
PARAMS = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True)


def policy_of(engine: AsyncEngine) -> SplitPolicy:
    policy = engine._core.parts[0].splitter
    assert isinstance(policy, SplitPolicy)
    return policy


async def test_each_way_is_measured_and_then_chosen_from(tiny_llama_dir: Path, tmp_path: Path) -> None:
    async with AsyncEngine(tiny_llama_dir, cache_dir=str(tmp_path), **OPTIONS) as engine:
        assert "; `overlap calibrate` measures them" in engine.explain()
        await engine.calibrate(progress=False)
        assert "overlap calibrate" not in engine.explain()
        policy = policy_of(engine)
        assert policy.calibrated, engine.explain()
        assert policy._held is None
        statistics = engine.statistics()
        assert (statistics.waiting, statistics.running) == (0, 0)
    async with AsyncEngine(tiny_llama_dir, cache_dir=str(tmp_path), **OPTIONS) as engine:
        assert "were measured before" in engine.explain()
        assert policy_of(engine).calibrated


async def test_what_was_measured_is_kept_though_an_engine_that_knew_less_ends_later(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    async with AsyncEngine(tiny_llama_dir, cache_dir=str(tmp_path), **OPTIONS) as server:
        async with AsyncEngine(tiny_llama_dir, cache_dir=str(tmp_path), **OPTIONS) as engine:
            await engine.calibrate(progress=False)
            (written,) = (tmp_path / "costs").iterdir()
            assert written.stat().st_size > 500, "kept at once, not when the engine ends"
        async for _ in server.generate([5, 6, 7], PARAMS):
            pass
    async with AsyncEngine(tiny_llama_dir, cache_dir=str(tmp_path), **OPTIONS) as engine:
        assert policy_of(engine).calibrated, engine.explain()


async def test_models_in_other_places_have_costs_of_their_own_random_ones_too(tmp_path: Path) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 97, "hidden_size": 32,
        "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "eos_token_id": 2,
    }  # fmt: skip
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    for name in ("one", "two", "two/../one"):
        model, cache = tmp_path / name, str(tmp_path / "cache")
        async with AsyncEngine(model, cache_dir=cache, load_format="dummy", **OPTIONS) as engine:
            assert ("were measured before" in engine.explain()) == ("/.." in name)
            async for _ in engine.generate([5, 6, 7], PARAMS):
                pass
    assert len(list((tmp_path / "cache" / "costs").iterdir())) == 2


async def test_answers_of_others_stay_as_they_are_and_a_cancelled_one_leaves_nothing(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    async def answer(engine: AsyncEngine) -> list[int]:
        return [output.token_ids async for output in engine.generate([5, 6, 7, 8], PARAMS)][-1]

    async with AsyncEngine(tiny_llama_dir, cache_dir=str(tmp_path), **OPTIONS) as engine:
        alone = await answer(engine)
        running = asyncio.create_task(engine.calibrate(progress=False))
        while not running.done():
            assert await answer(engine) == alone
        await running
        running = asyncio.create_task(engine.calibrate(progress=False))
        await asyncio.sleep(0.1)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert await answer(engine) == alone
        assert policy_of(engine)._held is None
        await asyncio.wrap_future(engine._core.idle())
        statistics = engine.statistics()
        assert statistics.free_pages + statistics.evictable_pages == statistics.num_pages


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"lanes": "serial"}, r"lanes='serial' was asked for: leave it out\.$"),
        ({}, r"Here lanes = mixed: on a CPU, .* once\. Give target_itl_ms \(`--target-itl-ms`\) to have it choose\.$"),
        ({"speculative": "ngram"}, r"Here lanes = mixed: a drafter and its verify share one lane .* so far\.$"),
    ],
)
async def test_where_nothing_is_chosen_it_says_why_there_is_nothing_to_calibrate(
    tiny_llama_dir: Path, options: dict[str, Any], says: str
) -> None:
    async with AsyncEngine(tiny_llama_dir, device="cpu", kv_cache=640, **options) as engine:
        with pytest.raises(ConfigError, match='There is nothing to calibrate: only lanes="auto" chooses. ' + says):
            await engine.calibrate()


@pytest.mark.parametrize(("option", "has", "why"), [("max_rows", 1, "be 2 or more"), ("context", 24, "be 32 or more")])
async def test_where_no_prompt_can_be_read_beside_an_answer_it_says_so(
    tiny_llama_dir: Path, option: str, has: int, why: str
) -> None:
    async with AsyncEngine(tiny_llama_dir, **{**OPTIONS, option: has}) as engine:
        with pytest.raises(ConfigError, match=f"{option} has to {why}, not {has}"):
            await engine.calibrate()
        assert policy_of(engine)._held is None


async def test_a_short_context_and_a_short_queue_are_enough_and_two_at_once_are_not(tiny_llama_dir: Path) -> None:
    async with AsyncEngine(tiny_llama_dir, **{**OPTIONS, "context": 40, "max_waiting": 1}) as engine:
        running = asyncio.create_task(engine.calibrate(progress=False))
        await asyncio.sleep(0.05)
        with pytest.raises(ConfigError, match="by someone else"):
            await engine.calibrate()
        await running
        assert policy_of(engine).calibrated


async def test_one_that_is_cancelled_while_it_begins_is_over_and_ends_no_other(tiny_llama_dir: Path) -> None:
    async def begin_and_cancel(engine: AsyncEngine) -> None:
        engine._core._post(time.sleep, 0.05)  # as a long step
        beginning = asyncio.create_task(engine.calibrate(progress=False))
        await asyncio.sleep(0)
        beginning.cancel()
        with pytest.raises(asyncio.CancelledError):
            await beginning

    async with AsyncEngine(tiny_llama_dir, **OPTIONS) as engine:
        await begin_and_cancel(engine)
        assert policy_of(engine)._held is None
        running = asyncio.create_task(engine.calibrate(progress=False))
        while policy_of(engine)._held is None:
            await asyncio.sleep(0.001)
        await begin_and_cancel(engine)
        with pytest.raises(ConfigError, match="by someone else"):
            await engine.calibrate()
        await running
        assert policy_of(engine).calibrated


async def test_closing_the_engine_ends_a_calibration(tiny_llama_dir: Path) -> None:
    engine = AsyncEngine(tiny_llama_dir, **OPTIONS)
    await engine.start()
    running = asyncio.create_task(engine.calibrate(progress=False))
    await asyncio.sleep(0.1)
    await engine.aclose()
    with pytest.raises(EngineClosed):
        await asyncio.wait_for(running, 20)


def test_the_sizes_fit_an_engine_of_any_size() -> None:
    large = cells_of(max_rows=256, token_budget=8192, kv_tokens=10**6, context=4096)
    assert large == (
        Cell(162, 1024, 8192, 1024), Cell(162, 1024, 2048, 1024), Cell(192, 16, 4096, 4095), Cell(40, 1024, 8192, 1024)
    )  # fmt: skip
    assert cells_of(max_rows=2, token_budget=2, kv_tokens=16, context=32) == (Cell(1, 16, 2, 2), Cell(1, 16, 1, 1))
    little_kv = cells_of(max_rows=512, token_budget=8192, kv_tokens=400_000, context=16_384)
    assert little_kv[0] == Cell(65, 1024, 8192, 1024), "fewer rows, and contexts as they are"
    assert little_kv[-1] == Cell(16, 1024, 8192, 1024)
    few_slots = cells_of(max_rows=6, token_budget=8192, kv_tokens=10**6, context=9000)
    assert few_slots[0] == Cell(4, 1024, 8192, 8192), "two chunks at a time, and two slots for them"
    for size in cells_of(max_rows=64, token_budget=8192, kv_tokens=4096, context=100):
        assert size.rows + size.tokens <= 4096
        assert max(size.context, size.prompt) < 100


def test_a_command_does_it_and_says_what_is_known(
    tiny_llama_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [f"--{name.replace('_', '-')}={value}" for name, value in OPTIONS.items()]
    assert main(["calibrate", str(tiny_llama_dir), f"--cache-dir={tmp_path}", *given]) == 0
    told = capsys.readouterr().out
    assert "lanes: steps that each way is known by: mixed" in told
    assert list(tmp_path.glob("costs/*.json"))
