"""The leading rank's runner: it tells the followers of each step, then launches that itself."""

from __future__ import annotations

import asyncio
from typing import Final

from overlap.cache.pages import Ints
from overlap.errors import EngineDead
from overlap.flight import TorchFlight
from overlap.graphs.driver import GraphStatistics
from overlap.parallel.team import Team
from overlap.parallel.wire import WarmUp
from overlap.runner import Runner
from overlap.schedule.plan import StepPlan
from overlap.streams.stream import Busy

CAUSE_S: Final = 3.0
"""Seconds in which a rank that has ended is noticed: a sum fails a moment before its reason is known."""


class LedFlight:
    """A step that all ranks have launched."""

    __slots__ = ("_flight", "_team")

    def __init__(self, flight: TorchFlight, team: Team) -> None:
        self._flight = flight
        self._team = team

    @property
    def plan(self) -> StepPlan:
        """What was launched."""
        return self._flight.plan

    @property
    def blocks_left(self) -> int:
        """How many blocks of it are not enqueued yet."""
        return self._flight.blocks_left

    def launch_block(self) -> None:
        """Enqueue the next block."""
        self._flight.launch_block()

    @property
    def landed(self) -> bool:
        """Whether the device is done. Never waits."""
        return self._flight.landed

    async def wait_landed(self) -> Ints:
        """Return the tokens [E]. Raises EngineDead with the reason if a rank was lost meanwhile."""
        try:
            tokens = await self._flight.wait_landed()
        except Exception as failure:
            self._team.blame(failure)
            if not await asyncio.to_thread(self._team.wait_lost, CAUSE_S):
                raise
            raise EngineDead(self._team.why()) from failure
        self._team.check()  # a sum over NCCL that was given up raises nothing, and what lands then means nothing
        return tokens

    def scored(self) -> Ints | None:
        """Return this rank's scores: they are the same on each. Only once it has landed."""
        return self._flight.scored()

    def busy(self) -> Busy:
        """Return when the device ran it. Only once it has landed."""
        return self._flight.busy()


class LeadingRunner:
    """A Runner whose steps the followers run, too. A step that fails on one rank ends the engine."""

    def __init__(self, runner: Runner, team: Team) -> None:
        self._runner = runner
        self._team = team
        self._failed = False

    def launch(self, plan: StepPlan) -> LedFlight:
        """Tell the followers of a plan, enqueue it here, and return at once. Raises EngineDead if one is gone."""
        self._team.launch(plan)
        return LedFlight(self._runner.launch(plan), self._team)

    def warm_up_one(self) -> bool:
        """Capture one more graph, on all ranks; return whether one was left. Raises EngineDead if a rank is gone."""
        self._team.tell(WarmUp())
        return self._runner.warm_up_one()

    def usable(self) -> bool:
        """Return False: it is asked after a failed step, and the ranks may no longer be at the same place."""
        self._failed = True
        return False

    def state_bytes(self) -> int:
        """Return the bytes of this rank's memory that slots, mail and KV take."""
        return self._runner.state_bytes()

    def statistics(self) -> GraphStatistics:
        """Return what this rank's graphs did so far."""
        return self._runner.statistics()

    def explain(self) -> tuple[str, ...]:
        """Return what runs as which graph, on each rank alike."""
        return self._runner.explain()

    def close(self) -> None:
        """Let all ranks finish what is queued, and end the followers."""
        if self._failed:
            self._team.give_up()
        else:
            self._team.stop()
        try:
            self._runner.close()
        finally:
            self._team.close()
