"""An answer as server-sent events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Final

import msgspec
from aiohttp import web
from msgspec import UNSET, UnsetType

from overlap.messages import Output, Usage
from overlap.serve.errors import ApiError, to_api_error
from overlap.serve.protocol import Asked
from overlap.serve.shapes import Answer, AnswerShape, Choice, UsageObject, total_usage

HEADERS: Final = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # a proxy such as nginx would otherwise hold chunks back
}
DONE: Final = b"data: [DONE]\n\n"
UNHURRIED: Final = 16 * 2**10
"""Bytes that may wait for a reader before it is timed; asyncio's transports make us wait from 64 KiB on."""


class EventWriter:
    """Writes events to one client, and gives up on one that takes none for `stall_seconds`."""

    def __init__(self, response: web.StreamResponse, request: web.Request, stall_seconds: float) -> None:
        self._response = response
        self._transport = request.transport
        self._stall_seconds = stall_seconds

    async def write(self, event: bytes) -> None:
        """Write one event. Raises ConnectionError when the client left or stalls."""
        transport = self._transport
        if transport is None:
            raise ConnectionResetError("the client left")
        if transport.get_write_buffer_size() + len(event) < UNHURRIED:
            await self._response.write(event)
            return
        try:
            async with asyncio.timeout(self._stall_seconds):
                await self._response.write(event)
        except TimeoutError:
            transport.abort()
            raise ConnectionAbortedError("the client reads nothing") from None

    async def fail(self, event: bytes) -> None:
        """Write an error event and cut the connection: a client takes a stream that merely ends for a whole one."""
        await self.write(event)
        if self._transport is not None:
            self._transport.abort()


class EventStream:
    """Writes one request's answer, chunk by chunk, all under one id."""

    def __init__(
        self,
        asked: Asked,
        shapes: Sequence[AnswerShape],
        prompts: Sequence[list[int]],
        *,
        id: str,  # noqa: A002
        object: str,  # noqa: A002
        created: int,
        model: str,
        stall_seconds: float,
    ) -> None:
        self._asked = asked
        self._shapes = shapes
        self._prompts = prompts
        self._id = id
        self._object = object
        self._created = created
        self._model = model
        self._stall_seconds = stall_seconds
        self._encode = msgspec.json.Encoder().encode
        self.usages: dict[int, Usage] = {}
        """What each answer has cost so far."""
        self.failure: ApiError | None = None
        """What ended the stream before its end."""

    async def send(self, request: web.Request, answers: AsyncIterator[tuple[int, Output]]) -> web.StreamResponse:
        """Stream `answers` to the client.

        The headers wait for the first Output, so that a bad request still gets its status code: what `answers` raises
        before is raised here. A failure after that becomes an error event, and then the connection is cut.
        """
        first = await anext(answers)
        response = web.StreamResponse(headers=HEADERS)
        await response.prepare(request)
        writer = EventWriter(response, request, self._stall_seconds)
        try:
            for number, shape in enumerate(self._shapes):
                for choice in shape.opening():
                    await self._write(writer, (choice,), prompt=self._prompts[number // self._asked.n])
            await self._output(writer, *first)
            async for index, output in answers:
                await self._output(writer, index, output)
            if self._asked.include_usage:
                await self._write(writer, (), total_usage(self.usages, self._asked.n))
            await writer.write(DONE)
            await response.write_eof()
        except ConnectionError:
            self.failure = ApiError(499, "The client left.", code="client_left")  # there is nobody to tell
        except Exception as error:  # whatever it is, the client must not take this for the end
            self.failure = to_api_error(error)
            await writer.fail(b"data: " + self.failure.body() + b"\n\n")
        return response

    async def _output(self, writer: EventWriter, index: int, output: Output) -> None:
        self.usages[index] = output.usage
        for choice in self._shapes[index].chunks(output):
            await self._write(writer, (choice,))

    async def _write(
        self,
        writer: EventWriter,
        choices: tuple[Choice, ...],
        usage: UsageObject | None = None,
        prompt: list[int] | None = None,
    ) -> None:
        shown: UsageObject | UnsetType | None = usage if self._asked.include_usage else UNSET
        if usage is None and self._asked.continuous_usage:
            shown = total_usage(self.usages, self._asked.n)
        chunk = Answer(
            id=self._id,
            object=self._object,
            created=self._created,
            model=self._model,
            choices=choices,
            usage=shown,
            prompt_token_ids=tuple(prompt) if prompt is not None and self._asked.return_token_ids else UNSET,
        )
        await writer.write(b"data: " + self._encode(chunk) + b"\n\n")
