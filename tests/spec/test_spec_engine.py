"""Speculation through the whole engine changes no token, whatever drafts, and whatever else goes on."""

from __future__ import annotations

import asyncio
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from overlap import AsyncEngine, Output, SamplingParams, Statistics
from overlap.errors import ConfigError, RequestAborted

BASE: dict[str, Any] = {"device": "cpu", "dtype": "float32", "kv_cache": 8192}
FOUR: dict[str, Any] = {"num_drafts": 4}  # and not "auto", which drafts only while that pays
FEW = dict.fromkeys(range(5, 11), 12.0)
"""A bias towards so few tokens that the answer repeats itself."""
ASKED: tuple[dict[str, Any], ...] = (
    {}, {"top_k": 10}, {"top_p": 0.8}, {"min_p": 0.05}, {"repetition_penalty": 1.3}, {"logprobs": 3},
    {"logit_bias": FEW}, {"presence_penalty": 1.0, "frequency_penalty": 0.5},
    {"logit_bias": FEW, "frequency_penalty": 1.0}, {"min_tokens": 8, "logit_bias": {2: 100}},
)  # fmt: skip
Job = tuple[list[int], SamplingParams]


def jobs_of(seed: int, count: int) -> list[Job]:
    draw = random.Random(seed)
    stem = [draw.randrange(3, 500) for _ in range(40)]
    jobs = []
    for number in range(count):
        prompt = stem[: draw.choice([0, 0, 35])] + [draw.randrange(3, 500) for _ in range(draw.randrange(1, 40))]
        params = SamplingParams(
            max_tokens=draw.randrange(10, 50), seed=seed * 100 + number, ignore_eos=draw.random() < 0.5,
            temperature=draw.choice([0, 0.7, 1.2]), **ASKED[number % len(ASKED)],
        )  # fmt: skip
        jobs.append((prompt * draw.choice([1, 2]), params))
    return jobs


async def answers(
    path: Path, jobs: list[Job], aborts: dict[int, int] | None = None, **options: Any
) -> tuple[list[Output], Statistics]:
    """Return the last Output of each job, all at once; `aborts` says after how many tokens some are aborted."""

    async def one(engine: AsyncEngine, number: int, job: Job) -> Output:
        last: Output | None = None
        try:
            async for output in engine.generate(*job, request_id=str(number)):
                last = output
                if aborts is not None and len(output.token_ids) >= aborts.get(number, 1000):
                    await engine.abort(str(number))
        except RequestAborted:
            pass
        assert last is not None
        return last

    async with AsyncEngine(path, **{**BASE, **options}) as engine:
        got = await asyncio.gather(*(one(engine, number, job) for number, job in enumerate(jobs)))
        while (figures := engine.statistics()).draining:  # the last flight still writes to its pages
            await asyncio.sleep(0.01)
        return got, figures


def same(got: list[Output], want: list[Output]) -> bool:
    def facts(output: Output) -> tuple[Any, ...]:
        top = (
            None if output.logprobs is None else [tuple(id_ for id_, _ in one.alternatives) for one in output.logprobs]
        )
        return output.token_ids, output.text, output.finish_reason, output.stop_reason, top

    return [facts(one) for one in got] == [facts(one) for one in want]


@pytest.fixture(scope="module")
def drafters(tiny_llama_dir: Path, target: Any, spec: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Options of an engine for each kind of drafter; "near" is the target with a little noise in its weights."""
    from transformers import LlamaForCausalLM

    path = tmp_path_factory.mktemp("drafters")
    for kind in ("eagle3", "eagle"):
        (path / kind).mkdir()
        spec.write_random_head(path / kind, target, kind)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = LlamaForCausalLM.from_pretrained(tiny_llama_dir)
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.03)
    model.save_pretrained(path / "near")
    for file in tiny_llama_dir.glob("tokenizer*"):
        shutil.copy(file, path / "near")
    return {
        "ngram": {"speculative": "ngram"},
        "itself": {"speculative": "draft", "draft_model": str(tiny_llama_dir)},
        "near": {"speculative": "draft", "draft_model": str(path / "near")},
        "eagle3": {"speculative": "eagle", "draft_model": str(path / "eagle3")},
        "eagle": {"speculative": "eagle", "draft_model": str(path / "eagle")},
    }


WAYS: dict[str, dict[str, Any]] = {
    "in one batch": {},
    "without overlap, in chunks": {"overlap": False, "prefill_chunk": 9, "num_drafts": 2},
    "short of pages": {"kv_cache": 288, "num_drafts": 7},
    "few rows, small steps": {"max_rows": 3, "token_budget": 17, "num_drafts": 5},
    "too many rows to draft for": {"max_rows": 16, "token_budget": 40, "num_drafts": 3},
    "prompts and answers in turn": {"lanes": "serial", "prefix_cache": False, "num_drafts": 1},
}


@pytest.mark.parametrize("way", WAYS)
async def test_a_drafter_changes_no_token_in_any_way_of_running(tiny_llama_dir: Path, drafters: Any, way: str) -> None:
    seed = list(WAYS).index(way)
    jobs = jobs_of(seed, 14)
    want, _ = await answers(tiny_llama_dir, jobs)
    for name in ("ngram", "near"):
        got, figures = await answers(tiny_llama_dir, jobs, **{**FOUR, **drafters[name], **WAYS[way]})
        assert same(got, want)
        assert figures.drafted_tokens > figures.accepted_tokens > 0
        assert (figures.preemptions > 0) == (way == "short of pages")


@pytest.mark.parametrize("name", ["ngram", "itself", "near", "eagle3"])
async def test_many_rows_verify_fewer_drafts_each_and_no_token_changes(
    tiny_llama_dir: Path, drafters: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = jobs_of(31, 12)
    want, _ = await answers(tiny_llama_dir, jobs)
    monkeypatch.setattr("overlap.resolve._draft_ladder", lambda *_, **__: ((3, 6), (5, 4), (12, 2)))
    got, figures = await answers(tiny_llama_dir, jobs, **FOUR, **drafters[name])
    assert same(got, want)
    if name == "itself":  # some answers are longer: at the end few rows are left
        assert figures.tried_at[1] > 2 * figures.tried_at[2] > 0
        assert figures.tried_at[5] > 0


@pytest.mark.parametrize("way", list(WAYS)[:3])
@pytest.mark.parametrize("short", [False, True])
async def test_where_steps_with_prompts_do_not_draft_or_only_short_ones_no_token_changes(
    tiny_llama_dir: Path, drafters: Any, way: str, *, short: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("overlap.resolve._drafts_with_prompts", lambda *_: False)
    monkeypatch.setattr("overlap.runner.Runner.short_steps", short)
    jobs = jobs_of(47, 14)
    want, _ = await answers(tiny_llama_dir, jobs)
    for name in ("ngram", "itself", "eagle3"):
        got, figures = await answers(tiny_llama_dir, jobs, **{**FOUR, **drafters[name], **WAYS[way]})
        assert same(got, want)
        assert figures.drafted_tokens > 0


@pytest.mark.parametrize("name", ["itself", "eagle3", "eagle"])
async def test_every_kind_of_drafter_changes_no_token(tiny_llama_dir: Path, drafters: Any, name: str) -> None:
    jobs = jobs_of(99, 12)
    want, plain = await answers(tiny_llama_dir, jobs)
    got, figures = await answers(tiny_llama_dir, jobs, **FOUR, **drafters[name])
    assert same(got, want)
    assert figures.drafted_tokens > 0
    if name == "itself":  # the same logits and the same noise: nearly every draft is right
        assert figures.accepted_tokens > 0.95 * figures.drafted_tokens
        assert figures.steps < plain.steps / 3


async def test_a_stop_string_or_a_stop_token_in_the_middle_of_a_run_ends_the_answer_there(
    tiny_llama_dir: Path, drafters: Any
) -> None:
    prompt = list(range(40, 60))
    base = SamplingParams(max_tokens=40, temperature=0.9, seed=3, ignore_eos=True)
    whole = (await answers(tiny_llama_dir, [(prompt, base)]))[0][0]
    tokens = whole.token_ids
    first = [place for place, token in enumerate(tokens) if token not in tokens[:place]]
    asked = [replace(base, stop_token_ids=[tokens[place]]) for place in first]
    asked += [replace(base, stop=whole.text[place : place + 2]) for place in range(0, len(whole.text) - 2, 3)]
    asked += [replace(base, max_tokens=count) for count in range(1, 12)]
    want, _ = await answers(tiny_llama_dir, [(prompt, params) for params in asked])
    got, figures = await answers(tiny_llama_dir, [(prompt, params) for params in asked], **FOUR, **drafters["itself"])
    assert same(got, want)
    assert figures.accepted_tokens > 100
    assert [len(one.token_ids) for one in got[: len(first)]] == [place + 1 for place in first]


async def test_aborts_leave_the_others_as_they_are_and_give_all_pages_back(tiny_llama_dir: Path, drafters: Any) -> None:
    jobs = jobs_of(7, 24)
    want, _ = await answers(tiny_llama_dir, jobs)
    aborts = {number: 1 + number % 5 for number in range(0, 24, 3)}
    for options in ({}, {"kv_cache": 400}):
        got, figures = await answers(tiny_llama_dir, jobs, aborts, **FOUR, **drafters["itself"], **options)
        for number, (mine, whole) in enumerate(zip(got, want, strict=True)):
            if number in aborts:
                assert mine.token_ids == whole.token_ids[: len(mine.token_ids)]
            else:
                assert same([mine], [whole])
        assert figures.free_pages + figures.evictable_pages == figures.num_pages


async def test_an_answer_may_fill_the_context_to_its_last_token(tiny_llama_dir: Path, drafters: Any) -> None:
    jobs = [(list(range(3, 3 + n)), SamplingParams(max_tokens=60 - n, temperature=0, ignore_eos=True)) for n in (1, 30)]
    want, _ = await answers(tiny_llama_dir, jobs, context=60)
    for name in ("itself", "eagle3", "ngram"):
        got, _ = await answers(tiny_llama_dir, jobs, context=60, kv_cache=80, num_drafts=7, **drafters[name])
        assert same(got, want)


async def test_a_cached_prefix_is_looked_up_in_too(tiny_llama_dir: Path) -> None:
    """What the prefix cache spares, no step reads: the n-gram drafter is told of it."""
    draw = random.Random(1)
    text = [draw.randrange(3, 500) for _ in range(64)]
    params = SamplingParams(max_tokens=6, temperature=0, logit_bias=FEW, ignore_eos=True)
    drafted = []
    async with AsyncEngine(tiny_llama_dir, **BASE, **FOUR, speculative="ngram") as engine:
        answer: list[int] = []
        async for output in engine.generate(text, params):
            answer = output.token_ids
        for prompt in ([*text, *answer, 300, *answer], [*text, *answer, 400, *text[:3]]):
            before = engine.statistics().drafted_tokens
            async for output in engine.generate(prompt, params):
                assert output.usage.cached_tokens == 64
            drafted.append(engine.statistics().drafted_tokens - before)
    assert max(drafted) > 0


async def test_drafting_that_is_turned_down_and_tried_again_changes_no_token(
    tiny_llama_dir: Path, drafters: Any
) -> None:
    jobs = jobs_of(5, 14)
    want, _ = await answers(tiny_llama_dir, jobs)
    for name in ("ngram", "itself", "eagle3"):
        got, _ = await answers(tiny_llama_dir, jobs, **drafters[name])
        assert same(got, want)


async def test_what_drafts_is_explained(tiny_llama_dir: Path, drafters: Any) -> None:
    for name, words in {"ngram": "prompt lookup", "eagle3": "an eagle3 head", "near": "a smaller model"}.items():
        async with AsyncEngine(tiny_llama_dir, **BASE, **drafters[name], num_drafts=3) as engine:
            assert f"speculation: up to 3 tokens a row, verified and accepted on the device; drafted by {words}" in (
                engine.explain()
            )
            assert "lanes = mixed: a drafter and its verify share one lane" in engine.explain()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"speculative": "magic"}, "speculative must be one of ngram, eagle, draft, or None, not 'magic'"),
        ({"speculative": "draft"}, "speculative='draft' needs draft_model, a smaller model of the same family"),
        ({"speculative": "ngram", "draft_model": "x"}, "draft_model is for speculative="),
        ({"speculative": "ngram", "num_drafts": 16}, "num_drafts must be an integer from 1 to 15"),
        ({"speculative": "ngram", "lanes": "streams"}, 'not "streams"'),
        ({"speculative": "ngram", "target_itl_ms": 5.0}, "target_itl_ms chooses between two"),
        ({"speculative": "ngram", "tensor_parallel": 2}, "speculative needs tensor_parallel=1"),
    ],
)
def test_what_does_not_combine_is_refused_by_name(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        AsyncEngine("m", **options)
    assert words in str(error.value)


async def test_a_drafter_of_another_vocabulary_is_refused(tiny_llama_dir: Path, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(
        LlamaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    ).save_pretrained(tmp_path)
    shutil.copy(tiny_llama_dir / "tokenizer.json", tmp_path)
    with pytest.raises(ConfigError, match="a vocabulary of 300 tokens"):
        async with AsyncEngine(tiny_llama_dir, **BASE, speculative="draft", draft_model=str(tmp_path)):
            pass


@pytest.mark.slow
async def test_smollm2_says_the_same_with_a_drafter(smollm2_path: Path) -> None:
    prompts = ["The capital of France is", "List of numbers: 1, 2, 3, 1, 2, 3, 1, 2, 3,", "She opened the door. " * 6]
    params = SamplingParams(max_tokens=48, temperature=0, ignore_eos=True)
    found: list[list[list[int]]] = []
    for options in (
        {},
        {"speculative": "ngram", **FOUR},
        {"speculative": "draft", "draft_model": str(smollm2_path), **FOUR},
    ):
        async with AsyncEngine(
            smollm2_path, device="cpu", dtype="float32", kv_cache=1024, context=256, **options
        ) as engine:
            found.append([[]] * len(prompts))
            async for output in engine.generate_batch(prompts, params, progress=False):
                found[-1][output.index] = output.token_ids
            if options:
                assert engine.statistics().accepted_tokens > 40
    assert found[1] == found[0]
    assert found[2] == found[0]
