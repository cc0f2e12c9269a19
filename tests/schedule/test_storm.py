"""The storm: whatever comes, ends, expires or fails, and when, nothing is lost and every token is the right one.

The model hashes all tokens before the next one, read through the page table, so its answer to a prompt that runs alone
is the oracle: one page shared wrongly gives a wrong token. Time is virtual, the deadlines' too, so a seed is a seed.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pytest

from overlap.cache.pages import PAGE, Ints
from overlap.errors import DeadlineExceeded, QueueFull, RequestError
from overlap.loop import Loop
from overlap.schedule.life import Life
from overlap.schedule.plan import StepPlan
from overlap.schedule.planner import Planner
from overlap.schedule.request import Request
from overlap.schedule.settled import Settled
from overlap.schedule.split import Always, Choice, Outlook, Splitter
from overlap.testing import EchoModel, SimDevice, SimRunner
from overlap.testing.echo import SimFlight

MODEL = EchoModel()


class Injected(RuntimeError):
    """A step was made to fail."""

    def __init__(self, step: int) -> None:
        super().__init__(step)
        self.step = step


class BrittleRunner(SimRunner):
    """Knows whom each step concerns, and may fail to launch it."""

    planner: Planner
    launch_fault: Callable[[StepPlan], None]
    concerned: dict[int, set[int]]

    def launch(self, plan: StepPlan) -> SimFlight:
        self.concerned[plan.number] = {key for key, _ in self.planner.keys_in(plan)}
        self.launch_fault(plan)
        return super().launch(plan)


@dataclass
class Case:
    """A request, and all that was told of it."""

    request: Request
    prompt: list[int]
    due: int | None = None
    """The tick at which its deadline passes."""
    tokens: list[int] = field(default_factory=list)
    scores: list[int] = field(default_factory=list)
    outcome: str = ""
    """How it ended; empty before that."""
    cached: int | None = None

    def end(self, outcome: str) -> None:
        assert not self.outcome, f"request {self.request.key} is {self.outcome}, and then {outcome}"
        self.outcome = outcome

    def check(self) -> None:
        """Compare with the answer to the prompt alone."""
        asked = self.request
        seed = asked.seed if asked.temperature > 0 else 0
        whole = self.outcome == "finished"
        limit = asked.limit if whole else len(self.tokens)
        alone = MODEL.answer(self.prompt, limit, stop_ids=asked.stop_ids if whole else (), seed=seed)
        assert self.tokens == alone, f"request {asked.key}, {self.outcome}"
        assert self.outcome
        assert self.scores == (MODEL.scores(self.prompt) if asked.scores else [])[: len(self.scores)]
        assert not asked.scores or not self.tokens or len(self.scores) == len(self.prompt) - 1


class Storm:
    """An engine's loop on a simulated device, and everybody who uses it."""

    def __init__(self, seed: int, splitter: Splitter | None = None) -> None:
        self.draw = draw = random.Random(seed)
        self.num_pages = draw.choice([4, 5, 7, 9, 12, 16, 24, 48])
        max_rows = draw.choice([1, 2, 4, 8, 8])
        budget = max_rows + draw.choice([1, 3, 16, 64, 200])
        self.planner = Planner(
            max_rows=max_rows,
            num_pages=self.num_pages,
            token_budget=budget,
            prefill_chunk=draw.choice([1, 5, 16, 23, budget]) if budget > 10 else draw.randint(1, budget),
            context=draw.choice([1024, 1024, self.num_pages * PAGE - 7]),
            prefix_cache=draw.random() < 0.9,
            max_waiting=draw.choice([2**31, 2**31, 2**31, 4]),
            splitter=splitter,
        )
        self.failing = draw.choice([0.0, 0.0, 0.005, 0.04])
        self.checks = seed % 3 == 0
        self.runner = self._make_runner()
        self.loop = Loop(self.planner, self.runner, self, overlap=draw.random() < 0.75)
        self.cases: dict[int, Case] = {}
        self.live: set[int] = set()
        self.now = 0
        self.met: Counter[str] = Counter()
        self.ending = draw.choice([0.0, 0.01, 0.03, 0.15])
        self.coming = draw.choice([0.1, 0.5, 1.0])
        self.limits = draw.choice([(3, 30, 90), (90,), (200,)])
        vocabulary = draw.choice([2, 97])  # of two tokens, prompts share pages by chance and by halves
        self.vocabulary = vocabulary
        self.prefixes = [self._tokens(draw.choice([0, 16, 32, 96]) + draw.choice([0, 0, 9])) for _ in range(4)]

    def _make_runner(self) -> BrittleRunner:
        def shared() -> object:
            return self.planner._store._tree.pages()

        runner = BrittleRunner(
            SimDevice().stream("compute"),
            MODEL,
            num_pages=self.num_pages,
            fault=lambda plan: self._fault(plan, 0.4),
            row_fault=lambda plan, row: self._fault(plan, 0.4 / plan.num_rows),
            shared=shared if self.checks else None,  # type: ignore[arg-type]
        )
        runner.concerned = {}
        runner.planner = self.planner
        runner.launch_fault = lambda plan: self._fault(plan, 0.4)
        return runner

    def _fault(self, plan: StepPlan, share: float) -> None:
        if self.draw.random() < self.failing * share:
            self.met["failed steps"] += 1
            raise Injected(plan.number)

    # ── requests ─────────────────────────────────────────────────────────────────────────────────────────────────

    def _tokens(self, count: int) -> list[int]:
        return [self.draw.randrange(self.vocabulary) for _ in range(count)]

    def _prompt(self) -> list[int]:
        draw, finished = self.draw, [case for case in self.cases.values() if case.outcome == "finished"]
        match draw.choice(["prefix", "prefix", "turn", "equal", "own"]):
            case "turn" if finished:
                before = draw.choice(finished)
                return before.prompt + before.tokens + self._tokens(draw.randint(1, 20))
            case "equal" if self.cases:
                return draw.choice(list(self.cases.values())).prompt
            case "own":
                return self._tokens(draw.choice([3, 12, 60]))
            case _:
                return draw.choice(self.prefixes) + self._tokens(draw.randint(1, 20))

    def submit(self) -> None:
        draw, room = self.draw, self.planner.context
        prompt = self._prompt()
        if len(prompt) >= room:
            prompt = prompt[: draw.randint(1, room - 1)]
        limit = draw.randint(1, min(room - len(prompt), draw.choice(self.limits)))
        if draw.random() < 0.02:
            limit = room  # can never fit
        due = self.now + draw.choice([0, 3, 20, 100]) if draw.random() < 0.1 else None
        request = Request(
            key=len(self.cases),
            front=0,
            prompt=np.array(prompt, dtype=np.int32),
            limit=limit,
            temperature=draw.choice([0.0, 1.0]),
            seed=draw.randrange(1000),
            stop_ids=tuple(draw.sample(range(97), draw.choice([0, 0, 0, 1]))),
            priority=draw.choice([0, 0, 0, 1, 5]),
            fairness_key=draw.choice(["", "", "a", "b"]),
            salt=draw.choice(["", "", "", "other"]),
            scores=len(prompt) if len(self.cases) % 4 == 1 else 0,
            deadline=None if due is None else time.monotonic() + due - self.now + 0.5,
        )
        self.cases[request.key] = Case(request, prompt, due)
        self.live.add(request.key)
        self.equip(request)
        self.loop.submit(request)

    def equip(self, request: Request) -> None:
        """Give a request what it may have besides."""

    def end(self, key: int) -> None:
        request = self.planner.request(key)
        case = self.cases[key]
        assert (request is None) == bool(case.outcome)
        if request is not None:
            resumes = "preempted " if request.life is Life.WAITING and request.made else ""
            begun = " prefilling" if request.life is Life.RUNNING and not case.tokens else ""
            self.met[f"ended {resumes}{request.life.value}{begun}"] += 1
        else:
            self.met["ended twice"] += 1
        if self.loop.end(key):
            case.end("ended")
            self.live.discard(key)
        assert not self.loop.end(key)

    def happen(self) -> None:
        """Let what may happen at any moment happen."""
        self.now += 1
        assert len(self.runner.concerned) < 30_000, "no end in sight"
        draw = self.draw
        if self.checks:
            self.planner.check()
        while len(self.cases) < self.most and draw.random() < self.coming:
            self.submit()
        while self.cases and draw.random() < self.ending:
            self.end(draw.choice(draw.choice(self.groups())))

    def groups(self) -> list[list[int]]:
        """Return whom to end: anybody, even if that has ended; the living; those that were preempted."""
        live = sorted(self.live)
        preempted = [key for key in live if self.cases[key].tokens and self.cases[key].request.life is Life.WAITING]
        return [group for group in (list(self.cases), live, live, preempted) if group]

    # ── the loop's outbox ────────────────────────────────────────────────────────────────────────────────────────

    def tell_settled(self, settled: Settled) -> None:
        for scored in settled.scored:
            case = self.cases[scored.key]
            assert not case.outcome
            assert not case.tokens, "a score came behind the first token"
            assert scored.start == 1 + len(case.scores)
            case.scores += scored.words[:, 0].tolist()
        for key, token in zip(settled.keys.tolist(), settled.tokens.tolist(), strict=True):
            case = self.cases[key]
            assert not case.outcome, f"request {key} is {case.outcome}, and got a token"
            if not case.tokens:
                case.cached = settled.cached.get(key, 0)
            case.tokens.append(token)
        for key, cached in settled.cached.items():
            case = self.cases[key]
            assert len(case.tokens) == 1, "hits are told with the first token"
            assert 0 < cached < len(case.prompt)
            assert cached % PAGE == 0
            self.met["hits"] += 1
        for end in settled.ends:
            self.cases[end.key].end("finished")
            self.live.discard(end.key)
        self.happen()

    def tell_failed(self, key: int, front: int, failure: BaseException) -> None:
        case = self.cases[key]
        if isinstance(failure, Injected):
            assert key in self.runner.concerned[failure.step], "a step failed that had nothing to do with the request"
            case.end("failed")
        elif isinstance(failure, DeadlineExceeded):
            assert case.due is not None
            assert self.now >= case.due
            case.end("expired")
        elif isinstance(failure, QueueFull):
            case.end("turned away")
        else:
            assert isinstance(failure, RequestError), f"{failure!r}"
            assert len(case.prompt) + case.request.limit > self.planner.context
            case.end("refused")
        self.live.discard(key)
        while self.live and self.draw.random() < self.ending:  # an end out of the failure of another
            self.end(self.draw.choice(sorted(self.live)))

    # ── the whole ────────────────────────────────────────────────────────────────────────────────────────────────

    async def rage(self, *, waves: int = 2, size: int = 20) -> Counter[str]:
        """Let waves of requests come and go; look at what is left after each. Returns what was met."""
        events = asyncio.get_running_loop()
        events.time = lambda: float(self.now)  # type: ignore[method-assign]
        self.most = 0
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.loop.run())
            for _ in range(waves):
                self.most += size
                while len(self.cases) < self.most or self.planner.has_work:
                    self.happen()
                    await asyncio.sleep(0)
                idle = asyncio.Event()
                self.loop.when_idle(self.look_idle)
                self.loop.when_idle(idle.set)
                await idle.wait()
            self.leave()
        self.look_idle()
        return self.count()

    def leave(self) -> None:
        """Close, at once or with steps in the air."""
        if self.draw.random() < 0.5:
            self.most += 3
            for _ in range(3):
                self.submit()
            for key in sorted(self.live):
                self.end(key)
        self.loop.close()

    def look_idle(self) -> None:
        self.planner.check_idle()
        figures = self.planner.statistics()
        assert (figures.running, figures.waiting, figures.draining, figures.fenced_pages) == (0, 0, 0, 0)
        assert figures.free_pages + figures.cached_pages == figures.num_pages == self.num_pages
        assert figures.evictable_pages == figures.cached_pages
        assert not self.loop._deadlines, "a deadline was kept of a request that has ended"
        assert not self.live
        for case in self.cases.values():
            case.check()
        if self.draw.random() < 0.2:
            self.planner.clear_cache()
            assert self.planner.statistics().free_pages == self.num_pages

    def count(self) -> Counter[str]:
        figures = self.planner.statistics()
        self.met += Counter(case.outcome for case in self.cases.values())
        self.met["steps"] += figures.planned_steps
        self.met["preemptions"] += figures.preemptions
        self.met["pressed"] += self.planner._room.pressed
        self.met["evicted pages"] += figures.evicted_pages
        self.met["cached tokens"] += figures.cached_tokens
        self.met["prompt tokens"] += figures.prompt_tokens
        self.met["requests"] += len(self.cases)
        return self.met


@pytest.mark.parametrize("seed", range(100))
async def test_whatever_happens_nothing_is_lost_and_every_token_is_right(seed: int) -> None:
    await Storm(seed).rage()


@pytest.mark.parametrize("seed", range(60))
async def test_so_it_is_where_prompts_and_decode_rows_take_turns(seed: int) -> None:
    await Storm(seed, Always("serial")).rage()


async def test_the_storm_meets_all_that_is_hard() -> None:
    met: Counter[str] = Counter()
    for seed in range(1000, 1040):
        met += await Storm(seed).rage()
    outcomes = ("finished", "ended", "failed", "expired", "refused", "turned away")
    phases = ("waiting", "running prefilling", "running", "preempted waiting", "twice")
    for case in (*outcomes, *(f"ended {phase}" for phase in phases), "failed steps", "preemptions", "pressed", "hits"):
        assert met[case] >= 3, f"{case}: {met[case]}"
    assert met["evicted pages"] > 100
    assert 100 < met["cached tokens"] < met["prompt tokens"]


class Sudden:
    """Allows everything. Its next mask, or its failure, is there once it was asked for often enough, or after a while.

    So it comes where another thread would bring it: also between the plans of two lanes.
    """

    look = staticmethod(lambda: None)

    def __init__(self, num_prompt: int, draw: random.Random, loop: Loop, fails_at: int) -> None:
        self.mask: Ints = np.array([num_prompt], dtype=np.int32)
        self.told: list[int] = []
        self._num_prompt, self._draw, self._loop, self._fails_at = num_prompt, draw, loop, fails_at
        self._ready, self._failure = True, None
        self._asks = 0

    @property
    def ready(self) -> bool:
        self._ask()
        return self._ready

    @property
    def failure(self) -> RequestError | None:
        self._ask()
        return self._failure

    def take(self, tokens: Sequence[int], drafts: Sequence[int] = ()) -> None:
        assert self._ready, "told a token before the mask of the one before was there"
        assert not drafts
        self.told += tokens
        self._ready, self._asks = False, self._draw.choice([1, 2, 3, 4, 5, 8, 20])
        self._wait(len(self.told), self._draw.choice([0, 1, 3, 30]))

    def _wait(self, told: int, turns: int) -> None:
        if told == len(self.told) and turns:
            asyncio.get_running_loop().call_soon(self._wait, told, turns - 1)
        elif told == len(self.told):
            self._make()

    def _ask(self) -> None:
        self._asks -= 1
        if not self._ready and self._asks <= 0:
            self._make()

    def _make(self) -> None:
        if self._ready:
            return
        self.mask = np.array([self._num_prompt + len(self.told)], dtype=np.int32)
        if len(self.told) >= self._fails_at:
            self._failure = RequestError("no token may come next")  # type: ignore[assignment]
        self._ready = True
        asyncio.get_running_loop().call_soon(self._loop.look)


class MaskedRunner(BrittleRunner):
    """Holds each row with a form to having the mask of its position, and all others to having none."""

    def launch(self, plan: StepPlan) -> SimFlight:
        for emit, row in enumerate(plan.emits.tolist()):
            owner = self.planner._slots.owners[int(plan.slots[row])]
            assert owner is None or (owner.matcher is not None) == (emit in plan.masked)
        return super().launch(plan)

    def _run(self, plan: StepPlan, out: list[int], scores: list[int]) -> None:
        super()._run(plan, out, scores)
        for emit, mask in zip(plan.masked, plan.masks, strict=True):
            assert mask.tolist() == [self._length[int(plan.slots[plan.emits[emit]])]]


class FormStorm(Storm):
    """Half of the requests have a form, and some forms fail."""

    def _make_runner(self) -> MaskedRunner:
        device = SimDevice(lambda work, tokens: self.draw.choice([0.5, 1.0, 3.0]))
        runner = MaskedRunner(
            device.stream("compute"), MODEL, num_pages=self.num_pages,
            fault=lambda plan: self._fault(plan, 0.4),
            row_fault=lambda plan, row: self._fault(plan, 0.4 / plan.num_rows),
            side=device.stream("side"), side_blocks=self.draw.choice([1, 1, 3]),
        )  # fmt: skip
        runner.concerned = {}
        runner.planner = self.planner
        runner.launch_fault = lambda plan: self._fault(plan, 0.4)
        return runner

    def equip(self, request: Request) -> None:
        if self.draw.random() < 0.5:
            fails_at = self.draw.choice([999, 999, 999, self.draw.randint(1, 20)])
            request.matcher = Sudden(len(request.prompt), self.draw, self.loop, fails_at)

    def tell_failed(self, key: int, front: int, failure: BaseException) -> None:
        if "no token may come next" not in str(failure):
            super().tell_failed(key, front, failure)
            return
        case = self.cases[key]
        assert isinstance(case.request.matcher, Sudden)
        assert case.tokens == case.request.matcher.told, "all that it was told was told on"
        case.end("unmatched")
        self.live.discard(key)


class Drawn(Always):
    """A splitter that chooses at random."""

    def __init__(self, draw: random.Random) -> None:
        super().__init__("mixed")
        self._draw = draw

    def choose(self, outlook: Outlook) -> Choice:
        mode: Literal["mixed", "serial", "lanes"] = self._draw.choice(["mixed", "serial", "lanes", "lanes"])
        return Choice(mode, self._draw.choice([1, 7, 40, 1000]), self._draw.choice([0, 24]) if mode == "lanes" else 0)


@pytest.mark.parametrize("seed", range(60))
async def test_whatever_happens_in_two_lanes_nothing_is_lost_and_every_token_is_right(seed: int) -> None:
    draw = random.Random(seed)
    drawn = Drawn(draw)
    splitter: Splitter = draw.choice([drawn, drawn, Always("lanes"), Always("serial")])
    await FormStorm(seed, splitter).rage()
