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


Joint: TypeAlias = Attend
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
