"""DraftRows: what the device keeps of each slot's drafts, from the step that drafts to the one that verifies."""

from __future__ import annotations

import torch
from torch import Tensor

from overlap.spec.control import DraftControl


class DraftRows:
    """Persistent device state of S slots, and of the scratch slot behind them. Written by `spec.runs` and `admit`."""

    def __init__(self, num_slots: int, max_drafts: int, device: torch.device | str) -> None:
        self.max_drafts = max_drafts
        self.control = DraftControl(num_slots, max_drafts, device)
        self.tokens_SK = torch.zeros((num_slots + 1, max_drafts), dtype=torch.int32, device=device)
        """int32 [S, K]: always tokens of the vocabulary, meant or not."""
        self.num_S = torch.zeros(num_slots + 1, dtype=torch.int32, device=device)
        """int32 [S]: how many of them are meant."""

    def admit(self, slots_A: Tensor) -> None:
        """Forget what earlier owners of these slots (int64 [A]) left."""
        self.control.admit(slots_A)
        self.num_S.index_fill_(0, slots_A, 0)

    @property
    def nbytes(self) -> int:
        """Bytes of device memory."""
        return self.tokens_SK.nbytes + self.num_S.nbytes
