"""A model as a program of pieces and joints, and what one run of it needs.

`forward` is a generator. Between yields it runs a piece (GEMM, norm, rope, activation); each yield hands a joint to
whoever drives it, and is sent the joint's result. The program knows no driver, and no driver knows the model. (The
shape is that of `httpx.Auth.auth_flow`; capture, two lanes and speculation are drivers of this one method.)

Shape legend: T tokens, R rows, E emitting rows, H query heads, K key/value heads, D head size, C hidden size,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """The inputs of one forward, on the device."""

    token_ids: Tensor
    """int32 [T]"""
    positions: Tensor
    """int32 [T] absolute position of each token."""
    kv_index: Tensor
    """int32 [T] where each token's KV goes: page * PAGE + offset in the page. -1 for padding: written nowhere."""
    kv: Tensor
    """[pages, layers, 2, PAGE, K, D] the KV memory, page-major: a page is one contiguous block."""


@dataclass(frozen=True, slots=True)
class Attend:
    """Joint: attention of this step's queries over the pages of their rows. KV of this step is written already.

    The driver answers with [T, H * D].
    """

    layer: int
    q_THD: Tensor


class Pending(Protocol):
    """A sum over ranks that is under way."""

    def wait(self) -> Tensor:
        """Return the sum. On CUDA the stream waits for it, not the host; on a CPU the thread does."""


class Ranks(Protocol):
    """The ranks that hold a model together, as one of them sees it. Each calls the same in the same order.

    Raises EngineDead once a rank is lost, or late by the group's time limit.
    """

    rank: int
    """Which one this is, from 0."""
    size: int
    """How many there are."""

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum of `x` over all ranks, the same bits on each. Written over `x`, which is contiguous."""

    def start_sum(self, x: Tensor) -> Pending:
        """Begin `sum` and return at once: it runs while the caller goes on."""

    def gather(self, x: Tensor) -> Tensor:
        """Return the `x` of all ranks, [size, *x.shape]. Of the same shape on each."""


@dataclass(frozen=True, slots=True)
class Reduce:
    """Joint: `x`, of each rank a part of a sum. Only a model of several ranks yields it.

    The driver answers with `ranks.sum(x)`, or starts it and lets another forward run meanwhile.
    """

    x_TC: Tensor
    ranks: Ranks


Joint: TypeAlias = Attend | Reduce
Forward: TypeAlias = Generator[Joint, Tensor, Tensor]
"""Yields joints, is sent their results, returns hidden states [T, C] (after the final norm)."""


class Program(Protocol):
    """A loaded model."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int

    def forward(self, batch: Batch) -> Forward:
        """Run the model over `batch`, pausing at each joint."""

    def logits(self, hidden_EC: Tensor) -> Tensor:
        """Return the logits of some hidden states, float32 [E, V]."""

    def greedy(self, hidden_EC: Tensor) -> Tensor:
        """Return the likeliest tokens, int32 [E]: `logits(hidden).argmax(-1)`, the lowest of equals."""

    def weight_bytes(self) -> int:
        """Bytes of device memory that the parameters take."""
