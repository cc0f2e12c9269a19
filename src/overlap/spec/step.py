"""A step with a drafter: verify up to K drafts of each decode row, accept, take the bonus token, draft again.

All of it is enqueued; the host plans with upper bounds and learns a step later how many tokens came. A decode row runs
`plan.width` positions: its last token, then the drafts that its slot holds. Which of them are true is known only
here, so here is where a slot's length moves on. Positions past the context exist in no page: they are read as the
context's last one, write no KV, and what comes of them is past every row's limit.

`decode` is a step of decode rows alone with no word from the host, `short` one with short prompts, in strips: what
graphs record. `run` is any step. All are made of the same parts.

The order of shapes is the same as without a drafter: the target's logits at each position are shaped by what stands in
front of that position (`shape_logits` is told the drafts), then filtered, then drawn with the noise of the position.

Legend: D decode rows, J positions of each, C prompt chunks, R = D + C rows, N = D * J, P tokens of the chunks, T = N +
P, L numbers that land (N and one for each chunk that ends its prompt), K drafts of a row at most, V vocabulary, M rows
that are held to a form.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
import torch
from torch import Tensor

from overlap.graphs.eager import drive
from overlap.models.llama import Llama
from overlap.models.program import Batch, Forward
from overlap.ops.attention import Attention
from overlap.sample.sampler import sample, sample_all
from overlap.sample.shaping import mask_logits, shape_logits
from overlap.schedule.plan import Admission, Ladder, SampleKind, StepPlan, widths_for
from overlap.spec.drafter import Drafter, Read
from overlap.spec.inputs import Inputs, last_of_chunks, mixed_inputs, run_inputs
from overlap.spec.rows import DraftRows
from overlap.spec.runs import Outcome, Runs, build_runs, ends_of, forget_runs, keep_drafts, land_runs, settle_runs
from overlap.state.inputs import apply_changes, sampled_rows
from overlap.state.mail import Mail
from overlap.state.packing import ADMISSION_WORDS, Layout
from overlap.state.replay import take_plan
from overlap.state.rows import SlotRows
from overlap.state.shapes import to_device
from overlap.state.strips import take_strips

DRAFT_COST: Final = 0.0
"""What one more draft costs its row: nothing, for a wide step computes all its positions whether they hold drafts or
not. Whether steps are wide the host decides, by what they take (`schedule.pace`)."""
_ONE_PROMPT: Final = 4
_FEW_ROWS: Final = 2
_ANY_ROWS: Final = 1 << 31
RunTarget: TypeAlias = Callable[[Batch], Tensor]
"""Runs the target over tokens whose attention is planned; returns what `Llama.forward` does, the taps included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Brought:
    """What a step lands."""

    tokens_L: Tensor
    """int32 [L]: see `StepPlan.width`."""
    choices_L: Tensor
    """int32 [L]: the target's choice at each of these places, taken or not."""
    logits_LV: Tensor
    """float32 [L, V]: the target's own."""
    drafts_MK: Tensor | None
    """int32 [M, 1 + K], for each masked row: how many drafts its slot holds now, and these. None without such rows."""
    hidden_TC: Tensor
    """[T, C]: its final states."""


class Speculation:
    """Owns the drafts of all slots. One lane's; used inside its stream only."""

    def __init__(
        self,
        program: Llama,
        attention: Attention,
        kv: Tensor,
        rows: SlotRows,
        drafter: Drafter,
        context: int,
        ladder: Ladder | None = None,
    ) -> None:
        """`kv` is the target's memory, which `attention` is bound to; `context` the most tokens of a request.

        `ladder` says how many drafts a row may verify by the number of rows; None for always as many.
        """
        self._program = program
        self._attention = attention
        self._kv = kv
        self._rows = rows
        self._drafter = drafter
        self._context = context
        self.ladder: Final = ladder or ((_ANY_ROWS, drafter.max_drafts),)
        """How many drafts a row may verify, by the number of rows."""
        self._drafts = DraftRows(rows.scratch, drafter.max_drafts, kv.device)

    @property
    def width(self) -> int:
        """The most positions of a decode row: K + 1."""
        return self._drafter.max_drafts + 1

    @property
    def captures(self) -> bool:
        """Whether `decode` takes nothing from the host, so that a graph of it can be replayed."""
        return self._attention.captures_decode and self._drafter.captures

    @property
    def nbytes(self) -> int:
        """Bytes of device memory, the drafter's own left out."""
        return self._drafts.nbytes

    @torch.inference_mode()
    def decode(self, mail: Mail, num_rows: int, width: int, kind: SampleKind) -> None:
        """Enqueue one whole step of `num_rows` decode rows, from the mail and back to it. Drafts if it is wide.

        Which plan it is, and how many of the rows are real, stands in the mail.
        """
        take_plan(mail, self._rows, num_rows)
        runs = build_runs(mail.packed, self._rows, self._drafts, num_rows, width, self._context)
        inputs = run_inputs(runs, self._context)
        final_NC, taps_NX = self._read(inputs, self._drive)
        choices_N = self._choose_all(final_NC, runs, kind)
        outcome = settle_runs(runs, choices_N, self._rows, self._drafts, DRAFT_COST)
        if kind == "shaped":
            self._note(runs.slots_D, outcome)
        read = self._told(inputs, choices_N.int(), outcome.last_D, taps_NX, self._context - 1, width)
        if width > 1:
            keep_drafts(runs.slots_D, self._drafter.draft(read, self._rows, kind), outcome.most_D, self._drafts)
        else:
            self._drafter.take_in(read)
        land_runs(mail, outcome.landing_DJ)

    @torch.inference_mode()
    def short(self, mail: Mail, num_strips: int, kind: SampleKind, *, drafts: bool) -> None:
        """Enqueue one whole step of rows that are cut into so many strips, prompts too, from the mail and back to it.

        No row verifies drafts; with `drafts` each gets some for the next step. The requests that begin with it may have
        to be remembered first (`remember`).
        """
        strips = take_strips(mail, self._rows, num_strips)
        forget_runs(mail.packed, self._drafts, num_strips)
        inputs = Inputs(
            token_ids_T=strips.token_ids_T,
            positions_T=strips.positions_T,
            kv_index_T=strips.kv_index_T,
            token_slots_T=strips.token_slots_T,
            slots_R=strips.slots_R,
            page_table=strips.row_pages,
            rows=strips.attention_rows(),
        )
        final_TC, taps_TX = self._read(inputs, self._drive)
        final_RC = final_TC.index_select(0, strips.last_R)
        if kind == "greedy":
            choices_R = self._program.greedy(final_RC)
        else:
            choices_R = sample_all(self._program.logits(final_RC), self._rows, strips.slots_R, strips.ends_R, kind)
        outcome = settle_runs(ends_of(strips, mail.packed), choices_R, self._rows, self._drafts, DRAFT_COST)
        if kind == "shaped":
            self._note(strips.slots_R, outcome)
        next_T = strips.next_tokens(choices_R)
        # A few strips are one prompt's more often than not, alone or beside some rows that decode.
        width = widths_for(_FEW_ROWS if num_strips <= _ONE_PROMPT else num_strips, self.ladder)[0]
        read = self._told(inputs, next_T, strips.last_R, taps_TX, self._context - 1, width)
        if drafts:
            keep_drafts(strips.slots_R, self._drafter.draft(read, self._rows, kind), outcome.most_D, self._drafts)
        else:
            self._drafter.take_in(read)
        land_runs(mail, outcome.landing_DJ)

    def remember(self, admissions: Sequence[Admission]) -> None:
        """Tell the drafter what the cached prefixes of new requests are, if it wants to know."""
        for admission in admissions:
            if admission.spared is not None:
                self._drafter.remember(admission.slot, to_device(self._kv.device, admission.spared))

    def run(
        self,
        plan: StepPlan,
        layout: Layout,
        packed: Tensor,
        target: RunTarget | None = None,
        masks: Tensor | None = None,
    ) -> Brought:
        """Enqueue a whole step whose plan is on the device as `packed`.

        `target` runs the target's forward in another way than kernel by kernel. `masks` says which tokens rows that are
        held to a form may choose at each place of theirs that counts (see `mask_logits`). The host knows their drafts,
        which it was told when they were made.
        """
        apply_changes(packed, layout, self._rows)
        self._admit(plan.admissions, packed, layout)
        runs = build_runs(packed, self._rows, self._drafts, plan.num_decode, plan.width, self._context)
        inputs = mixed_inputs(plan, layout, packed, self._rows, runs)
        final_TC, taps_TX = self._read(inputs, target or self._drive)
        ends_C = last_of_chunks(plan, self._kv.device) if plan.num_decode < plan.num_rows else None
        emits_L = self._emits(plan, ends_C)
        logits_LV = self._program.logits(final_TC.index_select(0, emits_L))
        masked_LV = logits_LV if masks is None else mask_logits(logits_LV, masks)
        choices_L = self._choose(plan, runs, inputs, emits_L, masked_LV, packed, layout)
        num_run = plan.num_decode * plan.width
        outcome = settle_runs(runs, choices_L[:num_run], self._rows, self._drafts, DRAFT_COST)
        self._settle(plan, runs, outcome, choices_L[num_run:])
        self._draft(plan, inputs, outcome, ends_C, choices_L, taps_TX)
        tokens_L = torch.cat((outcome.landing_DJ.view(-1), choices_L[num_run:]))
        drafts_MK = self._drafts_of(plan, inputs, emits_L) if plan.masked else None
        return Brought(
            tokens_L=tokens_L, choices_L=choices_L, logits_LV=logits_LV, drafts_MK=drafts_MK, hidden_TC=final_TC
        )

    # ── what both are made of ────────────────────────────────────────────────────────────────────────────────────

    def _read(self, inputs: Inputs, target: RunTarget) -> tuple[Tensor, Tensor]:
        """Run the target; return its final states [T, C], and what it tells the drafter, [T, X]."""
        self._attention.plan(inputs.rows)
        batch = Batch(
            token_ids=inputs.token_ids_T, positions=inputs.positions_T, kv_index=inputs.kv_index_T, kv=self._kv
        )
        states_TX = target(batch)
        width = self._program.config.hidden_size
        return states_TX[:, :width], states_TX[:, width:]

    def forward(self, batch: Batch) -> Forward:
        """Return the target's forward; beside its final states it says what the drafter reads."""
        return self._program.forward(batch, self._drafter.taps)

    def _drive(self, batch: Batch) -> Tensor:
        return drive(self.forward(batch), self._attention)

    def _told(self, inputs: Inputs, next_T: Tensor, last_R: Tensor, taps_TX: Tensor, longest: int, width: int) -> Read:
        """Return what the drafter is told of a step. The next is taken to be as wide; behind prompts, the widest."""
        return Read(
            token_ids=inputs.token_ids_T,
            next_tokens=next_T,
            positions=inputs.positions_T,
            kv_index=inputs.kv_index_T,
            hidden=taps_TX if self._drafter.taps else None,
            rows=inputs.rows,
            last=last_R,
            slots=inputs.slots_R,
            token_slots=inputs.token_slots_T,
            page_table=inputs.page_table,
            longest=longest,
            most=width - 1 if width > 1 else None,
        )

    def _note(self, slots_D: Tensor, outcome: Outcome) -> None:
        """Count the tokens of runs that were taken for their slots' penalties."""
        shapes = self._rows.shapes.rows
        assert shapes is not None, "a shaped step has rows of shapes"
        taken_DJ = outcome.landing_DJ >= 0
        noted_DJ = torch.where(taken_DJ, slots_D[:, None], self._rows.scratch)  # nobody looks at the scratch slot
        shapes.note(noted_DJ.view(-1), outcome.landing_DJ.clamp(min=0).view(-1))

    # ── decode rows alone, nothing from the host ─────────────────────────────────────────────────────────────────

    def _choose_all(self, final_NC: Tensor, runs: Runs, kind: SampleKind) -> Tensor:
        """Return the target's choice at each position, of any integer kind."""
        if kind == "greedy":
            return self._program.greedy(final_NC)
        logits_NV, slots_N, positions_N = self._program.logits(final_NC), runs.token_slots_N, runs.positions_N + 1
        if kind == "shaped":
            before_NK = _before(runs)
            logits_NV = shape_logits(logits_NV, self._rows.shapes.rows, slots_N, positions_N, drafted_NK=before_NK)
            kind = "truncated"
        return sample_all(logits_NV, self._rows, slots_N, positions_N, kind)

    # ── any step ─────────────────────────────────────────────────────────────────────────────────────────────────

    def _admit(self, admissions: Sequence[Admission], packed: Tensor, layout: Layout) -> None:
        """Forget what the slots' earlier owners left."""
        self._rows.shapes.admit(admissions, self._program.vocab_size, self._kv.device)
        if not admissions:
            return
        words = packed.narrow(0, layout.admissions, layout.num_admissions * ADMISSION_WORDS)
        self._drafts.admit(words.view(-1, ADMISSION_WORDS)[:, 0].long())
        self.remember(admissions)

    def _emits(self, plan: StepPlan, ends_C: Tensor | None) -> Tensor:
        """Return the index among T of each place that lands, int64 [L]."""
        device, num_run = self._kv.device, plan.num_decode * plan.width
        emits_L = torch.arange(num_run, device=device)
        if ends_C is None or len(plan.emits) == plan.num_decode:
            return emits_L
        ending = plan.emits[plan.num_decode :].astype(np.int64) - plan.num_decode
        return torch.cat((emits_L, ends_C.index_select(0, to_device(device, ending))))

    def _choose(
        self,
        plan: StepPlan,
        runs: Runs,
        inputs: Inputs,
        emits_L: Tensor,
        logits_LV: Tensor,
        packed: Tensor,
        layout: Layout,
    ) -> Tensor:
        """Return the choices, int32, at all places that land."""
        device, num_run = self._kv.device, plan.num_decode * plan.width
        if not layout.num_emits:
            return torch.empty(0, dtype=torch.int32, device=device)
        slots_L = inputs.token_slots_T.index_select(0, emits_L)
        positions_L = inputs.positions_T.index_select(0, emits_L) + 1
        shaped_LV = logits_LV
        if plan.shaped:
            before_LK = torch.full((len(emits_L), max(1, plan.width - 1)), -1, dtype=torch.int32, device=device)
            before_LK[:num_run] = _before(runs)
            shaped_LV = shape_logits(logits_LV, self._rows.shapes.rows, slots_L, positions_L, drafted_NK=before_LK)
        num_wide = int(np.searchsorted(plan.sampled, plan.num_decode))  # of the sampled rows, the decode rows
        sampled = sampled_rows(packed, layout)
        within_J = torch.arange(plan.width, dtype=torch.int32, device=device)
        wide = (sampled[:num_wide, None] * plan.width + within_J).view(-1)
        sampled_L = torch.cat((wide, sampled[num_wide:] + plan.num_decode * (plan.width - 1)))
        return sample(shaped_LV, self._rows, slots_L, positions_L, sampled_L, plan.truncated)

    def _settle(self, plan: StepPlan, runs: Runs, outcome: Outcome, firsts_E: Tensor) -> None:
        """Move on what `settle_runs` leaves: the rows of chunks that end their prompt, and counts of tokens."""
        shapes = self._rows.shapes.rows if plan.shaped else None
        if shapes is not None and plan.num_decode:
            self._note(runs.slots_D, outcome)
        if len(plan.emits) > plan.num_decode:
            ending = to_device(self._kv.device, plan.slots[plan.emits[plan.num_decode :]].astype(np.int64))
            self._rows.last_token.index_copy_(0, ending, firsts_E)
            if shapes is not None:
                shapes.note(ending, firsts_E)

    def _next_tokens(self, plan: StepPlan, inputs: Inputs, ends_C: Tensor | None, choices_L: Tensor) -> Tensor:
        """Return the token behind each that was read, [T]: the target's choice, or the prompt's next."""
        num_run, token_ids_T = plan.num_decode * plan.width, inputs.token_ids_T
        if ends_C is None or plan.behind is None:
            return choices_L[:num_run]
        # Of a chunk's last token this takes that of the chunk behind it, and then what the host says.
        next_T = torch.cat((choices_L[:num_run], token_ids_T[num_run + 1 :], token_ids_T[:1]))
        behind_C = to_device(self._kv.device, plan.behind)
        if len(plan.emits) > plan.num_decode:
            ends = to_device(self._kv.device, (plan.emits[plan.num_decode :] - plan.num_decode).astype(np.int64))
            behind_C = behind_C.index_copy(0, ends, choices_L[num_run:])
        return next_T.index_copy_(0, ends_C, behind_C)

    def _draft(
        self,
        plan: StepPlan,
        inputs: Inputs,
        outcome: Outcome,
        ends_C: Tensor | None,
        choices_L: Tensor,
        taps_TX: Tensor,
    ) -> None:
        """Let the drafter read what the target has read, and keep what it proposes."""
        next_T = self._next_tokens(plan, inputs, ends_C, choices_L)
        last_R, most_R = outcome.last_D, outcome.most_D
        if ends_C is not None:
            last_R = torch.cat((last_R, ends_C))
            chunks_C = inputs.slots_R[plan.num_decode :]
            most_R = torch.cat((most_R, self._drafts.control.choose(chunks_C, DRAFT_COST)))
        longest = int((plan.starts + plan.counts).max()) - 1
        read = self._told(inputs, next_T, last_R, taps_TX, longest, plan.width)
        if plan.drafts:
            keep_drafts(inputs.slots_R, self._drafter.draft(read, self._rows, _kind(plan)), most_R, self._drafts)
        else:
            self._drafter.take_in(read)
            self._drafts.num_S.index_fill_(0, inputs.slots_R.long(), 0)

    def _drafts_of(self, plan: StepPlan, inputs: Inputs, emits_L: Tensor) -> Tensor:
        """Return what the slots of the masked rows hold now: such a row is not run again before the host knows it."""
        places = np.array([plan.landing(emit) for emit in plan.masked], dtype=np.int64)
        tokens_M = emits_L.index_select(0, to_device(self._kv.device, places))
        slots_M = inputs.token_slots_T.index_select(0, tokens_M)
        num_M1 = self._drafts.num_S.index_select(0, slots_M)[:, None]
        return torch.cat((num_M1, self._drafts.tokens_SK.index_select(0, slots_M)), dim=1)


def _before(runs: Runs) -> Tensor:
    """Return the drafts in front of each position of the runs, int32 [N, max(1, J - 1)], -1 for none."""
    num_rows, width, device = len(runs.slots_D), runs.width, runs.drafts_DK.device
    if width == 1:
        return torch.full((num_rows, 1), -1, dtype=torch.int32, device=device)
    places_J = torch.arange(width, device=device)
    front_JK = places_J[None, :-1] < places_J[:, None]
    return torch.where(front_JK[None], runs.drafts_DK[:, None, :], -1).reshape(num_rows * width, width - 1)


def _kind(plan: StepPlan) -> SampleKind:
    """Return how a drafter has to draw to draw as the target does."""
    if plan.shaped:
        return "shaped"
    if plan.truncated:
        return "truncated"
    return "sampled" if len(plan.sampled) else "greedy"
