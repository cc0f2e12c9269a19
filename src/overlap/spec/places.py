"""Where the forwards of a chain drafter read, all of them at once: they follow from each row's last true token.

Legend: T tokens, R rows, S forwards and the block before them, P pages of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from overlap.cache.pages import PAGE
from overlap.spec.drafter import Read


@dataclass(frozen=True, slots=True)
class Places:
    """int32 [S, R] each. Number 0 is the block's last true token, of which only `says` is meant."""

    positions_SR: Tensor
    """Never past the context's last one."""
    kv_index_SR: Tensor
    """-1 past the context, and for padding."""
    seq_lens_SR: Tensor
    says_SR: Tensor
    """The position of the token that comes of it."""


def chain_places(read: Read, steps: int, context: int, ahead: int, scratch: int) -> Places:
    """Return the places of `steps` forwards of a token a row; `ahead` is the head's, `scratch` the slot of padding."""
    if read.positions.is_cuda:
        from overlap.spec import places_triton

        return Places(*places_triton.chain_places(read, steps, context, ahead, scratch))
    ahead_S1 = torch.arange(steps + 1, dtype=torch.int32)[:, None]
    places_SR = read.positions.index_select(0, read.last) + ahead_S1
    real_R = read.slots != scratch
    positions_SR = places_SR.clamp(max=context - 1)
    pages_SR = read.page_table.gather(1, (positions_SR // PAGE).long().T).T
    # Past the context nothing is written; what such a row drafts is of no use, and of no harm.
    kv_index_SR = torch.where((places_SR < context) & real_R, pages_SR * PAGE + positions_SR % PAGE, -1)
    return Places(positions_SR, kv_index_SR, positions_SR + 1, places_SR + ahead)
