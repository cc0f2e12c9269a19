"""A decode step as a graph has it, run on the CPU: all of it but the capture."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from overlap.assemble import Parts, assemble
from overlap.cache.pages import Ints
from overlap.config import EngineConfig
from overlap.graphs.lane import decode_step, part, short_step
from overlap.graphs.pieces import answer_buffers, rehearse
from overlap.graphs.policy import asked_of, decode_kind, short_kind, short_of
from overlap.schedule.plan import StepPlan, strips_of
from overlap.schedule.request import Request
from overlap.schedule.shaping import Shaping
from overlap.state.mail import DEPTH, EMPTY
from overlap.state.packing import pack
from overlap.state.rows import SlotRows
from overlap.state.shapes import ShapeRows

ASKED: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0.8, "seed": 3},
    {"temperature": 1.2, "top_k": 9, "seed": 4},
    {"temperature": 1.0, "top_p": 0.8, "min_p": 0.01, "seed": 5},
    {},
)
SHAPED: tuple[dict[str, Any], ...] = (
    {"shaping": Shaping(repetition_penalty=1.4, logit_bias=((7, 9.0),))},
    *ASKED[1:3],
    {"temperature": 0.9, "seed": 8, "shaping": Shaping(frequency_penalty=1.5, presence_penalty=0.5)},
    {"shaping": Shaping(min_tokens=9, banned=(1, 7, 30), logit_bias=((30, 50.0),)), "stop_ids": (30,)},
)


def opened(path: Path) -> Parts:
    return assemble(EngineConfig(model=str(path), device="cpu", dtype="float32", max_rows=8, kv_cache=1024))


class Replaying:
    """Runs the steps of a runner as graphs would, decode steps with `padding` more rows than they have, short ones with
    as many strips more.
    """

    def __init__(self, parts: Parts, padding: int) -> None:
        self._runner = parts.own
        self._padding = padding
        self._inputs = self._runner._main._lane.static_inputs(64, 64)
        self.replayed = self.short = 0

    async def run(self, plan: StepPlan) -> Ints:
        kind, short = decode_kind(plan), short_kind(plan)
        if kind is None and short is None:
            return await self._runner.launch(plan).wait_landed()
        lane, place = self._runner._main._lane, plan.number % DEPTH
        pack(plan, lane.mail.plan_words[place])
        lane.mail.turn.fill_(place)
        if short is not None:
            self.short += 1
            with torch.inference_mode():
                self._runner._main._admit_apart(plan)
            short_step(lane, strips_of(plan.counts) + self._padding, short_of(short)[0])
        elif kind is not None:
            self.replayed += 1
            size = plan.num_rows + self._padding
            decode_step(lane, part(self._inputs, size, size, size), asked_of(kind))
        return lane.mail.landed_words[place][: plan.num_rows].copy()


def answer(parts: Parts, asked: tuple[dict[str, Any], ...], padding: int) -> tuple[dict[int, list[int]], Replaying]:
    """Answer one request each, with other lengths; with a padding of -1 nothing is replayed."""
    replaying = Replaying(parts, padding)
    answers: dict[int, list[int]] = {key: [] for key in range(len(asked))}
    for key, params in enumerate(asked):
        prompt = np.arange(10 + key, 14 + 7 * key, dtype=np.int32)
        parts.planner.submit(Request(key=key, front=0, prompt=prompt, limit=20 + 5 * key, **params))

    async def run() -> None:
        while parts.planner.has_work:
            plan = parts.planner.plan()
            assert plan is not None
            if padding < 0:
                tokens = await parts.own.launch(plan).wait_landed()
            else:
                tokens = await replaying.run(plan)
            settled = parts.planner.settle(plan, tokens)
            for key, token in zip(settled.keys.tolist(), settled.tokens.tolist(), strict=True):
                answers[key].append(token)

    asyncio.run(run())
    return answers, replaying


@pytest.mark.parametrize("asked", [ASKED[:1], ASKED[:2], ASKED, SHAPED])
def test_a_replayed_step_gives_the_tokens_of_a_launched_one_whatever_its_padding(
    tiny_llama_dir: Path, asked: tuple[dict[str, Any], ...]
) -> None:
    expected = None
    for padding in (-1, 0, 1, 7):
        parts = opened(tiny_llama_dir)
        try:
            answers, replaying = answer(parts, asked, padding)
        finally:
            parts.own.close()
        expected = expected or answers
        assert answers == expected
        assert (replaying.replayed > 15) == (padding >= 0)
        assert (replaying.short > 0) == (padding >= 0)


def test_a_run_with_nothing_but_padding_changes_no_slot_and_no_page(tiny_llama_dir: Path) -> None:
    parts = opened(tiny_llama_dir)
    try:
        lane = parts.own._main._lane
        answer(parts, SHAPED, -1)
        shapes = lane.rows.shapes.rows
        assert shapes is not None
        columns = {name: getattr(lane.rows, name) for name in SlotRows.COLUMNS}
        columns |= {name: getattr(shapes, name)[:-1] for name in ShapeRows.__slots__}
        before = {name: column.clone() for name, column in columns.items()}
        kv = lane.kv.clone()
        inputs = lane.static_inputs(16, 16)
        for kind in ("greedy", "sampled", "truncated", "shaped"):
            lane.mail.turn.fill_(EMPTY)
            decode_step(lane, part(inputs, 8, 8, 8), kind)
            lane.mail.turn.fill_(EMPTY)
            short_step(lane, 3, kind)
        inputs.kv_index.fill_(-1)
        batch = lane.batch(inputs)
        rehearse(lane.forward(batch), batch, answer_buffers(lane.program, 16, lane.kv))
        assert torch.equal(lane.kv, kv)
        for name, column in before.items():
            assert torch.equal(columns[name], column), name
    finally:
        parts.own.close()


def test_a_cpu_engine_has_no_graphs_and_says_so(tiny_llama_dir: Path) -> None:
    parts = opened(tiny_llama_dir)
    try:
        assert parts.own.explain() == ("graphs: none on a CPU",)
        assert parts.own.warm_up_one() is False
        assert parts.own.statistics().full_replays == 0
    finally:
        parts.own.close()
