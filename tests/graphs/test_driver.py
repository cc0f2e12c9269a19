"""Policy, driver and runner together on the CPU, where a "graph" makes the calls again that it was captured from."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor

from overlap.assemble import Parts, assemble
from overlap.cache.pages import Ints
from overlap.config import EngineConfig
from overlap.errors import EngineDead, RequestError
from overlap.graphs.buckets import row_buckets, token_buckets
from overlap.graphs.capture import CaptureError
from overlap.graphs.driver import GraphDriver
from overlap.graphs.lane import part
from overlap.graphs.pieces import rehearse
from overlap.graphs.policy import Policy, Shape
from overlap.graphs.shares import ShareGraphs
from overlap.models.program import Attend, Batch
from overlap.ops.attention import Attention
from overlap.schedule.plan import STRIPS
from overlap.schedule.request import Request

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

PARAMS: tuple[dict[str, Any], ...] = (
    {}, {"temperature": 0.8}, {"temperature": 1.1, "top_k": 40}, {}, {"temperature": 1.0, "top_p": 0.9}, {},
)  # fmt: skip


class Counting:
    """A matcher: behind token t come t + 3 and t + 4 of the first 32 tokens, so n-grams recur."""

    failure: RequestError | None = None
    ready = True
    mask: Ints

    def __init__(self, last: int) -> None:
        self._last = last
        self.take(())

    def take(self, tokens: Sequence[int], drafts: Sequence[int] = ()) -> None:
        self._last = [self._last, *tokens][-1]
        lasts = [self._last, *drafts]
        words = np.zeros((len(lasts), 512 // 32), dtype=np.uint32)
        for line, last in enumerate(lasts):
            words[line, 0] = sum(1 << (last + step) % 32 for step in (3, 4))
        self.mask = words.view(np.int32)


class Repeated:
    """Stands for a graph, and for the recorder that it was made by."""

    pool_bytes = 0
    stream = 0

    def __init__(self, call: Callable[[], object]) -> None:
        self.launch = call

    def close(self) -> None:
        """Nothing to free."""


class RepeatedPieces:
    """Stands for pieces: the forward of so many tokens, with attention of the real ones only."""

    def __init__(self, driver: GraphDriver, batch: Batch) -> None:
        self._driver = driver
        self._batch = batch

    def run(self, attention: Attention, num_tokens: int, block: int | None = None) -> Generator[None, None, Tensor]:
        yield from ()
        forward = self._driver._lane.forward(self._batch)
        try:
            joint = next(forward)
            while True:
                assert isinstance(joint, Attend)
                answer_TX = torch.zeros(joint.q_THD.shape[0], joint.q_THD[0].numel())
                attention.attend(joint.layer, joint.q_THD[:num_tokens], answer_TX[:num_tokens])
                joint = forward.send(answer_TX)
        except StopIteration as end:
            hidden_TC: Tensor = end.value
            return hidden_TC[:num_tokens]

    def close(self) -> None:
        """Nothing to free."""


class RepeatingDriver(GraphDriver):
    """Captures on the CPU. `refuses` names shapes that cannot be captured; `loses` those whose launch fails."""

    refuses: tuple[Shape, ...] = ()
    loses: tuple[Shape, ...] = ()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._recorder: Any = Repeated(lambda: None)

    def _capture_full(self, shape: Shape, recorder: Any) -> None:
        assert shape.kind != "pieces"
        if shape in self.refuses:
            raise CaptureError("no")
        self._lane.mail.turn.fill_(3)
        self.run_eagerly(shape)

        def launch() -> None:
            if shape in self.loses:
                raise CaptureError("lost")
            self.run_eagerly(shape)

        self._full[shape] = Repeated(launch)  # type: ignore[assignment]

    def _capture_pieces(self, shape: Shape, recorder: Any) -> None:
        inputs = part(self._inputs, shape.size, 0, 0)
        inputs.kv_index.fill_(-1)
        batch = self._lane.batch(inputs)
        answers = torch.zeros(2, shape.size, self._lane.program.num_heads * self._lane.program.head_dim)
        rehearse(self._lane.forward(batch), batch, (answers[0], answers[1]))
        self._pieces[shape] = RepeatedPieces(self, batch)  # type: ignore[assignment]


@contextmanager
def opened(
    path: Path, *, whole: bool | None, kv_cache: int = 4096, rank: int | None = None, **more: Any
) -> Iterator[Parts]:
    """Parts on the CPU; `whole` says whether decode steps get graphs of their own, None means no graphs at all.

    `rank` is what the graphs are told of other ranks, of which there are none.
    """
    options: dict[str, Any] = {"max_rows": 8, "token_budget": 64, "kv_cache": kv_cache}
    parts = assemble(EngineConfig(model=str(path), device="cpu", dtype="float32", **options, **more))
    runner = parts.own
    try:
        if whole is not None:
            rows = row_buckets(8) if whole else ()
            ladder = runner._main._speculation.ladder if runner._main._speculation is not None else ()
            wide = {1 + drafts: rows for _, drafts in ladder}
            tokens = token_buckets(64, smallest=16 if whole else 1)
            policy = Policy(rows, tokens, wide, STRIPS if whole else ())
            own = RepeatingDriver(runner._main._lane, policy, max_tokens=64, max_rows=8, rank=rank)
            runner._main._shares = ShareGraphs(lambda _: own)
        yield parts
    finally:
        parts.own.close()


def serve(parts: Parts, seed: int, *, warm: bool = False, held: int = 0) -> dict[int, list[int]]:
    """Answer requests that come and go, with two flights in the air as in the loop; each `held`-th has a form."""
    chance = random.Random(seed)
    planner, runner = parts.planner, parts.own
    arrivals: dict[int, list[Request]] = {}
    answers: dict[int, list[int]] = {}
    for key in range(20):
        prompt = np.array([chance.randrange(3, 512) for _ in range(chance.choice([1, 5, 30, 70]))], dtype=np.int32)
        limit, params = chance.choice([4, 40, 80]), {**chance.choice(PARAMS), "seed": key}
        request = Request(key=key, front=0, prompt=prompt, limit=limit, **params)
        if held and key % held == 0:
            request.matcher = Counting(key)
        arrivals.setdefault(chance.randrange(40), []).append(request)
        answers[key] = []
    aborts = {chance.randrange(50): key for key in (2, 9, 13)}

    async def run() -> None:
        flight, number = None, 0
        while flight is not None or planner.has_work or arrivals:
            for request in arrivals.pop(number, []):
                planner.submit(request)
            if number in aborts:
                planner.end(aborts[number])
            if warm and number % 3 == 0:
                runner.warm_up_one()
            plan = planner.plan()
            launched = runner.launch(plan) if plan is not None else None
            if flight is not None:
                settled = planner.settle(flight.plan, await flight.wait_landed())
                for key, token in zip(settled.keys.tolist(), settled.tokens.tolist(), strict=True):
                    answers[key].append(token)
            flight = launched
            number += 1

    asyncio.run(run())
    return answers


@pytest.mark.parametrize("seed", [0])
def test_answers_are_those_of_eager_steps_while_requests_come_go_and_are_preempted(
    tiny_llama_dir: Path, seed: int
) -> None:
    with opened(tiny_llama_dir, whole=None, kv_cache=320) as parts:
        expected = serve(parts, seed)
        assert parts.planner.statistics().preemptions > 0
    for whole, warm in ((True, False), (True, True), (False, False)):
        with opened(tiny_llama_dir, whole=whole, kv_cache=320) as parts:
            assert serve(parts, seed, warm=warm) == expected
            statistics = parts.own.statistics()
            assert statistics.capture_failures == 0, parts.own.explain()
            assert (statistics.full_replays > 10) == whole
            assert statistics.piecewise_replays > 3
            assert statistics.eager_steps > 0
            assert statistics.padded_tokens > 0
            assert any("first use of its size" in line for line in parts.own.explain())


@pytest.mark.parametrize("drafter", ["ngram", "itself"])
def test_with_a_drafter_too(tiny_llama_dir: Path, drafter: str) -> None:
    options: dict[str, Any] = {"speculative": "ngram", "num_drafts": 3}
    if drafter == "itself":
        options |= {"speculative": "draft", "draft_model": str(tiny_llama_dir)}
    with opened(tiny_llama_dir, whole=None, kv_cache=320) as parts:
        expected = serve(parts, 0)
    for whole in (True, False):
        with opened(tiny_llama_dir, whole=whole, kv_cache=320, **options) as parts:
            if drafter == "itself":  # plain steps, too
                turns = itertools.cycle((1, 4, 4, 4))
                drafting = parts.planner._drafting
                drafting.width = lambda rows, budget, turns=turns: next(turns)  # type: ignore[misc,method-assign]
            answers = serve(parts, 0, warm=True)
            for key, answer in answers.items():  # one that is aborted has more or fewer tokens at that step
                both = min(len(answer), len(expected[key])) if key in (2, 9, 13) else None
                assert answer[:both] == expected[key][:both]
            statistics = parts.own.statistics()
            assert statistics.capture_failures == 0, parts.own.explain()
            assert (statistics.full_replays > 10) == whole
            assert statistics.piecewise_replays > 3
            assert parts.planner.statistics().drafted_tokens > 0
            assert any("whole wide sampled decode steps" in line for line in parts.own.explain()) == whole


@pytest.mark.parametrize("options", [{}, {"speculative": "ngram", "num_drafts": 3}], ids=["plain", "drafting"])
@pytest.mark.parametrize("held", [1, 4])
def test_with_rows_that_are_held_to_a_form_too(tiny_llama_dir: Path, held: int, options: dict[str, Any]) -> None:
    with opened(tiny_llama_dir, whole=None) as parts:
        expected = serve(parts, 0, held=held)
    with opened(tiny_llama_dir, whole=True, **options) as parts:
        answers = serve(parts, 0, warm=True, held=held)
        for key, answer in answers.items():
            both = min(len(answer), len(expected[key])) if key in (2, 9, 13) else None
            assert answer[:both] == expected[key][:both]
            if key % held == 0:
                steps = {(after - before) % 32 for before, after in itertools.pairwise([key, *answer])}
                assert steps <= {3, 4}
        statistics = parts.own.statistics()
        assert statistics.capture_failures == 0, parts.own.explain()
        assert statistics.not_whole["rows are held to a form (structured output)"] > 3
        assert statistics.piecewise_replays > 3
        assert (statistics.full_replays > 3) == (held > 1)
        assert (parts.planner.statistics().accepted_tokens > 3) == bool(options)


def test_graphs_that_cannot_be_captured_or_are_lost_change_no_answer(tiny_llama_dir: Path) -> None:
    with opened(tiny_llama_dir, whole=None) as parts:
        expected = serve(parts, 3)
    with opened(tiny_llama_dir, whole=True) as parts:
        driver: Any = parts.own._main._graphs
        driver.refuses = (Shape("truncated", 4), Shape("truncated", 8))
        driver.loses = (Shape("sampled", 8),)
        assert serve(parts, 3, warm=True) == expected
        explained = "\n".join(parts.own.explain())
        assert parts.own.statistics().capture_failures > 0
        assert "CaptureError: no" in explained
        assert "steps without a graph" in explained


@pytest.mark.parametrize("way", ["refuses", "loses"])
def test_of_several_ranks_one_that_cannot_have_a_graph_ends_the_engine_with_what_to_do(
    tiny_llama_dir: Path, way: str
) -> None:
    with opened(tiny_llama_dir, whole=True, rank=1) as parts:
        setattr(parts.own._main._graphs, way, [Shape("sampled", size) for size in row_buckets(8)])
        said = r"Rank 1 has no graph of \d sampled rows \(CaptureError: (no|lost)\), .* or give graphs=False"
        with pytest.raises(EngineDead, match=said):
            serve(parts, 3, warm=True)


def test_every_graph_is_captured_in_idle_moments_and_then_nothing_is_left(tiny_llama_dir: Path) -> None:
    with opened(tiny_llama_dir, whole=True) as parts:
        runner, count = parts.own, 0
        driver: Any = runner._main._graphs
        while driver.policy.next_idle() is not None:
            before = runner.statistics().captures
            assert runner.warm_up_one()
            asyncio.run(runner._main._stream.wait_reached(runner._main._stream.mark()))
            count += 1
            assert runner.statistics().captures == before + 1
        assert count == 2 * (len(row_buckets(8)) + len(STRIPS)) + len(token_buckets(64))
        assert not runner.warm_up_one()
