"""How many tokens to draft for each row: decided on the device from what the row's drafts were worth.

A row's acceptance p is the share of its tried drafts that were confirmed (a draft behind a refused one was not
tried), over the last hundred tries or so. With k drafts a step emits 1 + p + ... + p^k tokens on average and costs
1 + k * cost plain steps. The row takes the k that emits the most per cost. A row that takes none drafts one token
now and then, to notice when its text gets easier; the price of that is at most PROBE_PRICE of a step.

Legend: S slots (and the scratch slot), R rows, K drafts of a row at most.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

MEMORY: Final = 0.98
"""What a try counts after one more step: an average over about the last 50 verified steps."""
PRIOR_ACCEPTANCE: Final = 0.6
PRIOR_TRIES: Final = 4.0
"""A new row starts as if it had tried so many drafts, of which the prior's share were confirmed."""
PROBE_PRICE: Final = 0.01
"""The most that looking again may cost a row that does not draft, in plain steps a step."""
MARGIN: Final = 0.02
"""Drafting has to promise this much more than plain decoding: estimates are noisy, and plain decoding is certain."""


class DraftControl:
    """The columns of the rule, indexed by slot. One writer: whoever launches the verify."""

    def __init__(self, num_slots: int, max_drafts: int, device: torch.device | str) -> None:
        """`max_drafts` is K, 1 or more. There is a row more for the scratch slot, as in SlotRows."""
        self.max_drafts = max_drafts
        self.hits = torch.zeros(num_slots + 1, device=device)
        """float32 [S]: confirmed drafts, older ones counting less."""
        self.tries = torch.zeros(num_slots + 1, device=device)
        """float32 [S]: tried drafts, older ones counting less."""
        self.idle = torch.zeros(num_slots + 1, dtype=torch.int32, device=device)
        """int32 [S]: steps since the slot last drafted."""
        self._counts_K = torch.arange(max_drafts + 1, device=device)

    def admit(self, slots_R: Tensor) -> None:
        """Forget what earlier owners of these slots (int [R]) did."""
        index = slots_R.long()
        self.hits.index_fill_(0, index, 0.0)
        self.tries.index_fill_(0, index, 0.0)
        self.idle.index_fill_(0, index, 0)

    def choose(self, slots_R: Tensor, cost: Tensor | float) -> Tensor:
        """Return how many tokens to draft for each row, int32 [R], 0 to K.

        `cost` is what one more drafted position of a row costs at this load, in plain steps of that row: the host
        measures it (drafter step plus the wider verify, over a plain step) and writes it into a tensor of one
        float32, or passes a number. It is small at few rows and nears 1 where compute is the bound.
        """
        index = slots_R.long()
        p_R1 = self.acceptance(slots_R)[:, None]
        emitted_RK = p_R1.pow(self._counts_K[None, :]).cumsum(dim=1)
        price_K = 1 + self._counts_K * cost
        promise_RK = emitted_RK / price_K[None, :]
        promise_RK[:, 0] += MARGIN
        best_R = promise_RK.argmax(dim=1).int()
        probes_R = self.idle.index_select(0, index) * PROBE_PRICE >= cost
        return torch.maximum(best_R, probes_R.int())

    def acceptance(self, slots_R: Tensor) -> Tensor:
        """Return each row's estimate that its next draft is confirmed, float32 [R]."""
        index = slots_R.long()
        hits_R, tries_R = self.hits.index_select(0, index), self.tries.index_select(0, index)
        return (hits_R + PRIOR_ACCEPTANCE * PRIOR_TRIES) / (tries_R + PRIOR_TRIES)

    def learn(self, slots_R: Tensor, num_drafts_R: Tensor, num_accepted_R: Tensor) -> None:
        """Take in the outcome of one verify: int32 [R] each, of distinct slots. Rows without drafts learn nothing."""
        index = slots_R.long()
        drafted_R = num_drafts_R > 0
        tried_R = torch.minimum(num_accepted_R + 1, num_drafts_R)
        kept_R = torch.where(drafted_R, MEMORY, 1.0)
        self.hits.index_copy_(0, index, self.hits.index_select(0, index) * kept_R + num_accepted_R * drafted_R)
        self.tries.index_copy_(0, index, self.tries.index_select(0, index) * kept_R + tried_R * drafted_R)
        self.idle.index_copy_(0, index, (self.idle.index_select(0, index) + 1).masked_fill(drafted_R, 0))
