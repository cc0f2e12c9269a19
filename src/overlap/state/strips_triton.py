"""The inputs of a step in strips, in three kernels behind the one that fetches the plan; see `state.strips`."""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl

from overlap.cache.pages import PAGE
from overlap.ops import launch_triton
from overlap.schedule.plan import STRIP
from overlap.state import replay_triton
from overlap.state.mail import Mail
from overlap.state.packing import (
    ADMISSION_WORDS,
    ADMISSIONS,
    COUNTS,
    HEADER,
    NUM_ADMISSIONS,
    NUM_DECODE,
    NUM_ROWS,
    NUM_UPDATES,
    PAGE_UPDATES,
    PROMPT,
    ROW_TOKENS,
)
from overlap.state.rows import SlotRows
from overlap.state.strips import Strips

_USUAL_WORDS: Final = 24
"""Words of a plan in strips, a strip: its tokens, and its part of admissions and page updates."""
_CHANGES_BLOCK: Final = 64
_TABLE_BLOCK: Final = 128


@triton.jit
def _apply_plan_kernel(
    packed, seq_len, temperature, top_k, top_p, min_p, seed_lo, seed_hi, page_table,
    TABLE: tl.constexpr, ADMISSION: tl.constexpr, NUM_ADMISSIONS_WORD: tl.constexpr, ADMISSIONS_WORD: tl.constexpr,
    NUM_UPDATES_WORD: tl.constexpr, PAGE_UPDATES_WORD: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: there are few changes."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    num_admissions, num_updates = tl.load(packed + NUM_ADMISSIONS_WORD), tl.load(packed + NUM_UPDATES_WORD)
    admissions = packed + tl.load(packed + ADMISSIONS_WORD)
    updates = packed + tl.load(packed + PAGE_UPDATES_WORD)
    change = tl.arange(0, BLOCK)
    done = num_admissions * 0  # a while: the interpreter's range takes no device value
    while done < num_admissions:
        there = change < num_admissions
        word = admissions + change * ADMISSION
        slot = tl.load(word, mask=there, other=0)
        tl.store(seq_len + slot, tl.load(word + 1, mask=there, other=0), mask=there)
        heat = tl.load(word + 2, mask=there, other=0).to(tl.float32, bitcast=True)
        tl.store(temperature + slot, heat, mask=there)
        tl.store(top_k + slot, tl.load(word + 3, mask=there, other=0), mask=there)
        nucleus = tl.load(word + 4, mask=there, other=0).to(tl.float32, bitcast=True)
        tl.store(top_p + slot, nucleus, mask=there)
        least = tl.load(word + 5, mask=there, other=0).to(tl.float32, bitcast=True)
        tl.store(min_p + slot, least, mask=there)
        tl.store(seed_lo + slot, tl.load(word + 6, mask=there, other=0), mask=there)
        tl.store(seed_hi + slot, tl.load(word + 7, mask=there, other=0), mask=there)
        change += BLOCK
        done += BLOCK
    change = tl.arange(0, BLOCK)
    done = num_updates * 0
    while done < num_updates:
        there = change < num_updates
        slot = tl.load(updates + change, mask=there, other=0).to(tl.int64)
        index = tl.load(updates + num_updates + change, mask=there, other=0)
        page = tl.load(updates + 2 * num_updates + change, mask=there, other=0)
        tl.store(page_table + slot * TABLE + index, page, mask=there)
        change += BLOCK
        done += BLOCK


@triton.jit
def _copy_table(source, target, TABLE: tl.constexpr, BLOCK: tl.constexpr):
    for begin in range(0, TABLE, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        entry = tl.load(source + column, mask=column < TABLE, other=0)
        tl.store(target + column, entry, mask=column < TABLE)


@triton.jit(do_not_specialize=["scratch"])
def _begin_rows_kernel(
    packed, seq_len, page_table, slots, ends, last, row_pages, scratch,
    TABLE: tl.constexpr, STRIP_TOKENS: tl.constexpr, HEADER_WORDS: tl.constexpr, NUM_ROWS_WORD: tl.constexpr,
    COUNTS_WORD: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program a row: it alone reads and then advances the row's length."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row, lane = tl.program_id(0), tl.arange(0, LANES)
    num_rows = tl.load(packed + NUM_ROWS_WORD)
    real = row < num_rows
    counts = tl.load(packed + tl.load(packed + COUNTS_WORD) + lane, mask=lane < num_rows, other=0)
    count = tl.where(real, tl.sum(tl.where(lane == row, counts, 0)), 1)
    before = tl.sum(tl.where(lane < row, (counts + STRIP_TOKENS - 1) // STRIP_TOKENS, 0))
    slot = tl.where(real, tl.load(packed + HEADER_WORDS + row, mask=real, other=0), scratch)
    end = tl.load(seq_len + slot) + count
    _copy_table(page_table + slot.to(tl.int64) * TABLE, row_pages + row.to(tl.int64) * TABLE, TABLE, BLOCK)
    tl.store(slots + row, slot)
    tl.store(ends + row, end)
    tl.store(last + row, tl.where(real, before * STRIP_TOKENS + count - 1, 0).to(tl.int64))
    tl.debug_barrier()  # no thread may still have to read the length that the next line overwrites
    tl.store(seq_len + slot, end, mask=real)


@triton.jit(do_not_specialize=["scratch"])
def _fill_strips_kernel(
    packed, last_token, page_table, ends, token_ids, positions, kv_index, token_slots, behind, seq_lens, pages, scratch,
    TABLE: tl.constexpr, STRIP_TOKENS: tl.constexpr, HEADER_WORDS: tl.constexpr, NUM_ROWS_WORD: tl.constexpr,
    NUM_DECODE_WORD: tl.constexpr, COUNTS_WORD: tl.constexpr, ROW_TOKENS_WORD: tl.constexpr,
    PROMPT_WORD: tl.constexpr, PAGE_TOKENS: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program a strip."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    strip, lane = tl.program_id(0), tl.arange(0, LANES)
    num_rows, num_decode = tl.load(packed + NUM_ROWS_WORD), tl.load(packed + NUM_DECODE_WORD)
    counts = tl.load(packed + tl.load(packed + COUNTS_WORD) + lane, mask=lane < num_rows, other=0)
    sizes = (counts + STRIP_TOKENS - 1) // STRIP_TOKENS
    over = tl.cumsum(sizes, axis=0)
    row = tl.sum(tl.where((lane < num_rows) & (over <= strip), 1, 0))
    real = row < num_rows
    count = tl.sum(tl.where(lane == row, counts, 0))
    within = strip - tl.sum(tl.where(lane < row, sizes, 0))
    slot = tl.where(real, tl.load(packed + HEADER_WORDS + row, mask=real, other=0), scratch)
    first = tl.load(packed + tl.load(packed + ROW_TOKENS_WORD) + row, mask=real, other=0)
    start = tl.load(ends + row, mask=real, other=0) - count
    source = page_table + slot.to(tl.int64) * TABLE
    _copy_table(source, pages + strip.to(tl.int64) * TABLE, TABLE, BLOCK)
    place = tl.arange(0, STRIP_TOKENS)
    offset = tl.where(real, within, 0) * STRIP_TOKENS + place
    inside = real & (offset < count)
    text = packed + tl.load(packed + PROMPT_WORD) + first - num_decode + offset
    reads = inside & (row >= num_decode)
    token = tl.load(text, mask=reads, other=0)
    token = tl.where(inside & (row < num_decode), tl.load(last_token + slot), token)
    goes_on = inside & (offset + 1 < count)
    position = tl.where(real, start + tl.minimum(offset, count - 1), 0)
    page = tl.load(source + position // PAGE_TOKENS)
    here = strip * STRIP_TOKENS + place
    tl.store(token_ids + here, token)
    tl.store(positions + here, position)
    tl.store(kv_index + here, tl.where(inside, page * PAGE_TOKENS + position % PAGE_TOKENS, -1))
    tl.store(token_slots + here, tl.where(inside, slot, scratch))
    ending = tl.where(real, -1 - row, -1)
    tl.store(behind + here, tl.where(goes_on, tl.load(text + 1, mask=goes_on, other=0), ending))
    tl.store(seq_lens + strip, tl.where(real, start + (within + 1) * STRIP_TOKENS, STRIP_TOKENS))


def take_strips(mail: Mail, rows: SlotRows, num_strips: int) -> Strips:
    """See `state.strips.take_strips`."""
    packed, device, table = mail.packed, mail.packed.device, rows.page_table.shape[1]
    early = launch_triton.early(device)
    replay_triton.fetch_plan(mail, HEADER + _USUAL_WORDS * num_strips)
    _apply_plan_kernel[(1,)](
        packed, rows.seq_len, rows.temperature, rows.top_k, rows.top_p, rows.min_p, rows.seed_lo, rows.seed_hi,
        rows.page_table,
        TABLE=table, ADMISSION=ADMISSION_WORDS, NUM_ADMISSIONS_WORD=NUM_ADMISSIONS, ADMISSIONS_WORD=ADMISSIONS,
        NUM_UPDATES_WORD=NUM_UPDATES, PAGE_UPDATES_WORD=PAGE_UPDATES, BLOCK=_CHANGES_BLOCK, num_warps=2, **early,
    )  # fmt: skip
    lanes = max(16, triton.next_power_of_2(num_strips))
    # Lines that each begin at 16 bytes: Triton compiles a kernel anew for an address that does not.
    by_token = torch.empty((5, num_strips * STRIP), dtype=torch.int32, device=device)
    by_row = torch.empty((3, -(-num_strips // 4) * 4), dtype=torch.int32, device=device)[:, :num_strips]
    last = torch.empty(num_strips, dtype=torch.int64, device=device)
    tables = torch.empty((2, num_strips, table), dtype=torch.int32, device=device)
    token_ids, positions, kv_index, token_slots, behind = by_token
    slots, ends, seq_lens = by_row
    _begin_rows_kernel[(num_strips,)](
        packed, rows.seq_len, rows.page_table, slots, ends, last, tables[0], rows.scratch,
        TABLE=table, STRIP_TOKENS=STRIP, HEADER_WORDS=HEADER, NUM_ROWS_WORD=NUM_ROWS, COUNTS_WORD=COUNTS, LANES=lanes,
        BLOCK=_TABLE_BLOCK, num_warps=1, **early,
    )  # fmt: skip
    _fill_strips_kernel[(num_strips,)](
        packed, rows.last_token, rows.page_table, ends, token_ids, positions, kv_index, token_slots, behind, seq_lens,
        tables[1], rows.scratch,
        TABLE=table, STRIP_TOKENS=STRIP, HEADER_WORDS=HEADER, NUM_ROWS_WORD=NUM_ROWS, NUM_DECODE_WORD=NUM_DECODE,
        COUNTS_WORD=COUNTS, ROW_TOKENS_WORD=ROW_TOKENS, PROMPT_WORD=PROMPT, PAGE_TOKENS=PAGE, LANES=lanes,
        BLOCK=_TABLE_BLOCK, num_warps=1, **early,
    )  # fmt: skip
    return Strips(
        token_ids_T=token_ids,
        positions_T=positions,
        kv_index_T=kv_index,
        token_slots_T=token_slots,
        behind_T=behind,
        seq_lens_S=seq_lens,
        page_table=tables[1],
        slots_R=slots,
        ends_R=ends,
        last_R=last,
        row_pages=tables[0],
    )
