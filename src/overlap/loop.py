"""The loop: plan, launch, land, settle, and nothing else.

    plan N+1 ──► launch N+1 ──► wait until flight N landed ──► settle N ──► (again)
    host only    enqueue only    asyncio, no spin               tokens out, pages fenced

What is in flight is a local variable of `run`. A step that fails ends the requests that read from it, and the loop
goes on; a failure of the loop itself ends every request, and the loop with it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from overlap.cache.pages import Ints
from overlap.errors import EngineDead, InternalError
from overlap.observe.timeline import NoTimeline, Timeline
from overlap.schedule.plan import StepPlan
from overlap.schedule.planner import Planner, Settled
from overlap.schedule.request import Request


class Flight(Protocol):
    """A launched plan."""

    @property
    def plan(self) -> StepPlan:
        """What was launched."""

    async def wait_landed(self) -> Ints:
        """Return the tokens [E] once the device is done; raise what the step raised."""


class Runner(Protocol):
    """What turns plans into flights."""

    def launch(self, plan: StepPlan) -> Flight:
        """Enqueue a plan and return at once. Never waits for the device."""

    def usable(self) -> bool:
        """Return whether the device still works, after a step has failed. May wait."""


class Outbox(Protocol):
    """Whom the loop tells. Called on the loop's thread; must not block."""

    def tell_settled(self, settled: Settled) -> None:
        """Some requests got tokens, and some of them ended."""

    def tell_failed(self, key: int, front: int, failure: BaseException) -> None:
        """A request ended because a step failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopStatistics:
    """The loop's figures since it started."""

    steps: int
    failed_steps: int
    tokens_in: int
    """Tokens run: prompt and decode."""
    tokens_out: int
    """Tokens that reached a reader."""


class Loop:
    """One engine's loop. All methods but `run` return at once; all are called on the loop's thread."""

    def __init__(
        self,
        planner: Planner,
        runner: Runner,
        outbox: Outbox,
        *,
        timeline: Timeline | None = None,
        overlap: bool = True,
    ) -> None:
        self._planner = planner
        self._runner = runner
        self._outbox = outbox
        self._timeline = timeline or NoTimeline()
        self._overlap = overlap
        self._work = asyncio.Event()
        self._closing = False
        self._steps = self._failed = self._tokens_in = self._tokens_out = 0
        self._idle_waiters: list[Callable[[], None]] = []
        self.landed_at = time.monotonic()

    def submit(self, request: Request) -> None:
        """Queue a request; raises RequestError if it can never run."""
        self._planner.submit(request)
        self._work.set()

    def end(self, key: int) -> bool:
        """End a request now. Nothing more of it is told; its pages come back after the fence."""
        ended = self._planner.end(key)
        self._work.set()
        return ended

    def close(self) -> None:
        """Let `run` return once no flight is in the air. Requests that still run are the caller's to end."""
        self._closing = True
        self._work.set()

    def when_idle(self, call: Callable[[], None]) -> None:
        """Call back once when no request is left and no flight is in the air."""
        self._idle_waiters.append(call)
        self._work.set()

    async def run(self) -> None:
        """Serve until closed and the last flight has landed."""
        flight: Flight | None = None
        while flight is not None or await self._wait_work():
            with self._timeline.span("plan"):
                plan = None if self._closing else self._planner.plan()
            launched = None
            if plan is not None:
                with self._timeline.span("launch"):
                    launched = self._runner.launch(plan)
            if flight is not None:
                await self._settle(flight)
            elif launched is None and not self._closing:
                raise InternalError("requests wait, nothing is in flight, and nothing could be planned")
            flight = launched
            if flight is not None and not self._overlap:
                await self._settle(flight)
                flight = None

    async def _settle(self, flight: Flight) -> None:
        try:
            tokens = await flight.wait_landed()
        except Exception as failure:
            self._fail(flight.plan, failure)
            return
        with self._timeline.span("settle"):
            settled = self._planner.settle(flight.plan, tokens)
            self._steps += 1
            self._tokens_in += flight.plan.num_tokens
            self._tokens_out += len(settled.keys)
            self.landed_at = time.monotonic()
            self._outbox.tell_settled(settled)

    def _fail(self, plan: StepPlan, failure: BaseException) -> None:
        self._failed += 1
        for key, front in self._planner.keys_in(plan):
            self._planner.end(key)
            self._outbox.tell_failed(key, front, failure)
        self._planner.pass_step(plan)
        if not self._runner.usable():
            raise EngineDead(f"The device does not work any more after: {failure!r}") from failure

    async def _wait_work(self) -> bool:
        """Return True once there is work, False once closed. Called only with no flight in the air."""
        while not self._closing and not self._planner.has_work:
            self._work.clear()
            waiters, self._idle_waiters = self._idle_waiters, []
            for call in waiters:
                call()
            await self._work.wait()
        return not self._closing

    def statistics(self) -> LoopStatistics:
        """Return the figures so far."""
        return LoopStatistics(
            steps=self._steps, failed_steps=self._failed, tokens_in=self._tokens_in, tokens_out=self._tokens_out
        )
