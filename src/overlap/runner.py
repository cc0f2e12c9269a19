"""The runner: hands each plan to its lane. Decides nothing.

Two lanes have a stream, a mail, an attention and graphs each (`lane_runner`); weights, KV and the slots' rows are the
same. A step of the side lane is launched in blocks of layers, so that the main lane's next step never waits for the
host to launch all of a long prompt.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from overlap.cache.pages import pages_for
from overlap.flight import TorchFlight
from overlap.graphs.driver import GraphStatistics
from overlap.lane_runner import LaneRunner
from overlap.models.program import Program
from overlap.ops.attention import Attention
from overlap.schedule.plan import StepPlan
from overlap.spec.step import Speculation
from overlap.state.rows import SlotRows
from overlap.streams.stream import Stream


class Runner:
    """Owns the KV memory and the slots' rows, and one lane or two; the same code on CPU and CUDA."""

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
        host_bound: int,
        graphs: bool = True,
        side: tuple[Attention, Stream] | None = None,
        halves: Attention | None = None,
        rank: int | None = None,
        speculate: Callable[[SlotRows], Speculation] | None = None,
    ) -> None:
        """`graphs` lets steps be captured and replayed, on CUDA; see `explain` for which are. Those of more than
        `host_bound` tokens (`lane_runner.host_bound_tokens`) and of more than `max_rows` are not run in pieces.

        `side` makes a side lane: a stream of its own, and an attention that shares no workspace with the main lane's.
        `halves` is another attention, for the second half of a step that is run as two (`microbatch.halves`).
        `rank` is this one's of several, which are given the same of all else.
        `speculate` makes what drafts and verifies over the slots' rows; it excludes a side lane.
        """
        self._device = kv.device
        self._kv = kv
        # Of a row that verifies drafts some positions may lie past the context: a page more, for them to be read from.
        self._rows = SlotRows(max_rows, pages_for(context) + (speculate is not None), kv.device)

        speculation = None if speculate is None else speculate(self._rows)

        def lane(attention: Attention, stream: Stream, *, decodes: bool) -> LaneRunner:
            return LaneRunner(
                program,
                attention,
                stream,
                self._rows,
                kv,
                max_rows,
                token_budget,
                graphs=graphs,
                decodes=decodes,
                host_bound=host_bound,
                halves=halves,
                rank=rank,
                speculation=speculation,
            )

        self._main = lane(attention, stream, decodes=True)
        self._lanes = [self._main] if side is None else [self._main, lane(*side, decodes=False)]
        self._ends: dict[int, TorchFlight] = {}  # of each lane: its last step

    def launch(self, plan: StepPlan) -> TorchFlight:
        """Enqueue a plan (of a side lane's: nothing yet but what it follows) and return at once."""
        lane = self._lanes[plan.lane]
        lane.turn_to(plan.share)
        if plan.follows:
            lane.follow(self._ends[1 - plan.lane], plan.follows)
        if len(self._lanes) == 1:
            return lane.launch(plan)
        other = self._ends.get(1 - plan.lane)
        if self._device.type == "cpu":
            lane.share_cores(plan.beside or (other is not None and not other.landed))
        flight = self._ends[plan.lane] = lane.launch(plan)
        return flight

    def warm_up_one(self) -> bool:
        """Capture one more graph, for a moment in which there is nothing else to do; return whether one was left.

        Does not wait for the device, but takes the host some 10 to 100 ms. Call it again until it returns False.
        """
        return any(lane.warm_up_one() for lane in self._lanes)

    def usable(self) -> bool:
        """Return whether the device still works. Waits for the main lane; a broken device shows on any stream.

        The side lane is left alone: a mark in the middle of its step would take the failure that is the step's to tell.
        """
        return self._main.usable()

    def state_bytes(self) -> int:
        """Return the bytes of device memory that slots, mail and KV take."""
        return self._rows.nbytes + self._kv.nbytes + sum(lane.nbytes for lane in self._lanes)

    @property
    def short_steps(self) -> bool:
        """Whether each step with short prompts (`schedule.plan.is_short`) is one launch, once its graph is captured."""
        return self._main.short_steps

    def statistics(self) -> GraphStatistics:
        """Return what graphs did so far, in all lanes: zeros without any."""
        return sum((lane.statistics() for lane in self._lanes[1:]), self._main.statistics())

    def explain(self) -> tuple[str, ...]:
        """Return what runs as which graph, what was captured, and every fallback with its reason: a sentence each."""
        lines = list(self._main.explain())
        for lane in self._lanes[1:]:
            lines += [f"side lane: {line}" for line in lane.explain()]
        return tuple(lines)

    def close(self) -> None:
        """Finish what is queued and free the graphs. The memory goes with the last reference."""
        for lane in self._lanes:
            lane.close()
