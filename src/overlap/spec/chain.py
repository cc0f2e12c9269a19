"""Chain drafts from a network with KV of its own: an EAGLE head, or a small model of the target's family.

The network first reads what the target has read (the draft-extend), then goes on from its own choices, one token a
forward. Its KV is a tensor of its own with the target's page ids, so there is nothing to allocate, and a prefix that
the target has cached is cached for the drafter, too.

Legend: T tokens, R rows, K drafts of a row, C hidden size, P pages of a row.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from overlap.cache.pages import PAGE
from overlap.graphs.eager import drive
from overlap.models.llama import Llama
from overlap.models.program import Attend, Batch, Forward
from overlap.ops.attention import Attention, AttentionRows
from overlap.sample.sampler import sample_all
from overlap.schedule.plan import SampleKind
from overlap.spec.drafter import Drafts, Entry, Head, Read
from overlap.spec.places import Places, chain_places
from overlap.state.rows import SlotRows


class ChainDrafter:
    """A Drafter made of a head, its KV memory and an attention bound to that memory."""

    def __init__(self, head: Head, kv: Tensor, attention: Attention, max_drafts: int, context: int) -> None:
        """`kv` comes from `head_kv`. `context` is the most positions of a row: nothing is read or kept past it."""
        self.max_drafts = max_drafts
        self.taps = head.taps
        self.captures = attention.captures_decode
        self._head = head
        self._kv = kv
        self._attention = attention
        self._context = context

    def remember(self, slot: int, tokens: Tensor) -> None:
        """Do nothing: its KV of these tokens lies in the pages that the target's does."""

    def take_in(self, read: Read) -> None:
        """Read the block as far as it leaves KV, which is what later drafts attend to: to the last layer's joint."""
        forward = self._begin(read)
        joint = next(forward)
        for _ in range(self._head.num_layers - 1):
            assert isinstance(joint, Attend), "a head is whole on one rank"
            joint = forward.send(self._attention.attend(joint.layer, joint.q_THD))
        forward.close()

    def draft(self, read: Read, slots: SlotRows, kind: SampleKind) -> Drafts:
        """Read the block, then draft, one forward each token; with `Head.ahead` 2 the block says the first."""
        most = self.max_drafts if read.most is None else read.most
        state_TC = drive(self._begin(read), self._attention)
        tokens: list[Tensor] = []
        steps = most - (self._head.ahead == 2)
        places = chain_places(read, steps, self._context, self._head.ahead, slots.scratch)
        if self._head.ahead == 2:
            state_RC = state_TC.index_select(0, read.last)
            token_R = self._choose(state_RC, read.slots, places.says_SR[0], slots, kind)
            tokens.append(token_R)
        else:
            state_RC, token_R = state_TC, read.next_tokens.index_select(0, read.last)
        for step in range(1, steps + 1):
            state_RC = self._step(read, token_R, state_RC, places, step)
            token_R = self._choose(state_RC, read.slots, places.says_SR[step], slots, kind)
            tokens.append(token_R)
        return Drafts(tokens_RK=torch.stack(tokens, dim=1), num_R=torch.full_like(read.slots, most))

    def _begin(self, read: Read) -> Forward:
        """Return a forward over the block, its attention planned."""
        entry = Entry(
            token_ids=read.next_tokens if self._head.ahead == 2 else read.token_ids,
            positions=read.positions,
            kv_index=read.kv_index,
            hidden=read.hidden,
        )
        self._attention.plan(read.rows)
        return self._head.forward(entry, self._kv)

    def _step(self, read: Read, token_R: Tensor, state_RC: Tensor, places: Places, step: int) -> Tensor:
        """Read one token a row, `step` behind its last true one."""
        num_rows = token_R.shape[0]
        longest = min(read.longest + step, self._context - 1)
        rows = AttentionRows(
            num_decode=num_rows,
            seq_lens=places.seq_lens_SR[step],
            page_table=read.page_table,
            starts=np.full(num_rows, longest, dtype=np.int32),
            counts=np.ones(num_rows, dtype=np.int32),
            chunk_pages=np.empty(0, dtype=np.int32),
        )
        entry = Entry(
            token_ids=token_R,
            positions=places.positions_SR[step],
            kv_index=places.kv_index_SR[step],
            hidden=state_RC,
        )
        self._attention.plan(rows)
        return drive(self._head.forward(entry, self._kv), self._attention)

    def _choose(
        self, state_RC: Tensor, slots_R: Tensor, positions_R: Tensor, slots: SlotRows, kind: SampleKind
    ) -> Tensor:
        """Draw as the target would at these positions, with the same filters and the same noise; int32 [R]."""
        if kind == "greedy":
            return self._head.greedy(state_RC)
        return sample_all(self._head.logits(state_RC), slots, slots_R, positions_R, kind).int()


class ModelHead:
    """A small model as a head: it reads token i at position i, and nothing of the target but its tokens."""

    ahead = 1
    taps: tuple[int, ...] = ()

    def __init__(self, program: Llama) -> None:
        """`program` has the target's vocabulary, and a context no shorter than the target's is used to."""
        self.num_layers, self.num_heads = program.num_layers, program.num_heads
        self.num_kv_heads, self.head_dim = program.num_kv_heads, program.head_dim
        self._program = program

    def forward(self, entry: Entry, kv: Tensor) -> Forward:
        """Return the model's hidden states, [T, C]."""
        batch = Batch(token_ids=entry.token_ids, positions=entry.positions, kv_index=entry.kv_index, kv=kv)
        return self._program.forward(batch)

    def logits(self, state_EC: Tensor) -> Tensor:
        """Return float32 [E, V]."""
        return self._program.logits(state_EC)

    def greedy(self, state_EC: Tensor) -> Tensor:
        """Return int32 [E]."""
        return self._program.greedy(state_EC)


def head_kv(head: Head, num_pages: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Return KV memory for a head, [pages, layers, 2, PAGE, K, D], beside a target's of as many pages."""
    shape = (num_pages, head.num_layers, 2, PAGE, head.num_kv_heads, head.head_dim)
    return torch.zeros(shape, dtype=dtype, device=device)
