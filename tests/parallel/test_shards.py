"""A model cut for several ranks says what the whole one says. The ranks are threads here, with real gloo between."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._C._distributed_c10d import HashStore

from overlap import ConfigError
from overlap.cache.pages import PAGE
from overlap.graphs.eager import drive, drive_in_blocks
from overlap.models.checkpoint import Checkpoint
from overlap.models.config import ModelConfig
from overlap.models.directory import DirectoryCheckpoint
from overlap.models.dummy import DummyCheckpoint
from overlap.models.gguf import GgufCheckpoint
from overlap.models.layout import tensor_shapes
from overlap.models.llama import Llama
from overlap.models.load import build
from overlap.models.program import Batch
from overlap.models.shard import part_of, shard_config, vocabulary_part
from overlap.ops.attention import AttentionRows, TorchAttention
from overlap.parallel.group import Group

T = TypeVar("T")

TINY = ModelConfig(
    architecture="LlamaForCausalLM", vocab_size=331, hidden_size=48, num_layers=2, num_heads=12, num_kv_heads=6,
    head_dim=8, intermediate_size=66, rms_norm_eps=1e-5, rope_theta=1e4, rope_scaling=None, context=64,
    tied_embeddings=True, attention_bias=False, mlp_bias=False, eos_token_ids=(2,), bos_token_id=1, dtype="float32",
)  # fmt: skip
KINDS = {
    "tied": TINY,
    "untied and biased": replace(TINY, tied_embeddings=False, attention_bias=True, mlp_bias=True),
    "qwen3": replace(TINY, architecture="Qwen3ForCausalLM", head_norm=True),
}


def on_ranks(size: int, work: Callable[[Group], T]) -> list[T]:
    """Call `work` with each rank's group, each on a thread; return what they return, rank by rank."""
    store, results, failures = HashStore(), [None] * size, []

    def run(rank: int) -> None:
        try:
            with torch.inference_mode():
                results[rank] = work(Group(store, rank, size, torch.device("cpu"), timeout_s=20))  # type: ignore[call-overload]
        except BaseException as failure:  # told by the assertion below, on the test's thread
            failures.append(failure)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures
    return results  # type: ignore[return-value]


def hidden_states(program: Llama, tokens: Tensor, *, block: int | None = None) -> Tensor:
    """Run one prompt of 3 pages at most."""
    kv = torch.zeros(3, program.num_layers, 2, PAGE, program.num_kv_heads, program.head_dim)
    positions = torch.arange(len(tokens), dtype=torch.int32)
    attention = TorchAttention(kv, program.num_heads)
    attention.plan(
        AttentionRows(
            num_decode=0,
            seq_lens=torch.tensor([len(tokens)], dtype=torch.int32),
            page_table=torch.arange(3, dtype=torch.int32)[None],
            starts=np.zeros(1, dtype=np.int32),
            counts=np.array([len(tokens)], dtype=np.int32),
            chunk_pages=np.arange(-(-len(tokens) // PAGE), dtype=np.int32),
        )
    )
    forward = program.forward(Batch(token_ids=tokens.int(), positions=positions, kv_index=positions, kv=kv))
    if block is None:
        return drive(forward, attention)
    blocks = drive_in_blocks(forward, attention, block)
    pauses = 0
    try:
        while True:
            next(blocks)
            pauses += 1
    except StopIteration as end:
        assert pauses == (program.num_layers - 1) // block
        hidden: Tensor = end.value
        return hidden


class Loud(DummyCheckpoint):
    """Random weights, of a size at which every one of them counts; norms and biases included."""

    def read_into(self, name: str, out: Tensor, part: Any = None) -> None:
        super().read_into(name, out, part)
        out.mul_(0.7 + len(name) % 3 * 0.2 if "norm" in name else 12)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("config", KINDS.values(), ids=list(KINDS))
def test_a_cut_model_gives_the_logits_of_the_whole(config: ModelConfig, size: int) -> None:
    tokens = torch.arange(37) * 7 % config.vocab_size
    whole = build(Loud(config), device="cpu", dtype=torch.float32)
    with torch.inference_mode():
        expected = whole.logits(hidden_states(whole, tokens))

    def one(group: Group) -> tuple[Tensor, Tensor, Tensor, int]:
        program = build(Loud(config), device="cpu", dtype=torch.float32, ranks=group)
        assert (program.num_heads, program.num_kv_heads) == (12 // size, 6 // size)
        hidden = hidden_states(program, tokens)
        assert torch.equal(hidden, hidden_states(program, tokens, block=1))
        return program.logits(hidden), program.greedy(hidden), hidden, program.weight_bytes()

    results = on_ranks(size, one)
    for logits, greedy, hidden, _ in results:
        assert torch.equal(logits, results[0][0])
        assert torch.equal(hidden, results[0][2])
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-3)
        assert torch.equal(greedy, logits.argmax(-1).int())
    assert torch.equal(results[0][1], expected.argmax(-1).int())
    assert max(result[3] for result in results) < 0.8 * whole.weight_bytes()


def test_greedy_takes_the_lowest_of_equal_tokens_whichever_rank_has_it() -> None:
    class Flat(DummyCheckpoint):
        def read_into(self, name: str, out: Tensor, part: Any = None) -> None:
            out.fill_(1.0)

    def one(group: Group) -> Tensor:
        program = build(Flat(TINY), device="cpu", dtype=torch.float32, ranks=group)
        return program.greedy(torch.ones(2, TINY.hidden_size))

    assert [result.tolist() for result in on_ranks(3, one)] == [[0, 0]] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_parts_of_dummy_weights_are_one_model_for_any_number_of_ranks(dtype: torch.dtype) -> None:
    check_parts(DummyCheckpoint(KINDS["untied and biased"]), dtype, sizes=(2, 3, 6))


def test_the_parts_of_a_safetensors_directory_make_the_whole(tiny_llama_dir: Path) -> None:
    checkpoint = DirectoryCheckpoint(tiny_llama_dir)
    try:
        check_parts(checkpoint, torch.float32, sizes=(2,))
    finally:
        checkpoint.close()


def test_the_parts_of_a_gguf_make_the_whole(smollm2_path: Path) -> None:
    checkpoint = GgufCheckpoint(smollm2_path)
    try:
        check_parts(checkpoint, torch.float32, sizes=(3,), layers=("layers.7.",))
    finally:
        checkpoint.close()


def check_parts(
    checkpoint: Checkpoint, dtype: torch.dtype, sizes: tuple[int, ...], layers: tuple[str, ...] = ("",)
) -> None:
    for name, shape in tensor_shapes(checkpoint.config).items():
        if not any(layer in name for layer in layers):
            continue
        whole = torch.empty(shape, dtype=dtype)
        checkpoint.read_into(name, whole)
        for size in sizes:
            seen = torch.zeros(shape)
            for rank in range(size):
                part = part_of(name, shape, rank, size)
                if part is None:
                    continue
                out = torch.empty(part.shape(shape), dtype=dtype)
                checkpoint.read_into(name, out, part)
                block = slice(*part.rows), *(() if part.columns is None else (slice(*part.columns),))
                assert torch.equal(out, whole[block]), (name, rank)
                seen[block] += 1
            assert (seen == (0 if part is None else 1)).all(), name


@pytest.mark.parametrize(
    ("change", "size", "said"),
    [
        ({}, 4, r"tensor_parallel is 4; the model has 6 key/value heads.*Possible here: 1, 2, 3, 6"),
        ({"num_heads": 9, "num_kv_heads": 3}, 2, "9 query heads"),
        ({"intermediate_size": 65}, 3, "65 channels"),
        ({"vocab_size": 2}, 3, "vocabulary of 2"),
    ],
)
def test_a_model_that_cannot_be_cut_is_refused_with_the_numbers(change: dict[str, int], size: int, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        shard_config(replace(TINY, **change), size)  # type: ignore[arg-type]


def test_the_vocabulary_is_cut_without_a_gap() -> None:
    for vocab in (331, 512, 7):
        for size in (1, 2, 3, 6):
            parts = [vocabulary_part(vocab, rank, size) for rank in range(size)]
            assert [token for start, stop in parts for token in range(start, stop)] == list(range(vocab))


def test_sums_and_gathers_are_the_same_on_all_ranks_and_may_run_behind() -> None:
    def one(group: Group) -> list[Tensor]:
        x = torch.full((5, 3), float(group.rank + 1), dtype=torch.bfloat16)
        wide = x.float() * 10  # before the sum that is written over x begins
        first, second = group.start_sum(x), group.start_sum(wide)
        return [first.wait().float(), second.wait(), group.gather(torch.tensor([[group.rank]]))]

    for first, second, gathered in on_ranks(3, one):
        assert (first == 6).all()
        assert (second == 60).all()
        assert gathered.tolist() == [[[0]], [[1]], [[2]]]
