"""The inputs of a speculating step that the host launches part by part: runs of decode rows, then prompt chunks.

Legend: D decode rows, C prompt chunks, R = D + C rows, T tokens, P pages of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from overlap.cache.pages import PAGE
from overlap.ops.attention import AttentionRows
from overlap.schedule.plan import StepPlan
from overlap.spec.runs import Runs
from overlap.state.packing import Layout
from overlap.state.rows import SlotRows
from overlap.state.shapes import to_device

NONE = np.empty(0, dtype=np.int32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What target and drafter read, int32 on the device."""

    token_ids_T: Tensor
    positions_T: Tensor
    kv_index_T: Tensor
    token_slots_T: Tensor
    slots_R: Tensor
    page_table: Tensor
    """[R, P]"""
    rows: AttentionRows


def run_inputs(runs: Runs, context: int) -> Inputs:
    """Return the inputs of a step of runs alone. What the host knows of their lengths is that none passes `context`."""
    num_rows, width = len(runs.slots_D), runs.width
    rows = AttentionRows(
        num_decode=num_rows,
        width=width,
        seq_lens=runs.seq_lens_D,
        page_table=runs.page_table,
        starts=np.full(num_rows, context - 1, dtype=np.int32),
        counts=np.full(num_rows, width, dtype=np.int32),
        chunk_pages=NONE,
    )
    return Inputs(
        token_ids_T=runs.token_ids_N,
        positions_T=runs.positions_N,
        kv_index_T=runs.kv_index_N,
        token_slots_T=runs.token_slots_N,
        slots_R=runs.slots_D,
        page_table=runs.page_table,
        rows=rows,
    )


def mixed_inputs(plan: StepPlan, layout: Layout, packed: Tensor, rows: SlotRows, runs: Runs) -> Inputs:
    """Return the inputs of a plan whose decode rows are `runs`; moves the lengths of the chunks' rows on."""
    columns: list[tuple[Tensor, ...]] = [(runs.token_ids_N, runs.positions_N, runs.kv_index_N, runs.token_slots_N)]
    by_row: list[tuple[Tensor, ...]] = [(runs.slots_D, runs.seq_lens_D, runs.page_table)]
    if plan.num_decode < plan.num_rows:
        num_chunks, num_tokens = plan.num_rows - plan.num_decode, len(plan.prompt)
        slots_C = packed.narrow(0, layout.slots + plan.num_decode, num_chunks)
        counts_C = packed.narrow(0, layout.counts + plan.num_decode, num_chunks)
        firsts_C = packed.narrow(0, layout.row_tokens + plan.num_decode, num_chunks) - plan.num_decode * plan.width
        starts_C = rows.seq_len.index_select(0, slots_C)
        page_table = rows.page_table.index_select(0, slots_C)
        row_P = torch.repeat_interleave(counts_C.long(), output_size=num_tokens)
        positions_P = (starts_C - firsts_C).index_select(0, row_P)
        positions_P = positions_P + torch.arange(num_tokens, dtype=torch.int32, device=packed.device)
        pages_P = page_table[row_P, (positions_P // PAGE).long()]
        index_P = pages_P * PAGE + positions_P % PAGE
        prompt_P = packed.narrow(0, layout.prompt, num_tokens)
        columns.append((prompt_P, positions_P, index_P, slots_C.index_select(0, row_P)))
        ends_C = starts_C + counts_C
        rows.seq_len.index_copy_(0, slots_C.long(), ends_C)
        by_row.append((slots_C, ends_C, page_table))
    token_ids_T, positions_T, kv_index_T, token_slots_T = _joined(columns)
    slots_R, seq_lens_R, page_table = _joined(by_row)
    return Inputs(
        token_ids_T=token_ids_T,
        positions_T=positions_T,
        kv_index_T=kv_index_T,
        token_slots_T=token_slots_T,
        slots_R=slots_R,
        page_table=page_table,
        rows=AttentionRows(
            num_decode=plan.num_decode,
            width=plan.width,
            seq_lens=seq_lens_R,
            page_table=page_table,
            starts=plan.starts,
            counts=plan.counts,
            chunk_pages=plan.chunk_pages,
        ),
    )


def last_of_chunks(plan: StepPlan, device: torch.device) -> Tensor:
    """Return the index among T of each chunk's last token, int64 [C]."""
    return to_device(device, np.cumsum(plan.counts, dtype=np.int64)[plan.num_decode :] - 1)


def _joined(parts: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    return parts[0] if len(parts) == 1 else tuple(torch.cat(column) for column in zip(*parts, strict=True))
