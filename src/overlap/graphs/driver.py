"""The graph driver of one lane: captures what the policy names, and runs steps with what is captured.

Its graphs run on one stream, in the stream's order with eager steps. What a graph writes (static inputs, the pool's
intermediates, the answers of joints) is read by nothing that is enqueued behind the next graph, so step N+1 may be
launched while step N runs, by the same graph too. What the host writes and reads lies in the mail, which rotates.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Generator
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from overlap.cache.pages import Ints
from overlap.errors import EngineDead, InternalError
from overlap.graphs.capture import CaptureError, Graph, Recorder
from overlap.graphs.lane import Lane, decode_step, part, short_step
from overlap.graphs.pieces import Pieces, answer_buffers, record, rehearse
from overlap.graphs.policy import Decision, Policy, Shape, asked_of, short_of
from overlap.models.program import Batch
from overlap.schedule.plan import STRIP, StepPlan
from overlap.state.inputs import StepInputs
from overlap.state.mail import DEPTH, EMPTY


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphStatistics:
    """What graphs did since the engine started."""

    full_replays: int = 0
    """Steps that were one launch: decode steps, and short ones with prompts."""
    piecewise_replays: int = 0
    eager_steps: int = 0
    captures: int = 0
    capture_failures: int = 0
    padded_rows: int = 0
    """Rows of padding in all decode steps that were replayed."""
    padded_tokens: int = 0
    """Tokens of padding in all forwards that were replayed in pieces, and in all short steps that were one launch."""
    capture_seconds: float = 0.0
    pool_bytes: int = 0
    """Device memory of the graphs' pool."""
    incomplete: int = 0
    """Lanes that had something left to capture when they last looked, in an idle moment."""
    fallbacks: Counter[str] = field(default_factory=Counter)
    """Eager steps by why they had no graph."""
    not_whole: Counter[str] = field(default_factory=Counter)
    """Decode steps that no graph holds whole, by what they ask for; captured pieces run them where there are some."""

    def __add__(self, other: GraphStatistics) -> GraphStatistics:
        """Return the figures of two lanes together."""
        return GraphStatistics(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})


class GraphDriver:
    """Use it on one thread, inside the lane's stream. Nothing here waits for the device."""

    def __init__(self, lane: Lane, policy: Policy, *, max_tokens: int, max_rows: int, rank: int | None = None) -> None:
        """`max_tokens` and `max_rows` are the largest buckets of the policy, or larger.

        `rank` is this one's of several, which run all steps alike: then a graph that cannot be had raises EngineDead.
        """
        self.policy = policy
        self._rank = rank
        self._lane = lane
        self._inputs = lane.static_inputs(max(max_tokens, max_rows), max_rows)
        self._max_tokens = max_tokens
        self._answers: tuple[Tensor, Tensor] | None = None
        self._recorder: Recorder | None = None
        self._full: dict[Shape, Graph] = {}
        self._pieces: dict[Shape, Pieces] = {}
        self._again: tuple[Ints, int, Shape] | None = None  # rows and width of the last whole step, and what ran it
        self._turn: int | None = None  # what the device's `turn` is once all that is queued has run; None: unknown
        self._replays = self._piecewise = self._eager = self._captures = self._failures = 0
        self._padded_rows = self._padded_tokens = 0
        self._seconds = 0.0
        self.usual = True
        """Whether the step that was prepared last runs as such steps will run from now on."""

    def prepare(self, plan: StepPlan) -> Shape | None:
        """Return the graph that is to run a plan, captured now if it is time; None for an eager step."""
        decision = self.policy.decide(plan)
        self.usual = decision.capture is None and not decision.first
        own = decision.run if decision.own else None
        decodes = own is not None and own.kind != "pieces" and not own.is_short
        self._again = (plan.slots, plan.width, own) if own is not None and decodes else None
        if decision.capture is not None and not self.capture(decision.capture):
            decision = Decision(None, None)
        if decision.run is None:
            self._eager += 1
        return decision.run

    def replay_again(self, plan: StepPlan, place: int) -> bool:
        """Enqueue a step of the rows of the step before (`StepPlan.again`) as that was; False if it could not be."""
        if self._again is None or self._turn != place:
            return False
        slots, width, shape = self._again
        if slots is not plan.slots or width != plan.width:
            return False
        self.usual = True
        return self._launch(shape, place, plan.num_rows)

    def forget_turn(self) -> None:
        """Take in that something else has used the mail since."""
        self._turn = None

    @torch.inference_mode()
    def replay(self, shape: Shape, place: int, count: int) -> bool:
        """Enqueue a whole step, whose plan lies at `place` of the mail; False if it could not be, nor was.

        `count` is the plan's rows, of a short step its tokens: the rest is padding.
        """
        if self._turn != place:
            self._lane.mail.turn.fill_(place)
        launched = self._launch(shape, place, count)
        self._eager += not launched
        return launched

    def _launch(self, shape: Shape, place: int, count: int) -> bool:
        graph, self._turn = self._full[shape], None
        try:
            graph.launch()
        except CaptureError as failure:
            self._lose(shape, failure)
            return False
        self._turn = (place + 1) % DEPTH
        self._replays += 1
        if shape.is_short:
            self._padded_tokens += shape.size * STRIP - count
        else:
            self._padded_rows += shape.size - count
        return True

    def inputs(self, shape: Shape, num_rows: int, num_emits: int) -> StepInputs:
        """Return where the inputs of a step in pieces are to be built."""
        return part(self._inputs, shape.size, num_rows, num_emits)

    def run_pieces(self, shape: Shape, num_tokens: int, block: int | None = None) -> Generator[None, None, Tensor]:
        """Enqueue a forward in pieces; return the hidden states [num_tokens, C], to be used before the next step.

        Pauses behind each `block` joints; nothing else of this driver may be launched meanwhile.
        """
        self._piecewise += 1
        self._padded_tokens += shape.size - num_tokens
        return self._pieces[shape].run(self._lane.attention, num_tokens, block)

    def run_batch(self, shape: Shape, batch: Batch) -> Tensor:
        """Enqueue a forward over a batch in pieces; return what it returns, to be used before the next step."""
        num_tokens = len(batch.token_ids)
        inputs = self.inputs(shape, 0, 0)
        for name in ("token_ids", "positions", "kv_index"):
            getattr(inputs, name)[:num_tokens].copy_(getattr(batch, name))
        inputs.kv_index[num_tokens:].fill_(-1)
        blocks = self.run_pieces(shape, num_tokens)
        while True:
            try:
                next(blocks)
            except StopIteration as end:
                states: Tensor = end.value
                return states

    @torch.inference_mode()
    def capture(self, shape: Shape) -> bool:
        """Run a shape once with padding only, then capture it; False, with the reason kept, if that fails.

        Of several ranks one that fails raises EngineDead: the others may have the graph, whose sums are of other sizes
        than those of the eager step.
        """
        if shape in self._full or shape in self._pieces:
            return True
        start = time.perf_counter()
        try:
            if self._recorder is None:
                self._recorder = Recorder(self._lane.kv.device)
            if shape.kind == "pieces":
                self._capture_pieces(shape, self._recorder)
            else:
                self._capture_full(shape, self._recorder)
        except InternalError:
            raise
        except Exception as failure:  # whatever torch, Triton or CUDA raise: the engine runs without this graph
            self._lose(shape, failure)
            return False
        finally:
            self._turn = None  # a run with padding has moved it
            self._seconds += time.perf_counter() - start
        self.policy.captured(shape)
        self._captures += 1
        return True

    def _capture_full(self, shape: Shape, recorder: Recorder) -> None:
        self._lane.mail.turn.fill_(EMPTY)
        self.run_eagerly(shape)
        with recorder.recording():
            recorder.begin()
            self.run_eagerly(shape)
            self._full[shape] = recorder.end()

    def run_eagerly(self, shape: Shape) -> None:
        """Make the calls of a whole step one by one: those that its graph replays."""
        speculation = self._lane.speculation
        if shape.is_short:
            kind, drafts = short_of(shape.kind)
            if speculation is None:
                short_step(self._lane, shape.size, kind)
            else:
                speculation.short(self._lane.mail, shape.size, kind, drafts=drafts)
            return
        kind = asked_of(shape.kind)
        if speculation is not None:
            speculation.decode(self._lane.mail, shape.size, shape.width, kind)
            return
        inputs = part(self._inputs, shape.size, shape.size, shape.size)
        decode_step(self._lane, inputs, kind)

    def _capture_pieces(self, shape: Shape, recorder: Recorder) -> None:
        program = self._lane.program
        if self._answers is None:
            self._answers = answer_buffers(program, self._max_tokens, self._lane.kv)
        inputs = part(self._inputs, shape.size, 0, 0)
        inputs.kv_index.fill_(-1)
        batch = self._lane.batch(inputs)
        rehearse(self._lane.forward(batch), batch, self._answers)
        self._pieces[shape] = record(self._lane.forward(batch), batch, self._answers, recorder)

    def _lose(self, shape: Shape, failure: Exception) -> None:
        self._failures += 1
        self._again = None
        first = str(failure).strip().splitlines()
        why = f"{type(failure).__name__}: {first[0] if first else 'no message'}"
        if self._rank is not None:
            raise EngineDead(
                f"Rank {self._rank} has no graph of {shape} ({why}), and the others may have it: sums over the ranks "
                "would not be of one size. Leave graphs more memory by a lower kv_cache, or give graphs=False"
            ) from None
        self.policy.lost(shape, why)
        self._full.pop(shape, None)
        self._pieces.pop(shape, None)

    @property
    def num_nodes(self) -> dict[Shape, int]:
        """How many kernels and copies each whole decode step has."""
        return {shape: graph.num_nodes for shape, graph in self._full.items()}

    def statistics(self) -> GraphStatistics:
        """Return the figures so far."""
        return GraphStatistics(
            full_replays=self._replays,
            piecewise_replays=self._piecewise,
            eager_steps=self._eager,
            captures=self._captures,
            capture_failures=self._failures,
            padded_rows=self._padded_rows,
            padded_tokens=self._padded_tokens,
            capture_seconds=self._seconds,
            pool_bytes=self._recorder.pool_bytes if self._recorder is not None else 0,
            fallbacks=self.policy.fallbacks,
            not_whole=self.policy.not_whole,
        )

    def explain(self) -> tuple[str, ...]:
        """Return what runs as which graph, and what they took."""
        return (
            *self.policy.explain(),
            f"graphs: {self._captures} captured in {self._seconds:.2f} s, "
            f"{self.statistics().pool_bytes / 2**20:.0f} MiB of memory",
        )

    def close(self) -> None:
        """Free graphs and pool. The stream must have finished."""
        for graph in self._full.values():
            graph.close()
        for pieces in self._pieces.values():
            pieces.close()
        self._full.clear()
        self._pieces.clear()
        self._answers = None
        if self._recorder is not None:
            self._recorder.close()
            self._recorder = None
