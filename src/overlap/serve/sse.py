"""An answer as server-sent events."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Final

import msgspec
from aiohttp import HttpVersion11, web
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


def event_response(request: web.Request) -> web.StreamResponse:
    """Return the response for a stream of events. Where HTTP has chunks, each event is one."""
    response = web.StreamResponse(headers=HEADERS)
    if request.version == HttpVersion11:
        response.enable_chunked_encoding()  # aiohttp would do so by itself, and not tell that it did
    return response


class EventWriter:
    """Writes events to one client, and gives up on one that takes none for `stall_seconds`."""

    def __init__(self, response: web.StreamResponse, request: web.Request, stall_seconds: float) -> None:
        """`response` is one of `event_response`, prepared."""
        self._response = response
        self._transport = request.transport
        self._stall_seconds = stall_seconds
        self._begun = False

    def write_nowait(self, event: bytes) -> bool:
        """Write one event if there is nothing to wait for; False if `write` has to.

        The event goes to the transport as the chunk that aiohttp would make of it, and takes a quarter of the time.
        """
        transport = self._transport
        if (
            not self._begun
            or transport is None
            or transport.is_closing()
            or transport.get_write_buffer_size() + len(event) >= UNHURRIED
        ):
            return False
        transport.write(b"%x\r\n%b\r\n" % (len(event), event))
        return True

    async def write(self, event: bytes) -> None:
        """Write one event. Raises ConnectionError when the client left or stalls."""
        if self.write_nowait(event):
            return
        transport = self._transport
        if transport is None:
            raise ConnectionResetError("the client left")
        self._begun = self._response.chunked  # the head goes out with this event at the latest
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
        self._last: dict[int, Output] = {}
        self._around: dict[int, tuple[bytes, bytes]] = {}
        """Of each answer: what stands before and behind the text of a chunk that has nothing else."""
        self.failure: ApiError | None = None
        """What ended the stream before its end."""

    @property
    def usages(self) -> Mapping[int, Usage]:
        """What each answer has cost so far."""
        return {index: output.usage for index, output in self._last.items()}

    async def send(self, request: web.Request, answers: AsyncIterator[tuple[int, Output]]) -> web.StreamResponse:
        """Stream `answers` to the client.

        The headers wait for the first Output, so that a bad request still gets its status code: what `answers` raises
        before is raised here. A failure after that becomes an error event, and then the connection is cut.
        """
        first = await anext(answers)
        response = event_response(request)
        await response.prepare(request)
        writer = EventWriter(response, request, self._stall_seconds)
        try:
            for number, shape in enumerate(self._shapes):
                for choice in shape.opening():
                    await self._write(writer, (choice,), prompt=self._prompts[number // self._asked.n])
            await self._output(writer, *first)
            async for index, output in answers:
                text = self._shapes[index].plain(output)
                if text is None:
                    await self._output(writer, index, output)
                    continue
                self._last[index] = output
                if text and not writer.write_nowait(event := self._plain(index, text)):
                    await writer.write(event)
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
        self._last[index] = output
        for choice in self._shapes[index].chunks(output):
            await self._write(writer, (choice,))

    def _plain(self, index: int, text: str) -> bytes:
        """Return the event that `_write` makes of a choice with text only: a chunk as it is always, with new text."""
        around = self._around.get(index)
        if around is None:
            place = secrets.token_hex(16)  # stands nowhere else
            chunk = self._encode(self._chunk((self._shapes[index].choice(place),), None))
            before, _, behind = chunk.partition(self._encode(place))
            if self._asked.continuous_usage:
                behind = behind.removesuffix(b"null}")
            around = self._around[index] = b"data: " + before, behind
        if not self._asked.continuous_usage:
            return b"%b%b%b\n\n" % (around[0], self._encode(text), around[1])
        return b"%b%b%b%b}\n\n" % (
            around[0],
            self._encode(text),
            around[1],
            self._encode(total_usage(self.usages, self._asked.n)),
        )

    async def _write(
        self,
        writer: EventWriter,
        choices: tuple[Choice, ...],
        usage: UsageObject | None = None,
        prompt: list[int] | None = None,
    ) -> None:
        if usage is None and self._asked.continuous_usage:
            usage = total_usage(self.usages, self._asked.n)
        await writer.write(b"data: " + self._encode(self._chunk(choices, usage, prompt)) + b"\n\n")

    def _chunk(
        self, choices: tuple[Choice, ...], usage: UsageObject | None, prompt: list[int] | None = None
    ) -> Answer[Choice]:
        shown: UsageObject | UnsetType | None = usage if self._asked.include_usage else UNSET
        return Answer(
            id=self._id,
            object=self._object,
            created=self._created,
            model=self._model,
            choices=choices,
            usage=shown,
            prompt_token_ids=tuple(prompt) if prompt is not None and self._asked.return_token_ids else UNSET,
        )
