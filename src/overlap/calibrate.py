"""A short calibration: every way to run prompts beside decode rows is tried on requests made up for it.

What it measures goes where all steps' times go (`microbatch.cost`). So a policy that was calibrated begins where one
that was not gets after some minutes of such work, and knows ways, too, that are rarely good enough to be tried.
"""

from __future__ import annotations

import asyncio
import random
import secrets
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeAlias, TypeVar

from overlap.cache.pages import PAGE
from overlap.errors import ConfigError, QueueFull
from overlap.messages import SamplingParams
from overlap.microbatch.cost import FIRM
from overlap.microbatch.policy import SplitPolicy
from overlap.observe.progress import bar
from overlap.schedule.split import Route, name_of

if TYPE_CHECKING:
    from overlap.core import Core
    from overlap.engine import AsyncEngine
    from overlap.resolve import Resolved

T = TypeVar("T")
Call: TypeAlias = Callable[[Callable[[], object]], Awaitable[Any]]
"""Calls a function on the engine's thread, where the policy lives."""

_ENOUGH: Final = FIRM
"""Chunks that are measured of a way at a size."""
_MOST: Final = 12
"""Chunks that are read for them at most: the first of a kind may be captured as graphs, and then are no measure."""
_ALONE: Final = 2 * FIRM
"""Decode steps alone, in front of each way that runs them beside chunks: contexts have grown since the last."""
_SHORT: Final = 16
"""Tokens of a prompt that is read for the decode steps in front of it, and in KV of an answer with a short context."""
_USUAL: Final = 1024
"""Tokens of a prompt, and in KV of an answer, where there is room: lanes hold each other up by how much the answers
read, and a prompt as long as the budget takes longer than several shorter ones."""
_LONGEST: Final = 16_384
"""Tokens of an answer that is there to decode, at most: many more than pass meanwhile."""
_LAST: Final = -(10**6)
"""The priority of its requests."""
_FULL_S: Final = 0.005
"""How long to wait while too many wait."""
_GROWN: Final = 512
"""Tokens that such an answer has room to grow by; rarely all of them come."""


@dataclass(frozen=True, slots=True)
class Cell:
    """A size of work."""

    rows: int
    """That decode, ..."""
    context: int
    """... each with so many tokens in KV when they begin."""
    tokens: int
    """Of prompts, in one step, ..."""
    prompt: int
    """... each of so many at most."""


def cells_of(*, max_rows: int, token_budget: int, kv_tokens: int, context: int) -> tuple[Cell, ...]:
    """Return the sizes that say the most of all others: many rows beside a large and a small chunk; with short contexts
    beside a long prompt; and few rows.

    At least one slot is left for prompts, so `max_rows` is 2 or more.
    """
    budget = max(1, min(token_budget, kv_tokens // 4))  # two chunks are read at a time
    many = max(1, min(max_rows * 3 // 4, max_rows - 1, token_budget // 2))

    def cell(rows: int, usual: int, tokens: int, longest: int) -> Cell:
        usual = min(usual, context // 4)
        rows = max(1, min(rows, kv_tokens // 4 // (usual + _GROWN)))
        held = max(_SHORT, min(usual, kv_tokens // 4 // rows - _GROWN))
        at_once = max(1, (max_rows - rows) // 2)
        prompt = min(context - 1, tokens, max(longest, -(-tokens // at_once)))
        return Cell(rows, held, tokens, prompt)

    large = cell(many, _USUAL, budget, _USUAL)
    cells = (
        large, cell(many, _USUAL, -(-budget // 4), _USUAL), cell(many, _SHORT, -(-budget // 2), budget),
        cell(max(1, large.rows // 4), _USUAL, budget, _USUAL),
    )  # fmt: skip
    return tuple(dict.fromkeys(cells))


def _why_not(resolved: Resolved) -> str:
    """Return why an engine does not choose its lanes, and what to do."""
    why = next((reason for reason in resolved.reasons if reason.startswith("lanes = ")), None)
    if why is None:
        return f"lanes={resolved.lanes!r} was asked for: leave it out."
    if resolved.device == "cpu" and resolved.tensor_parallel == 1 and resolved.speculative is None:
        return f"Here {why}. Give target_itl_ms (`--target-itl-ms`) to have it choose."
    return f"Here {why}."


async def calibrate(engine: AsyncEngine, core: Core, *, vocab_size: int, progress: bool | None) -> None:
    """See `AsyncEngine.calibrate`."""
    planner, _ = core.parts
    policy, resolved = planner.splitter, engine.config
    if not isinstance(policy, SplitPolicy):
        raise ConfigError(f'There is nothing to calibrate: only lanes="auto" chooses. {_why_not(resolved)}')
    for name, has, needs in (("max_rows", resolved.max_rows, 2), ("context", engine.context, 2 * _SHORT)):
        if has < needs:
            raise ConfigError(
                f"A calibration reads prompts beside answers: {name} has to be {needs} or more, not {has}."
            )
    cells = cells_of(
        max_rows=resolved.max_rows,
        token_budget=resolved.token_budget,
        kv_tokens=planner.statistics().num_pages * PAGE,
        context=engine.context,
    )

    async def call(function: Callable[[], T]) -> T:
        return await asyncio.wrap_future(core.call(function))

    begun = False  # known on the engine's thread: it begins there though nobody waits for it any more

    def begin() -> bool:
        nonlocal begun
        begun = policy.begin()
        return begun

    def end() -> bool:
        if begun:
            policy.end()
        return begun

    try:
        if not await call(begin):
            raise ConfigError("The engine is being calibrated by someone else. Wait for that to end.")
        with bar(len(cells) * len(policy.routes), "calibrating", "way", asked=progress) as shown:
            await Calibration(engine, policy, call, vocab_size=vocab_size, told=shown.update).run(cells)
    finally:
        if await call(end):
            await asyncio.wrap_future(core.keep_costs())
    if not policy.calibrated:
        found = ", ".join(f"{name_of(route)} {policy.samples(route)}" for route in policy.routes)
        raise ConfigError(
            f"Not every way could be measured {FIRM} times: {found}. "
            "Open the engine with more kv_cache, or calibrate when it has nothing else to do."
        )


class Calibration:
    """One run of it."""

    def __init__(
        self, engine: AsyncEngine, policy: SplitPolicy, call: Call, *, vocab_size: int, told: Callable[[], object]
    ) -> None:
        """`told` is called when a way has been measured in a cell."""
        self._engine, self._policy, self._call, self._told = engine, policy, call, told
        self._vocab_size = vocab_size
        self._draw = random.Random(0)
        self._salt = f"calibration {secrets.token_hex(8)}"  # no prefix of it is found, by the next one neither
        self._routes = sorted(policy.routes, key=lambda route: route[0] != "serial")
        """In turn first: that says what decode steps take alone."""

    async def run(self, cells: tuple[Cell, ...]) -> None:
        """Measure each way in each cell, and those once more of which too little was to be learned."""
        for cell in cells:
            await self._measure_all(cell, self._routes, self._told)
        for cell in cells:
            missing = [route for route in self._routes if await self._samples(route) < _ENOUGH]
            if missing:
                await self._measure_all(cell, missing, lambda: None)

    async def _measure_all(self, cell: Cell, routes: Sequence[Route], told: Callable[[], object]) -> None:
        await self._hold(self._routes[0])
        answers = [asyncio.create_task(self._decode(cell.context)) for _ in range(cell.rows)]
        try:
            await self._ask(_SHORT, 1)  # behind all of them: now they decode
            for route in routes:
                if route[0] == "lanes":  # what decode steps take alone by now, with which those beside are compared
                    await self._hold(self._routes[0])
                    await self._ask(_SHORT, _ALONE)
                await self._hold(route)
                await self._measure(route, cell)
                told()
                for task in answers:
                    if task.done():
                        task.result()  # one ends only by what it failed at
        finally:
            await _cancelled(answers)

    async def _measure(self, route: Route, cell: Cell) -> None:
        """Read chunks until enough of them are known. A second one waits while one is read, as under load."""
        before, reading = await self._samples(route), set[asyncio.Task[None]]()
        try:
            for _ in range(_MOST):
                reading.add(asyncio.create_task(self._read(cell)))
                if len(reading) == 2:
                    done, reading = await asyncio.wait(reading, return_when=asyncio.FIRST_COMPLETED)
                    for task in done:
                        task.result()
                if await self._samples(route) >= before + _ENOUGH:
                    break
            await asyncio.gather(*reading)
        except BaseException:
            await _cancelled(reading)
            raise

    async def _read(self, cell: Cell) -> None:
        """Have the prompts of one chunk read."""
        whole, rest = divmod(cell.tokens, cell.prompt)
        await asyncio.gather(*(self._ask(length, 1) for length in [cell.prompt] * whole + [rest] * (rest > 0)))

    async def _decode(self, held: int) -> None:
        """Have one answer after the other decoded behind so many tokens, until cancelled."""
        while True:
            await self._ask(held, min(self._engine.context, held + _LONGEST) - held)

    async def _ask(self, num_prompt: int, num_tokens: int) -> None:
        """Wait for an answer, behind all requests of others."""
        prompt = self._draw.choices(range(self._vocab_size), k=num_prompt)
        params = SamplingParams(max_tokens=num_tokens, temperature=0, ignore_eos=True)
        while True:
            answer = self._engine.generate(
                prompt, params, priority=_LAST, fairness_key=self._salt, cache_salt=self._salt, whole=True
            )
            try:
                async for _ in answer:
                    pass
            except QueueFull:
                await asyncio.sleep(_FULL_S)
            else:
                return
            finally:
                await answer.aclose()

    async def _hold(self, route: Route) -> None:
        await self._call(lambda: self._policy.hold(route))

    async def _samples(self, route: Route) -> int:
        samples: int = await self._call(lambda: self._policy.samples(route))
        return samples


async def _cancelled(tasks: Collection[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
