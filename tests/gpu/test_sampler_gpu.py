"""The sampling kernels against the torch code of `sampler` on the same GPU. Run with `python -m pytest tests/gpu`."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from overlap.sample.philox import gumbel
from overlap.sample.sampler import scale, truncate
from overlap.state.rows import SlotRows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:Synchronization debug mode"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SHAPES = ((1, 49152), (1, 128256), (5, 1000), (8, 151936), (33, 49152), (64, 128256), (300, 4099))


def draw(logits: Tensor, rows: SlotRows, slots: Tensor, positions: Tensor, truncated: bool) -> Tensor:
    from overlap.sample import draw_triton

    return draw_triton.draw(logits, rows, slots, positions, truncated)


def reference(
    logits: Tensor, rows: SlotRows, slots: Tensor, positions: Tensor, truncated: bool, nudge: float = 1.0
) -> Tensor:
    """The same by torch; `nudge` moves the borders of top-p and min-p."""
    temperature, seed_lo, seed_hi, top_k, top_p, min_p = (
        column.index_select(0, slots)
        for column in (rows.temperature, rows.seed_lo, rows.seed_hi, rows.top_k, rows.top_p, rows.min_p)
    )
    scaled = scale(logits.float(), temperature)
    if truncated:
        scaled = truncate(scaled, top_k, torch.where(top_p < 1, top_p * nudge, top_p), min_p * nudge)
    drawn = gumbel(seed_lo, seed_hi, positions, scaled.shape[1], scaled).argmax(dim=-1)
    return torch.where(temperature > 0, drawn, logits.float().argmax(dim=-1))


def random_rows(chance: random.Random, num_rows: int) -> tuple[SlotRows, Tensor, Tensor]:
    rows = SlotRows(num_rows + 3, 1, "cpu")
    for slot in range(num_rows + 3):
        rows.temperature[slot] = chance.choice([0.0, 0.3, 0.7, 1.0, 1.0, 5.0])
        rows.top_k[slot] = chance.choice([0, 0, 1, 5, 50, 2000])
        rows.top_p[slot] = chance.choice([1.0, 1.0, 0.99, 0.9, 0.5, 0.1])
        rows.min_p[slot] = chance.choice([0.0, 0.0, 0.05, 0.5])
        rows.seed_lo[slot], rows.seed_hi[slot] = chance.getrandbits(31), -chance.getrandbits(31)
    device = SlotRows(num_rows + 3, 1, "cuda")
    for name in ("temperature", "top_k", "top_p", "min_p", "seed_lo", "seed_hi"):
        getattr(device, name).copy_(getattr(rows, name))
    slots = torch.tensor(chance.sample(range(num_rows + 3), num_rows), dtype=torch.int32, device="cuda")
    return device, slots, torch.randint(0, 2**31 - 1, (num_rows,)).int().cuda()


def random_logits(chance: random.Random, num_rows: int, size: int) -> Tensor:
    logits = torch.randn(num_rows, size, device="cuda") * chance.choice([0.5, 3.0, 6.0])
    logits[::3] = logits[::3].round()  # many ties
    logits[1::3, : size // 2] = -torch.inf
    return logits


@pytest.mark.parametrize(("num_rows", "size"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_drawn_tokens_are_the_references_bit_for_bit(num_rows: int, size: int, dtype: torch.dtype) -> None:
    for seed in range(4):
        torch.manual_seed(seed)
        chance = random.Random(seed)
        rows, slots, positions = random_rows(chance, num_rows)
        logits = random_logits(chance, num_rows, size).to(dtype)
        got = draw(logits, rows, slots, positions, False)
        assert torch.equal(got, reference(logits, rows, slots, positions, False))


@pytest.mark.parametrize(("num_rows", "size"), SHAPES)
def test_filters_without_a_sort_leave_the_tokens_of_the_reference(num_rows: int, size: int) -> None:
    """Equal but for borders of top-p and min-p that hang on the last bit of `exp`."""
    different, total = 0, 0
    for seed in range(8):
        torch.manual_seed(seed)
        chance = random.Random(seed)
        rows, slots, positions = random_rows(chance, num_rows)
        logits = random_logits(chance, num_rows, size)
        got = draw(logits, rows, slots, positions, True)
        exact = reference(logits, rows, slots, positions, True)
        nudged = [reference(logits, rows, slots, positions, True, 1 + sign * 2**-20) for sign in (-1, 1)]
        assert bool(((got == exact) | (got == nudged[0]) | (got == nudged[1])).all())
        different += int((got != exact).sum())
        total += num_rows
    print(f"\n{different} of {total} tokens hang on a last bit")
    assert different <= total // 100


def test_a_row_draws_the_same_token_alone_and_in_any_batch_and_nothing_waits() -> None:
    torch.manual_seed(0)
    rows, slots, positions = random_rows(random.Random(0), 40)
    logits = random_logits(random.Random(0), 40, 49152)
    for truncated in (False, True):
        draw(logits, rows, slots, positions, truncated)  # compiles
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            together = draw(logits, rows, slots, positions, truncated)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for begin, end in ((0, 1), (7, 8), (3, 9), (20, 40)):
            some = slice(begin, end)
            assert torch.equal(draw(logits[some], rows, slots[some], positions[some], truncated), together[some])


def test_logits_that_are_not_finite_harm_their_row_only() -> None:
    torch.manual_seed(1)
    rows, slots, positions = random_rows(random.Random(1), 30)
    logits = torch.randn(30, 49152, device="cuda")
    for truncated in (False, True):
        sane = draw(logits, rows, slots, positions, truncated)
        for bad in (torch.nan, torch.inf, -torch.inf):
            broken = logits.clone()
            broken[:3] = bad
            broken[3:6, 100] = bad
            got = draw(broken, rows, slots, positions, truncated)
            assert torch.equal(got[6:], sane[6:])
            assert torch.equal(got, reference(broken, rows, slots, positions, truncated))


@pytest.mark.parametrize("truncated", [False, True])
def test_replays_of_a_graph_draw_from_the_exact_distribution(truncated: bool) -> None:
    """The positions advance inside the graph, so each replay has noise of its own; no buffer of one is left dirty."""
    torch.manual_seed(2)
    num_rows, size, rounds, top_k = 32, 5000, 300, 40
    one = torch.randn(size, device="cuda") * 2.5
    logits = one.expand(num_rows, -1).contiguous()
    rows = SlotRows(num_rows, 1, "cuda")
    rows.temperature.fill_(0.8)
    rows.top_p.fill_(1.0)
    rows.top_k.fill_(top_k if truncated else 0)
    rows.seed_lo.copy_(torch.arange(num_rows + 1))
    slots = torch.arange(num_rows, dtype=torch.int32, device="cuda")
    positions = torch.zeros(num_rows, dtype=torch.int32, device="cuda")
    draw(logits, rows, slots, positions, truncated)
    counts = torch.zeros(size, dtype=torch.int64, device="cuda")
    ones = torch.ones(num_rows, dtype=torch.int64, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        positions += 1
        counts.index_add_(0, draw(logits, rows, slots, positions, truncated), ones)
    counts.zero_()
    for _ in range(rounds):
        graph.replay()
    assert int(positions[0]) == rounds
    scaled = one.double().cpu() / 0.8
    if truncated:
        scaled[scaled < scaled.topk(top_k).values[-1]] = -torch.inf
    expected = scaled.softmax(0) * rounds * num_rows
    got = counts.double().cpu()
    assert got.sum() == rounds * num_rows
    assert got[expected == 0].sum() == 0
    likely = expected >= 5  # what is rarer makes one cell together
    got = torch.cat((got[likely], got[~likely].sum()[None]))
    want = torch.cat((expected[likely], expected[~likely].sum()[None] + 1e-9))
    freedom = int(likely.sum())
    chi_square = float(((got - want) ** 2 / want)[: freedom + int(want[-1] >= 5)].sum())
    print(f"\nchi-square {chi_square:.0f} over {freedom} cells")
    assert freedom > 20
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5 + 4  # about one chance in ten thousand
