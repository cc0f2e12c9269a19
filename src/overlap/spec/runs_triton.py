"""The state changes of a speculating step in four kernels. Imported only where Triton is; see `spec.runs`."""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from overlap.cache.pages import PAGE
from overlap.ops import launch_triton
from overlap.schedule.plan import REFUSED, UNUSED
from overlap.spec.control import MARGIN, MEMORY, PRIOR_ACCEPTANCE, PRIOR_TRIES, PROBE_PRICE
from overlap.spec.drafter import Drafts
from overlap.spec.rows import DraftRows
from overlap.spec.runs import Ends, Outcome, Runs
from overlap.state.mail import DEPTH, Mail
from overlap.state.packing import ADMISSION_WORDS, ADMISSIONS, HEADER, NUM_ADMISSIONS, NUM_ROWS
from overlap.state.rows import SlotRows

_TABLE_BLOCK: Final = 128
_REFUSED: Final = tl.constexpr(REFUSED)
_UNUSED: Final = tl.constexpr(UNUSED)
_MEMORY: Final = tl.constexpr(MEMORY)
_MARGIN: Final = tl.constexpr(MARGIN)
_PRIOR_HITS: Final = tl.constexpr(PRIOR_ACCEPTANCE * PRIOR_TRIES)
_PRIOR_TRIES: Final = tl.constexpr(PRIOR_TRIES)
_PROBE_PRICE: Final = tl.constexpr(PROBE_PRICE)


@triton.jit(do_not_specialize=["scratch", "context", "stride_N", "stride_D"])
def _build_runs_kernel(
    packed,
    last_token,
    seq_len,
    page_table,
    tokens,
    num_drafts,
    out_N,
    stride_N,
    out_D,
    stride_D,
    pages,
    out_drafts,
    scratch,
    context,
    WIDTH: tl.constexpr,
    MOST: tl.constexpr,
    TABLE: tl.constexpr,
    HEADER_WORDS: tl.constexpr,
    NUM_ROWS_WORD: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program a row. `out_N`: tokens, positions, kv_index, slots; `out_D`: slots, starts, ends, drafts."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0)
    real = row < tl.load(packed + NUM_ROWS_WORD)
    slot = tl.where(real, tl.load(packed + HEADER_WORDS + row, mask=real, other=0), scratch)
    start = tl.load(seq_len + slot)
    source = page_table + slot.to(tl.int64) * TABLE
    for begin in range(0, TABLE, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        entry = tl.load(source + column, mask=column < TABLE, other=0)
        tl.store(pages + row.to(tl.int64) * TABLE + column, entry, mask=column < TABLE)
    place = tl.arange(0, LANES)
    inside = place < WIDTH
    draft = tl.load(tokens + slot.to(tl.int64) * MOST + place - 1, mask=inside & (place > 0), other=0)
    position = tl.minimum(start + place, context - 1)
    page = tl.load(source + position // PAGE_TOKENS, mask=inside, other=0)
    written = real & (start + place < context)
    here = out_N + row * WIDTH + place
    tl.store(here, tl.where(place > 0, draft, tl.load(last_token + slot)), mask=inside)
    tl.store(here + stride_N, position, mask=inside)
    index = tl.where(written, page * PAGE_TOKENS + position % PAGE_TOKENS, -1)
    tl.store(here + 2 * stride_N, index, mask=inside)
    tl.store(here + 3 * stride_N, slot + place * 0, mask=inside)
    tl.store(out_drafts + row * (WIDTH - 1) + place - 1, draft, mask=inside & (place > 0))
    tl.store(out_D + row, slot)
    tl.store(out_D + stride_D + row, start)
    tl.store(out_D + 2 * stride_D + row, start + WIDTH)
    tl.store(out_D + 3 * stride_D + row, tl.minimum(tl.load(num_drafts + slot), WIDTH - 1))


@triton.jit(do_not_specialize=["cost"])
def _settle_runs_kernel(
    packed,
    choices,
    drafts,
    slots,
    starts,
    num_drafts,
    last_token,
    seq_len,
    num_S,
    hits,
    tries,
    idle,
    landing,
    last,
    most,
    cost,
    WIDTH: tl.constexpr,
    MOST: tl.constexpr,
    NUM_ROWS_WORD: tl.constexpr,
    LANES: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program a row."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0)
    real = row < tl.load(packed + NUM_ROWS_WORD)
    slot = tl.load(slots + row)
    start = tl.load(starts + row)
    drafted = tl.load(num_drafts + row)
    place = tl.arange(0, LANES)
    choice = tl.load(choices + row * WIDTH + place, mask=place < WIDTH, other=0).to(tl.int32)
    draft = tl.load(drafts + row * (WIDTH - 1) + place, mask=place < WIDTH - 1, other=-1)
    accepted = tl.min(tl.where((place < drafted) & (draft == choice), LANES, place))
    rest = tl.where(place <= drafted, _REFUSED, _UNUSED)
    tl.store(landing + row * WIDTH + place, tl.where(place <= accepted, choice, rest), mask=place < WIDTH)
    tl.store(last + row, (row * WIDTH + accepted).to(tl.int64))
    bonus = tl.sum(tl.where(place == accepted, choice, 0))
    tl.store(seq_len + slot, start + accepted + 1, mask=real)
    tl.store(last_token + slot, bonus, mask=real)
    tl.store(num_S + slot, 0, mask=real)

    hit, tried, idled = tl.load(hits + slot), tl.load(tries + slot), tl.load(idle + slot)
    learns = drafted > 0
    hit = tl.where(learns & real, hit * _MEMORY + accepted, hit)
    tried = tl.where(learns & real, tried * _MEMORY + tl.minimum(accepted + 1, drafted), tried)
    idled = tl.where(real, tl.where(learns, 0, idled + 1), idled)
    chance = (hit + _PRIOR_HITS) / (tried + _PRIOR_TRIES)
    promised, power, best, best_promise = 1.0, 1.0, 0, 1.0 + _MARGIN
    for count in tl.static_range(1, MOST + 1):
        power *= chance
        promised += power
        promise = promised / (1 + count * cost)
        best = tl.where(promise > best_promise, count, best)
        best_promise = tl.maximum(promise, best_promise)
    probes = (idled * _PROBE_PRICE >= cost).to(tl.int32)
    tl.store(most + row, tl.maximum(best, probes))
    tl.debug_barrier()  # no thread may still have to read what the next lines overwrite
    tl.store(hits + slot, hit, mask=real)
    tl.store(tries + slot, tried, mask=real)
    tl.store(idle + slot, idled, mask=real)


@triton.jit
def _forget_runs_kernel(
    packed, hits, tries, idle, num_S, ADMISSION: tl.constexpr, NUM_ADMISSIONS_WORD: tl.constexpr,
    ADMISSIONS_WORD: tl.constexpr, LANES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    place = tl.arange(0, LANES)
    there = place < tl.load(packed + NUM_ADMISSIONS_WORD)
    admissions = packed + tl.load(packed + ADMISSIONS_WORD)
    slot = tl.load(admissions + place * ADMISSION, mask=there, other=0)
    tl.store(hits + slot, 0.0, mask=there)
    tl.store(tries + slot, 0.0, mask=there)
    tl.store(idle + slot, 0, mask=there)
    tl.store(num_S + slot, 0, mask=there)


@triton.jit
def _keep_drafts_kernel(
    slots, proposed, num, most, tokens, num_S, COUNT: tl.constexpr, MOST: tl.constexpr, LANES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0)
    slot = tl.load(slots + row).to(tl.int64)
    place = tl.arange(0, LANES)
    token = tl.load(proposed + row * COUNT + place, mask=place < COUNT, other=0)
    tl.store(tokens + slot * MOST + place, token, mask=place < COUNT)
    tl.store(num_S + slot, tl.minimum(tl.load(num + row), tl.load(most + row)))


@triton.jit(do_not_specialize=["stride"])
def _land_runs_kernel(
    packed,
    turn,
    landing,
    landings,
    stride,
    WIDTH: tl.constexpr,
    MOST_ROWS: tl.constexpr,
    NUM_ROWS_WORD: tl.constexpr,
    PLACES: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    end = tl.minimum(tl.load(packed + NUM_ROWS_WORD), MOST_ROWS) * WIDTH
    place = tl.load(turn)
    target = landings + place.to(tl.int64) * stride
    for begin in range(0, MOST_ROWS * WIDTH, BLOCK):
        entry = begin + tl.arange(0, BLOCK)
        tl.store(target + entry, tl.load(landing + entry, mask=entry < end, other=0), mask=entry < end)
    tl.debug_barrier()  # no thread may still have to read the turn that the next line overwrites
    tl.store(turn, (place + 1) % PLACES)


def aligned(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Return int32 whose lines each begin at 16 bytes: Triton compiles a kernel anew for an address that does not."""
    *outer, inner = shape
    return torch.empty((*outer, -(-inner // 4) * 4), dtype=torch.int32, device=device)[..., :inner]


def build_runs(packed: Tensor, rows: SlotRows, drafts: DraftRows, num_rows: int, width: int, context: int) -> Runs:
    """See `spec.runs.build_runs`."""
    table = rows.page_table.shape[1]
    out_N = aligned((4, num_rows * width), packed.device)
    out_D = aligned((4, num_rows), packed.device)
    pages = out_N.new_empty((num_rows, table))
    drafts_DK = out_N.new_empty((num_rows, width - 1))
    if num_rows:
        _build_runs_kernel[(num_rows,)](
            packed,
            rows.last_token,
            rows.seq_len,
            rows.page_table,
            drafts.tokens_SK,
            drafts.num_S,
            out_N,
            out_N.stride(0),
            out_D,
            out_D.stride(0),
            pages,
            drafts_DK,
            rows.scratch,
            context,
            WIDTH=width,
            MOST=drafts.max_drafts,
            TABLE=table,
            HEADER_WORDS=HEADER,
            NUM_ROWS_WORD=NUM_ROWS,
            PAGE_TOKENS=PAGE,
            LANES=triton.next_power_of_2(width),
            BLOCK=_TABLE_BLOCK,
            num_warps=1,
            **launch_triton.early(packed.device),
        )
    token_ids_N, positions_N, kv_index_N, token_slots_N = out_N
    slots_D, starts_D, seq_lens_D, num_drafts_D = out_D
    return Runs(
        packed=packed,
        width=width,
        token_ids_N=token_ids_N,
        positions_N=positions_N,
        kv_index_N=kv_index_N,
        token_slots_N=token_slots_N,
        slots_D=slots_D,
        starts_D=starts_D,
        seq_lens_D=seq_lens_D,
        page_table=pages,
        drafts_DK=drafts_DK,
        num_drafts_D=num_drafts_D,
    )


def settle_runs(runs: Ends, choices_N: Tensor, rows: SlotRows, drafts: DraftRows, cost: float) -> Outcome:
    """See `spec.runs.settle_runs`."""
    num_rows, width = len(runs.slots_D), runs.width
    landing_DJ = torch.empty((num_rows, width), dtype=torch.int32, device=choices_N.device)
    last_D = torch.empty(num_rows, dtype=torch.int64, device=choices_N.device)
    most_D = landing_DJ.new_empty(num_rows)
    if num_rows:
        _settle_runs_kernel[(num_rows,)](
            runs.packed,
            choices_N,
            runs.drafts_DK,
            runs.slots_D,
            runs.starts_D,
            runs.num_drafts_D,
            rows.last_token,
            rows.seq_len,
            drafts.num_S,
            drafts.control.hits,
            drafts.control.tries,
            drafts.control.idle,
            landing_DJ,
            last_D,
            most_D,
            cost,
            WIDTH=width,
            MOST=drafts.max_drafts,
            NUM_ROWS_WORD=NUM_ROWS,
            LANES=triton.next_power_of_2(width),
            num_warps=1,
            **launch_triton.early(choices_N.device),
        )
    return Outcome(landing_DJ=landing_DJ, last_D=last_D, most_D=most_D)


def keep_drafts(slots_R: Tensor, proposed: Drafts, most_R: Tensor, drafts: DraftRows) -> None:
    """See `spec.runs.keep_drafts`."""
    _keep_drafts_kernel[(len(slots_R),)](
        slots_R,
        proposed.tokens_RK,
        proposed.num_R,
        most_R,
        drafts.tokens_SK,
        drafts.num_S,
        COUNT=proposed.tokens_RK.shape[1],
        MOST=drafts.max_drafts,
        LANES=triton.next_power_of_2(proposed.tokens_RK.shape[1]),
        num_warps=1,
        **launch_triton.early(slots_R.device),
    )


def land_runs(mail: Mail, landing_DJ: Tensor) -> None:
    """See `spec.runs.land_runs`."""
    num_rows, width = landing_DJ.shape
    _land_runs_kernel[(1,)](
        mail.packed,
        mail.turn,
        landing_DJ,
        mail.landings,
        mail.landings.stride(0),
        WIDTH=width,
        MOST_ROWS=num_rows,
        NUM_ROWS_WORD=NUM_ROWS,
        PLACES=DEPTH,
        BLOCK=min(1024, triton.next_power_of_2(num_rows * width)),
        num_warps=4,
        **launch_triton.early(landing_DJ.device),
    )


def forget_runs(packed: Tensor, drafts: DraftRows, most: int) -> None:
    """See `spec.runs.forget_runs`."""
    control = drafts.control
    _forget_runs_kernel[(1,)](
        packed,
        control.hits,
        control.tries,
        control.idle,
        drafts.num_S,
        ADMISSION=ADMISSION_WORDS,
        NUM_ADMISSIONS_WORD=NUM_ADMISSIONS,
        ADMISSIONS_WORD=ADMISSIONS,
        LANES=max(16, triton.next_power_of_2(most)),
        num_warps=1,
        **launch_triton.early(packed.device),
    )
