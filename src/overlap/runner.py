"""The runner: turns a plan into work on a stream, and the work's end into tokens. Decides nothing.

A step is one of three. A decode step that was captured is one launch: its graph fetches the plan from pinned memory
and writes the tokens there (`graphs.lane`). Any other crosses to the device as one packed copy and comes back as one;
its forward is run eagerly, or as captured pieces with attention in between (`graphs.pieces`). The ends on the host
rotate: see `state.mail`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Final

import torch
from torch import Tensor

from overlap.cache.pages import Ints, pages_for
from overlap.graphs.buckets import row_buckets, token_buckets
from overlap.graphs.driver import GraphDriver, GraphStatistics
from overlap.graphs.eager import drive
from overlap.graphs.lane import Lane
from overlap.graphs.policy import Policy, Shape
from overlap.models.program import Program
from overlap.ops.attention import Attention, AttentionRows
from overlap.sample.sampler import sample
from overlap.schedule.plan import StepPlan
from overlap.state.inputs import build_inputs, sampled_rows, settle_tokens
from overlap.state.mail import DEPTH, Mail
from overlap.state.packing import Layout, capacity, pack
from overlap.state.rows import SlotRows
from overlap.streams.stream import Busy, Mark, Stream

HOST_BOUND: Final = 6.4e12
"""Floating point operations past which a step is not run in pieces: 16 ms at 400 TFLOP/s, longer than the host takes to
launch it eagerly, so that pieces would bring nothing but padding."""


@dataclass(frozen=True, slots=True)
class TorchFlight:
    """A plan that is running, or queued to."""

    plan: StepPlan
    stream: Stream
    mark: Mark
    tokens: Ints

    async def wait_landed(self) -> Ints:
        """Return the tokens [E] once the device is done; raise what the step raised."""
        await self.stream.wait_reached(self.mark)
        return self.tokens.copy()

    def busy(self) -> Busy:
        """Return when the device ran it. Only once it has landed."""
        return self.stream.busy(self.mark)


class Runner:
    """Owns the KV memory, the slots' rows, the buffers and the graphs of one lane; the same code on CPU and CUDA."""

    def __init__(
        self,
        program: Program,
        attention: Attention,
        stream: Stream,
        *,
        kv: Tensor,
        max_rows: int,
        token_budget: int,
        context: int,
        graphs: bool = True,
    ) -> None:
        """`graphs` lets steps be captured and replayed, on CUDA; see `explain` for which are."""
        self._program = program
        self._attention = attention
        self._stream = stream
        self._kv = kv
        self._device = kv.device
        self._rows = SlotRows(max_rows, pages_for(context), kv.device)
        self._mail = Mail(capacity(max_rows, token_budget, kv.shape[0] + max_rows), max_rows, kv.device)
        self._lane = Lane(program=program, attention=attention, kv=kv, rows=self._rows, mail=self._mail)
        self._graphs: GraphDriver | None = None
        if not graphs:
            self._graph_note = "graphs: off, as asked"
        elif not kv.is_cuda:
            self._graph_note = "graphs: none on a CPU"
        else:
            self._graphs, self._graph_note = self._driver(max_rows, token_budget)

    def _driver(self, max_rows: int, token_budget: int) -> tuple[GraphDriver, str]:
        whole = self._attention.captures_decode
        parameters = self._program.weight_bytes() / self._kv.dtype.itemsize
        most = min(token_budget, max(max_rows, int(HOST_BOUND / (2 * parameters))))
        tokens = token_buckets(most) if whole else token_buckets(most, smallest=1)
        policy = Policy(row_buckets(max_rows) if whole else (), tokens)
        note = f"graphs: decode steps whole, up to {max_rows} rows; others in pieces, up to {most} tokens"
        if not whole:
            note = (
                f"graphs: in pieces, up to {most} tokens; no whole decode steps, since {self._attention.name} "
                "attention takes its sizes from the host"
            )
        return GraphDriver(self._lane, policy, max_tokens=most, max_rows=max_rows), note

    def launch(self, plan: StepPlan) -> TorchFlight:
        """Enqueue a plan and return at once."""
        place = plan.number % DEPTH
        layout = pack(plan, self._mail.plan_words[place])
        self._stream.launch("step", partial(self._step, plan, layout, place), tokens=plan.num_tokens)
        tokens = self._mail.landed_words[place][: layout.num_emits]
        return TorchFlight(plan, self._stream, self._stream.mark(), tokens)

    def warm_up_one(self) -> bool:
        """Capture one more graph, for a moment in which there is nothing else to do; return whether one was left.

        Does not wait for the device, but takes the host some 10 to 100 ms. Call it again until it returns False.
        """
        graphs = self._graphs
        shape = graphs.policy.next_idle() if graphs is not None else None
        if graphs is None or shape is None:
            return False
        self._stream.launch("capture", partial(graphs.capture, shape))
        self._stream.mark()  # so that it does not count as the next step's time
        return True

    def _step(self, plan: StepPlan, layout: Layout, place: int) -> None:
        graphs = self._graphs
        shape = graphs.prepare(plan) if graphs is not None else None
        if graphs is None or shape is None or shape.kind == "pieces":
            self._run(plan, layout, place, shape)
        elif not graphs.replay_decode(shape, place, layout.num_rows):
            self._run(plan, layout, place, None)

    @torch.inference_mode()
    def _run(self, plan: StepPlan, layout: Layout, place: int, pieces: Shape | None) -> None:
        """Run a step whose parts the host launches: its forward in `pieces`, or eagerly."""
        graphs = self._graphs if pieces is not None else None
        packed = self._mail.plans[place][: layout.used]
        if self._kv.is_cuda:
            packed = self._mail.packed[: layout.used].copy_(packed, non_blocking=True)
        out = None if graphs is None or pieces is None else graphs.inputs(pieces, layout.num_rows, layout.num_emits)
        inputs = build_inputs(packed, layout, self._rows, out)
        self._attention.plan(
            AttentionRows(
                num_decode=plan.num_decode,
                seq_lens=inputs.seq_lens,
                page_table=inputs.page_table,
                starts=plan.starts,
                counts=plan.counts,
                chunk_pages=plan.chunk_pages,
            )
        )
        if graphs is None or pieces is None:
            hidden_TC = drive(self._program.forward(self._lane.batch(inputs)), self._attention)
        else:
            hidden_TC = graphs.run_pieces(pieces, layout.num_tokens)
        if not layout.num_emits:
            return
        if layout.num_emits != layout.num_tokens:
            hidden_TC = hidden_TC.index_select(0, inputs.emit_tokens)
        tokens = sample(
            self._program.logits(hidden_TC),
            self._rows,
            inputs.emit_slots,
            inputs.emit_positions,
            sampled_rows(packed, layout),
            plan.truncated,
        )
        settle_tokens(self._rows, inputs.emit_slots, tokens)
        self._mail.landings[place, : layout.num_emits].copy_(tokens, non_blocking=True)

    def usable(self) -> bool:
        """Return whether the device still works. Waits for it."""
        if self._device.type == "cuda":
            try:
                torch.cuda.synchronize(self._device)
            except RuntimeError:
                return False
        return True

    def state_bytes(self) -> int:
        """Return the bytes of device memory that slots, mail and KV take."""
        return self._rows.nbytes + self._mail.nbytes + self._kv.nbytes

    def statistics(self) -> GraphStatistics:
        """Return what graphs did so far: zeros without any."""
        return self._graphs.statistics() if self._graphs is not None else GraphStatistics()

    def explain(self) -> tuple[str, ...]:
        """Return what runs as which graph, what was captured, and every fallback with its reason: a sentence each."""
        return (self._graph_note, *(self._graphs.explain() if self._graphs is not None else ()))

    def close(self) -> None:
        """Finish what is queued and free the graphs. The memory goes with the last reference."""
        self._stream.close()
        if self._graphs is not None:
            self._graphs.close()
