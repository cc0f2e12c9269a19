"""A short calibration: every way to run prompts beside decode rows is tried on requests made up for it.

What it measures goes where all steps' times go (`microbatch.cost`). So a policy that was calibrated begins where one
that was not gets after some minutes of such work, and knows ways, too, that are rarely good enough to be tried.
"""

from __future__ import annotations

import asyncio
import random
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeAlias, TypeVar

from overlap.cache.pages import PAGE
from overlap.errors import ConfigError
from overlap.messages import SamplingParams
from overlap.microbatch.cost import FIRM
from overlap.microbatch.policy import Route, SplitPolicy
from overlap.observe.progress import bar

if TYPE_CHECKING:
    from overlap.core import Core
    from overlap.engine import AsyncEngine

T = TypeVar("T")
Call: TypeAlias = Callable[[Callable[[], object]], Awaitable[Any]]
"""Calls a function on the engine's thread, where the policy lives."""

_ENOUGH: Final = FIRM
"""Chunks that are measured of a way at a size."""
_MOST: Final = 12
"""Chunks that are read for them at most: the first of a kind may be captured as graphs, and then are no measure."""
_SHORT: Final = 16
"""Tokens of a prompt whose answer is there to decode."""
_LONGEST: Final = 16_384
"""Tokens of such an answer at most: many more than pass meanwhile."""
_GROWN: Final = 512
"""Tokens in KV that such an answer has room for; rarely all of them come."""


@dataclass(frozen=True, slots=True)
class Cell:
    """A size of work."""

    rows: int
    """That decode."""
    tokens: int
    """Of prompts, in one step."""


def cells(*, max_rows: int, token_budget: int, kv_tokens: int) -> tuple[Cell, ...]:
    """Return the sizes that say the most of all others: many rows beside a large and a small chunk, and few rows."""
    budget = max(1, min(token_budget, kv_tokens // 4))  # two chunks are read at a time
    many = max(1, min(max_rows * 3 // 4, token_budget // 2, kv_tokens // 4 // _GROWN))
    few = max(1, many // 4)
    return tuple(dict.fromkeys((Cell(many, budget), Cell(many, max(1, budget // 4)), Cell(few, max(1, budget // 2)))))


async def calibrate(engine: AsyncEngine, core: Core, *, vocab_size: int, progress: bool | None) -> None:
    """See `AsyncEngine.calibrate`."""
    planner, _ = core.parts
    policy = planner.splitter
    if not isinstance(policy, SplitPolicy):
        raise ConfigError(
            f'There is nothing to calibrate: lanes is {engine.config.lanes!r} here, and only "auto" chooses. '
            "`engine.explain()` says why it is so."
        )
    sizes = cells(
        max_rows=engine.config.max_rows,
        token_budget=engine.config.token_budget,
        kv_tokens=planner.statistics().num_pages * PAGE,
    )

    async def call(function: Callable[[], T]) -> T:
        return await asyncio.wrap_future(core.call(function))

    with bar(len(sizes) * len(policy.routes), "calibrating", "way", asked=progress) as shown:
        await Calibration(engine, policy, call, vocab_size=vocab_size, told=shown.update).run(sizes)


class Calibration:
    """One run of it."""

    def __init__(
        self, engine: AsyncEngine, policy: SplitPolicy, call: Call, *, vocab_size: int, told: Callable[[], object]
    ) -> None:
        """`told` is called when a way has been measured at a size."""
        self._engine, self._policy, self._call, self._told = engine, policy, call, told
        self._vocab_size = vocab_size
        self._draw = random.Random(0)
        self._salt = f"calibration {secrets.token_hex(8)}"  # no prefix of it is found, by the next one neither
        self._routes = sorted(policy.routes, key=lambda route: route[0] != "serial")
        """In turn first: that says what decode steps take alone, with which those beside a chunk are compared."""

    async def run(self, sizes: tuple[Cell, ...]) -> None:
        """Measure each way at each size. The policy chooses by itself again afterwards, whatever happens."""
        try:
            for cell in sizes:
                await self._run(cell)
        finally:
            await self._hold(None)

    async def _run(self, cell: Cell) -> None:
        await self._hold(self._routes[0])
        length = max(1, min(self._engine.context, _LONGEST) - _SHORT)
        answers = [asyncio.create_task(self._answer(_SHORT, length)) for _ in range(cell.rows)]
        try:
            await self._answer(_SHORT, 1)  # behind all of them: now they decode
            for route in self._routes:
                await self._hold(route)
                await self._measure(route, cell)
                self._told()
        finally:
            for task in answers:
                task.cancel()
            await asyncio.gather(*answers, return_exceptions=True)

    async def _measure(self, route: Route, cell: Cell) -> None:
        """Read chunks until enough of them are known. A second one waits while one is read, as under load."""
        before, reading = await self._samples(route), set[asyncio.Task[None]]()
        try:
            for _ in range(_MOST):
                reading.add(asyncio.create_task(self._read(cell.tokens)))
                if len(reading) == 2:
                    done, reading = await asyncio.wait(reading, return_when=asyncio.FIRST_COMPLETED)
                    for task in done:
                        task.result()
                if await self._samples(route) >= before + _ENOUGH:
                    break
            await asyncio.gather(*reading)
        except BaseException:
            for task in reading:
                task.cancel()
            await asyncio.gather(*reading, return_exceptions=True)
            raise

    async def _read(self, tokens: int) -> None:
        """Have prompts of so many tokens together read."""
        longest = max(1, min(tokens, self._engine.context - 1))
        lengths = [longest] * (tokens // longest) + [tokens % longest] * (tokens % longest > 0)
        await asyncio.gather(*(self._answer(length, 1) for length in lengths))

    async def _answer(self, num_prompt: int, num_tokens: int) -> None:
        prompt = self._draw.choices(range(self._vocab_size), k=num_prompt)
        params = SamplingParams(max_tokens=num_tokens, temperature=0, ignore_eos=True)
        answer = self._engine.generate(prompt, params, cache_salt=self._salt, whole=True)
        try:
            async for _ in answer:
                pass
        finally:
            await answer.aclose()

    async def _hold(self, route: Route | None) -> None:
        await self._call(lambda: self._policy.hold(route))

    async def _samples(self, route: Route) -> int:
        samples: int = await self._call(lambda: self._policy.samples(route))
        return samples
