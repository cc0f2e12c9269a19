"""A lane: what one concurrent batch needs for itself, and whole steps on it with no word from the host."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from overlap.graphs.eager import drive
from overlap.models.program import Batch, Forward, Program
from overlap.ops.attention import Attention, AttentionRows
from overlap.sample.sampler import sample_all
from overlap.schedule.plan import SampleKind
from overlap.spec.step import Speculation
from overlap.state.inputs import StepInputs, empty_inputs
from overlap.state.mail import Mail
from overlap.state.replay import build_decode_inputs, settle_decode, take_plan
from overlap.state.rows import SlotRows
from overlap.state.strips import take_strips


@dataclass(frozen=True, slots=True, kw_only=True)
class Lane:
    """The owners of a lane's device memory."""

    program: Program
    attention: Attention
    kv: Tensor
    rows: SlotRows
    mail: Mail
    speculation: Speculation | None = None
    """What verifies and drafts in each decode step, where there is a drafter."""
    sms: int = 0
    """How many SMs its decode rows are cut for; 0 for all of the device."""

    def forward(self, batch: Batch) -> Forward:
        """Return the model's forward over a batch, with what a drafter reads of it beside the hidden states."""
        if self.speculation is None:
            return self.program.forward(batch)
        return self.speculation.forward(batch)

    def batch(self, inputs: StepInputs) -> Batch:
        """Return a step's inputs as the model takes them."""
        return Batch(token_ids=inputs.token_ids, positions=inputs.positions, kv_index=inputs.kv_index, kv=self.kv)

    def static_inputs(self, num_tokens: int, num_rows: int) -> StepInputs:
        """Return inputs that graphs read: zeros, so that padding always holds valid tokens, positions and pages."""
        inputs = empty_inputs(num_tokens, num_rows, self.rows.page_table.shape[1], self.kv.device)
        for name in StepInputs.__slots__:
            getattr(inputs, name).zero_()
        return inputs


def part(inputs: StepInputs, num_tokens: int, num_rows: int, num_emits: int) -> StepInputs:
    """Return the first so many entries of each column, as views."""
    return StepInputs(
        token_ids=inputs.token_ids[:num_tokens],
        positions=inputs.positions[:num_tokens],
        kv_index=inputs.kv_index[:num_tokens],
        seq_lens=inputs.seq_lens[:num_rows],
        page_table=inputs.page_table[:num_rows],
        emit_tokens=inputs.emit_tokens[:num_emits],
        emit_slots=inputs.emit_slots[:num_emits],
        emit_positions=inputs.emit_positions[:num_emits],
    )


@torch.inference_mode()
def decode_step(lane: Lane, inputs: StepInputs, kind: SampleKind) -> None:
    """Enqueue one whole step of B decode rows, from the mail and back to it; `inputs` are B rows of static ones.

    Which plan it is, and how many of the rows are real, stands in the mail. So the same calls, recorded once, are every
    decode step of up to B rows.
    """
    take_plan(lane.mail, lane.rows, len(inputs.seq_lens))
    build_decode_inputs(lane.mail.packed, lane.rows, inputs)
    num_rows = len(inputs.seq_lens)
    lane.attention.plan(
        AttentionRows(
            num_decode=num_rows,
            seq_lens=inputs.seq_lens,
            page_table=inputs.page_table,
            starts=np.zeros(num_rows, dtype=np.int32),
            counts=np.ones(num_rows, dtype=np.int32),
            chunk_pages=np.empty(0, dtype=np.int32),
            sms=lane.sms,
        )
    )
    hidden_TC = drive(lane.program.forward(lane.batch(inputs)), lane.attention)
    _choose(lane, hidden_TC, inputs.emit_slots, inputs.emit_positions, kind)


@torch.inference_mode()
def short_step(lane: Lane, num_strips: int, kind: SampleKind) -> None:
    """Enqueue one whole step of rows that are cut into so many strips, prompts too, from the mail and back to it."""
    strips = take_strips(lane.mail, lane.rows, num_strips)
    lane.attention.plan(strips.attention_rows(lane.sms))
    columns = {"token_ids": strips.token_ids_T, "positions": strips.positions_T, "kv_index": strips.kv_index_T}
    hidden_TC = drive(lane.program.forward(Batch(**columns, kv=lane.kv)), lane.attention)
    _choose(lane, hidden_TC.index_select(0, strips.last_R), strips.slots_R, strips.ends_R, kind)


def _choose(lane: Lane, hidden_EC: Tensor, slots_E: Tensor, positions_E: Tensor, kind: SampleKind) -> None:
    """Choose a token behind each of these hidden states, and write it where it belongs."""
    if kind == "greedy":
        tokens_E = lane.program.greedy(hidden_EC)
    else:
        tokens_E = sample_all(lane.program.logits(hidden_EC), lane.rows, slots_E, positions_E, kind)
    if kind == "shaped" and lane.rows.shapes.rows is not None:
        lane.rows.shapes.rows.note(slots_E, tokens_E)
    settle_decode(lane.mail, lane.rows, tokens_E)
