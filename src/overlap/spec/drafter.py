"""What a drafter is: told what the target has just read, it proposes what comes next.

One speculative step: verify K + 1 positions, accept, then `draft`, which first takes in what the target read (the
draft-extend: a static block of K + 1 positions a row, of which the device knows how many are true) and then drafts.
What a drafter keeps for positions that turn out not to be true is written over in the next step.

Legend: T tokens, R rows, K drafts of a row at most, X width of what the target's layers gave, P pages of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from overlap.models.program import Forward
from overlap.ops.attention import AttentionRows
from overlap.schedule.plan import SampleKind
from overlap.state.rows import SlotRows


@dataclass(frozen=True, slots=True, kw_only=True)
class Read:
    """What the target read in a step, row after row, and what comes behind it; on the device unless it says host."""

    token_ids: Tensor
    """int32 [T]: the tokens that the target read."""
    next_tokens: Tensor
    """int32 [T]: the token behind each: the next one of the prompt, the target's choice where there is none yet."""
    positions: Tensor
    """int32 [T]: the absolute positions of `token_ids`."""
    kv_index: Tensor
    """int32 [T]: where their KV goes, as in Batch; -1 for padding."""
    hidden: Tensor | None
    """[T, X] what the drafter asked of the target: see `Drafter.taps`. None if it asked nothing."""
    rows: AttentionRows
    """The attention of these tokens. A verify's block is a decode row of K + 1 positions."""
    last: Tensor
    """int64 [R]: the index among T of each row's last true token. Drafts go on behind its next token."""
    slots: Tensor
    """int32 [R]"""
    token_slots: Tensor
    """int32 [T]: the slot of each token; the scratch slot for padding."""
    page_table: Tensor
    """int32 [R, P]: has pages for K positions past each row's last true token."""
    longest: int
    """Host: no row's last true token has a position past this."""
    most: int | None = None
    """Host: how many tokens to draft for each row at most, 1 to K; None for K."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drafts:
    """What a drafter proposes."""

    tokens_RK: Tensor
    """int32 [R, k]: for the k positions behind the next token of each row's last true one; k is `Read.most`."""
    num_R: Tensor
    """int32 [R]: how many of them are meant, 0 to k."""


class Drafter(Protocol):
    """Proposes up to K tokens a row. Enqueues only, and never waits for the device."""

    max_drafts: int
    """K"""
    captures: bool
    """Whether it takes nothing from the host but sizes, so that a graph of `draft` and `take_in` can be replayed."""
    taps: tuple[int, ...]
    """What `Read.hidden` has to be: the target's residual stream in front of these layers, side by side; for an
    empty one nothing. The number of layers stands for the hidden states behind the final norm."""

    def remember(self, slot: int, tokens: Tensor) -> None:
        """Take in the first tokens (int32) of a slot's new owner whose KV was there already: no step will read them."""

    def take_in(self, read: Read) -> None:
        """Take in what the target read, and draft nothing."""

    def draft(self, read: Read, slots: SlotRows, kind: SampleKind) -> Drafts:
        """Take in what the target read, then draft for each row. `kind` is that of `sampler.sample_all`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """What one forward of a head reads: int32 [T] each, and hidden states [T, X] if the head reads any."""

    token_ids: Tensor
    positions: Tensor
    kv_index: Tensor
    hidden: Tensor | None


class Head(Protocol):
    """A network that drafts: an EAGLE head, or a whole small model. Its KV uses the page ids of the target's."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ahead: int
    """Which token an entry at position i says: i + ahead. 2 reads the token behind the position, 1 the one at it."""
    taps: tuple[int, ...]
    """See `Drafter.taps`."""

    def forward(self, entry: Entry, kv: Tensor) -> Forward:
        """Run over T entries, pausing at each joint; return hidden states [T, C]."""

    def logits(self, state_EC: Tensor) -> Tensor:
        """Return float32 [E, V], over the target's vocabulary."""

    def greedy(self, state_EC: Tensor) -> Tensor:
        """Return the likeliest tokens, int32 [E]: `logits(state).argmax(-1)`."""
