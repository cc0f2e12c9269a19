"""A step's inputs in two small Triton kernels. Imported only where Triton is; see `state.inputs`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import triton
import triton.language as tl
from torch import Tensor

from overlap.cache.pages import PAGE
from overlap.state.packing import ADMISSION_WORDS, Layout
from overlap.state.rows import SlotRows

if TYPE_CHECKING:
    from overlap.state.inputs import StepInputs

_CHANGES_BLOCK: Final = 128
_TOKENS_BLOCK: Final = 128


# Counts and offsets change with every step: specialising on them would compile a kernel for each kind of number.
@triton.jit(do_not_specialize=["admissions", "num_admissions", "page_updates", "num_updates"])
def _apply_changes_kernel(
    packed,
    seq_len,
    temperature,
    top_k,
    top_p,
    min_p,
    seed_lo,
    seed_hi,
    page_table,
    table_stride,
    admissions,
    num_admissions,
    page_updates,
    num_updates,
    WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    change = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    admitted = change < num_admissions
    word = packed + admissions + change * WORDS
    slot = tl.load(word, mask=admitted, other=0)
    tl.store(seq_len + slot, tl.load(word + 1, mask=admitted, other=0), mask=admitted)
    heat = tl.load(word + 2, mask=admitted, other=0).to(tl.float32, bitcast=True)
    tl.store(temperature + slot, heat, mask=admitted)
    tl.store(top_k + slot, tl.load(word + 3, mask=admitted, other=0), mask=admitted)
    nucleus = tl.load(word + 4, mask=admitted, other=0).to(tl.float32, bitcast=True)
    tl.store(top_p + slot, nucleus, mask=admitted)
    least = tl.load(word + 5, mask=admitted, other=0).to(tl.float32, bitcast=True)
    tl.store(min_p + slot, least, mask=admitted)
    tl.store(seed_lo + slot, tl.load(word + 6, mask=admitted, other=0), mask=admitted)
    tl.store(seed_hi + slot, tl.load(word + 7, mask=admitted, other=0), mask=admitted)

    updated = change < num_updates
    word = packed + page_updates + change
    row = tl.load(word, mask=updated, other=0).to(tl.int64)
    index = tl.load(word + num_updates, mask=updated, other=0)
    page = tl.load(word + 2 * num_updates, mask=updated, other=0)
    tl.store(page_table + row * table_stride + index, page, mask=updated)


@triton.jit(do_not_specialize=["num_rows", "num_decode", "prompt"])
def _build_inputs_kernel(
    packed,
    last_token,
    seq_len,
    page_table,
    token_ids,
    positions,
    kv_index,
    seq_lens,
    pages,
    emit_tokens,
    emit_slots,
    emit_positions,
    num_rows,
    num_decode,
    prompt,
    WIDTH: tl.constexpr,
    HEADER_WORDS: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a row: it alone reads and then advances the row's length."""
    row = tl.program_id(0)
    words = packed + HEADER_WORDS + row
    slot = tl.load(words)
    first = tl.load(words + num_rows)
    count = tl.load(words + 2 * num_rows)
    emit = tl.load(words + 3 * num_rows)
    start = tl.load(seq_len + slot)
    source = page_table + slot.to(tl.int64) * WIDTH
    lane = tl.arange(0, BLOCK)
    for begin in range(0, WIDTH, BLOCK):
        column = begin + lane
        page = tl.load(source + column, mask=column < WIDTH, other=0)
        tl.store(pages + row.to(tl.int64) * WIDTH + column, page, mask=column < WIDTH)
    token = lane
    done = count * 0  # a while: the interpreter's range takes no device value
    while done < count:
        inside = token < count
        from_prompt = tl.load(packed + prompt + first - num_decode + token, mask=inside & (row >= num_decode), other=0)
        from_slot = tl.load(last_token + slot)
        position = start + token
        page = tl.load(source + position // PAGE_TOKENS, mask=inside, other=0)
        tl.store(token_ids + first + token, tl.where(row < num_decode, from_slot, from_prompt), mask=inside)
        tl.store(positions + first + token, position, mask=inside)
        tl.store(kv_index + first + token, page * PAGE_TOKENS + position % PAGE_TOKENS, mask=inside)
        token += BLOCK
        done += BLOCK
    tl.store(seq_lens + row, start + count)
    tl.store(emit_tokens + emit, first + count - 1, mask=emit >= 0)
    tl.store(emit_slots + emit, slot, mask=emit >= 0)
    tl.store(emit_positions + emit, start + count, mask=emit >= 0)
    tl.debug_barrier()  # no thread may still have to read the length that the next line overwrites
    tl.store(seq_len + slot, start + count)


def apply_changes(packed: Tensor, layout: Layout, rows: SlotRows) -> None:
    """See `state.inputs.apply_changes`."""
    changes = max(layout.num_admissions, layout.num_updates)
    if changes:
        _apply_changes_kernel[(triton.cdiv(changes, _CHANGES_BLOCK),)](
            packed,
            rows.seq_len,
            rows.temperature,
            rows.top_k,
            rows.top_p,
            rows.min_p,
            rows.seed_lo,
            rows.seed_hi,
            rows.page_table,
            rows.page_table.stride(0),
            layout.admissions,
            layout.num_admissions,
            layout.page_updates,
            layout.num_updates,
            WORDS=ADMISSION_WORDS,
            BLOCK=_CHANGES_BLOCK,
            num_warps=4,
        )


def build_inputs(packed: Tensor, layout: Layout, rows: SlotRows, out: StepInputs) -> None:
    """See `state.inputs.build_inputs`; writes the first T, R and E entries of `out`."""
    apply_changes(packed, layout, rows)
    _build_inputs_kernel[(layout.num_rows,)](
        packed,
        rows.last_token,
        rows.seq_len,
        rows.page_table,
        out.token_ids,
        out.positions,
        out.kv_index,
        out.seq_lens,
        out.page_table,
        out.emit_tokens,
        out.emit_slots,
        out.emit_positions,
        layout.num_rows,
        layout.num_decode,
        layout.prompt,
        WIDTH=rows.page_table.shape[1],
        HEADER_WORDS=layout.slots,
        PAGE_TOKENS=PAGE,
        BLOCK=_TOKENS_BLOCK,
        num_warps=4,
    )
