"""The program against `transformers`: the same weights, the same logits. Attention is dense here, over written KV."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from overlap.cache.pages import PAGE
from overlap.models import build, open_checkpoint
from overlap.models.llama import Llama
from overlap.models.program import Attend, Batch

SHAPES: dict[str, dict[str, Any]] = {
    "grouped": {"num_attention_heads": 4, "num_key_value_heads": 2},
    "multi-head": {"num_attention_heads": 4, "num_key_value_heads": 4},
    "multi-query": {"num_attention_heads": 5, "num_key_value_heads": 1, "hidden_size": 80},
    "untied": {"tie_word_embeddings": False},
    "biased": {"attention_bias": True, "mlp_bias": True},
    "llama3 rope": {
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
        },
    },
    "heads of 24": {"head_dim": 24, "hidden_size": 72},
    "heads of 80": {"head_dim": 80, "num_attention_heads": 3, "num_key_value_heads": 3, "hidden_size": 96},
    "one layer, odd sizes": {"num_hidden_layers": 1, "vocab_size": 331, "intermediate_size": 33, "hidden_size": 40},
    "qwen3": {"model_type": "qwen3", "head_dim": 32, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "qwen3, untied and biased": {
        "model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": False, "attention_bias": True,
    },
}  # fmt: skip


def save_llama(path: Path, shape: dict[str, Any], *, shard: str = "50GB") -> Any:
    """Save a random Llama (or what `model_type` says) as `transformers` does, and return it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    given: dict[str, Any] = {
        "model_type": "llama", "vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
        "tie_word_embeddings": True, "initializer_range": 0.15, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**given, **shape}), dtype=torch.float32).eval()
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.3)
    model.save_pretrained(path, max_shard_size=shard)
    return model


def run(program: Llama, kv: Tensor, token_ids: Tensor, start: int, pages: Tensor) -> Tensor:
    """Drive the program over one row's tokens from position `start` on; return the logits of all of them, [T, V]."""
    count = len(token_ids)
    positions = torch.arange(start, start + count)
    index = pages[positions // PAGE] * PAGE + positions % PAGE
    batch = Batch(token_ids=token_ids.int(), positions=positions.int(), kv_index=index.int(), kv=kv)
    forward = program.forward(batch)
    joint = next(forward)
    while True:
        assert isinstance(joint, Attend)
        seen_SD = pages[torch.arange(start + count) // PAGE], torch.arange(start + count) % PAGE
        keys, values = (
            kv[seen_SD[0], joint.layer, part, seen_SD[1]].repeat_interleave(
                program.num_heads // program.num_kv_heads, dim=1
            )
            for part in (0, 1)
        )
        mask = torch.arange(start + count)[None, :] <= positions[:, None]
        attended = F.scaled_dot_product_attention(
            joint.q_THD.transpose(0, 1), keys.transpose(0, 1), values.transpose(0, 1), attn_mask=mask
        )
        try:
            joint = forward.send(attended.transpose(0, 1).reshape(count, -1))
        except StopIteration as end:
            return program.logits(end.value)


def empty_kv(program: Llama, pages: int) -> Tensor:
    """KV memory full of NaN: what is read without having been written shows."""
    shape = (pages, program.num_layers, 2, PAGE, program.num_kv_heads, program.head_dim)
    return torch.full(shape, float("nan"), dtype=program.dtype)


@pytest.mark.parametrize("shard", ["50GB", "60KB"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
def test_logits_equal_those_of_transformers(
    shape: dict[str, Any], shard: str, tmp_path: Path, tiny_llama_dir: Path
) -> None:
    reference = save_llama(tmp_path, shape, shard=shard)
    shutil.copy(tiny_llama_dir / "tokenizer.json", tmp_path)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "60KB")
    checkpoint = open_checkpoint(tmp_path, cache_dir=tmp_path)
    program = build(checkpoint, device="cpu", dtype=torch.float32)
    checkpoint.close()
    token_ids = torch.randint(0, program.vocab_size, (90,), generator=torch.Generator().manual_seed(0))
    pages = torch.tensor([5, 2, 7, 1, 0, 3])
    kv = empty_kv(program, 8)
    with torch.inference_mode():
        expected = reference(token_ids[None]).logits[0]
        # A prompt in two chunks, then token by token: each part sees the KV that the parts before have written.
        cuts = [0, 37, 80, *range(81, 91)]
        found = torch.cat([run(program, kv, token_ids[a:b], a, pages) for a, b in itertools.pairwise(cuts)])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert torch.equal(found.argmax(-1), expected.argmax(-1))
    assert kv[4].isnan().all()  # a page of nobody


def test_bfloat16_is_near_to_float32(tiny_llama_dir: Path) -> None:
    token_ids = torch.arange(40)
    logits = []
    for dtype in (torch.float32, torch.bfloat16):
        checkpoint = open_checkpoint(tiny_llama_dir, cache_dir=tiny_llama_dir)
        program = build(checkpoint, device="cpu", dtype=dtype)
        checkpoint.close()
        with torch.inference_mode():
            logits.append(run(program, empty_kv(program, 3), token_ids, 0, torch.arange(3)))
    assert logits[1].dtype == torch.float32
    assert (logits[1] - logits[0]).norm() / logits[0].norm() < 3e-2


def test_padding_is_written_nowhere_and_changes_no_other_row(tiny_llama_dir: Path) -> None:
    checkpoint = open_checkpoint(tiny_llama_dir, cache_dir=tiny_llama_dir)
    program = build(checkpoint, device="cpu", dtype=torch.float32)
    checkpoint.close()
    outputs = []
    for padding in (0, 11):
        kv = empty_kv(program, 1)
        count = 5 + padding
        batch = Batch(
            token_ids=torch.tensor([7, 8, 9, 10, 11] + [0] * padding, dtype=torch.int32),
            positions=torch.tensor([0, 1, 2, 3, 4] + [0] * padding, dtype=torch.int32),
            kv_index=torch.tensor([0, 1, 2, 3, 4] + [-1] * padding, dtype=torch.int32),
            kv=kv,
        )
        with torch.inference_mode():
            forward = program.forward(batch)
            next(forward)
            try:
                while True:
                    forward.send(torch.ones(count, program.num_heads * program.head_dim))
            except StopIteration as end:
                outputs.append((end.value[:5], kv))
        assert kv[:, :, :, 5:].isnan().all()
    assert torch.equal(outputs[0][0], outputs[1][0])
    assert torch.equal(outputs[0][1][:, :, :, :5], outputs[1][1][:, :, :, :5])


def test_no_emitting_row_gives_no_logits(tiny_llama_dir: Path) -> None:
    checkpoint = open_checkpoint(tiny_llama_dir, cache_dir=tiny_llama_dir)
    program = build(checkpoint, device="cpu", dtype=torch.float32)
    checkpoint.close()
    assert program.logits(torch.empty(0, 64)).shape == (0, 512)


def test_weight_bytes_counts_what_was_loaded(tiny_llama_dir: Path) -> None:
    checkpoint = open_checkpoint(tiny_llama_dir, cache_dir=tiny_llama_dir)
    program = build(checkpoint, device="cpu", dtype=torch.float32)
    checkpoint.close()
    layer = 64 * (64 + 2 * 32) + 64 * 64 + 3 * 64 * 160 + 2 * 64
    embeddings = 2 if program.kinds() == ("onednn packed",) else 1  # packed once more for the head
    assert program.weight_bytes() == 4 * (embeddings * 512 * 64 + 3 * layer + 64 + 512 * 16)


def test_qwen3_answers_greedily_as_in_transformers(tmp_path: Path, tiny_llama_dir: Path) -> None:
    reference = save_llama(tmp_path, SHAPES["qwen3"])
    shutil.copy(tiny_llama_dir / "tokenizer.json", tmp_path)
    checkpoint = open_checkpoint(tmp_path, cache_dir=tmp_path)
    assert checkpoint.config.head_norm
    program = build(checkpoint, device="cpu", dtype=torch.float32)
    checkpoint.close()
    prompt, new = [5, 9, 200, 17], 40
    reference.generation_config.eos_token_id = None
    expected = reference.generate(
        torch.tensor([prompt]), max_new_tokens=new, do_sample=False, attention_mask=torch.ones(1, len(prompt)).long()
    )
    kv, answer = empty_kv(program, 3), list(prompt)
    with torch.inference_mode():
        logits = run(program, kv, torch.tensor(prompt), 0, torch.arange(3))
        for _ in range(new):
            answer.append(int(logits[-1].argmax()))
            logits = run(program, kv, torch.tensor(answer[-1:]), len(answer) - 1, torch.arange(3))
    assert answer == expected[0].tolist()


def test_the_greedy_head_takes_the_likeliest_token_and_the_lowest_of_equals(tiny_llama_dir: Path) -> None:
    checkpoint = open_checkpoint(tiny_llama_dir, cache_dir=tiny_llama_dir)
    program = build(checkpoint, device="cpu", dtype=torch.float32)
    checkpoint.close()
    hidden = torch.cat((torch.randn(5, 64, generator=torch.Generator().manual_seed(0)), torch.zeros(1, 64)))
    with torch.inference_mode():
        tokens = program.greedy(hidden)
        assert tokens.dtype == torch.int32
        assert torch.equal(tokens.long(), program.logits(hidden).argmax(-1))
    assert tokens[-1] == 0


def test_smollm2_continues_as_it_should(smollm2_path: Path) -> None:
    checkpoint = open_checkpoint(smollm2_path, cache_dir=smollm2_path.parent)
    program = build(checkpoint, device="cpu", dtype=torch.float32)
    assert checkpoint.tokenizer_source is not None
    words = checkpoint.tokenizer_source.fields["tokenizer.ggml.tokens"]
    checkpoint.close()
    token_ids = torch.tensor([words.index(word) for word in ("The", "Ġcapital", "Ġof", "ĠFrance", "Ġis")])
    with torch.inference_mode():
        logits = run(program, empty_kv(program, 1), token_ids, 0, torch.tensor([0]))
    assert words[int(logits[-1].argmax())] == "ĠParis"
