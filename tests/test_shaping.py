"""Penalties, bias, min_tokens and log-probabilities through the whole engine: in any batch as if alone, and as written.

The oracle is the definition, once more, in numpy over the whole answer: the model's logits by `transformers`, without
KV cache, and float32 arithmetic in the order that `SamplingParams` states.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from overlap import AsyncEngine, Output, RequestError, SamplingParams, Statistics

VOCABULARY = 200
NEW = 40
EOS = 199
PROMPTS = [[7], [3, 4, 3, 4, 3], list(range(20, 37)), [11, 12] * 25, [5] * 16 + [6] * 17, list(range(90, 10, -1))]
ASKED: list[dict[str, Any]] = [
    {"temperature": 0.0, "repetition_penalty": 1.5},
    {"temperature": 0.0, "frequency_penalty": 1.5, "presence_penalty": -0.5, "logit_bias": {9: 4.0, 30: -100, 0: 1}},
    {"temperature": 0.9, "top_p": 0.9, "seed": 5, "presence_penalty": 2.0, "frequency_penalty": 0.25},
    {"temperature": 1.3, "top_k": 30, "seed": 6, "repetition_penalty": 0.8, "frequency_penalty": 1.0},
    {"temperature": 0.0},
    {"temperature": 1.0, "min_p": 0.02, "seed": 2**63, "logit_bias": dict.fromkeys(range(0, 200, 3), -100)},
    {"temperature": 1.0, "seed": 1, "frequency_penalty": -1.0, "repetition_penalty": 1.2, "logit_bias": {55: 3.5}},
]


@pytest.fixture(scope="module")
def llama(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    from transformers import LlamaConfig, LlamaForCausalLM

    path = tmp_path_factory.mktemp("shaped")
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, eos_token_id=EOS, initializer_range=0.3,
        tie_word_embeddings=False,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = LlamaForCausalLM(config).eval()
    model.save_pretrained(path)
    shutil.copy(tiny_llama_dir / "tokenizer.json", path)
    return path, model


def raw_logits(model: Any, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
    with torch.inference_mode():
        return np.asarray(model(torch.tensor([list(tokens)])).logits[0, -1].float().numpy())


def shaped(logits: npt.NDArray[np.float32], prompt: list[int], answer: list[int], asked: dict[str, Any]) -> Any:
    """The definition, token by token."""
    one, out = np.float32, logits.copy()
    for token, value in asked.get("logit_bias", {}).items():
        out[token] += one(value)
    for token in range(VOCABULARY):
        times, factor = answer.count(token), one(asked.get("repetition_penalty", 1.0))
        if token in prompt or times:
            out[token] = out[token] / factor if out[token] > 0 else out[token] * factor
        out[token] -= one(asked.get("frequency_penalty", 0.0)) * one(times)
        out[token] -= one(asked.get("presence_penalty", 0.0)) * one(times > 0)
    return out


def expected(model: Any, prompt: list[int], asked: dict[str, Any], new: int = NEW) -> list[int]:
    from overlap.sample.sampler import sample
    from overlap.state.rows import SlotRows

    rows = SlotRows(1, 1, "cpu")
    rows.temperature[0], rows.top_k[0] = asked["temperature"], asked.get("top_k", 0)
    rows.top_p[0], rows.min_p[0] = asked.get("top_p", 1.0), asked.get("min_p", 0.0)
    words = np.array([asked.get("seed", 0)], dtype=np.uint64).view(np.int32)
    rows.seed_lo[0], rows.seed_hi[0] = int(words[0]), int(words[1])
    slot, drawn = torch.zeros(1, dtype=torch.int32), torch.arange(bool(asked["temperature"]), dtype=torch.int32)
    answer: list[int] = []
    while len(answer) < new:
        logits = torch.from_numpy(shaped(raw_logits(model, prompt + answer), prompt, answer, asked))[None]
        position = torch.tensor([len(prompt) + len(answer)], dtype=torch.int32)
        answer.append(int(sample(logits, rows, slot, position, drawn, truncated=True)))
    return answer


async def answers(path: Path, jobs: list[tuple[list[int], SamplingParams]], **options: Any) -> list[Output]:
    return (await answers_and_figures(path, jobs, **options))[0]


async def answers_and_figures(
    path: Path, jobs: list[tuple[list[int], SamplingParams]], *, alone: bool = False, rounds: int = 1, **options: Any
) -> tuple[list[Output], Statistics]:
    """Return the last round's answers."""
    options = {"device": "cpu", "dtype": "float32", "kv_cache": 8192, "max_rows": 16, **options}
    got: dict[int, Output] = {}
    async with AsyncEngine(path, **options) as engine:
        for _ in range(rounds):
            if alone:
                for index, (prompt, params) in enumerate(jobs):
                    async for output in engine.generate(prompt, params):
                        got[index] = output
            else:
                async for output in engine.generate_batch([p for p, _ in jobs], [p for _, p in jobs], progress=False):
                    got[output.index] = output
        figures = engine.statistics()
    return [got[index] for index in range(len(jobs))], figures


WAYS: dict[str, dict[str, Any]] = {
    "alone": {"alone": True},
    "in one batch, cold and warm": {"rounds": 2},
    "short of pages": {"kv_cache": 208, "prefill_chunk": 16},
    "prompts beside answers, in two lanes": {"lanes": "streams", "prefill_chunk": 16},
    "in few slots without overlap": {"overlap": False, "max_rows": 3, "prefill_chunk": 16},
}


async def test_every_way_of_serving_gives_the_tokens_of_the_definition(llama: tuple[Path, Any]) -> None:
    path, model = llama
    jobs = [(PROMPTS[i % len(PROMPTS)], asked) for i, asked in enumerate(ASKED)]
    want = [expected(model, prompt, asked) for prompt, asked in jobs]
    assert len({tuple(one) for one in want}) == len(want)
    asked = [(prompt, SamplingParams(max_tokens=NEW, ignore_eos=True, **asked)) for prompt, asked in jobs]
    for way, options in WAYS.items():
        got, figures = await answers_and_figures(path, asked, **options)
        assert [one.token_ids for one in got] == want, way
        assert (figures.preemptions > 0) == ("short" in way)


async def test_the_repetition_penalty_is_that_of_transformers(llama: tuple[Path, Any]) -> None:
    path, model = llama
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    params = SamplingParams(max_tokens=NEW, temperature=0, ignore_eos=True, repetition_penalty=1.3)
    got = await answers(path, [(prompt, params) for prompt in PROMPTS])
    for prompt, one in zip(PROMPTS, got, strict=True):
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW, repetition_penalty=1.3
            )
        assert one.token_ids == out[0, len(prompt) :].tolist()


async def test_logprobs_are_the_log_softmax_of_the_models_own_logits(llama: tuple[Path, Any]) -> None:
    path, model = llama
    kinds: list[dict[str, Any]] = [
        {"logprobs": 3, "temperature": 0.0},
        {"logprobs": 0, "temperature": 1.0, "seed": 4, "frequency_penalty": 2.0},
        {"logprobs": None, "temperature": 0.0},
        {"logprobs": 20, "temperature": 2.0, "seed": 4, "top_k": 50, "logit_bias": {8: 5}},
    ]
    jobs = [(PROMPTS[i], SamplingParams(max_tokens=20 + i, ignore_eos=True, **asked)) for i, asked in enumerate(kinds)]
    for one, (prompt, params) in zip(await answers(path, jobs), jobs, strict=True):
        if params.logprobs is None:
            assert one.logprobs is None
            continue
        assert one.logprobs is not None
        assert [entry.token for entry in one.logprobs] == one.token_ids
        for place, entry in enumerate(one.logprobs):
            logits = torch.from_numpy(raw_logits(model, prompt + one.token_ids[:place]))
            want = logits.log_softmax(dim=-1)
            assert entry.logprob == pytest.approx(float(want[entry.token]), abs=2e-4)
            assert len(entry.alternatives) == params.logprobs
            best = want.topk(max(params.logprobs, 1)).values.tolist()[: params.logprobs]
            assert [value for _, value in entry.alternatives] == pytest.approx(best, abs=2e-4)
            assert all(value == pytest.approx(float(want[token]), abs=2e-4) for token, value in entry.alternatives)


async def test_an_output_keeps_its_own_logprobs_while_the_answer_grows(llama: tuple[Path, Any]) -> None:
    seen: list[Output] = []
    async with AsyncEngine(llama[0], device="cpu", dtype="float32", kv_cache=512) as engine:
        params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True, logprobs=1)
        seen += [output async for output in engine.generate(PROMPTS[0], params)]
    assert [len(one.logprobs or ()) for one in seen] == [one.usage.completion_tokens for one in seen]


async def test_no_stop_comes_before_min_tokens(llama: tuple[Path, Any]) -> None:
    path, _ = llama
    eager_to_end = {EOS: 100, 17: 90}  # either ends the answer, and nothing else is as likely
    for kv_cache in (8192, 208):  # with and without preemption
        jobs = [
            (prompt, SamplingParams(max_tokens=NEW, min_tokens=n, logit_bias=eager_to_end, stop_token_ids=[17, 199]))
            for n, prompt in enumerate(PROMPTS * 2, start=19)
        ]
        got, figures = await answers_and_figures(path, jobs, kv_cache=kv_cache)
        assert [len(one.token_ids) for one in got] == [params.min_tokens + 1 for _, params in jobs]
        assert {one.token_ids[-1] for one in got} <= {EOS, 17}
        assert not any({EOS, 17} & set(one.token_ids[:-1]) for one in got)
        assert (figures.preemptions > 0) == (kv_cache == 208)


async def test_stop_strings_are_looked_for_behind_min_tokens_and_may_be_shown(llama: tuple[Path, Any]) -> None:
    path, _ = llama
    base: dict[str, Any] = {"max_tokens": 30, "temperature": 0.0, "ignore_eos": True, "frequency_penalty": 2.0}
    whole = (await answers(path, [(PROMPTS[2], SamplingParams(**base))]))[0]
    stop = whole.text[6:8]
    asked: list[dict[str, Any]] = [
        {"stop": stop},
        {"stop": stop, "include_stop_str_in_output": True},
        {"stop": stop, "min_tokens": 30},
    ]
    got = await answers(path, [(PROMPTS[2], SamplingParams(**base, **one)) for one in asked])
    end = whole.text.index(stop)
    assert [one.text for one in got] == [whole.text[:end], whole.text[: end + len(stop)], whole.text]
    assert [one.finish_reason for one in got] == ["stop", "stop", "length"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"presence_penalty": 2.1}, "presence_penalty must be in [-2, 2], not 2.1."),
        ({"frequency_penalty": float("nan")}, "frequency_penalty must be a finite number, not nan."),
        ({"repetition_penalty": 0}, "repetition_penalty must be above 0"),
        ({"logprobs": 21}, "logprobs must be from 0 to 20, or None, not 21."),
        ({"logprobs": True}, "logprobs must be an integer, not True."),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens must be from 0 to max_tokens, not 5."),
        ({"min_tokens": None}, "min_tokens must be an integer, not None."),
        ({"logit_bias": {"a": 1}}, "logit_bias has the key 'a'; give token ids, as integers."),
        ({"logit_bias": {4: 101}}, "logit_bias gives 101 to token 4; give a number in [-100, 100]."),
        ({"logit_bias": dict.fromkeys(range(1025), 1)}, "logit_bias has 1025 entries; give 1024 at most."),
        ({"n": 2}, "Give the prompt n times to `generate_batch`"),
        ({"bad_words": ["x"]}, "There is no sampling parameter 'bad_words' here. Give `logit_bias`"),
    ],
)
def test_a_value_that_cannot_be_is_refused_by_name(given: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError) as error:
        SamplingParams(**given)
    assert message in str(error.value)


async def test_a_bias_outside_the_vocabulary_is_refused_and_the_engine_goes_on(llama: tuple[Path, Any]) -> None:
    async with AsyncEngine(llama[0], device="cpu", dtype="float32", kv_cache=512) as engine:
        with pytest.raises(RequestError, match="logit_bias has token 200, but the vocabulary has 200 tokens"):
            await anext(aiter(engine.generate([1], SamplingParams(logit_bias={200: 1.0}))))
        params = SamplingParams(logit_bias={150: 100}, max_tokens=2, temperature=0)
        assert [output async for output in engine.generate([1], params)][-1].token_ids == [150, 150]
