"""SlotRows: what the device keeps of each running request, in rows indexed by slot.

Written by `state.inputs` and `state.replay` (admissions, page updates, lengths, last tokens) and by nobody else. Kept
apart from a step's inputs, which are made anew from it for every step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from overlap.state.shapes import ShapeRowsOwner


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotRowsStatistics:
    """What the rows take."""

    num_slots: int
    max_pages_per_row: int
    nbytes: int


class SlotRows:
    """Persistent device state of S slots; one allocation for each column, made once, zero at first.

    Behind the last slot is a row more, the scratch slot: what the padding of a graph reads. It stays zero.
    """

    COLUMNS: ClassVar = (
        "last_token",
        "min_p",
        "page_table",
        "seed_hi",
        "seed_lo",
        "seq_len",
        "temperature",
        "top_k",
        "top_p",
    )
    """The names of the tensors that every slot has a row in."""
    __slots__ = (*COLUMNS, "shapes")

    def __init__(self, num_slots: int, max_pages_per_row: int, device: torch.device | str) -> None:
        def column(dtype: torch.dtype, *width: int) -> Tensor:
            return torch.zeros((num_slots + 1, *width), dtype=dtype, device=device)

        self.last_token = column(torch.int32)
        """int32 [S]: the token chosen last, which is the input of the slot's next decode row."""
        self.seq_len = column(torch.int32)
        """int32 [S]: how many of the slot's tokens have their KV written (or launched to be)."""
        self.page_table = column(torch.int32, max_pages_per_row)
        """int32 [S, max_pages_per_row]: entries past the length are leftovers, but valid page ids."""
        self.temperature = column(torch.float32)
        self.top_k = column(torch.int32)
        self.top_p = column(torch.float32)
        self.min_p = column(torch.float32)
        self.seed_lo = column(torch.int32)
        """int32 [S]: the bit pattern of the seed's lower half."""
        self.seed_hi = column(torch.int32)
        """int32 [S]: the bit pattern of the seed's upper half."""
        self.shapes = ShapeRowsOwner(num_slots)
        """Penalties, bias and token counts, once a request has asked for any."""

    @property
    def scratch(self) -> int:
        """The scratch slot: S, one past the last slot of a request."""
        return self.seq_len.shape[0] - 1

    @property
    def nbytes(self) -> int:
        """Bytes of device memory."""
        return sum(int(getattr(self, name).nbytes) for name in self.__slots__)

    def statistics(self) -> SlotRowsStatistics:
        """Return the sizes."""
        width = self.page_table.shape[1]
        return SlotRowsStatistics(num_slots=self.scratch, max_pages_per_row=width, nbytes=self.nbytes)
