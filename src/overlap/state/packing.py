"""A plan as one int32 buffer: what crosses to the device, in one copy, once a step. Imports no torch.

The buffer opens with a header of HEADER words: R, D, T, E, S, A, N, the offset of each section in the order of
SECTIONS, and the number of words in use. The sections lie one after the other; floats travel as their bit patterns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from overlap.cache.pages import Ints
from overlap.errors import InternalError
from overlap.schedule.plan import Admission, StepPlan

HEADER: Final = 16
"""Words before the first section."""
ADMISSION_WORDS: Final = 8
"""slot, start, temperature bits, top_k, top_p bits, min_p bits, seed low, seed high."""
NUM_ROWS: Final = 0
NUM_DECODE: Final = 1
NUM_ADMISSIONS: Final = 5
NUM_UPDATES: Final = 6
ROW_TOKENS: Final = 8
COUNTS: Final = 9
ADMISSIONS: Final = 12
PAGE_UPDATES: Final = 13
PROMPT: Final = 14
USED: Final = 15
"""Where the header has R, D, A, N, the offsets of some sections, and the words in use: a graph reads them there."""
SECTIONS: Final = (
    "slots", "row_tokens", "counts", "row_emits", "sampled", "admissions", "page_updates", "prompt",
)  # fmt: skip
"""slots [R]; row_tokens [R], each row's first token; counts [R]; row_emits [R], which of the E emits the row is or -1;
sampled [S]; admissions [A, 8]; page_updates [3, N], slots, indices and ids; prompt [T - D]."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Where what lies in a packed plan: counts, and the offset of each section, in words."""

    num_rows: int
    num_decode: int
    num_tokens: int
    num_emits: int
    num_sampled: int
    num_admissions: int
    num_updates: int
    slots: int
    row_tokens: int
    counts: int
    row_emits: int
    sampled: int
    admissions: int
    page_updates: int
    prompt: int
    used: int
    """Words in use; what has to be copied."""


def capacity(max_rows: int, token_budget: int, max_updates: int) -> int:
    """Return how many int32 words hold any plan within these limits.

    A plan has at most `max_rows` rows and as many admissions, `token_budget` tokens, and `max_updates` page table
    updates.
    """
    return HEADER + max_rows * (5 + ADMISSION_WORDS) + 3 * max_updates + token_budget


def pack(plan: StepPlan, out: Ints) -> Layout:
    """Write `plan` into the first words of `out` and return where what lies.

    Raises InternalError if `out` is too small (see `capacity`).
    """
    num_rows, num_decode = plan.num_rows, plan.num_decode
    num_emits, num_sampled = len(plan.emits), len(plan.sampled)
    num_admissions, num_updates = len(plan.admissions), len(plan.page_slots)
    row_tokens = HEADER + num_rows
    counts = row_tokens + num_rows
    row_emits = counts + num_rows
    sampled = row_emits + num_rows
    admissions = sampled + num_sampled
    page_updates = admissions + ADMISSION_WORDS * num_admissions
    prompt = page_updates + 3 * num_updates
    used = prompt + len(plan.prompt)
    if used > len(out):
        raise InternalError(f"Step {plan.number} needs {used} packed words, but the buffer has {len(out)}.")
    layout = Layout(
        num_rows, num_decode, plan.num_tokens, num_emits, num_sampled, num_admissions, num_updates,
        HEADER, row_tokens, counts, row_emits, sampled, admissions, page_updates, prompt, used,
    )  # fmt: skip
    out[:HEADER] = (
        num_rows, num_decode, plan.num_tokens, num_emits, num_sampled, num_admissions, num_updates,
        HEADER, row_tokens, counts, row_emits, sampled, admissions, page_updates, prompt, used,
    )  # fmt: skip
    out[HEADER:row_tokens] = plan.slots
    out[row_tokens] = 0
    np.cumsum(plan.counts[:-1], out=out[row_tokens + 1 : counts])
    out[counts:row_emits] = plan.counts
    out[row_emits:sampled] = -1
    out[row_emits:sampled][plan.emits] = np.arange(num_emits, dtype=np.int32)
    out[sampled:admissions] = plan.sampled
    if num_admissions:
        out[admissions:page_updates] = _admission_words(plan.admissions)
    if num_updates:
        updates = out[page_updates:prompt].reshape(3, num_updates)
        updates[0], updates[1], updates[2] = plan.page_slots, plan.page_indices, plan.page_ids
    out[prompt:used] = plan.prompt
    return layout


def goes_over(plan: StepPlan, before: StepPlan | None) -> bool:
    """Return whether a plan can be packed over another one by `pack_again`: it repeats, and the rows are the same."""
    return plan.again and before is not None and before.slots is plan.slots and before.width == plan.width


def pack_again(plan: StepPlan, out: Ints) -> None:
    """Write a plan to where one of the same rows was packed last (see `goes_over`): only page updates differ."""
    first, num_updates = int(out[PAGE_UPDATES]), len(plan.page_slots)
    end = first + 3 * num_updates
    if end > len(out):
        raise InternalError(f"Step {plan.number} needs {end} packed words, but the buffer has {len(out)}.")
    out[NUM_UPDATES], out[PROMPT], out[USED] = num_updates, end, end
    if num_updates:
        updates = out[first:end].reshape(3, num_updates)
        updates[0], updates[1], updates[2] = plan.page_slots, plan.page_indices, plan.page_ids


def _admission_words(admissions: tuple[Admission, ...]) -> Ints:
    """Return the admissions as [A * 8] words."""
    words = np.empty((len(admissions), ADMISSION_WORDS), dtype=np.int32)
    words[:, 0] = [a.slot for a in admissions]
    words[:, 1] = [a.start for a in admissions]
    words[:, 3] = [a.top_k for a in admissions]
    floats = words.view(np.float32)
    # a float32 must hold it, and must not make 0 of it, which means greedy
    floats[:, 2] = [min(max(a.temperature, 1e-30), 1e30) if a.temperature > 0 else 0.0 for a in admissions]
    floats[:, 4] = [a.top_p for a in admissions]
    floats[:, 5] = [a.min_p for a in admissions]
    seeds = np.array([a.seed & (2**64 - 1) for a in admissions], dtype=np.uint64)
    words[:, 6:] = seeds.astype("<u8").view("<i4").reshape(-1, 2)
    return words.reshape(-1)
