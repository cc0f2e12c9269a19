"""Rows that are held to a form, on a simulated device: each mask is that of its position, and nobody else waits."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import pytest

from overlap.cache.pages import Ints
from overlap.errors import RequestError
from overlap.loop import Loop
from overlap.schedule.plan import SIDE, StepPlan
from overlap.schedule.planner import Planner
from overlap.schedule.request import Request
from overlap.schedule.settled import Settled
from overlap.schedule.split import Always
from overlap.streams.stream import Stream
from overlap.testing import EchoModel, SimDevice, SimRunner
from overlap.testing.echo import SimFlight

MODEL = EchoModel()


class LateMatcher:
    """Allows everything, some turns of the event loop after it was told a token; its mask says for which position."""

    def __init__(self, num_prompt: int, delay: Callable[[], int], fails_at: int) -> None:
        self.told: list[int] = []
        self.mask: Ints = np.array([num_prompt], dtype=np.int32)
        self.failure: RequestError | None = None
        self.ready = True
        self.look: Callable[[], None] = lambda: None
        self._num_prompt, self._delay, self._fails_at = num_prompt, delay, fails_at

    def take(self, tokens: Sequence[int], drafts: Sequence[int] = ()) -> None:
        assert not drafts
        assert self.ready, "told a token before the mask of the one before was there"
        assert self.failure is None
        self.told += tokens
        self.ready = False
        self._after(self._delay())

    def _after(self, turns: int) -> None:
        if turns:
            asyncio.get_running_loop().call_soon(self._after, turns - 1)
            return
        self.mask = np.array([self._num_prompt + len(self.told)], dtype=np.int32)
        if len(self.told) >= self._fails_at:
            self.failure = RequestError("no token may come next")
        self.ready = True
        self.look()


class MaskedRunner(SimRunner):
    """Holds each mask to the position of the token that it is for, and each row with a form to having one."""

    formed: Callable[[int], bool]

    def _run(self, plan: StepPlan, out: list[int], scores: list[int]) -> None:
        super()._run(plan, out, scores)
        masks = dict(zip(plan.masked, plan.masks, strict=True))
        for emit, row in enumerate(plan.emits.tolist()):
            slot = int(plan.slots[row])
            assert (emit in masks) == self.formed(slot)
            if emit in masks:
                assert masks[emit].tolist() == [self._length[slot]]


class Rig:
    """A loop on a simulated device, and what it told."""

    def __init__(
        self,
        *,
        max_rows: int = 8,
        num_pages: int = 64,
        side: bool = False,
        overlap: bool = True,
        cost: float | Callable[[str, int], float] = 4.0,
        mode: Literal["mixed", "serial", "lanes"] = "lanes",
    ) -> None:
        self.device = SimDevice(cost)
        self.planner = Planner(
            max_rows=max_rows, num_pages=num_pages, token_budget=max_rows + 24, prefill_chunk=16, context=1024,
            splitter=Always(mode, prefill_tokens=24) if side else None,
        )  # fmt: skip
        second: Stream | None = self.device.stream("prompts") if side else None
        self.runner = MaskedRunner(self.device.stream("compute"), MODEL, num_pages=num_pages, side=second)
        self.runner.formed = self._formed
        self.loop = Loop(self.planner, self.runner, self, overlap=overlap)
        self.answers: dict[int, list[int]] = {}
        self.ends: dict[int, str] = {}
        self.happen: Callable[[], None] = lambda: None

    def _formed(self, slot: int) -> bool:
        owner = self.planner._slots.owners[slot]
        return owner is not None and owner.matcher is not None

    def tell_settled(self, settled: Settled) -> None:
        for key, token in zip(settled.keys.tolist(), settled.tokens.tolist(), strict=True):
            assert key not in self.ends
            self.answers.setdefault(key, []).append(token)
        for end in settled.ends:
            self.ends[end.key] = end.reason
        self.planner.check()
        self.happen()

    def tell_failed(self, key: int, front: int, failure: BaseException) -> None:
        self.ends[key] = str(failure)

    async def serve(self, requests: Sequence[Request]) -> None:
        for one in requests:
            if isinstance(one.matcher, LateMatcher):
                one.matcher.look = self.loop.look
            self.loop.submit(one)
        self.loop.when_idle(self.loop.close)
        async with asyncio.timeout(60):
            await self.loop.run()
        self.planner.check_idle()


def request(
    key: int, prompt: list[int], limit: int, *, delay: Callable[[], int] | None, fails_at: int = 999
) -> Request:
    matcher = None if delay is None else LateMatcher(len(prompt), delay, fails_at)
    return Request(key=key, front=0, prompt=np.array(prompt, dtype=np.int32), limit=limit, matcher=matcher)


async def test_the_device_never_waits_for_a_mask_while_another_row_runs() -> None:
    rig = Rig()
    await rig.serve([request(0, [1, 2], 60, delay=None), request(1, [3], 20, delay=lambda: 1)])
    assert len(rig.answers[0]) == 60
    assert len(rig.runner.plans) == 60
    assert rig.device.bubble("compute") == 0
    assert rig.answers == {key: MODEL.answer(prompt, n) for key, prompt, n in ((0, [1, 2], 60), (1, [3], 20))}


async def test_nothing_stays_untold_while_the_loop_waits_for_a_mask() -> None:
    rig = Rig()
    one = request(0, [1, 2], 8, delay=lambda: 5)
    assert isinstance(one.matcher, LateMatcher)
    ready, told = one.matcher._after, list[tuple[int, int]]()

    def after(turns: int) -> None:
        if not turns:
            told.append((len(rig.answers.get(0, [])), len(matcher.told)))
        ready(turns)

    matcher = one.matcher
    matcher._after = after  # type: ignore[method-assign]
    await rig.serve([one])
    assert told == [(number, number) for number in range(1, 8)], "told before the next mask was there"


async def test_a_row_that_is_alone_takes_one_step_a_token() -> None:
    rig = Rig()
    await rig.serve([request(0, [1, 2], 30, delay=lambda: 5)])
    assert (len(rig.runner.plans), len(rig.answers[0])) == (30, 30)


@pytest.mark.parametrize("seed", range(40))
async def test_whatever_ends_fails_or_is_preempted_each_token_and_each_mask_is_the_right_one(seed: int) -> None:
    draw = random.Random(seed)
    rig = Rig(
        max_rows=draw.choice([2, 4, 8]), num_pages=draw.choice([7, 10, 16, 64]), side=seed % 3 == 0,
        overlap=draw.random() < 0.8,
    )  # fmt: skip
    prompts, requests = {}, []
    for key in range(24):
        shared = list(range(20, 20 + draw.choice([0, 0, 32])))
        prompts[key] = shared + [draw.randrange(97) for _ in range(draw.randint(1, 20))]
        form = draw.random() < 0.6
        requests.append(
            request(
                key,
                prompts[key],
                draw.randint(1, 40),
                delay=(lambda: draw.choice([0, 0, 1, 9])) if form else None,
                fails_at=draw.choice([999, 999, 999, draw.randint(1, 20)]),
            )
        )
        requests[-1].priority = draw.choice([0, 0, 1])

    def happen() -> None:
        if draw.random() < 0.02 and (key := draw.randrange(24)) not in rig.ends and rig.loop.end(key):
            rig.ends[key] = "ended"

    rig.happen = happen
    await rig.serve(requests)
    for one in requests:
        got, how = rig.answers.get(one.key, []), rig.ends[one.key]
        assert got == MODEL.answer(prompts[one.key], len(got))
        assert how in ("ended", "length", "no token may come next")
        assert (len(got) == one.limit) == (how == "length") or how == "ended"
        if isinstance(one.matcher, LateMatcher):
            assert got[: len(one.matcher.told)] == one.matcher.told
            assert how != "no token may come next" or got == one.matcher.told


@pytest.mark.parametrize("free", [0, 1])
@pytest.mark.parametrize("delay", [0, 1])  # of more the simulated clock makes a whole chunk
async def test_rows_that_all_have_a_form_go_on_beside_a_long_prompt_once_their_masks_are_made(
    delay: int, free: int
) -> None:
    """A chunk takes as long as 16 decode steps."""
    rig = Rig(side=True, num_pages=200, cost=lambda work, tokens: 160.0 if work == "prompts" else 10.0)
    told = list[float]()

    def happen() -> None:
        if len(rig.answers.get(0, [])) > len(told):
            told.append(rig.device.now)

    rig.happen = happen
    rows = [request(key, [1, 2, key], 300, delay=lambda: delay) for key in range(3)]
    rows += [request(key, [1, 2, key], 300, delay=None) for key in range(3, 3 + free)]
    await rig.serve([*rows, request(9, [7] * 960, 2, delay=None)])
    assert rig.answers == {
        **{key: MODEL.answer([1, 2, key], 300) for key in range(3 + free)},
        9: MODEL.answer([7] * 960, 2),
    }
    reading = rig.device.streams["prompts"].spans
    assert sum(span.end - span.start for span in reading) > 38 * 160.0
    during = [now for now in told if reading[0].start <= now <= reading[-1].end]
    most = 10.0 * (1 if not free else 2 + delay) + 10.0
    assert max(np.diff(during)) <= most, "no token waits for a chunk"


class Held:
    """A flight that lands when it is let."""

    def __init__(self, flight: SimFlight, let: asyncio.Event) -> None:
        self._flight, self._let = flight, let

    def __getattr__(self, name: str) -> Any:
        return getattr(self._flight, name)

    @property
    def landed(self) -> bool:
        return self._let.is_set() and self._flight.landed

    async def wait_landed(self) -> Ints:
        await self._let.wait()
        return await self._flight.wait_landed()


@pytest.mark.parametrize("delay", [0, 1, 4, 30])
async def test_however_long_a_step_of_the_side_lane_takes_rows_with_a_form_go_on_meanwhile(delay: int) -> None:
    rig, let = Rig(side=True, num_pages=200), asyncio.Event()
    launch = rig.runner.launch

    def held(plan: StepPlan) -> Any:
        return Held(launch(plan), let) if plan.lane == SIDE else launch(plan)

    rig.runner.launch = held  # type: ignore[method-assign]

    watched = set[object]()

    def happen() -> None:
        if not let.is_set() and len(rig.answers.get(0, [])) > 2:
            pending = rig.loop._watchdogs[SIDE]._pending
            watched.add(pending and (pending[0].number, pending[1]))
        if len(rig.answers.get(0, [])) == 40:
            assert 9 not in rig.answers, "the prompt is still being read"
            let.set()

    rig.happen = happen
    rows = [request(key, [1, 2, key], 60, delay=lambda: delay) for key in range(3)]
    await rig.serve([*rows, request(9, [7] * 960, 2, delay=None)])
    assert rig.answers == {
        **{key: MODEL.answer([1, 2, key], 60) for key in range(3)}, 9: MODEL.answer([7] * 960, 2),
    }  # fmt: skip
    assert len(watched) <= 2, "it is reported once it is late, though others go on: from its launch, or its first wait"


@pytest.mark.parametrize("mode", ["mixed", "serial"])
async def test_prompts_are_read_while_the_masks_of_all_rows_are_made(mode: Literal["mixed", "serial"]) -> None:
    rig = Rig(side=True, num_pages=200, mode=mode)
    rows = [request(key, [1, 2, key], 60, delay=lambda: 9) for key in range(3)]
    await rig.serve([*rows, request(9, [7] * 960, 2, delay=None)])
    alone = [plan for plan in rig.runner.plans if plan.num_rows > plan.num_decode == 0]
    assert len(alone) > 20, "the device does not idle while there is a prompt to read"
    assert rig.answers[9] == MODEL.answer([7] * 960, 2)


class MadeMeanwhile(LateMatcher):
    """Its first mask is made by another thread right behind the first question for it."""

    _asked = 0
    _made = False

    @property
    def ready(self) -> bool:
        self._asked += 1
        return self._asked > 1 and self._made

    @ready.setter
    def ready(self, made: bool) -> None:
        self._made = made


async def test_a_mask_that_is_made_while_the_only_request_is_planned_for_is_no_deadlock() -> None:
    rig = Rig()
    one = request(0, [1, 2], 5, delay=None)
    one.matcher = MadeMeanwhile(2, lambda: 1, 999)
    await rig.serve([one])
    assert rig.answers == {0: MODEL.answer([1, 2], 5)}
