"""The step that a graph records, run call by call on the CPU: it does what the step that the host launches does."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from overlap.assemble import Parts, assemble
from overlap.config import EngineConfig
from overlap.graphs.buckets import bucket_for, row_buckets
from overlap.graphs.policy import Policy, Shape, asked_of, decode_kind, short_kind, short_of
from overlap.runner import Runner
from overlap.schedule.pace import Pace
from overlap.schedule.plan import StepPlan, strips_of
from overlap.schedule.request import Request
from overlap.schedule.shaping import Shaping
from overlap.spec.chain import ChainDrafter
from overlap.spec.ngram import NgramDrafter
from overlap.spec.step import Speculation
from overlap.state.mail import DEPTH, EMPTY
from overlap.state.packing import pack
from overlap.state.rows import SlotRows

SHAPED = Shaping(repetition_penalty=1.3, frequency_penalty=0.5, logit_bias=((9, 4.0),))
PARAMS: dict[str, tuple[dict[str, Any], ...]] = {
    "greedy": ({},),
    "sampled": ({}, {"temperature": 0.8}),
    "truncated": ({}, {"temperature": 1.1, "top_k": 40}, {"temperature": 0.9, "top_p": 0.9}),
    "shaped": ({"shaping": SHAPED}, {"temperature": 0.8, "shaping": SHAPED}, {}),
}


@contextmanager
def opened(path: Path, **options: Any) -> Iterator[Parts]:
    asked: dict[str, Any] = {"device": "cpu", "dtype": "float32", "max_rows": 12, "kv_cache": 4096, "num_drafts": 3}
    parts = assemble(EngineConfig(model=str(path), **{**asked, **options}))
    try:
        yield parts
    finally:
        parts.own.close()


class State:
    """All device state that a step changes, of target and drafter, to be compared and put back."""

    def __init__(self, runner: Runner, *, short: bool = False) -> None:
        """Behind a `short` step it is left open for how many steps a row has not drafted: nothing hangs on it there."""
        speculation: Any = runner._main._speculation
        drafts, drafter = speculation._drafts, speculation._drafter
        scratch = runner._rows.scratch
        self._columns: list[Tensor] = [getattr(runner._rows, name) for name in SlotRows.COLUMNS]
        self._columns += [drafts.tokens_SK[:scratch], drafts.num_S[:scratch], drafts.control.hits, drafts.control.tries]
        self._columns += [runner._kv] if short else [drafts.control.idle, runner._kv]
        if isinstance(drafter, ChainDrafter):
            self._columns.append(drafter._kv)
        if isinstance(drafter, NgramDrafter):  # behind the end lies what is not kept; the scratch slot is nobody's
            self._columns.append(drafter.history_SL[:scratch, :-1])
        if runner._rows.shapes.rows is not None:
            self._columns.append(runner._rows.shapes.rows.seen[:scratch])
        self._kept = [column.clone() for column in self._columns]

    def restore(self) -> None:
        with torch.inference_mode():
            for column, kept in zip(self._columns, self._kept, strict=True):
                column.copy_(kept)

    def assert_equals(self, other: State) -> None:
        for mine, theirs in zip(self._kept, other._kept, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def on_stream(runner: Runner, call: Any) -> None:
    stream = runner._main._stream
    stream.launch("test", call)
    asyncio.run(stream.wait_reached(stream.mark()))


def both_ways(parts: Parts, plan: StepPlan) -> None:
    """Run a decode plan as the host launches it, then as a graph would; compare all; leave it done."""
    runner, kind, short = parts.own, decode_kind(plan), short_kind(plan)
    lane, speculation, place = runner._main._lane, runner._main._speculation, plan.number % DEPTH
    assert isinstance(speculation, Speculation)
    size = bucket_for(plan.num_rows, row_buckets(12)) or plan.num_rows
    layout, mail = pack(plan, lane.mail.plan_words[place]), lane.mail
    if short is not None:
        with torch.inference_mode():  # so that what it makes at its first use is there to be put back, too
            runner._main._admit_apart(plan)
    before = State(runner, short=short is not None)

    def eager() -> None:
        with torch.inference_mode():
            brought = speculation.run(plan, layout, mail.plans[place][: layout.used])
            assert brought is not None
            mail.landings[place, : plan.num_landing] = brought.tokens_L

    on_stream(runner, eager)
    landed, after = mail.landed_words[place].copy(), State(runner, short=short is not None)
    before.restore()
    mail.landed_words[place][:] = -9
    mail.turn.fill_(place)
    if short is not None:
        asked, drafts = short_of(short)
        with torch.inference_mode():
            runner._main._admit_apart(plan)
        strips = strips_of(plan.counts) + plan.number % 3
        on_stream(runner, lambda: speculation.short(mail, strips, asked, drafts=drafts))
    else:
        assert kind is not None
        asked = asked_of(kind)
        on_stream(runner, lambda: speculation.decode(mail, size, plan.width, asked))
    assert mail.landed_words[place][: plan.num_landing].tolist() == landed[: plan.num_landing].tolist()
    assert (mail.landed_words[place][plan.num_landing :] == -9).all(), "padding lands nowhere"
    assert int(mail.turn) == (place + 1) % DEPTH
    State(runner, short=short is not None).assert_equals(after)


def serve(
    parts: Parts, params: tuple[dict[str, Any], ...], seed: int, *, short: bool = False
) -> set[tuple[str | None, int, int]]:
    """Answer some requests, each decode step both ways, and with `short` steps with prompts, too; return (kind, width,
    decode rows) of what was compared.
    """
    planner, runner, chance = parts.planner, parts.own, random.Random(seed)
    compared: set[tuple[str | None, int, int]] = set()
    for key in range(9):
        stem = [chance.randrange(3, 500) for _ in range(chance.randrange(1, 9))]
        prompt = np.array(stem * 3, dtype=np.int32)
        planner.submit(
            Request(key=key, front=0, prompt=prompt, limit=4 + 3 * key, seed=key, **params[key % len(params)])
        )

    async def step(plan: StepPlan) -> None:
        flight = runner.launch(plan)
        planner.settle(plan, await flight.wait_landed())

    while planner.has_work:
        plan = planner.plan()
        assert plan is not None
        if decode_kind(plan) is None and not (short and short_kind(plan)):
            asyncio.run(step(plan))
            continue
        both_ways(parts, plan)
        compared.add((decode_kind(plan) or short_kind(plan), plan.width, plan.num_decode))
        place = plan.number % DEPTH
        planner.settle(plan, runner._main._mail.landed_words[place][: plan.num_landing].copy())
    return compared


@pytest.fixture(scope="module")
def drafters(target: Any, spec: Any, tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("heads")
    for kind in ("eagle3", "eagle"):
        (path / kind).mkdir()
        spec.write_random_head(path / kind, target, kind)
    return {
        "ngram": {"speculative": "ngram"},
        "itself": {"speculative": "draft", "draft_model": str(tiny_llama_dir)},
        "eagle3": {"speculative": "eagle", "draft_model": str(path / "eagle3")},
        "eagle": {"speculative": "eagle", "draft_model": str(path / "eagle")},
    }


@pytest.mark.parametrize("name", ["ngram", "itself", "eagle3", "eagle"])
@pytest.mark.parametrize("asked", PARAMS)
def test_the_step_of_a_graph_does_what_the_step_that_the_host_launches_does(
    tiny_llama_dir: Path, drafters: Any, name: str, asked: str
) -> None:
    with opened(tiny_llama_dir, **drafters[name]) as parts:
        compared = serve(parts, PARAMS[asked], seed=len(name))
    assert {width for _, width, _ in compared} == {4}
    assert len({rows for _, _, rows in compared}) > 2, "padding of several sizes"
    assert f"wide {asked}" in {kind for kind, _, _ in compared}


@pytest.mark.parametrize("name", ["ngram", "itself", "eagle3"])
def test_a_plain_step_of_an_engine_with_a_drafter_does_so_too(tiny_llama_dir: Path, drafters: Any, name: str) -> None:
    with opened(tiny_llama_dir, **drafters[name]) as parts:
        planner = parts.planner
        planner._drafting.width = lambda num_decode, budget: 1 + 3 * (planner._planned % 3 == 0)  # type: ignore[method-assign]
        compared = serve(parts, PARAMS["sampled"], seed=1)
    assert {width for _, width, _ in compared} == {1, 4}


@pytest.mark.parametrize("name", ["ngram", "itself", "eagle3", "eagle"])
@pytest.mark.parametrize("asked", PARAMS)
@pytest.mark.parametrize("pays", [True, False])
def test_a_short_step_with_prompts_does_what_the_one_that_the_host_launches_does(
    tiny_llama_dir: Path, drafters: Any, name: str, asked: str, *, pays: bool
) -> None:
    with opened(tiny_llama_dir, **drafters[name], max_rows=3) as parts:  # so that some prompts come beside decode rows
        drafting = parts.planner._drafting
        drafting.strips, drafting._with_prompts = True, False  # type: ignore[misc]  # as on CUDA
        if not pays:
            drafting._pace = Pace()
            drafting._pace.choose = lambda num_rows, widths: 1  # type: ignore[method-assign]
            drafting._pace.is_on = lambda num_rows: False  # type: ignore[method-assign]
        compared = serve(parts, PARAMS[asked], seed=len(name), short=True)
    shorts = {(kind, num_decode) for kind, _, num_decode in compared if kind is not None and kind.startswith("short")}
    kind = f"short drafting {asked}" if pays else f"short {asked}"
    assert kind in {kind for kind, _ in shorts}
    assert {kind.startswith("short drafting") for kind, _ in shorts} == {pays}
    beside = {num_decode for _, num_decode in shorts} - {0}
    assert bool(beside) != pays, "rows that verify drafts let prompts go first"


def test_a_run_with_padding_only_changes_nothing(tiny_llama_dir: Path, drafters: Any) -> None:
    with opened(tiny_llama_dir, **drafters["eagle3"]) as parts:
        runner, speculation = parts.own, parts.own._main._speculation
        assert speculation is not None
        serve(parts, PARAMS["greedy"], seed=0)
        before, mail = State(runner), runner._main._mail
        for width in (1, 4):
            mail.turn.fill_(EMPTY)
            on_stream(runner, lambda width=width: speculation.decode(mail, 8, width, "sampled"))
            State(runner).assert_equals(before)
        for drafts in (True, False):
            mail.turn.fill_(EMPTY)
            on_stream(runner, lambda drafts=drafts: speculation.short(mail, 4, "sampled", drafts=drafts))
            State(runner).assert_equals(before)


def test_wide_steps_have_graphs_of_their_own_and_a_sampled_one_serves_greedy_rows() -> None:
    policy = Policy((1, 2, 4), (), {5: (1, 2)})
    policy.captured(Shape("wide sampled", 2, 5))
    assert policy._ready(("wide greedy", 5), 2) == Shape("wide sampled", 2, 5)
    assert policy._ready(("greedy", 1), 2) is None
    assert asked_of("wide greedy") == "greedy"
    assert asked_of("shaped") == "shaped"
