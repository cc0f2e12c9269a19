"""Two halves at once: equal to one batch, and with the sums hidden behind the other half."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from overlap.cache.pages import PAGE
from overlap.graphs.buckets import token_buckets
from overlap.graphs.eager import drive
from overlap.lane_runner import explain_halves, host_bound_tokens
from overlap.microbatch.halves import LEAST_TOKENS, Half, cut, drive_together, middle_of
from overlap.models.config import ModelConfig
from overlap.models.dummy import DummyCheckpoint
from overlap.models.load import build
from overlap.models.program import Batch, Joint, Reduce
from overlap.ops.attention import AttentionRows, TorchAttention
from overlap.schedule.plan import StepPlan
from overlap.streams.sim import SimDevice, SimStream
from overlap.streams.stream import Mark


@dataclass
class SimSum:
    ranks: SimRanks
    mark: Mark
    x: Tensor

    def wait(self) -> Tensor:
        self.ranks.compute.follow(self.mark)
        return self.x


class SimRanks:
    """Two ranks with the same numbers: a sum doubles them, on a stream of its own."""

    rank, size = 0, 2

    def __init__(self, device: SimDevice) -> None:
        self.compute: SimStream = device.stream("compute")
        self.comm: SimStream = device.stream("comm")

    def sum(self, x: Tensor) -> Tensor:
        return self.start_sum(x).wait()

    def start_sum(self, x: Tensor) -> SimSum:
        self.comm.follow(self.compute.mark())
        self.comm.launch("sum", lambda: x.mul_(2), tokens=len(x))
        return SimSum(self, self.comm.mark(), x)

    def gather(self, x: Tensor) -> Tensor:
        return torch.stack([x, x])


class NoAttention(TorchAttention):
    def __init__(self) -> None:
        """Nothing to bind: these forwards have no such joint."""


def forward(ranks: SimRanks, x: Tensor, layers: int) -> Generator[Joint, Tensor, Tensor]:
    for _ in range(2 * layers):
        y = x.clone()
        ranks.compute.launch("piece", lambda y=y: y.sin_(), tokens=len(y))  # type: ignore[misc]
        x = yield Reduce(y, ranks)
    ranks.compute.launch("piece", lambda: None, tokens=len(x))
    return x + 1


def run(sizes: list[int], cost_of_a_sum: float) -> tuple[SimDevice, Tensor]:
    device = SimDevice(lambda work, tokens: tokens * (cost_of_a_sum if work == "sum" else 1.0))
    ranks = SimRanks(device)
    x = torch.linspace(0, 1, 8 * 3).reshape(8, 3)
    halves = [Half(forward(ranks, part, layers=16), NoAttention()) for part in torch.split(x, sizes)]
    return device, torch.cat(drive_together(halves))


@pytest.mark.parametrize("cost", [0.3, 0.9])
def test_two_even_halves_hide_the_sums_behind_each_other(cost: float) -> None:
    device, halved = run([4, 4], cost)
    assert device.hidden("comm", behind="compute") > 0.9
    assert device.bubble("compute") == pytest.approx(0.0)
    serial, whole = run([8], cost)
    assert serial.hidden("comm", behind="compute") == 0.0
    assert torch.equal(halved, whole)


def test_uneven_halves_hide_less_and_three_parts_need_no_other_driver() -> None:
    _, whole = run([8], 0.5)
    uneven, two = run([7, 1], 0.5)
    device, three = run([3, 3, 2], 0.5)
    assert torch.equal(two, whole)
    assert torch.equal(three, whole)
    assert uneven.hidden("comm", behind="compute") < 0.5 < 0.9 < device.hidden("comm", behind="compute")


def test_a_forward_that_fails_closes_the_others() -> None:
    device = SimDevice()
    ranks = SimRanks(device)
    closed = []

    def watched() -> Generator[Joint, Tensor, Tensor]:
        try:
            return (yield from forward(ranks, torch.ones(1), 4))
        finally:
            closed.append(True)

    def failing() -> Generator[Joint, Tensor, Tensor]:
        yield Reduce(torch.ones(1), ranks)
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        drive_together([Half(watched(), NoAttention()), Half(failing(), NoAttention())])
    assert closed


def test_halves_are_cut_between_rows_as_evenly_as_rows_allow() -> None:
    assert cut(np.array([1, 1, 1, 1], dtype=np.int32)) == 2
    assert cut(np.array([1, 1, 1, 90, 93], dtype=np.int32)) == 4
    assert cut(np.array([500, 1, 1], dtype=np.int32)) == 1
    assert cut(np.array([1, 1, 500], dtype=np.int32)) == 2
    assert cut(np.array([500], dtype=np.int32)) is None


@pytest.mark.parametrize(
    ("counts", "num_decode", "middle"),
    [
        ([LEAST_TOKENS // 2] * 2, 0, 1),
        ([LEAST_TOKENS // 2, LEAST_TOKENS // 2 - 1], 0, None),
        ([1] * 300, 300, None),
        ([1] * 40 + [4000], 40, None),
        ([1] * 40 + [2000, 900], 40, 41),
        ([500], 0, None),
    ],
    ids=["enough", "too few", "decode rows", "one prompt beside few rows", "two prompts", "one row"],
)
def test_halves_pay_with_enough_prompt_tokens_that_can_be_cut_into_two_of_about_as_many(
    counts: list[int], num_decode: int, middle: int | None
) -> None:
    own = planned(counts, num_decode)
    assert middle_of(own) == middle


def test_halves_that_no_step_can_have_are_explained_with_why_and_what_to_do() -> None:
    assert explain_halves(797, 8192, 3).startswith("halves: steps with 797 prompt tokens or more")
    assert explain_halves(0, 128, 3).startswith("halves: steps with 128 prompt tokens or more")
    pieces = (
        "no step is cut: those of up to 8192 tokens run whole, as graphs' pieces, and token_budget is 8192. Raise it"
    )
    assert pieces in explain_halves(8193, 8192, 0)
    assert "that takes 128 prompt tokens or more, and token_budget is 127" in explain_halves(0, 127, 0)


SMALL = ModelConfig(
    architecture="LlamaForCausalLM", vocab_size=49152, hidden_size=576, num_layers=30, num_heads=9, num_kv_heads=3,
    head_dim=64, intermediate_size=1536, rms_norm_eps=1e-5, rope_theta=1e4, rope_scaling=None, context=8192,
    tied_embeddings=True, attention_bias=False, mlp_bias=False, eos_token_ids=(2,), bos_token_id=1, dtype="bfloat16",
)  # fmt: skip
LARGE = replace(
    SMALL, vocab_size=128256, hidden_size=4096, num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128,
    intermediate_size=14336, tied_embeddings=False,
)  # fmt: skip


def test_how_many_tokens_run_in_pieces_goes_by_the_whole_model_and_the_number_of_ranks() -> None:
    assert [host_bound_tokens(LARGE, ranks) for ranks in (1, 2, 8)] == [398, 796, 3187]
    assert token_buckets(min(8192, host_bound_tokens(SMALL, 1)))[-1] == 8192
    assert host_bound_tokens(SMALL, 3) == 71367


def planned(counts: list[int], num_decode: int) -> StepPlan:
    none = np.empty(0, dtype=np.int32)
    return StepPlan(
        number=1, slots=np.arange(len(counts), dtype=np.int32), counts=np.array(counts, dtype=np.int32),
        starts=np.zeros(len(counts), dtype=np.int32), num_decode=num_decode,
        prompt=np.zeros(sum(counts[num_decode:]), dtype=np.int32), emits=none, sampled=none, truncated=False,
        admissions=(), page_slots=none, page_indices=none, page_ids=none, chunk_pages=none,
    )  # fmt: skip


class Alone:
    """One rank of one, which sums all the same: so that a real model yields its sums."""

    rank, size = 0, 2

    def sum(self, x: Tensor) -> Tensor:
        return x

    def start_sum(self, x: Tensor) -> SimSum:
        ranks = SimRanks(SimDevice())
        return SimSum(ranks, ranks.comm.mark(), x)

    def gather(self, x: Tensor) -> Tensor:
        return torch.stack([x, x])


def test_two_halves_of_a_llama_give_the_hidden_states_of_one_batch(tmp_path: Path) -> None:
    config = ModelConfig(
        architecture="LlamaForCausalLM", vocab_size=97, hidden_size=32, num_layers=3, num_heads=4, num_kv_heads=2,
        head_dim=8, intermediate_size=48, rms_norm_eps=1e-5, rope_theta=1e4, rope_scaling=None, context=128,
        tied_embeddings=True, attention_bias=False, mlp_bias=False, eos_token_ids=(2,), bos_token_id=1,
        dtype="float32",
    )  # fmt: skip
    program = build(DummyCheckpoint(config), device="cpu", dtype=torch.float32, ranks=Alone())
    counts, pages = [20, 7], [[0, 1], [2, 2]]

    def half(kv: Tensor, rows: list[int]) -> Half:
        positions = torch.cat([torch.arange(counts[row]) for row in rows])
        page = torch.cat([torch.tensor(pages[row])[torch.arange(counts[row]) // PAGE] for row in rows])
        batch = Batch(
            token_ids=torch.cat([torch.arange(counts[row]) * (row + 3) % 97 for row in rows]).int(),
            positions=positions.int(),
            kv_index=(page * PAGE + positions % PAGE).int(),
            kv=kv,
        )
        attention = TorchAttention(kv, program.num_heads)
        attention.plan(
            AttentionRows(
                num_decode=0,
                seq_lens=torch.tensor([counts[row] for row in rows], dtype=torch.int32),
                page_table=torch.tensor([pages[row] for row in rows], dtype=torch.int32),
                starts=np.zeros(len(rows), dtype=np.int32),
                counts=np.array([counts[row] for row in rows], dtype=np.int32),
                chunk_pages=np.array([p for row in rows for p in pages[row][: -(-counts[row] // PAGE)]], np.int32),
            )
        )
        return Half(program.forward(batch), attention)

    def kv() -> Tensor:
        return torch.zeros(3, 3, 2, PAGE, program.num_kv_heads, program.head_dim)

    with torch.inference_mode():
        whole = half(kv(), [0, 1])
        expected = drive(whole.forward, whole.attention)
        shared = kv()
        found = torch.cat(drive_together([half(shared, [0]), half(shared, [1])]))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
