"""Log-probabilities of prompts: those of `transformers`, whichever way the prompt is run."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from overlap import AsyncEngine, Output, RequestError, SamplingParams

BASE: dict[str, Any] = {"device": "cpu", "dtype": "float32", "kv_cache": 8192, "max_rows": 8}
DRAW = random.Random(3)
STEM = [DRAW.randrange(3, 500) for _ in range(64)]
PROMPTS = [STEM[:1], STEM[:2], STEM, STEM + STEM[:9], STEM[:48] + [7] * 30, [9] * 200, STEM[5:60]]
WAYS: dict[str, dict[str, Any]] = {
    "whole": {},
    "in chunks": {"prefill_chunk": 16, "max_rows": 3, "token_budget": 19},
    "short of pages": {"kv_cache": 272, "prefill_chunk": 16},
    "in two lanes": {"lanes": "streams", "prefill_chunk": 16},
    "without overlap": {"overlap": False, "prefill_chunk": 32},
    "with drafts": {"speculative": "ngram", "num_drafts": 4, "prefill_chunk": 32},
}


@pytest.fixture(scope="module")
def expected(tiny_llama_dir: Path) -> list[torch.Tensor]:
    """Of each prompt the log-softmax of the model's logits, [tokens, vocabulary]."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(tiny_llama_dir).eval()
    with torch.inference_mode():
        return [model(torch.tensor([prompt])).logits[0].float().log_softmax(dim=-1) for prompt in PROMPTS]


async def outputs(engine: AsyncEngine, num: int | None, **more: Any) -> list[Output]:
    params = SamplingParams(prompt_logprobs=num, temperature=0, ignore_eos=True, **{"max_tokens": 12, **more})
    found = {o.index: o async for o in engine.generate_batch(PROMPTS, params, progress=False)}
    return [found[index] for index in range(len(PROMPTS))]


def check(got: Output, prompt: list[int], want: torch.Tensor, num: int) -> None:
    entries = got.prompt_logprobs
    assert entries is not None
    assert len(entries) == len(prompt)
    assert entries[0] is None
    for place, entry in enumerate(entries[1:]):
        assert entry is not None
        assert entry.token == prompt[place + 1]
        assert entry.logprob == pytest.approx(float(want[place, entry.token]), abs=2e-5)
        best = want[place].topk(num).values.tolist() if num else []
        assert [value for _, value in entry.alternatives] == pytest.approx(best, abs=2e-5)
        assert all(value == pytest.approx(float(want[place, id_]), abs=2e-5) for id_, value in entry.alternatives)


@pytest.mark.parametrize("way", WAYS)
async def test_scores_are_those_of_transformers_and_change_no_token(
    tiny_llama_dir: Path, expected: list[torch.Tensor], way: str
) -> None:
    new = 60 if "short" in way else 12
    async with AsyncEngine(tiny_llama_dir, **{**BASE, **WAYS[way]}) as engine:
        plain = await outputs(engine, None, max_tokens=new)
        for num in (0, 3, 20):  # the prefix cache is warm by now
            got = await outputs(engine, num, max_tokens=new)
            assert [one.token_ids for one in got] == [one.token_ids for one in plain]
            for one, prompt, want in zip(got, PROMPTS, expected, strict=True):
                check(one, prompt, want, num)
        assert all(one.prompt_logprobs is None for one in plain)
        figures = engine.statistics()
        assert (figures.preemptions > 0) == ("short" in way)
        assert figures.free_pages + figures.cached_pages == figures.num_pages


async def test_a_prompt_that_is_scored_comes_from_no_cache_and_leaves_its_pages_in_it(tiny_llama_dir: Path) -> None:
    async with AsyncEngine(tiny_llama_dir, **BASE) as engine:

        async def cached(num: int | None) -> int:
            params = SamplingParams(prompt_logprobs=num, max_tokens=1)
            return [one async for one in engine.generate(STEM, params)][-1].usage.cached_tokens

        assert [await cached(2), await cached(2), await cached(None)] == [0, 0, 48]


async def test_all_scores_are_there_with_the_first_output(tiny_llama_dir: Path) -> None:
    async with AsyncEngine(tiny_llama_dir, **BASE, prefill_chunk=16) as engine:
        params = SamplingParams(prompt_logprobs=1, max_tokens=3, ignore_eos=True)
        async for output in engine.generate(PROMPTS[5], params):
            assert len(output.prompt_logprobs or ()) == 200


async def test_a_long_prompt_is_scored_a_few_tokens_a_step(tiny_llama_dir: Path) -> None:
    from overlap.schedule.shaping import MOST_SCORED

    prompt = [DRAW.randrange(3, 500) for _ in range(510)]
    async with AsyncEngine(tiny_llama_dir, **BASE) as engine:
        params = SamplingParams(prompt_logprobs=0, max_tokens=1)
        jobs = [prompt, prompt[::-1], prompt[3:]]
        got = {o.index: o async for o in engine.generate_batch(jobs, params, progress=False)}
        assert engine.statistics().steps >= sum(map(len, jobs)) / MOST_SCORED
    assert [len(got[index].prompt_logprobs or ()) for index in range(3)] == [510, 510, 507]


def test_scores_out_of_range_are_refused_by_name() -> None:
    with pytest.raises(RequestError, match="prompt_logprobs must be from 0 to 20, or None, not 21"):
        SamplingParams(prompt_logprobs=21)
