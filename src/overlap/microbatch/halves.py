"""Two halves of a batch at once: while the ranks sum for one half, the other computes.

    compute   A1   B1   A2   B2   A3   B3
    sums          ─a1─ ─b1─ ─a2─ ─b2─

A sum over ranks is started and not waited for until its half goes on, so this needs no more than `Ranks.start_sum`:
gloo sums on a thread of its own, NCCL on a stream of its own, and the simulated device on a stream of its own. (Other
engines do it with a second copy of the model, or with a thread for each half: docs/architecture.md.)

Both halves are of one step: they read each other's KV nowhere, since a row is in one of them only.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from torch import Tensor

from overlap.cache.pages import Ints
from overlap.models.program import Attend, Forward, Pending
from overlap.ops.attention import Attention

LEAST_TOKENS: Final = 128
"""Tokens of a step from which two halves pay: 64 in each. With fewer, a matrix product takes as long for half of them
as for all, since it waits for the weights, which two halves read twice."""


@dataclass(frozen=True, slots=True)
class Half:
    """A forward, and the attention that was planned for its rows."""

    forward: Forward
    attention: Attention


def pays(num_tokens: int, num_ranks: int) -> bool:
    """Return whether a step of so many tokens is better run as two halves: there are sums to hide, and enough work."""
    return num_ranks > 1 and num_tokens >= LEAST_TOKENS


def cut(counts: Ints) -> int | None:
    """Return how many of a step's rows make its first half, so that the tokens are as even as they can be.

    `counts` are the tokens of each row. None if there is but one row: a row's chunk attends to itself, and is not cut.
    """
    if len(counts) < 2:
        return None
    until = np.cumsum(counts)
    nearest = int(np.abs(2 * until - until[-1]).argmin())
    return min(nearest + 1, len(counts) - 1)


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
