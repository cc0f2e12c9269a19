"""Two halves of a batch at once: while the ranks sum for one half, the other computes.

    compute   A1   B1   A2   B2   A3   B3
    sums          ─a1─ ─b1─ ─a2─ ─b2─

A sum over ranks is started and not waited for until its half goes on, so this needs no more than `Ranks.start_sum`:
gloo sums on a thread of its own, NCCL on a stream of its own, and the simulated device on a stream of its own. No
second copy of the model, and no thread for each half.

Both halves are of one step: they read each other's KV nowhere, since a row is in one of them only.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from torch import Tensor

from overlap.cache.pages import PAGE, Ints
from overlap.models.program import Attend, Batch, Forward, Pending, Program
from overlap.ops.attention import Attention, AttentionRows
from overlap.schedule.plan import StepPlan

LEAST_TOKENS: Final = 128
"""Prompt tokens of a step from which two halves pay: 64 in each. With fewer, a matrix product takes as long for half of
them as for all, since it waits for the weights, which two halves read twice."""
LEAST_SHARE: Final = 0.25
"""Of a step's tokens, what the smaller half has at least: it hides no more of the other's sums than it computes."""


@dataclass(frozen=True, slots=True)
class Half:
    """A forward, and the attention that was planned for its rows."""

    forward: Forward
    attention: Attention


def cut(counts: Ints) -> int | None:
    """Return how many of a step's rows make its first half, so that the tokens are as even as they can be.

    `counts` are the tokens of each row. None if there is but one row: a row's chunk attends to itself, and is not cut.
    """
    if len(counts) < 2:
        return None
    until = np.cumsum(counts)
    nearest = int(np.abs(2 * until - until[-1]).argmin())
    return min(nearest + 1, len(counts) - 1)


def middle_of(plan: StepPlan) -> int | None:
    """Return how many rows of a step make the first of two halves; None if two halves do not pay.

    It depends on the plan only, so all ranks cut alike. Decode steps are bound by their weights, and stay whole.
    """
    middle = cut(plan.counts) if len(plan.prompt) >= LEAST_TOKENS else None
    if middle is None:
        return None
    first = int(plan.counts[:middle].sum())
    return middle if min(first, plan.num_tokens - first) >= LEAST_SHARE * plan.num_tokens else None


def part_of(rows: AttentionRows, first: int, last: int) -> AttentionRows:
    """Return those of a step's rows from `first` up to `last`."""
    decode = rows.num_decode
    num_pages = -(-(rows.starts[decode:] + rows.counts[decode:]) // PAGE)
    begin, end = (int(num_pages[: max(0, row - decode)].sum()) for row in (first, last))
    return replace(
        rows,
        num_decode=min(max(decode, first), last) - first,
        seq_lens=rows.seq_lens[first:last],
        page_table=rows.page_table[first:last],
        starts=rows.starts[first:last],
        counts=rows.counts[first:last],
        chunk_pages=rows.chunk_pages[begin:end],
    )


def halves_of(
    rows: AttentionRows, batch: Batch, program: Program, attentions: tuple[Attention, Attention], middle: int
) -> list[Half]:
    """Return the halves of a step, cut behind its first `middle` rows, each with its attention planned."""
    cut = int(rows.counts[:middle].sum())
    parts = ((0, middle, slice(0, cut)), (middle, len(rows.counts), slice(cut, None)))
    halves = []
    for attention, (first, last, tokens) in zip(attentions, parts, strict=True):
        attention.plan(part_of(rows, first, last))
        own = replace(
            batch,
            token_ids=batch.token_ids[tokens],
            positions=batch.positions[tokens],
            kv_index=batch.kv_index[tokens],
        )
        halves.append(Half(program.forward(own), attention))
    return halves


def drive_together(halves: Sequence[Half]) -> list[Tensor]:
    """Run forwards to their ends, each going on when another comes to a sum; return their hidden states [T, C].

    Enqueues only, as `graphs.eager.drive` does; on a CPU the thread waits for a sum that is not there when its half
    goes on. All ranks must cut a step alike, so that they start the same sums in the same order. If one forward fails,
    the others are closed.
    """
    hidden: dict[int, Tensor] = {}
    turns: deque[tuple[int, Pending | None]] = deque((index, None) for index in range(len(halves)))
    try:
        while turns:
            index, pending = turns.popleft()
            started = _until_sum(halves[index], pending, hidden, index)
            if started is not None:
                turns.append((index, started))
    finally:
        for half in halves:
            half.forward.close()
    return [hidden[index] for index in range(len(halves))]


def _until_sum(half: Half, pending: Pending | None, hidden: dict[int, Tensor], index: int) -> Pending | None:
    """Go on with one half until it starts its next sum, and return that; None once it has ended."""
    try:
        joint = next(half.forward) if pending is None else half.forward.send(pending.wait())
        while isinstance(joint, Attend):
            joint = half.forward.send(half.attention.attend(joint.layer, joint.q_THD))
    except StopIteration as end:
        hidden[index] = end.value
        return None
    return joint.ranks.start_sum(joint.x_TC)
