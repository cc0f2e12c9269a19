"""One engine on two GPUs over NCCL: the same tokens, and nothing left behind, however it ends."""

from __future__ import annotations

import asyncio
import json
import signal
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from overlap import AsyncEngine, EngineDead, SamplingParams
from overlap.parallel.leading import LeadingRunner
from overlap.schedule.plan import StepPlan

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 512, "hidden_size": 256,
    "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2,
    "head_dim": 128, "max_position_embeddings": 1024, "tie_word_embeddings": False, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
OPTIONS: dict[str, Any] = {"device": "cuda", "load_format": "dummy", "max_rows": 8, "kv_cache": 8192}
PROMPTS = [[3 + (i * k) % 500 for i in range(20 + 9 * k)] for k in range(1, 7)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    (path / "config.json").write_text(json.dumps(CONFIG))
    return path


def left_behind() -> set[str]:
    """Return what an engine of several ranks could leave: processes, shared memory, and the file in which they meet."""
    names = [("/dev/shm", "nccl*"), ("/dev/shm", "torch*"), (tempfile.gettempdir(), "overlap-ranks-*")]
    files = {str(path) for folder, pattern in names for path in Path(folder).glob(pattern)}
    return files | {f"process {child.pid}" for child in psutil.Process().children(recursive=True)}


async def answer(engine: AsyncEngine, prompt: list[int], tokens: int) -> list[int]:
    params, found = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True), []
    async for output in engine.generate(prompt, params):
        found = output.token_ids
    return list(found)


async def test_two_gpus_give_the_tokens_of_one_in_float32(model: Path) -> None:
    before, found = left_behind(), []
    for size in (1, 2):
        async with AsyncEngine(model, **OPTIONS, dtype="float32", tensor_parallel=size) as engine:
            found.append(await asyncio.gather(*(answer(engine, prompt, 48) for prompt in PROMPTS)))
    assert found[0] == found[1]
    assert left_behind() <= before


async def test_two_halves_of_a_step_on_two_gpus_give_the_tokens_of_one_in_float32(model: Path) -> None:
    """Without graphs, for a model so small has all its steps in graphs' pieces, which stay whole."""
    prompts, found = [[3 + (i * k) % 500 for i in range(90 + 30 * k)] for k in range(1, 13)], []
    more: dict[str, Any] = OPTIONS | {"dtype": "float32", "graphs": False, "token_budget": 512}
    for size in (1, 2):
        async with AsyncEngine(model, **more, tensor_parallel=size, lanes="halves" if size > 1 else "auto") as engine:
            found.append(await asyncio.gather(*(answer(engine, prompt, 24) for prompt in prompts)))
            explained = engine.explain()
    halves = next(line for line in explained.splitlines() if line.startswith("halves: "))
    assert int(halves.split()[-3]) > 1, halves
    assert found[0] == found[1]


async def test_a_killed_rank_ends_the_engine_and_leaves_nothing(model: Path) -> None:
    before = left_behind()
    engine = AsyncEngine(model, **OPTIONS, tensor_parallel=2)
    await engine.start()
    runner = engine._core._runner
    assert isinstance(runner, LeadingRunner)
    followers = [psutil.Process(follower._pid) for follower in runner._team._followers]
    generation = engine.generate([5, 6, 7], SamplingParams(max_tokens=900, ignore_eos=True))
    await anext(generation)
    followers[0].send_signal(signal.SIGKILL)
    async with asyncio.timeout(30):  # or the other waits for a rank that is gone
        with pytest.raises(EngineDead, match=r"rank 1 .* was ended by signal 9 \(SIGKILL\)"):
            async for _ in generation:
                pass
        await engine.aclose()
    assert not any(process.is_running() for process in followers)
    assert left_behind() <= before


async def test_an_exception_in_one_rank_ends_the_engine_and_leaves_nothing(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = left_behind()
    async with asyncio.timeout(90), AsyncEngine(model, **OPTIONS, tensor_parallel=2) as engine:
        runner = engine._core._runner
        assert isinstance(runner, LeadingRunner)
        launch = runner._team.launch

        def spoilt(plan: StepPlan) -> None:
            launch(replace(plan, emits=plan.emits + 10**6))

        monkeypatch.setattr(runner._team, "launch", spoilt)
        with pytest.raises(EngineDead, match=r"rank 1 .* failed: IndexError"):
            await answer(engine, [5, 6, 7], 40)
    assert left_behind() <= before
