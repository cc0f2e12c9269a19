from __future__ import annotations

import logging
import random

import numpy as np
import pytest
import torch
from torch import Tensor

from overlap.ops.attention import AttentionRows, TorchAttention, choose_attention, fallbacks_of


def random_rows(chance: random.Random, num_pages: int, num_decode: int, num_chunks: int) -> AttentionRows:
    """Rows of up to 90 tokens over random, unshared pages."""
    starts = [chance.randint(0, 80) for _ in range(num_decode + num_chunks)]
    counts = [1] * num_decode + [chance.randint(1, 10) for _ in range(num_chunks)]
    if num_chunks:
        starts[num_decode] = 0
    lengths = [start + count for start, count in zip(starts, counts, strict=True)]
    pages = chance.sample(range(num_pages), 6 * len(lengths))
    table = np.array(pages, dtype=np.int32).reshape(-1, 6)
    return AttentionRows(
        num_decode=num_decode,
        seq_lens=torch.tensor(lengths, dtype=torch.int32),
        page_table=torch.from_numpy(table),
        starts=np.array(starts, dtype=np.int32),
        counts=np.array(counts, dtype=np.int32),
        chunk_pages=np.concatenate(
            [table[row, : -(-lengths[row] // 16)] for row in range(num_decode, len(lengths))] or [table[0, :0]]
        ),
    )


def oracle(kv: Tensor, layer: int, q_THD: Tensor, rows: AttentionRows) -> Tensor:
    """One token, one head at a time."""
    out, token = torch.empty_like(q_THD), 0
    group = q_THD.shape[1] // kv.shape[4]
    for row, count in enumerate(rows.counts.tolist()):
        pages = kv[rows.page_table[row].long(), layer]
        keys, values = (pages[:, side].flatten(0, 1) for side in (0, 1))
        for position in range(int(rows.starts[row]), int(rows.starts[row]) + count):
            for head in range(q_THD.shape[1]):
                seen = keys[: position + 1, head // group]
                weights = (seen @ q_THD[token, head] / q_THD.shape[2] ** 0.5).softmax(0)
                out[token, head] = weights @ values[: position + 1, head // group]
            token += 1
    return out.flatten(1)


@pytest.mark.parametrize("num_decode", [0, 1, 5])
@pytest.mark.parametrize("num_chunks", [0, 1, 3])
def test_torch_attention_is_what_one_head_at_a_time_gives(num_decode: int, num_chunks: int) -> None:
    if num_decode + num_chunks == 0:
        return
    for seed in range(5):
        chance = random.Random(seed)
        torch.manual_seed(seed)
        kv = torch.randn(60, 2, 2, 16, 2, 16)
        attention = TorchAttention(kv, 6)
        for _ in range(2):  # the second plan meets what the first has left
            rows = random_rows(chance, 60, num_decode, num_chunks)
            q = torch.randn(int(rows.counts.sum()), 6, 16)
            attention.plan(rows)
            for layer in (0, 1):
                got = attention.attend(layer, q)
                torch.testing.assert_close(got, oracle(kv, layer, q, rows), rtol=1e-5, atol=1e-5)


def test_the_cpu_has_one_kind_of_attention_and_says_so() -> None:
    attention, why = choose_attention(torch.zeros(2, 1, 2, 16, 1, 16), 2, max_pages_per_row=2)
    assert attention.name == "torch"
    assert why == "the only kind for this device"


def test_plain_attention_on_a_gpu_is_a_warning_and_a_figure_and_on_a_cpu_it_is_neither(
    caplog: pytest.LogCaptureFixture,
) -> None:
    attention = TorchAttention(torch.zeros(2, 1, 2, 16, 1, 16), 2)
    with caplog.at_level(logging.WARNING, logger="overlap"):
        assert fallbacks_of(torch.device("cpu"), attention, "the only kind for this device") == {}
        assert not caplog.records
        reason = "attention: torch, since FlashInfer is not there"
        assert fallbacks_of(torch.device("cuda"), attention, "FlashInfer is not there") == {reason: 1}
        pages = "a build failed:\n" + "error: no such thing\n" * 500
        (long,) = fallbacks_of(torch.device("cuda"), attention, pages, "the drafter's attention")
    assert caplog.records[0].getMessage() == f"slower than it could be: {reason}"
    assert long.startswith("the drafter's attention: torch, since a build failed: error: no such thing error:")
    assert len(long) <= 200
    assert "\n" not in long
