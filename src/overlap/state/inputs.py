"""From a packed plan and the slots' rows to a step's inputs, on the device.

Legend: R rows, D decode rows, T tokens, E emitting rows, S sampled rows, P pages of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from overlap.cache.pages import PAGE, Ints
from overlap.state.packing import ADMISSION_WORDS, Layout
from overlap.state.rows import SlotRows


@dataclass(frozen=True, slots=True, kw_only=True)
class StepInputs:
    """What one step reads, all int32 on the device. May share memory with the packed plan."""

    token_ids: Tensor
    """[T]"""
    positions: Tensor
    """[T] absolute position of each token."""
    kv_index: Tensor
    """[T] page * PAGE + offset of each token's KV."""
    seq_lens: Tensor
    """[R] tokens of the row in KV, this step's included."""
    page_table: Tensor
    """[R, P] the pages of each row."""
    emit_tokens: Tensor
    """[E] the index among T of each emitting token: the last of its row."""
    emit_slots: Tensor
    """[E] the slot that each emitting row belongs to."""
    emit_positions: Tensor
    """[E] the absolute position of the token to be chosen: one past that of its input token."""


def empty_inputs(num_tokens: int, num_rows: int, max_pages_per_row: int, device: torch.device | str) -> StepInputs:
    """Return inputs to be written to, for `build_inputs`'s `out`; as many emits as rows."""

    def column(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=device)

    return StepInputs(
        token_ids=column(num_tokens),
        positions=column(num_tokens),
        kv_index=column(num_tokens),
        seq_lens=column(num_rows),
        page_table=column(num_rows, max_pages_per_row),
        emit_tokens=column(num_rows),
        emit_slots=column(num_rows),
        emit_positions=column(num_rows),
    )


def build_inputs(packed: Tensor, layout: Layout, rows: SlotRows, out: StepInputs | None = None) -> StepInputs:
    """Apply the plan's admissions, then its page updates; return the step's inputs; then advance each row's length.

    `packed` is the packed plan on the device, int32, `layout` what `pack` returned for it. With `out` (static buffers,
    each at least as long as needed), its first T, R and E entries are written and it is returned; kv_index past T
    becomes -1, and what else lies past the ends is left as it was. A slot's `last_token` has to be settled before the
    slot has a decode row.
    """
    if packed.is_cuda:
        from overlap.state import inputs_triton

        inputs = out or _of_size(layout, rows)
        inputs_triton.build_inputs(packed, layout, rows, inputs)
    else:
        _apply_changes(packed, layout, rows)
        inputs = _decode_inputs(packed, layout, rows)
        if layout.num_decode < layout.num_rows:
            inputs = _mixed_inputs(packed, layout, inputs)
        if out is not None:
            inputs = _copied(inputs, out)
    if out is not None:
        out.kv_index[layout.num_tokens :].fill_(-1)
    return inputs


def apply_changes(packed: Tensor, layout: Layout, rows: SlotRows) -> None:
    """Apply the plan's admissions, then its page updates, and nothing else: for who builds other inputs of them."""
    if packed.is_cuda:
        from overlap.state import inputs_triton

        inputs_triton.apply_changes(packed, layout, rows)
    else:
        _apply_changes(packed, layout, rows)


def settle_tokens(rows: SlotRows, emit_slots: Tensor, tokens: Tensor) -> None:
    """Write the tokens just chosen, int32 [E], into their slots' rows: the inputs of the next decode step."""
    rows.last_token.index_copy_(0, emit_slots.long(), tokens)


def sampled_rows(packed: Tensor, layout: Layout) -> Tensor:
    """Return the part of the packed plan that says which emits are not greedy, int32 [S]."""
    return packed.narrow(0, layout.sampled, layout.num_sampled)


def _of_size(layout: Layout, rows: SlotRows) -> StepInputs:
    inputs = empty_inputs(layout.num_tokens, layout.num_rows, rows.page_table.shape[1], rows.page_table.device)
    if layout.num_emits == layout.num_rows:
        return inputs
    emits = slice(layout.num_emits)
    return StepInputs(
        token_ids=inputs.token_ids,
        positions=inputs.positions,
        kv_index=inputs.kv_index,
        seq_lens=inputs.seq_lens,
        page_table=inputs.page_table,
        emit_tokens=inputs.emit_tokens[emits],
        emit_slots=inputs.emit_slots[emits],
        emit_positions=inputs.emit_positions[emits],
    )


def _apply_changes(packed: Tensor, layout: Layout, rows: SlotRows) -> None:
    """Write admissions and page updates into the rows. They are few: numpy's views cost the least."""
    words = packed.numpy()
    if layout.num_admissions:
        write_admissions(words[layout.admissions : layout.page_updates], rows)
    if layout.num_updates:
        slots, indices, pages = words[layout.page_updates : layout.prompt].reshape(3, -1)
        rows.page_table.numpy()[slots, indices] = pages


def write_admissions(words: Ints, rows: SlotRows) -> None:
    """Write admissions, [A * ADMISSION_WORDS] packed words, into rows on the CPU."""
    admissions = words.reshape(-1, ADMISSION_WORDS)
    slots, floats = admissions[:, 0], admissions.view(np.float32)
    rows.seq_len.numpy()[slots] = admissions[:, 1]
    rows.temperature.numpy()[slots] = floats[:, 2]
    rows.top_k.numpy()[slots] = admissions[:, 3]
    rows.top_p.numpy()[slots] = floats[:, 4]
    rows.min_p.numpy()[slots] = floats[:, 5]
    rows.seed_lo.numpy()[slots] = admissions[:, 6]
    rows.seed_hi.numpy()[slots] = admissions[:, 7]


def _decode_inputs(packed: Tensor, layout: Layout, rows: SlotRows) -> StepInputs:
    """Return the inputs as if each row ran one token; advances the lengths by the true counts."""
    slots = packed.narrow(0, layout.slots, layout.num_rows)
    starts = rows.seq_len.index_select(0, slots)
    page_table = rows.page_table.index_select(0, slots)
    pages = page_table.gather(1, (starts // PAGE).long()[:, None])[:, 0]
    seq_lens = starts + packed.narrow(0, layout.counts, layout.num_rows)
    rows.seq_len.index_copy_(0, slots.long(), seq_lens)
    return StepInputs(
        token_ids=rows.last_token.index_select(0, slots),
        positions=starts,
        kv_index=(pages * PAGE).add_(starts % PAGE),
        seq_lens=seq_lens,
        page_table=page_table,
        emit_tokens=packed.narrow(0, layout.row_tokens, layout.num_rows),
        emit_slots=slots,
        emit_positions=seq_lens,
    )


def _mixed_inputs(packed: Tensor, layout: Layout, decode: StepInputs) -> StepInputs:
    """Return the inputs with the prompt chunks' tokens, and with the rows that do not emit left out."""
    counts = packed.narrow(0, layout.counts, layout.num_rows).long()
    row_tokens = packed.narrow(0, layout.row_tokens, layout.num_rows)
    tokens = torch.arange(layout.num_tokens, dtype=torch.int32)
    row = torch.repeat_interleave(counts, output_size=layout.num_tokens)
    positions = (decode.positions - row_tokens).index_select(0, row).add_(tokens)
    pages = decode.page_table[row, (positions // PAGE).long()]
    emits = (packed.narrow(0, layout.row_emits, layout.num_rows) >= 0).nonzero()[:, 0]
    prompt = packed.narrow(0, layout.prompt, layout.num_tokens - layout.num_decode)
    return StepInputs(
        token_ids=torch.cat((decode.token_ids[: layout.num_decode], prompt)),
        positions=positions,
        kv_index=(pages * PAGE).add_(positions % PAGE),
        seq_lens=decode.seq_lens,
        page_table=decode.page_table,
        emit_tokens=(row_tokens + (counts - 1).int())[emits],
        emit_slots=decode.emit_slots[emits],
        emit_positions=decode.seq_lens[emits],
    )


def _copied(inputs: StepInputs, out: StepInputs) -> StepInputs:
    for name in StepInputs.__slots__:
        source = getattr(inputs, name)
        getattr(out, name)[: len(source)].copy_(source)
    return out
