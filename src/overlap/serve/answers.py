"""The answers to all prompts of one HTTP request, as they come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Final

from overlap.messages import Output, Usage
from overlap.serve.door import Door, Outputs
from overlap.serve.protocol import Asked

BEHIND: Final = 64
"""Outputs that may wait for a reader that is slower than the engine."""


async def encoded(door: Door, asked: Asked) -> list[list[int]]:
    """Return the tokens of each prompt of a request. Raises RequestError for what cannot be encoded."""
    prompts: list[list[int]] = []
    for prompt in asked.prompts:
        given: list[object] = list(prompt)
        if isinstance(prompt, str):
            prompts.append(await door.encode(prompt))
        elif given and isinstance(given[0], dict):
            prompts.append(await door.encode_chat(prompt, asked.tools or None))  # type: ignore[arg-type]  # messages
        else:
            prompts.append(given)  # type: ignore[arg-type]  # token ids
    return prompts


async def answer(
    door: Door, prompts: Sequence[list[int]], asked: Asked, request_id: str, fairness_key: str, deadline: float | None
) -> AsyncGenerator[tuple[int, Output], None]:
    """Yield (index of the answer, Output) until every answer has ended. Closing it aborts what still runs.

    Answer `i` is to prompt `i // n`; the answers to one prompt share its KV. Raises what `door.generate` raises; the
    first failure ends all answers. Where only an echo is asked for, each answer is one Output without tokens.
    """
    num = len(prompts) * asked.n

    @asynccontextmanager
    async def outputs(index: int) -> AsyncIterator[Outputs]:
        generation = door.generate(
            prompts[index // asked.n],
            asked.params_of(index % asked.n),
            request_id=request_id if num == 1 else f"{request_id}-{index}",
            priority=asked.priority,
            deadline=deadline,
            fairness_key=fairness_key,
            cache_salt=asked.cache_salt,
            whole=not asked.stream,
        )
        try:
            yield generation
        finally:
            await generation.aclose()

    if num == 1:
        async with outputs(0) as one:
            async for output in one:
                yield 0, _without_answer(output) if asked.only_echo else output
        return
    arrived: asyncio.Queue[tuple[int, Output | Exception]] = asyncio.Queue(BEHIND)

    async def read(index: int) -> None:
        try:
            async with outputs(index) as one:
                async for output in one:
                    await arrived.put((index, output))
        except Exception as error:  # told to the one who reads, below
            await arrived.put((index, error))

    readers = [asyncio.create_task(read(index)) for index in range(num)]
    try:
        running = len(readers)
        while running:
            index, item = await arrived.get()
            if isinstance(item, Exception):
                raise item
            running -= item.finished
            yield index, _without_answer(item) if asked.only_echo else item
    finally:
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)


def _without_answer(output: Output) -> Output:
    """Return what an answer of one token says of its prompt."""
    usage = output.usage
    return Output(
        request_id=output.request_id,
        index=output.index,
        tokens=[],
        text="",
        text_delta="",
        finish_reason="length",
        stop_reason=None,
        usage=Usage(prompt_tokens=usage.prompt_tokens, completion_tokens=0, cached_tokens=usage.cached_tokens),
        prompt_logprobs=output.prompt_logprobs,
    )
