"""The answers to all prompts of one HTTP request, as they come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING

from overlap.messages import Output, Prompt, SamplingParams

if TYPE_CHECKING:
    from overlap import AsyncEngine

BEHIND = 64
"""Outputs that may wait for a reader that is slower than the engine."""


async def answer(
    engine: AsyncEngine, prompts: Sequence[Prompt], params: SamplingParams, request_id: str
) -> AsyncGenerator[tuple[int, Output], None]:
    """Yield (index of the prompt, Output) until every prompt is answered. Closing it aborts what still runs.

    Raises what `engine.generate` raises; the first failure ends the answers to all prompts.
    """
    if len(prompts) == 1:
        async with aclosing(engine.generate(prompts[0], params, request_id=request_id)) as outputs:
            async for output in outputs:
                yield 0, output
        return
    arrived: asyncio.Queue[tuple[int, Output | Exception]] = asyncio.Queue(BEHIND)

    async def read(index: int, prompt: Prompt) -> None:
        try:
            async with aclosing(engine.generate(prompt, params, request_id=f"{request_id}-{index}")) as outputs:
                async for output in outputs:
                    await arrived.put((index, output))
        except Exception as error:  # told to the one who reads, below
            await arrived.put((index, error))

    readers = [asyncio.create_task(read(index, prompt)) for index, prompt in enumerate(prompts)]
    try:
        running = len(readers)
        while running:
            index, item = await arrived.get()
            if isinstance(item, Exception):
                raise item
            running -= item.finished
            yield index, item
    finally:
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)
