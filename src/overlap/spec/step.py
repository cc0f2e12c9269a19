"""A step with a drafter: verify up to K drafts of each decode row, accept, take the bonus token, draft again.

All of it is enqueued; the host plans with upper bounds and learns a step later how many tokens came. A decode row runs
`plan.width` positions: its last token, then the drafts that its slot holds. Which of them are true is known only
here, so here is where a slot's length moves on. Positions past the context exist in no page: they are read as the
context's last one, write no KV, and what comes of them is past every row's limit.

The order of shapes is the same as without a drafter: the target's logits at each position are shaped by what stands in
front of that position (`shape_logits` is told the drafts), then filtered, then drawn with the noise of the position.

Legend: D decode rows, J positions of each, C prompt chunks, R = D + C rows, P tokens of the chunks, T = D * J + P, L
numbers that land (D * J and one for each chunk that ends its prompt), K drafts of a row at most, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from overlap.cache.pages import PAGE
from overlap.graphs.eager import drive
from overlap.models.llama import Llama
from overlap.models.program import Batch
from overlap.ops.attention import Attention, AttentionRows
from overlap.sample.sampler import SampleKind, sample
from overlap.sample.shaping import shape_logits
from overlap.schedule.plan import REFUSED, UNUSED, Admission, StepPlan
from overlap.spec.accept import Accepted, accept
from overlap.spec.control import DraftControl
from overlap.spec.drafter import Drafter, Read
from overlap.state.inputs import apply_changes, sampled_rows
from overlap.state.packing import ADMISSION_WORDS, Layout
from overlap.state.rows import SlotRows

DRAFT_COST: Final = 0.1
"""What one more drafted position is taken to cost, in plain steps: between a memory-bound step's and a compute-bound
one's. Whether to draft at all the host decides by what steps take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Brought:
    """What a step lands."""

    tokens_L: Tensor
    """int32 [L]: see `StepPlan.width`."""
    choices_L: Tensor
    """int32 [L]: the target's choice at each of these places, taken or not."""
    logits_LV: Tensor
    """float32 [L, V]: the target's own."""
    hidden_TC: Tensor
    """[T, C]: its hidden states."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Inputs:
    """A step's inputs on the device, int32."""

    token_ids_T: Tensor
    positions_T: Tensor
    kv_index_T: Tensor
    token_slots_T: Tensor
    slots_R: Tensor
    starts_R: Tensor
    """The position of each row's first token."""
    lasts_R: Tensor
    """int64: the index among T of each row's last token."""
    page_table: Tensor
    """[R, pages of a row]"""
    drafts_DK: Tensor
    """[D, J - 1]"""
    num_drafts_D: Tensor
    rows: AttentionRows


class Speculation:
    """Owns the drafts of all slots. One lane's; used inside its stream only."""

    def __init__(
        self, program: Llama, attention: Attention, kv: Tensor, rows: SlotRows, drafter: Drafter, context: int
    ) -> None:
        """`kv` is the target's memory, which `attention` is bound to; `context` the most tokens of a request."""
        self._program = program
        self._attention = attention
        self._kv = kv
        self._rows = rows
        self._drafter = drafter
        self._context = context
        num_slots = rows.scratch
        self._control = DraftControl(num_slots, drafter.max_drafts, kv.device)
        self._drafts_SK = torch.zeros((num_slots + 1, drafter.max_drafts), dtype=torch.int32, device=kv.device)
        self._num_S = torch.zeros(num_slots + 1, dtype=torch.int32, device=kv.device)

    @property
    def width(self) -> int:
        """The most positions of a decode row: K + 1."""
        return self._drafter.max_drafts + 1

    @property
    def nbytes(self) -> int:
        """Bytes of device memory, the drafter's own left out."""
        return self._drafts_SK.nbytes + self._num_S.nbytes

    def run(self, plan: StepPlan, layout: Layout, packed: Tensor) -> Brought:
        """Enqueue a whole step whose plan is on the device as `packed`."""
        apply_changes(packed, layout, self._rows)
        self._admit(plan.admissions, packed, layout)
        inputs = self._inputs(plan, layout, packed)
        self._attention.plan(inputs.rows)
        batch = Batch(
            token_ids=inputs.token_ids_T, positions=inputs.positions_T, kv_index=inputs.kv_index_T, kv=self._kv
        )
        states = drive(self._program.forward(batch, self._drafter.taps), self._attention)
        width = self._program.config.hidden_size
        emits_L = self._emits(plan, inputs)
        logits_LV, choices_L = self._choose(plan, inputs, states[:, :width], emits_L, packed, layout)
        run_tokens = plan.num_decode * plan.width
        choices_DJ = choices_L[:run_tokens].view(plan.num_decode, plan.width)
        outcome = accept(choices_DJ, inputs.drafts_DK, inputs.num_drafts_D)
        tokens_L = torch.cat((_landing(outcome, inputs.num_drafts_D).view(-1), choices_L[run_tokens:]))
        self._settle(plan, inputs, outcome, choices_L[run_tokens:])
        self._draft(plan, inputs, outcome, choices_L, states[:, width:])
        return Brought(tokens_L=tokens_L, choices_L=choices_L, logits_LV=logits_LV, hidden_TC=states[:, :width])

    def _admit(self, admissions: Sequence[Admission], packed: Tensor, layout: Layout) -> None:
        """Forget what the slots' earlier owners left."""
        self._rows.shapes.admit(admissions, self._program.vocab_size, self._kv.device)
        if not admissions:
            return
        words = packed.narrow(0, layout.admissions, layout.num_admissions * ADMISSION_WORDS)
        slots = words.view(-1, ADMISSION_WORDS)[:, 0].long()
        self._control.admit(slots)
        self._num_S.index_fill_(0, slots, 0)
        for admission in admissions:
            if admission.spared is not None:
                self._drafter.remember(admission.slot, _to(self._kv.device, admission.spared))

    def _inputs(self, plan: StepPlan, layout: Layout, packed: Tensor) -> _Inputs:
        num_decode, width, device = plan.num_decode, plan.width, self._kv.device
        slots_R = packed.narrow(0, layout.slots, layout.num_rows)
        starts_R = self._rows.seq_len.index_select(0, slots_R)
        page_table = self._rows.page_table.index_select(0, slots_R)
        counts_R = packed.narrow(0, layout.counts, layout.num_rows)
        firsts_R = packed.narrow(0, layout.row_tokens, layout.num_rows)
        row_T = torch.repeat_interleave(counts_R.long(), output_size=layout.num_tokens)
        place_T = torch.arange(layout.num_tokens, dtype=torch.int32, device=device)
        positions_T = (starts_R - firsts_R).index_select(0, row_T) + place_T
        inside_T = positions_T < self._context
        positions_T = positions_T.clamp(max=self._context - 1)
        pages_T = page_table[row_T, (positions_T // PAGE).long()]
        slots_D = slots_R[:num_decode]
        drafts_DK = self._drafts_SK.index_select(0, slots_D)[:, : width - 1]
        last_D1 = self._rows.last_token.index_select(0, slots_D)[:, None]
        prompt_P = packed.narrow(0, layout.prompt, len(plan.prompt))
        return _Inputs(
            token_ids_T=torch.cat((torch.cat((last_D1, drafts_DK), dim=1).view(-1), prompt_P)),
            positions_T=positions_T,
            kv_index_T=torch.where(inside_T, pages_T * PAGE + positions_T % PAGE, -1),
            token_slots_T=slots_R.index_select(0, row_T),
            slots_R=slots_R,
            starts_R=starts_R,
            lasts_R=(firsts_R + counts_R - 1).long(),
            page_table=page_table,
            drafts_DK=drafts_DK,
            num_drafts_D=self._num_S.index_select(0, slots_D).clamp(max=width - 1),
            rows=AttentionRows(
                num_decode=num_decode,
                width=width,
                seq_lens=starts_R + counts_R,
                page_table=page_table,
                starts=plan.starts,
                counts=plan.counts,
                chunk_pages=plan.chunk_pages,
            ),
        )

    def _emits(self, plan: StepPlan, inputs: _Inputs) -> Tensor:
        """Return the index among T of each place that lands, int64 [L]."""
        num_run = plan.num_decode * plan.width
        places_L = torch.arange(num_run, device=self._kv.device)
        if len(plan.emits) == plan.num_decode:
            return places_L
        ends = _to(self._kv.device, plan.emits[plan.num_decode :].astype(np.int64))
        return torch.cat((places_L, inputs.lasts_R.index_select(0, ends)))

    def _choose(
        self, plan: StepPlan, inputs: _Inputs, hidden_TC: Tensor, emits_L: Tensor, packed: Tensor, layout: Layout
    ) -> tuple[Tensor, Tensor]:
        """Return the target's logits and its choices at all places that land."""
        logits_LV = self._program.logits(hidden_TC.index_select(0, emits_L))
        if not layout.num_emits:
            return logits_LV, torch.empty(0, dtype=torch.int32, device=self._kv.device)
        slots_L = inputs.token_slots_T.index_select(0, emits_L)
        positions_L = inputs.positions_T.index_select(0, emits_L) + 1
        shaped_LV = logits_LV
        if plan.shaped:
            before = self._before(plan, inputs, len(emits_L))
            shaped_LV = shape_logits(logits_LV, self._rows.shapes.rows, slots_L, positions_L, drafted_NK=before)
        num_wide = int(np.searchsorted(plan.sampled, plan.num_decode))  # of the sampled rows, the decode rows
        sampled = sampled_rows(packed, layout)
        within_J = torch.arange(plan.width, dtype=torch.int32, device=self._kv.device)
        wide = (sampled[:num_wide, None] * plan.width + within_J).view(-1)
        sampled_L = torch.cat((wide, sampled[num_wide:] + plan.num_decode * (plan.width - 1)))
        return logits_LV, sample(shaped_LV, self._rows, slots_L, positions_L, sampled_L, plan.truncated)

    def _before(self, plan: StepPlan, inputs: _Inputs, num_landing: int) -> Tensor:
        """Return the drafts in front of each place of a run, int32 [L, J - 1], -1 for none."""
        num_run, width = plan.num_decode * plan.width, plan.width
        before_LK = torch.full((num_landing, max(1, width - 1)), -1, dtype=torch.int32, device=self._kv.device)
        if width > 1:
            places = torch.arange(width, device=self._kv.device)
            front_JK = places[:-1][None, :] < places[:, None]
            runs_DJK = torch.where(front_JK[None], inputs.drafts_DK[:, None, :], -1)
            before_LK[:num_run] = runs_DJK.reshape(num_run, width - 1)
        return before_LK

    def _settle(self, plan: StepPlan, inputs: _Inputs, outcome: Accepted, firsts_E: Tensor) -> None:
        """Move the slots' rows on: lengths, last tokens, counts of tokens, and what drafts were worth."""
        rows, num_decode = self._rows, plan.num_decode
        lengths_R = inputs.rows.seq_lens.clone()
        lengths_R[:num_decode] = inputs.starts_R[:num_decode] + outcome.num_emitted
        rows.seq_len.index_copy_(0, inputs.slots_R.long(), lengths_R)
        slots_D = inputs.slots_R[:num_decode]
        rows.last_token.index_copy_(0, slots_D.long(), outcome.bonus_R)
        self._control.learn(slots_D, inputs.num_drafts_D, outcome.num_accepted_R)
        ending = None
        if len(plan.emits) > num_decode:
            ending = inputs.slots_R.index_select(0, _to(self._kv.device, plan.emits[num_decode:].astype(np.int64)))
            rows.last_token.index_copy_(0, ending.long(), firsts_E)
        if plan.shaped and rows.shapes.rows is not None:
            taken_DJ = outcome.tokens_RJ >= 0
            noted_DJ = torch.where(taken_DJ, slots_D[:, None], rows.scratch)  # nobody looks at the scratch slot's
            rows.shapes.rows.note(noted_DJ.view(-1), outcome.tokens_RJ.clamp(min=0).view(-1))
            if ending is not None:
                rows.shapes.rows.note(ending, firsts_E)

    def _next_tokens(self, plan: StepPlan, inputs: _Inputs, choices_L: Tensor) -> Tensor:
        """Return the token behind each that was read, [T]: the target's choice, or the prompt's next."""
        num_decode, device = plan.num_decode, self._kv.device
        num_run, token_ids_T = num_decode * plan.width, inputs.token_ids_T
        if plan.behind is None:
            return choices_L[:num_run]
        # Of a chunk's last token this takes that of the chunk behind it, and then what the host says.
        next_T = torch.cat((choices_L[:num_run], token_ids_T[num_run + 1 :], token_ids_T[:1]))
        behind_C = _to(device, plan.behind)
        if len(plan.emits) > num_decode:
            ends = plan.emits[num_decode:] - num_decode
            behind_C = behind_C.index_copy(0, _to(device, ends.astype(np.int64)), choices_L[num_run:])
        return next_T.index_copy_(0, inputs.lasts_R[num_decode:], behind_C)

    def _draft(self, plan: StepPlan, inputs: _Inputs, outcome: Accepted, choices_L: Tensor, hidden_TX: Tensor) -> None:
        """Let the drafter read what the target has read, and keep what it proposes."""
        num_decode = plan.num_decode
        last_R = inputs.lasts_R.clone()
        last_R[:num_decode] += outcome.num_accepted_R - (plan.width - 1)
        read = Read(
            token_ids=inputs.token_ids_T,
            next_tokens=self._next_tokens(plan, inputs, choices_L),
            positions=inputs.positions_T,
            kv_index=inputs.kv_index_T,
            hidden=hidden_TX if self._drafter.taps else None,
            rows=inputs.rows,
            last=last_R,
            slots=inputs.slots_R,
            token_slots=inputs.token_slots_T,
            page_table=inputs.page_table,
            longest=int((plan.starts + plan.counts).max()) - 1,
        )
        slots_R = inputs.slots_R.long()
        if not plan.drafts:
            self._drafter.take_in(read)
            self._num_S.index_fill_(0, slots_R, 0)
            return
        drafts = self._drafter.draft(read, self._rows, _kind(plan))
        most_R = self._control.choose(inputs.slots_R, DRAFT_COST)
        self._drafts_SK.index_copy_(0, slots_R, drafts.tokens_RK)
        self._num_S.index_copy_(0, slots_R, torch.minimum(drafts.num_R, most_R))


def _landing(outcome: Accepted, num_drafts_D: Tensor) -> Tensor:
    """Return what lands of the runs, int32 [D, J]: tokens, REFUSED for each refused draft, UNUSED."""
    places_J = torch.arange(outcome.tokens_RJ.shape[1], dtype=torch.int32, device=num_drafts_D.device)
    rest_DJ = torch.where(places_J[None, :] <= num_drafts_D[:, None], REFUSED, UNUSED).int()
    return torch.where(outcome.tokens_RJ >= 0, outcome.tokens_RJ, rest_DJ)


def _kind(plan: StepPlan) -> SampleKind:
    """Return how a drafter has to draw to draw as the target does."""
    if plan.shaped:
        return "shaped"
    if plan.truncated:
        return "truncated"
    return "sampled" if len(plan.sampled) else "greedy"


def _to(device: torch.device, values: npt.NDArray[np.generic]) -> Tensor:
    """Return host values on the device, without waiting for it."""
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
