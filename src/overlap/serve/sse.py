"""An answer as server-sent events."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Final

import msgspec
from aiohttp import web
from msgspec import UNSET, UnsetType

from overlap.messages import Output, Usage
from overlap.serve.errors import to_api_error
from overlap.serve.protocol import Asked
from overlap.serve.shapes import Answer, Choice, Shape, UsageObject, total_usage

HEADERS: Final = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # a proxy such as nginx would otherwise hold chunks back
}
DONE: Final = b"data: [DONE]\n\n"


class EventStream:
    """Writes one request's answer, chunk by chunk, all under one id."""

    def __init__(self, shape: Shape, asked: Asked, *, id: str, created: int, model: str) -> None:  # noqa: A002
        self._shape = shape
        self._asked = asked
        self._id = id
        self._created = created
        self._model = model
        self._encode = msgspec.json.Encoder().encode
        self._usages: dict[int, Usage] = {}

    async def send(self, request: web.Request, answers: AsyncIterator[tuple[int, Output]]) -> web.StreamResponse:
        """Stream `answers` to the client.

        The headers wait for the first Output, so that a bad request still gets its status code: what `answers` raises
        before is raised here. A failure after that becomes an error event, and then the connection is cut, because a
        client takes a stream that merely ends for a whole one.
        """
        first = await anext(answers)
        response = web.StreamResponse(headers=HEADERS)
        await response.prepare(request)
        try:
            for index in range(len(self._asked.prompts)):
                await self._write(response, self._shape.opening(index))
            await self._output(response, *first)
            async for index, output in answers:
                await self._output(response, index, output)
            if self._asked.include_usage:
                await self._write(response, (), total_usage([*self._usages.values()]))
            await response.write(DONE)
            await response.write_eof()
        except ConnectionError:
            pass  # the client left; there is nobody to tell
        except Exception as error:  # whatever it is, the client must not take this for the end
            await response.write(b"data: " + to_api_error(error).body() + b"\n\n")
            if request.transport is not None:
                request.transport.abort()
        return response

    async def _output(self, response: web.StreamResponse, index: int, output: Output) -> None:
        self._usages[index] = output.usage
        if output.text_delta:
            await self._write(response, (self._shape.delta(index, output.text_delta),))
        if output.finish_reason is not None:
            await self._write(response, (self._shape.ending(index, output.finish_reason),))

    async def _write(
        self, response: web.StreamResponse, choices: tuple[Choice, ...], usage: UsageObject | None = None
    ) -> None:
        if not choices and usage is None:
            return
        shown: UsageObject | UnsetType | None = usage if self._asked.include_usage else UNSET
        if usage is None and self._asked.continuous_usage:
            shown = total_usage([*self._usages.values()])
        chunk = Answer(
            id=self._id,
            object=self._shape.chunk_object,
            created=self._created,
            model=self._model,
            choices=choices,
            usage=shown,
        )
        await response.write(b"data: " + self._encode(chunk) + b"\n\n")
