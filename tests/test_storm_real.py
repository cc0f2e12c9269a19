"""A storm of requests on the real model: whatever happens beside it, each answer is the one it gives alone."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest

from overlap import AsyncEngine, Output, RequestAborted, RequestFailed, SamplingParams

SHARED = "The following is a short and friendly conversation between a curious student and a patient teacher. "
PROMPTS = [SHARED + end for end in ("Why is the sky", "What is two plus", "Tell me about", "Who wrote")] + [
    "The capital of France is",
    "Once upon a time",
]
NEW = 20
PARAMS = SamplingParams(max_tokens=NEW, temperature=0, ignore_eos=True)
LONG = SamplingParams(max_tokens=60, temperature=0, ignore_eos=True)
"""Five of these together need more pages than the storm's engine has, however slow the machine is."""


async def tokens(engine: AsyncEngine, prompt: str, params: SamplingParams = PARAMS) -> list[int]:
    output: Output | None = None
    async for output in engine.generate(prompt, params):
        pass
    assert output is not None
    return output.token_ids


@pytest.mark.slow
async def test_every_answer_of_a_storm_is_the_one_it_gives_alone(smollm2_path: Path) -> None:
    options = {"device": "cpu", "dtype": "float32"}
    async with AsyncEngine(smollm2_path, prefix_cache=False, kv_cache=2048, max_rows=4, **options) as engine:
        long = dict(
            zip(PROMPTS, await asyncio.gather(*(tokens(engine, prompt, LONG) for prompt in PROMPTS)), strict=True)
        )
    alone = {prompt: answer[:NEW] for prompt, answer in long.items()}
    draw = random.Random(0)
    ended: dict[str, int] = {"answered": 0, "left": 0, "aborted": 0, "failed": 0}

    async with AsyncEngine(smollm2_path, kv_cache=192, max_rows=6, prefill_chunk=24, **options) as engine:
        runner: Any = engine._core._loop._runner  # type: ignore[union-attr]
        launch = runner.launch

        def fault(plan: Any) -> Any:
            if plan.number == 40:
                raise MemoryError("injected")
            return launch(plan)

        runner.launch = fault

        async def one(number: int) -> None:
            prompt, patience = draw.choice(PROMPTS), draw.choice([0, 1, 7, NEW, NEW, NEW])
            name = f"r{number}"
            seen: list[int] = []
            answer = engine.generate(
                prompt, PARAMS, request_id=name, priority=draw.choice([0, 0, 1]), fairness_key=draw.choice("ab")
            )
            try:
                async for output in answer:
                    seen = output.token_ids
                    assert seen == alone[prompt][: len(seen)]
                    if patience == 1 and len(seen) > 2:
                        await engine.abort(name)
                    elif patience == 7 and len(seen) >= 7:
                        break
                await answer.aclose()
                ended["answered" if len(seen) == NEW else "left"] += 1
            except RequestAborted:
                ended["aborted"] += 1
            except RequestFailed:
                ended["failed"] += 1

        async def cancelled(number: int) -> None:
            task = asyncio.create_task(one(number))
            await asyncio.sleep(draw.random() * 0.3)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

        await asyncio.gather(*((cancelled if n % 5 == 4 else one)(n) for n in range(36)))
        together = await asyncio.gather(*(tokens(engine, prompt, LONG) for prompt in PROMPTS))
        assert dict(zip(PROMPTS, together, strict=True)) == long
        await asyncio.wrap_future(engine._core.idle())
        await asyncio.wrap_future(engine._core.call(engine._core.parts[0].check_idle))
        figures = engine.statistics()
    assert ended["answered"] > 8, ended
    assert ended["failed"] > 0, ended
    assert figures.cached_tokens > 0
    assert figures.preemptions > 0
