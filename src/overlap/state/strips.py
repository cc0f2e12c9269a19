"""Short prompts as a graph can replay them: rows cut into strips of STRIP positions, nothing told by the host.

A step whose rows are few and short (the rest of a prompt behind a cached prefix, a question, decode rows beside it) is
one launch like a decode step. Each row takes as many strips as its tokens need, a decode row one; the graph has a fixed
number of strips, and as many rows. Each strip attends as a decode row of STRIP positions does. What lies past a row's
tokens is padding: the row's last position once more, written nowhere. So are strips and rows past the plan's: the
scratch slot's.

Every row emits: a chunk that does not end its prompt is long, and not for this.

Legend: R rows of the plan, S strips of the graph and as many rows, T = S * STRIP tokens, P pages of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from overlap.cache.pages import PAGE
from overlap.ops.attention import AttentionRows
from overlap.schedule.plan import STRIP
from overlap.state.inputs import write_admissions
from overlap.state.mail import Mail
from overlap.state.packing import (
    ADMISSION_WORDS,
    ADMISSIONS,
    COUNTS,
    HEADER,
    NUM_ADMISSIONS,
    NUM_DECODE,
    NUM_ROWS,
    PROMPT,
    ROW_TOKENS,
)
from overlap.state.replay import take_plan
from overlap.state.rows import SlotRows


@dataclass(frozen=True, slots=True, kw_only=True)
class Strips:
    """The inputs of a step in strips, on the device; int32 unless it says otherwise."""

    token_ids_T: Tensor
    positions_T: Tensor
    kv_index_T: Tensor
    """-1 for padding."""
    token_slots_T: Tensor
    behind_T: Tensor
    """The token of the prompt behind each; -1 - r where the token that row r emits stands behind it."""
    seq_lens_S: Tensor
    """Where each strip's positions end."""
    page_table: Tensor
    """[S, P] of each strip."""
    slots_R: Tensor
    """[S] of each row."""
    ends_R: Tensor
    """[S] tokens of the row with this step's: the position of the token to be chosen."""
    last_R: Tensor
    """int64 [S]: the index among T of each row's last token; 0 for padding."""
    row_pages: Tensor
    """[S, P] of each row."""

    def attention_rows(self, sms: int = 0) -> AttentionRows:
        """Return the strips as attention takes them."""
        num_strips = len(self.seq_lens_S)
        return AttentionRows(
            num_decode=num_strips,
            width=STRIP,
            strips=True,
            seq_lens=self.seq_lens_S,
            page_table=self.page_table,
            starts=np.zeros(num_strips, dtype=np.int32),
            counts=np.full(num_strips, STRIP, dtype=np.int32),
            chunk_pages=np.empty(0, dtype=np.int32),
            sms=sms,
        )

    def next_tokens(self, choices_R: Tensor) -> Tensor:
        """Return the token behind each, int32 [T], with what the rows chose."""
        chosen_T = choices_R.int().index_select(0, (-1 - self.behind_T).clamp_(min=0))
        return torch.where(self.behind_T < 0, chosen_T, self.behind_T)


def take_strips(mail: Mail, rows: SlotRows, num_strips: int) -> Strips:
    """Take the plan whose turn it is, apply its admissions and page updates, and return the inputs of its rows.

    Moves the rows' lengths on. The plan has no more strips than that.
    """
    if mail.packed.is_cuda:
        from overlap.state import strips_triton

        return strips_triton.take_strips(mail, rows, num_strips)
    take_plan(mail, rows, num_strips)
    words = mail.packed.numpy()
    first, count = words[ADMISSIONS], words[NUM_ADMISSIONS] * ADMISSION_WORDS
    write_admissions(words[first : first + count], rows)
    return _build(mail.packed, rows, num_strips)


def _build(packed: Tensor, rows: SlotRows, num_strips: int) -> Strips:
    words = packed.numpy()
    num_rows, num_decode = int(words[NUM_ROWS]), int(words[NUM_DECODE])
    counts = words[words[COUNTS] :][:num_rows]
    firsts = words[words[ROW_TOKENS] :][:num_rows] - num_decode + words[PROMPT]
    slots_R = torch.full((num_strips,), rows.scratch, dtype=torch.int32)
    slots_R[:num_rows] = packed[HEADER : HEADER + num_rows]
    ends_R, last_R = torch.ones(num_strips, dtype=torch.int32), torch.zeros(num_strips, dtype=torch.int64)
    shape = num_strips, STRIP
    tokens, positions, behind = torch.zeros(shape).int(), torch.zeros(shape).int(), torch.full(shape, -1).int()
    index, token_slots = torch.full(shape, -1).int(), torch.full(shape, rows.scratch).int()
    strip_slots, seq_lens = torch.full((num_strips,), rows.scratch), torch.full((num_strips,), STRIP).int()
    strip = 0
    for row, count in enumerate(counts.tolist()):
        slot, start = int(slots_R[row]), int(rows.seq_len[slots_R[row]])
        text = rows.last_token[slot][None] if row < num_decode else packed[firsts[row] : firsts[row] + count]
        size = -(-count // STRIP)
        places = torch.arange(size * STRIP, dtype=torch.int32)
        mine, inside = slice(strip, strip + size), places < count
        tokens[mine].view(-1)[:count] = text
        behind[mine] = -1 - row
        behind[mine].view(-1)[: count - 1] = text[1:]
        row_positions = start + places.clamp(max=count - 1)
        positions[mine] = row_positions.view(-1, STRIP)
        found = rows.page_table[slot][(row_positions // PAGE).long()] * PAGE + row_positions % PAGE
        index[mine] = torch.where(inside, found, -1).view(-1, STRIP)
        token_slots[mine] = torch.where(inside, slot, rows.scratch).int().view(-1, STRIP)
        strip_slots[mine] = slot
        seq_lens[mine] = start + STRIP * torch.arange(1, size + 1, dtype=torch.int32)
        ends_R[row], last_R[row] = start + count, strip * STRIP + count - 1
        rows.seq_len[slot] = start + count
        strip += size
    return Strips(
        token_ids_T=tokens.view(-1),
        positions_T=positions.view(-1),
        kv_index_T=index.view(-1),
        token_slots_T=token_slots.view(-1),
        behind_T=behind.view(-1),
        seq_lens_S=seq_lens,
        page_table=rows.page_table.index_select(0, strip_slots),
        slots_R=slots_R,
        ends_R=ends_R,
        last_R=last_R,
        row_pages=rows.page_table.index_select(0, slots_R),
    )
