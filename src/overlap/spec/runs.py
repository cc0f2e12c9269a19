"""Runs: the decode rows of a speculating step, from the slots' rows to its inputs, and from its outcome back to them.

Nothing comes from the host but the packed plan, so the same calls, recorded once, are every such step of up to D rows.
Rows past the plan's are padding: the scratch slot's, written nowhere. On CUDA each function is one kernel.

Legend: D rows, J positions of each (width), N = D * J, K drafts of a row at most, S slots, P pages of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from overlap.cache.pages import PAGE
from overlap.schedule.plan import REFUSED, UNUSED
from overlap.spec.accept import Accepted, accept
from overlap.spec.drafter import Drafts
from overlap.spec.rows import DraftRows
from overlap.state.mail import DEPTH, Mail
from overlap.state.packing import ADMISSION_WORDS, ADMISSIONS, HEADER, NUM_ADMISSIONS, NUM_ROWS
from overlap.state.rows import SlotRows
from overlap.state.strips import Strips


@dataclass(frozen=True, slots=True, kw_only=True)
class Ends:
    """What is to be settled of D rows of J positions each, int32 on the device."""

    packed: Tensor
    """The packed plan, whose header has the number of rows."""
    width: int
    """J"""
    slots_D: Tensor
    starts_D: Tensor
    """The position of each row's first token."""
    drafts_DK: Tensor
    """[D, J - 1]"""
    num_drafts_D: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Runs(Ends):
    """The inputs of D rows of J positions each, int32 on the device."""

    token_ids_N: Tensor
    """Of each row its last token, then its drafts."""
    positions_N: Tensor
    """Positions past the context, which exist in no page, are read as the context's last one."""
    kv_index_N: Tensor
    """-1 past the context, and for padding."""
    token_slots_N: Tensor
    seq_lens_D: Tensor
    """Where the row's J positions end."""
    page_table: Tensor
    """[D, P]"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a verify brought: int32 on the device, but for `last_D`."""

    landing_DJ: Tensor
    """The tokens that a row emits, REFUSED for each refused draft, then UNUSED."""
    last_D: Tensor
    """int64: the index among N of each row's last true token."""
    most_D: Tensor
    """How many tokens to draft for each row."""


def build_runs(packed: Tensor, rows: SlotRows, drafts: DraftRows, num_rows: int, width: int, context: int) -> Runs:
    """Return the inputs of the first `num_rows` rows of the plan `packed`, padded where it has fewer."""
    if packed.is_cuda:
        from overlap.spec import runs_triton

        return runs_triton.build_runs(packed, rows, drafts, num_rows, width, context)
    real = _num_real(packed, num_rows)
    slots_D = torch.full((num_rows,), rows.scratch, dtype=torch.int32)
    slots_D[:real] = packed[HEADER : HEADER + real]
    starts_D = rows.seq_len.index_select(0, slots_D)
    page_table = rows.page_table.index_select(0, slots_D)
    places_DJ = starts_D[:, None] + torch.arange(width, dtype=torch.int32)
    positions_DJ = places_DJ.clamp(max=context - 1)
    inside_DJ = places_DJ < context
    inside_DJ[real:] = False
    pages_DJ = page_table.gather(1, (positions_DJ // PAGE).long())
    drafts_DK = drafts.tokens_SK.index_select(0, slots_D)[:, : width - 1]
    last_D1 = rows.last_token.index_select(0, slots_D)[:, None]
    return Runs(
        packed=packed,
        width=width,
        token_ids_N=torch.cat((last_D1, drafts_DK), dim=1).view(-1),
        positions_N=positions_DJ.reshape(-1),
        kv_index_N=torch.where(inside_DJ, pages_DJ * PAGE + positions_DJ % PAGE, -1).view(-1),
        token_slots_N=slots_D.repeat_interleave(width),
        slots_D=slots_D,
        starts_D=starts_D,
        seq_lens_D=starts_D + width,
        page_table=page_table,
        drafts_DK=drafts_DK,
        num_drafts_D=drafts.num_S.index_select(0, slots_D).clamp(max=width - 1),
    )


def ends_of(strips: Strips, packed: Tensor) -> Ends:
    """Return the rows of a step in strips as runs of their last token alone: what they emit is settled as that is."""
    num_rows, device = len(strips.slots_R), packed.device
    return Ends(
        packed=packed,
        width=1,
        slots_D=strips.slots_R,
        starts_D=strips.ends_R - 1,
        drafts_DK=torch.empty((num_rows, 0), dtype=torch.int32, device=device),
        num_drafts_D=torch.zeros(num_rows, dtype=torch.int32, device=device),
    )


def forget_runs(packed: Tensor, drafts: DraftRows, most: int) -> None:
    """Forget what the earlier owners of slots left that are taken by the packed plan: up to `most` of them."""
    if packed.is_cuda:
        from overlap.spec import runs_triton

        runs_triton.forget_runs(packed, drafts, most)
        return
    words = packed.numpy()
    first, count = int(words[ADMISSIONS]), int(words[NUM_ADMISSIONS]) * ADMISSION_WORDS
    drafts.admit(packed[first : first + count].view(-1, ADMISSION_WORDS)[:, 0].long())


def settle_runs(runs: Ends, choices_N: Tensor, rows: SlotRows, drafts: DraftRows, cost: float) -> Outcome:
    """Accept, and move the slots' rows on: lengths, last tokens, what drafts were worth, none left to verify.

    `choices` (int32 or int64) are the target's; `cost` is that of `DraftControl.choose`.
    """
    if choices_N.is_cuda:
        from overlap.spec import runs_triton

        return runs_triton.settle_runs(runs, choices_N, rows, drafts, cost)
    num_rows, width = len(runs.slots_D), runs.width
    real = _num_real(runs.packed, num_rows)
    found = accept(choices_N.int().view(num_rows, width), runs.drafts_DK, runs.num_drafts_D)
    slots_D = runs.slots_D[:real].long()
    rows.seq_len.index_copy_(0, slots_D, (runs.starts_D + found.num_emitted)[:real])
    rows.last_token.index_copy_(0, slots_D, found.bonus_R[:real])
    drafts.control.learn(slots_D, runs.num_drafts_D[:real], found.num_accepted_R[:real])
    drafts.num_S.index_fill_(0, slots_D, 0)
    return Outcome(
        landing_DJ=_landing(found, runs.num_drafts_D),
        last_D=torch.arange(num_rows) * width + found.num_accepted_R,
        most_D=drafts.control.choose(runs.slots_D, cost),
    )


def keep_drafts(slots_R: Tensor, proposed: Drafts, most_R: Tensor, drafts: DraftRows) -> None:
    """Keep what was proposed for these slots, `most` of it meant at most. Behind fewer than K the old ones stay."""
    if slots_R.is_cuda:
        from overlap.spec import runs_triton

        runs_triton.keep_drafts(slots_R, proposed, most_R, drafts)
        return
    index_R = slots_R.long()
    drafts.tokens_SK[:, : proposed.tokens_RK.shape[1]].index_copy_(0, index_R, proposed.tokens_RK)
    drafts.num_S.index_copy_(0, index_R, torch.minimum(proposed.num_R, most_R))


def land_runs(mail: Mail, landing_DJ: Tensor) -> None:
    """Write the plan's rows to the host, at the place whose turn it is; then move the turn on."""
    if mail.packed.is_cuda:
        from overlap.spec import runs_triton

        runs_triton.land_runs(mail, landing_DJ)
        return
    turn, real = int(mail.turn.numpy()[0]), _num_real(mail.packed, len(landing_DJ))
    mail.landings[turn, : real * landing_DJ.shape[1]] = landing_DJ[:real].reshape(-1)
    mail.turn.fill_((turn + 1) % DEPTH)


def _num_real(packed: Tensor, num_rows: int) -> int:
    return min(num_rows, int(packed.numpy()[NUM_ROWS]))


def _landing(found: Accepted, num_drafts_D: Tensor) -> Tensor:
    places_J = torch.arange(found.tokens_RJ.shape[1], dtype=torch.int32)
    rest_DJ = torch.where(places_J[None, :] <= num_drafts_D[:, None], REFUSED, UNUSED).int()
    return torch.where(found.tokens_RJ >= 0, found.tokens_RJ, rest_DJ)
