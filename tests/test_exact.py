"""Greedy answers are those of `transformers`, token for token, in fp32 on the CPU, of real and of random models."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from overlap import AsyncEngine, SamplingParams, Statistics

PROMPTS = [
    "The capital of France is",
    "Once upon a time",
    "def fibonacci(n):",
    "Gravity is",
    "1 + 1 = 2, 2 + 2 = 4, 3 + 3 =",
    "Water boils at a temperature of",
    "The three laws of motion are",
    "I",
    "Dear Sir or Madam,\n\nI am writing to",
    "<|im_start|>user\nWhat is the tallest mountain?<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>system\nYou are terse.<|im_end|>\n<|im_start|>user\nName a fruit.<|im_end|>\n<|im_start|>assistant\n",
    "Breaking news: scientists have discovered",
    "To make bread you need flour, water, salt and",
    "The following is a list of European countries and their capitals:\n- France: Paris\n- Germany:",
    "SELECT name, age FROM users WHERE",
    "In 1969, the first humans walked on",
    "She opened the door and saw " * 4,
    "Photosynthesis is the process by which plants turn light, water and carbon dioxide into sugar. " * 4 + "In short,",
    "List of numbers: " + ", ".join(str(n) for n in range(60)),
    "It was the best of times, it was the worst of times. " * 12,
]
NEW = 64


@pytest.fixture(scope="module")
def expected(smollm2_path: Path) -> tuple[list[list[int]], list[list[int]]]:
    """(prompts as tokens, answers) by transformers, which reads the same file with its own code."""
    from transformers import AutoModelForCausalLM

    from overlap.environment import cache_directory
    from overlap.models import open_checkpoint
    from overlap.text import Tokenizer

    checkpoint = open_checkpoint(smollm2_path, cache_dir=cache_directory(None))
    assert checkpoint.tokenizer_source is not None
    tokenizer = Tokenizer.from_gguf(checkpoint.tokenizer_source.fields)
    checkpoint.close()
    model = AutoModelForCausalLM.from_pretrained(
        smollm2_path.parent, gguf_file=smollm2_path.name, dtype=torch.float32
    ).eval()
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
    return prompts, greedy(model, prompts, NEW)


def greedy(model: Any, prompts: list[list[int]], new: int) -> list[list[int]]:
    """Return the answers of `transformers`, in one batch: padded on the left, as it wants it."""
    model.generation_config.eos_token_id = None  # go on to the full length, as ours does
    model.generation_config.pad_token_id = 0
    longest = max(map(len, prompts))
    padding = [[0] * (longest - len(prompt)) for prompt in prompts]
    ids = torch.tensor([[*before, *prompt] for before, prompt in zip(padding, prompts, strict=True)])
    mask = torch.tensor([[*before, *[1] * len(prompt)] for before, prompt in zip(padding, prompts, strict=True)])
    with torch.inference_mode():
        out = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=new)
    return out[:, longest:].tolist()  # type: ignore[no-any-return]


async def ours(
    model: Path, prompts: list[list[int]], *, alone: bool = False, rounds: int = 1, **options: Any
) -> tuple[list[list[list[int]]], Statistics]:
    """Return the answers of each round, all by one engine, and its figures."""
    params = SamplingParams(max_tokens=NEW, temperature=0, ignore_eos=True)
    options = {"device": "cpu", "dtype": "float32", "kv_cache": 16384, "max_rows": 20, **options}
    answers: list[dict[int, list[int]]] = [{} for _ in range(rounds)]
    async with AsyncEngine(model, **options) as engine:
        for answer in answers:
            if alone:
                for index, prompt in enumerate(prompts):
                    async for output in engine.generate(prompt, params):
                        answer[index] = output.token_ids
            else:
                async for output in engine.generate_batch(prompts, params):
                    answer[output.index] = output.token_ids
        figures = engine.statistics()
    return [[answer[index] for index in range(len(prompts))] for answer in answers], figures


@pytest.mark.slow
async def test_smollm2_alone(smollm2_path: Path, expected: tuple[list[list[int]], list[list[int]]]) -> None:
    prompts, want = expected
    assert [len(answer) for answer in want] == [NEW] * 20
    assert (await ours(smollm2_path, prompts, alone=True))[0] == [want]


MATRIX: dict[str, dict[str, Any]] = {
    "in one batch, cold and warm": {"rounds": 2},
    "in chunks of 16, cold and warm": {"prefill_chunk": 16, "rounds": 2},
    "short of pages, cold and warm": {"kv_cache": 1024, "rounds": 2},
    "without cache and overlap": {"prefix_cache": False, "overlap": False},
    "in two lanes, cold and warm": {"lanes": "streams", "prefill_chunk": 16, "rounds": 2},
}


@pytest.mark.parametrize("way", MATRIX)
@pytest.mark.slow
async def test_smollm2(smollm2_path: Path, expected: tuple[list[list[int]], list[list[int]]], way: str) -> None:
    prompts, want = expected
    answers, figures = await ours(smollm2_path, prompts, **MATRIX[way])
    assert answers == [want] * len(answers)
    assert (figures.cached_tokens > 0) == ("warm" in way)
    assert (figures.preemptions > 0) == ("short" in way)
    assert (figures.side_steps > 0) == ("lanes" in way)


SHAPES: dict[str, dict[str, Any]] = {
    "grouped queries": {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 24},
    "one key head, untied": {"num_attention_heads": 4, "num_key_value_heads": 1, "tie_word_embeddings": False},
    "all heads, biases": {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True},
    "llama3 rope": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
}


@pytest.mark.parametrize("shape", SHAPES)
async def test_small_random_llamas_in_every_way(tiny_llama_dir: Path, tmp_path: Path, shape: str) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {
        "vocab_size": 400, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "eos_token_id": 399,
        "tie_word_embeddings": True, "initializer_range": 0.2, **SHAPES[shape],
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = LlamaForCausalLM(LlamaConfig(**settings)).eval()
        prompts = [torch.randint(0, 399, (n,)).tolist() for n in (1, 2, 15, 16, 17, 40, 100, 150)]
    model.save_pretrained(tmp_path)
    shutil.copy(tiny_llama_dir / "tokenizer.json", tmp_path)  # a directory has one; the prompts here are token ids
    want = [greedy(model, [prompt], NEW)[0] for prompt in prompts]
    for options in (
        {"alone": True, "rounds": 2},
        {"rounds": 2},
        {"prefill_chunk": 16, "rounds": 2},
        {"prefill_chunk": 16, "overlap": False, "max_rows": 3},
        {"kv_cache": 256, "prefill_chunk": 24, "rounds": 2},
        {"prefix_cache": False},
        {"lanes": "streams", "prefill_chunk": 16, "rounds": 2},
        {"lanes": "streams", "kv_cache": 256, "prefill_chunk": 24, "rounds": 2},
        {"lanes": "serial", "prefill_chunk": 16, "overlap": False, "max_rows": 3},
        {"lanes": "auto", "target_itl_ms": 2.0, "prefill_chunk": 32, "rounds": 2},
    ):
        answers, figures = await ours(tmp_path, prompts, **options)
        assert answers == [want] * len(answers), options
        assert (figures.preemptions > 0) == ("kv_cache" in options)
