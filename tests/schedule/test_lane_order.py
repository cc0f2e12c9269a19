"""When the side lane's steps land while the main lane has nothing in the air, in a script of plans and landings."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

import pytest

from overlap.loop import Loop
from overlap.streams.stream import Busy


@dataclass
class Plan:
    number: int
    lane: int
    follows: int = 0
    num_tokens: int = 1
    num_rows: int = 1
    num_decode: int = 1
    again: bool = False


@dataclass
class Settled:
    keys: tuple[int, ...] = ()
    ends: tuple[int, ...] = ()


class Flight:
    """Lands when it is told to."""

    blocks_left = 0

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.over = asyncio.Event()

    @property
    def landed(self) -> bool:
        return self.over.is_set()

    async def wait_landed(self) -> list[int]:
        await self.over.wait()
        return []

    def scored(self) -> None:
        return None

    def busy(self) -> Busy:
        return Busy("lane", 0.0, 0.0, 0.0, typical=False)


@dataclass
class Script:
    """A planner, runner and outbox: step 1 decodes, 2 and on read prompts; whose prompt is read by 2 decodes in 9."""

    num_prompts: int
    waits_for_mask: bool = False
    has_work: bool = True
    said: list[str] = field(default_factory=list)
    flights: dict[int, Flight] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._plans = [Plan(1, 0)], [Plan(2 + place, 1) for place in range(self.num_prompts)]

    @property
    def wants_side(self) -> bool:
        return bool(self._plans[1])

    def unmatched(self) -> list[Any]:
        return []

    def plan(self, lane: int) -> Plan | None:
        return self._plans[lane].pop(0) if self._plans[lane] else None

    def settle(self, plan: Plan, tokens: Any, scored: Any) -> Settled:
        self.said.append(f"settle {plan.number}")
        if plan.number == 2:
            self._plans[0].append(Plan(9, 0))
        return Settled()

    def launch(self, plan: Plan) -> Flight:
        self.said.append(f"launch {plan.number}")
        self.flights[plan.number] = Flight(plan)
        return self.flights[plan.number]

    def note_odd(self, plan: Plan) -> None:
        """Nothing is learned."""

    def tell_settled(self, settled: Settled) -> None:
        """Nobody reads."""


async def after_the_first_prompt(script: Script) -> list[str]:
    """Let steps 1 and 2 land at once, and return what the loop did then, while nothing else lands."""
    part: Any = script
    running = asyncio.create_task(Loop(part, part, part).run())
    while 2 not in script.flights and not running.done():
        await asyncio.sleep(0)
    before = len(script.said)
    script.flights[1].over.set()
    script.flights[2].over.set()
    for _ in range(50):
        await asyncio.sleep(0)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    return script.said[before:]


async def test_a_request_whose_prompt_is_through_decodes_before_the_next_prompt_step_has_landed() -> None:
    did = await after_the_first_prompt(Script(num_prompts=2))
    assert did[did.index("settle 2") :] == ["settle 2", "launch 9"], did


async def test_a_request_whose_prompt_is_through_does_not_wait_for_the_mask_of_another() -> None:
    did = await after_the_first_prompt(Script(num_prompts=1, waits_for_mask=True))
    assert did[did.index("settle 2") :] == ["settle 2", "launch 9"], did
