"""The places of a chain drafter in one kernel. Imported only where Triton is; see `spec.places`."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from overlap.cache.pages import PAGE
from overlap.ops import launch_triton
from overlap.spec.drafter import Read
from overlap.spec.runs_triton import aligned


@triton.jit(do_not_specialize=["context", "ahead", "scratch", "table_stride", "stride"])
def _chain_places_kernel(
    positions,
    slots,
    last,
    page_table,
    table_stride,
    out,
    stride,
    context,
    ahead,
    scratch,
    STEPS: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    LANES: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program a row; `out` is [4, STEPS, R] with lines `stride` long: see `Places`."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0)
    token = tl.load(last + row)
    step = tl.arange(0, LANES)
    inside = step < STEPS
    place = tl.load(positions + token) + step
    real = tl.load(slots + row) != scratch
    position = tl.minimum(place, context - 1)
    page = tl.load(page_table + row.to(tl.int64) * table_stride + position // PAGE_TOKENS, mask=inside, other=0)
    index = tl.where((place < context) & real, page * PAGE_TOKENS + position % PAGE_TOKENS, -1)
    here = out + step * stride + row
    tl.store(here, position, mask=inside)
    tl.store(here + STEPS * stride, index, mask=inside)
    tl.store(here + 2 * STEPS * stride, position + 1, mask=inside)
    tl.store(here + 3 * STEPS * stride, place + ahead, mask=inside)


def chain_places(read: Read, steps: int, context: int, ahead: int, scratch: int) -> Tensor:
    """See `spec.places.chain_places`; int32 [4, steps + 1, R]."""
    num_rows = len(read.slots)
    out = aligned((4, steps + 1, num_rows), read.slots.device)
    _chain_places_kernel[(num_rows,)](
        read.positions,
        read.slots,
        read.last,
        read.page_table,
        read.page_table.stride(0),
        out,
        out.stride(1),
        context,
        ahead,
        scratch,
        STEPS=steps + 1,
        PAGE_TOKENS=PAGE,
        LANES=triton.next_power_of_2(steps + 1),
        num_warps=1,
        **launch_triton.early(out.device),
    )
    return out
