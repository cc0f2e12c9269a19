"""The state changes of a replayed decode step in four kernels. Imported only where Triton is; see `state.replay`.

The first reads the plan straight from pinned memory, the last writes the tokens there: a replay needs no copy beside
it. The host has packed the plan before it launches the graph, so the kernel finds it; `volatile` keeps the reads out of
caches that a step before may have filled from the same place.
"""

from __future__ import annotations

from typing import Final

import triton
import triton.language as tl
from torch import Tensor

from overlap.cache.pages import PAGE
from overlap.ops import launch_triton
from overlap.state.inputs import StepInputs
from overlap.state.mail import DEPTH, Mail
from overlap.state.packing import HEADER, NUM_ROWS, NUM_UPDATES, PAGE_UPDATES, USED
from overlap.state.rows import SlotRows

_TAKE_BLOCK: Final = 512
_USUAL_WORDS: Final = 6
"""Words of a plan of decode rows, a row: its part of five sections, and some page updates."""
_UPDATE_PROGRAMS: Final = 2
_UPDATE_BLOCK: Final = 128
_TABLE_BLOCK: Final = 128


@triton.jit(do_not_specialize=["stride", "words"])
def _take_plan_kernel(plans, turn, packed, stride, words, USED_WORD: tl.constexpr, BLOCK: tl.constexpr):
    """Begins a graph, so it is launched as a plain kernel: what it waits for lies in front of the graph.

    It looks once over the bus: what there is to read is asked for before it is known how much of it there is.
    """
    plan = plans + tl.load(turn).to(tl.int64) * stride
    word = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    used = tl.load(plan + USED_WORD, volatile=True)
    tl.store(packed + word, tl.load(plan + word, mask=word < words, other=0, volatile=True), mask=word < words)
    word += words
    while tl.min(word) < used:
        tl.store(packed + word, tl.load(plan + word, mask=word < used, other=0, volatile=True), mask=word < used)
        word += tl.num_programs(0) * BLOCK


@triton.jit
def _update_pages_kernel(
    packed,
    page_table,
    WIDTH: tl.constexpr,
    NUM_UPDATES_WORD: tl.constexpr,
    PAGE_UPDATES_WORD: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    num_updates = tl.load(packed + NUM_UPDATES_WORD)
    updates = packed + tl.load(packed + PAGE_UPDATES_WORD)
    lane = tl.arange(0, BLOCK)
    done = tl.program_id(0) * BLOCK
    while done < num_updates:
        change = done + lane
        inside = change < num_updates
        slot = tl.load(updates + change, mask=inside, other=0).to(tl.int64)
        index = tl.load(updates + num_updates + change, mask=inside, other=0)
        page = tl.load(updates + 2 * num_updates + change, mask=inside, other=0)
        tl.store(page_table + slot * WIDTH + index, page, mask=inside)
        done += PROGRAMS * BLOCK


@triton.jit(do_not_specialize=["scratch"])
def _build_decode_inputs_kernel(
    packed,
    last_token,
    seq_len,
    page_table,
    token_ids,
    positions,
    kv_index,
    seq_lens,
    pages,
    emit_slots,
    emit_positions,
    scratch,
    WIDTH: tl.constexpr,
    HEADER_WORDS: tl.constexpr,
    NUM_ROWS_WORD: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program a row: it alone reads and then advances the row's length."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0)
    real = row < tl.load(packed + NUM_ROWS_WORD)
    slot = tl.load(packed + HEADER_WORDS + row, mask=real, other=0)
    slot = tl.where(real, slot, scratch)
    start = tl.load(seq_len + slot)
    source = page_table + slot.to(tl.int64) * WIDTH
    page = tl.load(source + start // PAGE_TOKENS)
    lane = tl.arange(0, BLOCK)
    for begin in range(0, WIDTH, BLOCK):
        column = begin + lane
        entry = tl.load(source + column, mask=column < WIDTH, other=0)
        tl.store(pages + row.to(tl.int64) * WIDTH + column, entry, mask=column < WIDTH)
    tl.store(token_ids + row, tl.load(last_token + slot))
    tl.store(positions + row, start)
    tl.store(kv_index + row, tl.where(real, page * PAGE_TOKENS + start % PAGE_TOKENS, -1))
    tl.store(seq_lens + row, start + 1)
    tl.store(emit_slots + row, slot)
    tl.store(emit_positions + row, start + 1)
    tl.debug_barrier()  # no thread may still have to read the length that the next line overwrites
    tl.store(seq_len + slot, start + 1, mask=real)


@triton.jit(do_not_specialize=["stride"])
def _settle_decode_kernel(
    packed,
    turn,
    tokens,
    last_token,
    landings,
    stride,
    HEADER_WORDS: tl.constexpr,
    NUM_ROWS_WORD: tl.constexpr,
    PLACES: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.arange(0, BLOCK)
    real = row < tl.load(packed + NUM_ROWS_WORD)
    token = tl.load(tokens + row, mask=real, other=0).to(tl.int32)
    slot = tl.load(packed + HEADER_WORDS + row, mask=real, other=0)
    place = tl.load(turn)
    tl.store(last_token + slot, token, mask=real)
    tl.store(landings + place.to(tl.int64) * stride + row, token, mask=real)
    tl.debug_barrier()  # no thread may still have to read the turn that the next line overwrites
    tl.store(turn, (place + 1) % PLACES)


def take_plan(mail: Mail, rows: SlotRows, num_rows: int) -> None:
    """See `state.replay.take_plan`."""
    fetch_plan(mail, HEADER + _USUAL_WORDS * num_rows)
    _update_pages_kernel[(_UPDATE_PROGRAMS,)](
        mail.packed,
        rows.page_table,
        WIDTH=rows.page_table.shape[1],
        NUM_UPDATES_WORD=NUM_UPDATES,
        PAGE_UPDATES_WORD=PAGE_UPDATES,
        PROGRAMS=_UPDATE_PROGRAMS,
        BLOCK=_UPDATE_BLOCK,
        num_warps=2,
        **launch_triton.early(mail.packed.device),
    )


def fetch_plan(mail: Mail, usual_words: int) -> None:
    """Copy the plan whose turn it is to `mail.packed`; so many words of it are asked for at once."""
    words = min(usual_words, mail.plans.shape[1])
    _take_plan_kernel[(triton.cdiv(words, _TAKE_BLOCK),)](
        mail.plans,
        mail.turn,
        mail.packed,
        mail.plans.stride(0),
        words,
        USED_WORD=USED,
        BLOCK=_TAKE_BLOCK,
        num_warps=4,
    )


def build_decode_inputs(packed: Tensor, rows: SlotRows, out: StepInputs) -> None:
    """See `state.replay.build_decode_inputs`."""
    _build_decode_inputs_kernel[(len(out.seq_lens),)](
        packed,
        rows.last_token,
        rows.seq_len,
        rows.page_table,
        out.token_ids,
        out.positions,
        out.kv_index,
        out.seq_lens,
        out.page_table,
        out.emit_slots,
        out.emit_positions,
        rows.scratch,
        WIDTH=rows.page_table.shape[1],
        HEADER_WORDS=HEADER,
        NUM_ROWS_WORD=NUM_ROWS,
        PAGE_TOKENS=PAGE,
        BLOCK=_TABLE_BLOCK,
        num_warps=1,
        **launch_triton.early(packed.device),
    )


def settle_decode(mail: Mail, rows: SlotRows, tokens: Tensor) -> None:
    """See `state.replay.settle_decode`."""
    _settle_decode_kernel[(1,)](
        mail.packed,
        mail.turn,
        tokens,
        rows.last_token,
        mail.landings,
        mail.landings.stride(0),
        HEADER_WORDS=HEADER,
        NUM_ROWS_WORD=NUM_ROWS,
        PLACES=DEPTH,
        BLOCK=triton.next_power_of_2(tokens.shape[0]),
        num_warps=4,
        **launch_triton.early(tokens.device),
    )
