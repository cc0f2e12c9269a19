"""The handlers of one engine's routes."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any, Final

import msgspec
from aiohttp import web
from msgspec import UNSET

from overlap.messages import Output, Usage
from overlap.serve.access import FAIRNESS_KEY, TOLD, ServeOptions, read_body
from overlap.serve.answers import answer, encoded
from overlap.serve.chat import ChatAnswer, parse_chat
from overlap.serve.completions import TextAnswer, parse_completion
from overlap.serve.door import Door
from overlap.serve.errors import ApiError, to_api_error
from overlap.serve.grammar import held
from overlap.serve.logprobs import prompt_table
from overlap.serve.openapi import document
from overlap.serve.protocol import Asked
from overlap.serve.responses import ResponseAnswer, parse_response
from overlap.serve.shapes import CHUNK_OBJECTS, ID_PREFIXES, OBJECTS, Answer, AnswerShape, Kind, total_usage
from overlap.serve.sse import EventStream, EventWriter, event_response
from overlap.serve.tokens import Detokenized, parse_detokenize, parse_tokenize, tokenize
from overlap.serve.tools import MessageReader, call_format, thinking
from overlap.serve.turnstile import Turnstile

BEGUN_PER_TURN: Final = 8
"""Requests that are begun in one turn of the event loop, which takes 2 to 4 ms then."""
_PROMPT_END: Final = 8  # tokens: a template that opens reasoning does it at the very end of the prompt
_encode: Final = msgspec.json.Encoder().encode


class Endpoint:
    """The handlers of the routes of one Door."""

    def __init__(self, door: Door, options: ServeOptions) -> None:
        self._door = door
        self._options = options
        self._model_name = options.model_name or door.model_name
        self._started = int(time.time())
        self._turnstile = Turnstile(BEGUN_PER_TURN)

    def routes(self) -> list[web.RouteDef]:
        """Return what can be asked."""
        return [
            web.get("/health", self.health, name="health"),
            web.get("/ready", self.ready),
            web.get("/openapi.json", self.openapi),
            web.get("/v1/models", self.models),
            web.get("/v1/models/{model:.+}", self.model),
            web.post("/v1/completions", self.completions),
            web.post("/v1/chat/completions", self.chat_completions),
            web.post("/v1/responses", self.responses),
            web.post("/tokenize", self.tokenize),
            web.post("/detokenize", self.detokenize),
        ]

    # ---------------------------------------------------------------- what there is

    async def health(self, _: web.Request) -> web.Response:
        """200 while the engine lives, even if it is ending; 503 once whatever runs it should start it again."""
        health = self._door.health()
        if health.ok:
            return _json({"status": "ok"})
        return _json({"status": "failed", "reason": health.reason}, status=503)

    async def ready(self, _: web.Request) -> web.Response:
        """200 while new requests are taken, else 503 and why not."""
        health = self._door.health()
        if health.ready:
            return _json({"status": "ok"})
        return _json({"status": "ending" if health.ok else "failed", "reason": health.reason}, status=503)

    async def openapi(self, _: web.Request) -> web.Response:
        """Describe the routes."""
        return _json(document(keys=bool(self._options.api_keys), model_name=self._model_name))

    async def models(self, _: web.Request) -> web.Response:
        """List the one model."""
        return _json({"object": "list", "data": [self._description()]})

    async def model(self, request: web.Request) -> web.Response:
        """Describe the one model."""
        self._check_model(request.match_info["model"])
        return _json(self._description())

    async def tokenize(self, request: web.Request) -> web.Response:
        """Turn a text or messages into tokens."""
        asked = parse_tokenize(await self._body(request))
        self._check_model(asked.model)
        return _json(await tokenize(self._door, asked))

    async def detokenize(self, request: web.Request) -> web.Response:
        """Turn tokens into text."""
        asked = parse_detokenize(await self._body(request))
        self._check_model(asked.model)
        return _json(Detokenized(prompt=self._door.decode(asked.tokens)))

    # ---------------------------------------------------------------- answers

    async def completions(self, request: web.Request) -> web.StreamResponse:
        """Go on with a text."""
        return await self._answer(request, parse_completion(await self._body(request)), "text")

    async def chat_completions(self, request: web.Request) -> web.StreamResponse:
        """Answer a conversation."""
        return await self._answer(request, parse_chat(await self._body(request)), "chat")

    async def responses(self, request: web.Request) -> web.StreamResponse:
        """Answer in the shape of the Responses API."""
        wanted, asked = parse_response(await self._body(request))
        self._check_model(asked.model)
        prompts = await self._prompts(request, asked)
        asked = self._held(asked, prompts[0])
        id_ = f"resp_{uuid.uuid4().hex}"
        response = ResponseAnswer(
            wanted, self._reader(asked, prompts[0]), id=id_, created=int(time.time()), model=self._model_name
        )
        async with aclosing(self._outputs(request, prompts, asked, id_)) as answers:
            if asked.stream:
                return await self._stream_response(request, response, answers)
            async for _, output in answers:
                response.push(output)
        _tell(request, {0: output.usage}, 1, output.finish_reason)
        return _json(response.whole(output))

    async def _answer(self, request: web.Request, asked: Asked, kind: Kind) -> web.StreamResponse:
        self._check_model(asked.model)
        prompts = await self._prompts(request, asked)
        if kind == "chat":
            asked = self._held(asked, prompts[0])
        shapes = self._shapes(asked, prompts, kind)
        id_ = ID_PREFIXES[kind] + uuid.uuid4().hex
        created = int(time.time())
        async with aclosing(self._outputs(request, prompts, asked, id_)) as answers:
            if asked.stream:
                stream = EventStream(
                    asked, shapes, prompts, id=id_, object=CHUNK_OBJECTS[kind], created=created, model=self._model_name,
                    stall_seconds=self._options.stall_seconds,
                )  # fmt: skip
                try:
                    return await stream.send(request, answers)
                finally:
                    failed = None if stream.failure is None else stream.failure.code
                    _tell(request, stream.usages, asked.n, None, error=failed)
            finals = {index: output async for index, output in answers if output.finished}
        usages = {index: output.usage for index, output in finals.items()}
        _tell(request, usages, asked.n, finals[0].finish_reason)
        return _json(
            Answer(
                id=id_,
                object=OBJECTS[kind],
                created=created,
                model=self._model_name,
                choices=tuple(shape.whole(finals[index]) for index, shape in enumerate(shapes)),
                usage=total_usage(usages, asked.n),
                prompt_token_ids=tuple(prompts[0]) if asked.return_token_ids else UNSET,
                prompt_logprobs=prompt_table(finals[0], asked.prompt_logprobs, self._door.decode)
                if kind == "chat"
                else UNSET,  # each choice has its own
            )
        )

    async def _stream_response(
        self, request: web.Request, response: ResponseAnswer, answers: AsyncGenerator[tuple[int, Output], None]
    ) -> web.StreamResponse:
        _, output = await anext(answers)
        stream = event_response(request)
        await stream.prepare(request)
        writer = EventWriter(stream, request, self._options.stall_seconds)
        try:
            for event in [*response.opening(), *response.push(output)]:
                await writer.write(_event(event))
            async for _, output in answers:
                for event in response.push(output):
                    await writer.write(_event(event))
            await stream.write_eof()
        except ConnectionError:
            pass  # the client left; there is nobody to tell
        except Exception as error:  # whatever it is, the client must not take this for the end
            await writer.fail(_event(response.error(to_api_error(error))))
        finally:
            _tell(request, {0: output.usage}, 1, output.finish_reason)
        return stream

    # ---------------------------------------------------------------- inside

    async def _body(self, request: web.Request) -> bytes:
        body = await read_body(request, self._options.body_seconds)
        await self._turnstile.wait_turn()
        return body

    async def _prompts(self, request: web.Request, asked: Asked) -> list[list[int]]:
        if asked.tools and call_format(self._door.chat_template) is None:
            raise ApiError(400, "The model's chat template takes no tools. Leave tools out, or use another model.",
                           param="tools", code="unsupported_parameter")  # fmt: skip
        if self._options.log_prompts:
            request[TOLD]["prompts"] = asked.prompts
        return await encoded(self._door, asked)

    def _outputs(
        self, request: web.Request, prompts: Sequence[list[int]], asked: Asked, id_: str
    ) -> AsyncGenerator[tuple[int, Output], None]:
        fairness_key = request.get(FAIRNESS_KEY, "")
        return answer(self._door, prompts, asked, id_, fairness_key, self._options.deadline_seconds)

    def _shapes(self, asked: Asked, prompts: Sequence[list[int]], kind: Kind) -> list[AnswerShape]:
        ids = asked.return_token_ids
        shapes: list[AnswerShape] = []
        for index in range(len(prompts) * asked.n):
            prompt = prompts[index // asked.n]
            if kind == "chat":
                shapes.append(ChatAnswer(index, self._door.decode, self._reader(asked, prompt), token_ids=ids))
                continue
            text = asked.prompts[index // asked.n] if asked.echo else None
            echoed = text if text is None or isinstance(text, str) else self._door.decode(prompt)
            scores = asked.prompt_logprobs
            shapes.append(
                TextAnswer(index, self._door.decode, prompt=prompt, echoed=echoed, token_ids=ids, num_scores=scores)
            )
        return shapes

    def _held(self, asked: Asked, prompt: Sequence[int]) -> Asked:
        """Return what was asked for with the form of the whole answer, which hangs on the chat template."""
        if asked.params.structured is None and not asked.must_call:
            return asked
        template = self._door.chat_template
        params = held(
            asked.params,
            asked.tools,
            asked.must_call,
            parallel=asked.parallel_tool_calls,
            calls=call_format(template),
            thinking=thinking(template, self._door.decode(prompt[-_PROMPT_END:])),
        )
        return replace(asked, params=params)

    def _reader(self, asked: Asked, prompt: Sequence[int]) -> MessageReader:
        template = self._door.chat_template
        return MessageReader(
            thinking=thinking(template, self._door.decode(prompt[-_PROMPT_END:])),
            calls=call_format(template) if asked.tools else None,
            names={tool["function"]["name"] for tool in asked.tools},
            parallel=asked.parallel_tool_calls,
        )

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self._model_name:
            raise ApiError(404, f"There is no model {name[:200]!r} here; there is {self._model_name!r}.",
                           param="model", code="model_not_found")  # fmt: skip

    def _description(self) -> dict[str, Any]:
        return {
            "id": self._model_name,
            "object": "model",
            "created": self._started,
            "owned_by": "overlap",
            "max_model_len": self._door.context,
        }


def _tell(
    request: web.Request, usages: Mapping[int, Usage], n: int, reason: str | None, *, error: str | None = None
) -> None:
    """Let the log say what an answer has cost."""
    usage = total_usage(usages, n)
    told = {
        "prompt_tokens": usage.prompt_tokens,
        "cached_tokens": usage.prompt_tokens_details.cached_tokens,
        "completion_tokens": usage.completion_tokens,
        "finish_reason": reason,
        "error": error,
    }
    request[TOLD].update({name: value for name, value in told.items() if value is not None})


def _event(event: dict[str, Any]) -> bytes:
    kind: str = event["type"]
    return b"event: " + kind.encode() + b"\ndata: " + _encode(event) + b"\n\n"


def _json(body: object, *, status: int = 200) -> web.Response:
    return web.Response(body=_encode(body), status=status, content_type="application/json")
