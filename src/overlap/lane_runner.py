"""One lane of the runner: turns the plans of its lane into work on its stream. Decides nothing.

A step is one of three. A decode step that was captured is one launch: its graph fetches the plan from pinned memory
and writes the tokens there (`graphs.lane`); so is a step with prompts if those are short (`state.strips`). Any other
crosses to the device as one packed copy and comes back as one; its forward is run eagerly, or as captured pieces with
attention in between (`graphs.pieces`). The ends on the host rotate: see `state.mail`. A step of the same rows as the
one before is packed by what has changed and runs as that ran.

With a drafter each step verifies, accepts and drafts again (`spec.step`), in one lane: decode steps as one graph, too,
others with the target's forward in pieces.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import replace
from functools import partial
from typing import Final

import torch
from torch import Tensor

from overlap.errors import InternalError
from overlap.flight import TorchFlight
from overlap.graphs.buckets import row_buckets, token_buckets
from overlap.graphs.driver import GraphDriver, GraphStatistics
from overlap.graphs.eager import drive_in_blocks
from overlap.graphs.lane import Lane
from overlap.graphs.policy import Policy, Shape
from overlap.graphs.shares import ShareGraphs
from overlap.microbatch.halves import LEAST_TOKENS, drive_together, halves_of, middle_of
from overlap.models.config import ModelConfig
from overlap.models.layout import tensor_shapes
from overlap.models.program import Program
from overlap.ops.attention import Attention, AttentionRows
from overlap.sample.sampler import sample
from overlap.sample.score import write_scores
from overlap.sample.shaping import mask_logits, shape_logits, told_words
from overlap.schedule.plan import SIDE, STRIP, STRIPS, StepPlan
from overlap.spec.step import Speculation
from overlap.state.inputs import build_inputs, sampled_rows, settle_tokens
from overlap.state.mail import DEPTH, Mail, mask_lines
from overlap.state.packing import Layout, capacity, goes_over, pack, pack_again
from overlap.state.rows import SlotRows
from overlap.streams.cpu import use_cores
from overlap.streams.stream import Stream

HOST_BOUND: Final = 6.4e12
"""Floating point operations past which a step is not run in pieces: 16 ms at 400 TFLOP/s, longer than the host takes to
launch it eagerly, so that pieces would bring nothing but padding."""

BLOCK_LAYERS: Final = 8
"""Layers of a side lane's step that are launched at once. The main lane may have to wait for one block: milliseconds of
host time while readers in the same process hold the interpreter (docs/log.md), so fewer layers keep its steps nearer
together, and more read prompts sooner."""


def host_bound_tokens(config: ModelConfig, num_ranks: int) -> int:
    """Return how many tokens a step has at most to be run in pieces, by the whole model: the same on all ranks.

    Not by what a rank holds: where the vocabulary cannot be cut evenly, the last one holds less.
    """
    parameters = sum(math.prod(shape) for shape in tensor_shapes(config).values())
    return int(HOST_BOUND * num_ranks / (2 * parameters))


def explain_halves(least: int, token_budget: int, num_halved: int) -> str:
    """Return which steps are run as two halves, or why none is. `least` tokens are more than pieces have."""
    if least > token_budget:
        return (
            f"halves: no step is cut: those of up to {least - 1} tokens run whole, as graphs' pieces, and token_budget "
            f"is {token_budget}. Raise it, give graphs=False, or give another `lanes`"
        )
    least = max(LEAST_TOKENS, least)
    if least > token_budget:
        return (
            f"halves: no step is cut: that takes {least} prompt tokens or more, and token_budget is {token_budget}. "
            "Raise it, or give another `lanes`"
        )
    return (
        f"halves: steps with {least} prompt tokens or more, whose rows can be cut into two of about as many, "
        f"run as two halves: while the ranks sum for one, the other computes; {num_halved} so far"
    )


def _has_tail(plan: StepPlan, layout: Layout) -> bool:
    """Whether anything comes of a step's hidden states: a token, or a score."""
    return layout.num_emits > 0 or plan.scores is not None


class LaneRunner:
    """One lane: its stream, mail, attention and graphs, over the KV memory and the slots' rows of all."""

    def __init__(
        self,
        program: Program,
        attention: Attention,
        stream: Stream,
        rows: SlotRows,
        kv: Tensor,
        max_rows: int,
        token_budget: int,
        *,
        graphs: bool,
        decodes: bool,
        host_bound: int,
        halves: Attention | None,
        rank: int | None,
        speculation: Speculation | None,
    ) -> None:
        self._program = program
        self._halves = halves
        self._halves_from = 0  # tokens; more than pieces have
        self._num_halved = 0
        self._token_budget = token_budget
        self._attention = attention
        self._stream = stream
        self._kv = kv
        self._rows = rows
        self._decodes = decodes
        self._place = 0
        self._packed: list[StepPlan | None] = [None] * DEPTH  # what lies at each place of the mail
        self._cores = torch.get_num_threads()
        self._shares_cores = False
        self._speculation = speculation
        most_landing = max_rows * (1 if speculation is None else 2 * speculation.width)  # tokens; masked rows' drafts
        self._mail = Mail(capacity(max_rows, token_budget, kv.shape[0] + max_rows), most_landing, kv.device)
        self._lane = Lane(
            program=program, attention=attention, kv=kv, rows=self._rows, mail=self._mail, speculation=speculation
        )
        self.short_steps = False
        """Whether each step with short prompts is one launch."""
        self._share = 0
        self._shares: ShareGraphs | None = None
        if not graphs:
            self._graph_note = "graphs: off, as asked"
        elif not kv.is_cuda:
            self._graph_note = "graphs: none on a CPU"
        else:
            most = min(token_budget, max(max_rows, host_bound))
            self._halves_from = most + 1
            self._shares, self._graph_note = self._share_graphs(max_rows, token_budget, most, rank)

    def _share_graphs(self, max_rows: int, token_budget: int, most: int, rank: int | None) -> tuple[ShareGraphs, str]:
        """`most` is how many tokens a step in pieces has at most."""
        speculation = self._speculation
        whole = self._decodes and (self._attention.captures_decode if speculation is None else speculation.captures)
        tokens = token_buckets(most) if whole else token_buckets(most, smallest=1)
        wide: dict[int, tuple[int, ...]] = {}
        if whole and speculation is not None:  # a wide step has to fit into the budget: see the planner
            for most_rows, drafts in speculation.ladder:
                fitting = min(most_rows, max_rows, (token_budget - 1) // (1 + drafts))
                wide[1 + drafts] = row_buckets(max(1, fitting))

        strips = tuple(size for size in STRIPS if whole and size <= max(1, token_budget // STRIP))
        self.short_steps = strips == STRIPS

        def make(_share: int) -> GraphDriver:
            policy = Policy(row_buckets(max_rows) if whole else (), tokens, wide, strips)
            return GraphDriver(self._lane, policy, max_tokens=most, max_rows=max_rows, rank=rank)

        note = (
            f"graphs: decode steps whole, up to {max_rows} rows, those with short prompts up to "
            f"{(strips or (0,))[-1] * STRIP} positions; others in pieces, up to {most} tokens"
        )
        if not self._decodes:
            note = f"graphs: in pieces, up to {most} tokens, captured when they are used again"
        elif not whole:
            note = (
                f"graphs: in pieces, up to {most} tokens; no whole decode steps, since {self._attention.name} "
                "attention takes its sizes from the host"
            )
        return ShareGraphs(make), note

    @property
    def _graphs(self) -> GraphDriver | None:
        return self._shares.current if self._shares is not None else None

    def turn_to(self, share: int) -> None:
        """Let steps from now on have a share of the SMs (see `StepPlan.share`), in order with those before."""
        if share == self._share:
            return
        self._stream.use(share)
        self._share = share
        self._lane = replace(self._lane, sms=share if self._decodes else 0)
        if self._shares is not None:
            self._stream.launch("share", partial(self._shares.turn_to, share))

    def share_cores(self, shared: bool) -> None:
        """On a CPU: leave half of the cores to the other lane, or take all of them again."""
        if shared != self._shares_cores:
            self._shares_cores = shared
            cores = self._cores - self._cores // 2 if self._decodes else self._cores // 2
            self._stream.launch("cores", partial(use_cores, max(1, cores) if shared else self._cores))

    def follow(self, flight: TorchFlight, number: int) -> None:
        """Let what is launched next wait for a step of the other lane, which has been launched whole."""
        if flight.plan.number < number:
            raise InternalError(f"step {number} is to be followed, and was not launched")
        self._stream.follow(flight.mark)

    def launch(self, plan: StepPlan) -> TorchFlight:
        """Enqueue a plan and return at once; a side lane's is enqueued block by block."""
        place = self._place = (self._place + 1) % DEPTH
        before, self._packed[place] = self._packed[place], plan
        if self._graphs is not None and not plan.logprobs and goes_over(plan, before):
            pack_again(plan, self._mail.plan_words[place])
            return self._launch_again(self._graphs, plan, place)
        layout = pack(plan, self._mail.plan_words[place])
        masks = None
        if plan.masked:
            rows, lines = mask_lines(plan, -(-self._program.vocab_size // 32))
            masks = self._mail.put_masks(place, rows, lines)
        num_landing = plan.num_landing + plan.num_draft_words
        landings = [self._mail.landed_words[place][:num_landing]]
        if plan.logprobs:
            landings.append(self._mail.told_words[place][:num_landing])
        scores = None if plan.scores is None else self._mail.scored_words[place][: len(plan.scores)]
        if plan.lane == SIDE:
            num_blocks = 1 + -(-self._program.num_layers // BLOCK_LAYERS) + _has_tail(plan, layout)
            blocks = self._step(plan, layout, place, masks, BLOCK_LAYERS)
            return TorchFlight(plan, self._stream, landings, scores, blocks, num_blocks, self._is_usual)
        blocks = self._step(plan, layout, place, masks, None)
        flight = TorchFlight(plan, self._stream, landings, scores, blocks, 1, self._is_usual)
        flight.launch_block()
        return flight

    def _launch_again(self, graphs: GraphDriver, plan: StepPlan, place: int) -> TorchFlight:
        """Enqueue a step of the rows of the step before, by the same graph if that was one."""

        def run() -> None:
            if graphs.replay_again(plan, place):
                return
            layout = pack(plan, self._mail.plan_words[place])
            with torch.inference_mode():
                deque(self._step(plan, layout, place, None, None), maxlen=0)

        self._stream.launch("step", run, tokens=plan.num_tokens)
        landings = [self._mail.landed_words[place][: plan.num_landing]]
        return TorchFlight(plan, self._stream, landings, None, iter(()), 0, self._is_usual)

    def usable(self) -> bool:
        """Return whether what was launched could run. Waits for it, on CUDA.

        For this stream, not for the device: that fails while anybody in the process captures a graph.
        """
        if not self._kv.is_cuda:
            return True
        self._stream.launch("check", lambda: torch.cuda.current_stream(self._kv.device).synchronize())
        try:
            self._stream.mark()  # an error of the device stays, and every later call tells it
        except RuntimeError:
            return False
        return True

    def _is_usual(self) -> bool:
        """Return whether the step that was launched last runs as such steps will from now on."""
        return self._graphs is None or self._graphs.usual

    def warm_up_one(self) -> bool:
        """Capture one more graph; return whether one was left. A side lane's only if it has missed some."""
        wanted = self._shares.next_idle(missed_only=not self._decodes) if self._shares is not None else None
        if wanted is not None:
            self.turn_to(wanted[0])
        if wanted is None or self._graphs is None:
            return False
        self._stream.launch("capture", partial(self._graphs.capture, wanted[1]))
        self._stream.mark()  # so that it does not count as the next step's time
        return True

    def _step(
        self, plan: StepPlan, layout: Layout, place: int, masks: Tensor | None, block: int | None
    ) -> Iterator[None]:
        """Run a step, pausing behind each `block` layers where it is not one graph."""
        graphs = self._graphs
        shape = graphs.prepare(plan) if graphs is not None else None
        pieces = shape if shape is not None and shape.kind == "pieces" else None
        whole = shape if pieces is None else None
        if graphs is not None and whole is not None:
            self._admit_apart(plan)
            if graphs.replay(whole, place, plan.num_tokens if whole.is_short else plan.num_rows):
                return
        if self._speculation is not None:
            self._speculate(self._speculation, plan, layout, place, pieces, masks)
        else:
            yield from self._run(plan, layout, place, pieces, masks, block)

    def _admit_apart(self, plan: StepPlan) -> None:
        """Take in what a plan says of its new requests that no graph does: few have any of it."""
        if plan.admissions:
            self._rows.shapes.admit(plan.admissions, self._program.vocab_size, self._kv.device)
            if self._speculation is not None:
                self._speculation.remember(plan.admissions)

    def _speculate(
        self,
        speculation: Speculation,
        plan: StepPlan,
        layout: Layout,
        place: int,
        pieces: Shape | None,
        masks: Tensor | None,
    ) -> None:
        """Run a step with a drafter whose parts the host launches."""
        packed = self._mail.plans[place][: layout.used]
        if self._kv.is_cuda:
            packed = self._mail.packed[: layout.used].copy_(packed, non_blocking=True)
        graphs = self._graphs if pieces is not None else None
        target = None if graphs is None or pieces is None else partial(graphs.run_batch, pieces)
        if masks is not None:
            masks = masks.to(self._kv.device, non_blocking=True)
        brought = speculation.run(plan, layout, packed, target, masks)
        self._score(plan, brought.hidden_TC, place)
        if layout.num_emits:
            self._mail.landings[place, : plan.num_landing].copy_(brought.tokens_L, non_blocking=True)
            if brought.drafts_MK is not None:
                behind = self._mail.landings[place, plan.num_landing : plan.num_landing + plan.num_draft_words]
                behind.copy_(brought.drafts_MK.view(-1), non_blocking=True)
            if plan.logprobs:
                told = told_words(brought.logits_LV, brought.choices_L)
                self._mail.told[place, : plan.num_landing].copy_(told, non_blocking=True)

    def _run(
        self, plan: StepPlan, layout: Layout, place: int, pieces: Shape | None, masks: Tensor | None, block: int | None
    ) -> Generator[None, None, None]:
        """Run a step whose parts the host launches: its forward in `pieces`, or eagerly.

        With `block` it pauses in front of the first layer and behind the last, too: what stands there takes the host as
        long as several blocks.
        """
        graphs = self._graphs if pieces is not None else None
        packed = self._mail.plans[place][: layout.used]
        if self._kv.is_cuda:
            packed = self._mail.packed[: layout.used].copy_(packed, non_blocking=True)
        out = None if graphs is None or pieces is None else graphs.inputs(pieces, layout.num_rows, layout.num_emits)
        inputs = build_inputs(packed, layout, self._rows, out)
        self._rows.shapes.admit(plan.admissions, self._program.vocab_size, self._kv.device)
        halves = self._halves
        # By the plan alone, not by what was captured so far: all ranks have to cut alike.
        middle = None if halves is None or plan.num_tokens < self._halves_from else middle_of(plan)
        rows = AttentionRows(
            num_decode=plan.num_decode,
            seq_lens=inputs.seq_lens,
            page_table=inputs.page_table,
            starts=plan.starts,
            counts=plan.counts,
            chunk_pages=plan.chunk_pages,
            sms=self._lane.sms,
        )
        if middle is None:
            self._attention.plan(rows)
        if block is not None:
            yield
        if halves is not None and middle is not None:
            self._num_halved += 1
            batch, attentions = self._lane.batch(inputs), (self._attention, halves)
            hidden_TC = torch.cat(drive_together(halves_of(rows, batch, self._program, attentions, middle)))
        elif graphs is None or pieces is None:
            forward = self._program.forward(self._lane.batch(inputs))
            hidden_TC = yield from drive_in_blocks(forward, self._attention, block)
        else:
            hidden_TC = yield from graphs.run_pieces(pieces, layout.num_tokens, block)
        if block is not None and _has_tail(plan, layout):
            yield
        self._score(plan, hidden_TC, place)
        if not layout.num_emits:
            return
        if layout.num_emits != layout.num_tokens:
            hidden_TC = hidden_TC.index_select(0, inputs.emit_tokens)
        logits_EV = self._program.logits(hidden_TC)
        slots_E, positions_E, shapes = inputs.emit_slots, inputs.emit_positions, self._rows.shapes.rows
        shaped_EV = logits_EV
        if masks is not None:
            shaped_EV = mask_logits(shaped_EV, masks.to(self._kv.device, non_blocking=True))
        if plan.shaped:
            shaped_EV = shape_logits(shaped_EV, shapes, slots_E, positions_E)
        tokens = sample(shaped_EV, self._rows, slots_E, positions_E, sampled_rows(packed, layout), plan.truncated)
        settle_tokens(self._rows, slots_E, tokens)
        if plan.shaped and shapes is not None:
            shapes.note(slots_E, tokens)
        self._mail.landings[place, : layout.num_emits].copy_(tokens, non_blocking=True)
        if plan.logprobs:
            self._mail.told[place, : layout.num_emits].copy_(told_words(logits_EV, tokens), non_blocking=True)

    def _score(self, plan: StepPlan, hidden_TC: Tensor, place: int) -> None:
        if plan.scores is not None:
            write_scores(self._program, plan, hidden_TC, self._mail.scored[place, : len(plan.scores)])

    @property
    def nbytes(self) -> int:
        """Bytes of device memory that the mail takes."""
        return self._mail.nbytes

    def statistics(self) -> GraphStatistics:
        """Return what graphs did so far: zeros without any."""
        return self._shares.statistics() if self._shares is not None else GraphStatistics()

    def explain(self) -> tuple[str, ...]:
        """Return what runs as which graph, what was captured, and every fallback with its reason: a sentence each."""
        lines = [self._graph_note, *(self._shares.explain() if self._shares is not None else ())]
        if self._halves is not None:
            lines.append(explain_halves(self._halves_from, self._token_budget, self._num_halved))
        return tuple(lines)

    def close(self) -> None:
        """Finish what is queued and free the graphs. The memory goes with the last reference."""
        self._stream.close()
        if self._shares is not None:
            self._shares.close()
