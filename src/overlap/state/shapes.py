"""ShapeRows: what the device keeps of each slot's penalties, bias and tokens so far. Made when a request first asks.

Told at admission (prompt and, after a preemption, the answer so far); from then on counted by the step that chose the
token, so the step behind it, which is launched before anybody has read that token, sees it. A slot that asks for
nothing has neutral values, with which its logits come out as they went in, to the bit.

Legend: S slots, V vocabulary, W the most entries of a slot, A admissions, E emitting rows.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from overlap.cache.pages import Ints
from overlap.schedule.plan import Admission
from overlap.schedule.shaping import MOST_BANNED, MOST_BIASED, Shaped

ENTRIES: Final = MOST_BIASED + MOST_BANNED
"""W: room for the entries of a bias and the tokens that may not come yet."""
FOREVER: Final = 2**31 - 1
ANSWERED: Final = 2
"""A token of the answer counts so much in `seen`, whose lowest bit is the prompt's."""


class ShapeRows:
    """Persistent device state of S slots and the scratch slot behind them: (S + 1) * (4 * V + 12 * W) bytes and some.

    Written at admission by `admit` and behind each step by `note`, and by nobody else.
    """

    __slots__ = (
        "entry_ids", "entry_untils", "entry_values", "frequency", "num_entries", "presence", "repetition", "seen",
    )  # fmt: skip

    def __init__(self, num_slots: int, vocab_size: int, device: torch.device) -> None:
        def column(dtype: torch.dtype, *width: int) -> Tensor:
            return torch.zeros((num_slots + 1, *width), dtype=dtype, device=device)

        self.seen = column(torch.int32, vocab_size)
        """int32 [S, V]: twice how often the answer has the token, plus 1 if the prompt has it. Only of slots with
        penalties; of others leftovers."""
        self.presence = column(torch.float32)
        self.frequency = column(torch.float32)
        self.repetition = torch.ones(num_slots + 1, dtype=torch.float32, device=device)
        self.num_entries = column(torch.int32)
        self.entry_ids = column(torch.int32, ENTRIES)
        """int32 [S, W]: tokens whose logit gets a value added ..."""
        self.entry_values = column(torch.float32, ENTRIES)
        """float32 [S, W]: ... this one (-inf: it cannot come) ..."""
        self.entry_untils = column(torch.int32, ENTRIES)
        """int32 [S, W]: ... for tokens at absolute positions under this one."""

    @property
    def nbytes(self) -> int:
        """Bytes of device memory."""
        return sum(int(getattr(self, name).nbytes) for name in self.__slots__)

    def admit(self, admissions: Sequence[Admission]) -> None:
        """Write what new owners of slots ask for, neutral values included. Does not wait for the device."""
        shapings = [a.shaped.shaping if a.shaped is not None else None for a in admissions]
        device = self.seen.device
        slots = to_device(device, np.array([a.slot for a in admissions], dtype=np.int64))
        columns = np.array(
            [(s.presence_penalty, s.frequency_penalty, s.repetition_penalty) if s else (0, 0, 1) for s in shapings],
            dtype=np.float32,
        )
        presence, frequency, repetition = to_device(device, np.ascontiguousarray(columns.T))
        self.presence.index_copy_(0, slots, presence)
        self.frequency.index_copy_(0, slots, frequency)
        self.repetition.index_copy_(0, slots, repetition)
        entries = [entries_of(a.shaped) for a in admissions]
        counts = np.array([len(ids) for ids, _, _ in entries], dtype=np.int32)
        self.num_entries.index_copy_(0, slots, to_device(device, counts))
        for admission, own in zip(admissions, entries, strict=True):
            if len(own[0]):
                self._write_entries(admission.slot, own)
            if admission.shaped is not None and admission.shaped.shaping.counts:
                self._write_seen(admission.slot, admission.shaped)

    def _write_entries(self, slot: int, own: tuple[Ints, npt.NDArray[np.float32], Ints]) -> None:
        columns = (self.entry_ids, self.entry_values, self.entry_untils)
        for column, values in zip(columns, own, strict=True):
            column[slot, : len(values)].copy_(to_device(column.device, values))

    def _write_seen(self, slot: int, shaped: Shaped) -> None:
        tokens, words = seen_words(shaped)
        row = self.seen[slot].zero_()
        row.index_copy_(0, to_device(row.device, tokens), to_device(row.device, words))

    def note(self, slots_E: Tensor, tokens_E: Tensor) -> None:
        """Count tokens just chosen, of any integer kind, for the answers of their slots."""
        index_E = slots_E.long() * self.seen.shape[1] + tokens_E.long()
        self.seen.view(-1).index_add_(0, index_E, torch.full_like(index_E, ANSWERED, dtype=torch.int32))


class ShapeRowsOwner:
    """Where the ShapeRows of an engine are, once a request has asked for them: `rows` is None before."""

    __slots__ = ("_lock", "_made", "_num_slots", "rows")

    def __init__(self, num_slots: int) -> None:
        self._num_slots = num_slots
        self._lock = threading.Lock()  # two lanes may meet their first such request at once
        self._made: torch.cuda.Event | None = None
        self.rows: ShapeRows | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of device memory: 0 before anybody has asked."""
        return 0 if self.rows is None else self.rows.nbytes

    def admit(self, admissions: Sequence[Admission], vocab_size: int, device: torch.device) -> None:
        """Take in a plan's admissions; costs nothing as long as none of an engine's requests asks for any of it."""
        if self.rows is None:
            if all(admission.shaped is None for admission in admissions):
                return
            with self._lock:
                if self.rows is None:
                    rows = ShapeRows(self._num_slots, vocab_size, device)
                    self._made = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None
                    self.rows = rows
        if self._made is not None:  # by the other lane, maybe: then its stream still clears what this one writes to
            torch.cuda.current_stream(device).wait_event(self._made)
        if admissions:
            self.rows.admit(admissions)


def entries_of(shaped: Shaped | None) -> tuple[Ints, npt.NDArray[np.float32], Ints]:
    """Return a slot's entries as (tokens, values, the positions from which they no longer hold)."""
    if shaped is None:
        return np.empty(0, np.int32), np.empty(0, np.float32), np.empty(0, np.int32)
    shaping = shaped.shaping
    banned = shaping.banned if shaped.made < shaping.min_tokens else ()
    ids = [token for token, _ in shaping.logit_bias] + list(banned)
    values = [value for _, value in shaping.logit_bias] + [-np.inf] * len(banned)
    until = min(len(shaped.tokens) - shaped.made + shaping.min_tokens, FOREVER)
    untils = [FOREVER] * len(shaping.logit_bias) + [until] * len(banned)
    return np.array(ids, dtype=np.int32), np.array(values, dtype=np.float32), np.array(untils, dtype=np.int32)


def seen_words(shaped: Shaped) -> tuple[npt.NDArray[np.int64], Ints]:
    """Return the tokens that prompt and answer have, each once, and what `ShapeRows.seen` says of each."""
    num_prompt = len(shaped.tokens) - shaped.made
    tokens, place = np.unique(shaped.tokens, return_inverse=True)
    words = np.zeros(len(tokens), dtype=np.int32)
    np.add.at(words, place[num_prompt:], ANSWERED)
    words[place[:num_prompt]] |= 1
    return tokens.astype(np.int64), words


def to_device(device: torch.device, values: npt.NDArray[np.generic]) -> Tensor:
    """Return host values on the device, without waiting for it."""
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
