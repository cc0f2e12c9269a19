"""/v1/responses: the Responses API, created and streamed. Nothing is stored, so no response can be gone on from."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

import msgspec

from overlap.messages import Output, Usage
from overlap.serve.chat import checked_tools, plain_call, plain_message, plain_text
from overlap.serve.errors import ApiError
from overlap.serve.grammar import form_of_format
from overlap.serve.protocol import MEANINGLESS, Asked, Sampled, asked, decode, sampling
from overlap.serve.tools import CallBegins, CallGoesOn, MessageReader, Part, Text, Thought

_MEANINGLESS: Final = MEANINGLESS | {"max_tool_calls"}
_UNSUPPORTED: Final[Mapping[str, tuple[object, ...]]] = {
    "previous_response_id": (),
    "conversation": (),
    "background": (False,),
    "background_options": (),
    "truncation": ("disabled",),
    "reasoning": ({}, {"effort": None}, {"effort": "medium"}),
    "prompt": (),
    "image": (),
    "access_programs": (),
    "context_management": ([],),
    "moderation": (),
    "top_logprobs": (0,),
}
_INCLUDED: Final = ("reasoning.encrypted_content",)  # we encrypt nothing, so there is none to include
_TEXTS: Final = ("input_text", "output_text", "text")


class ResponseRequest(msgspec.Struct, frozen=True, kw_only=True):
    """The body of /v1/responses."""

    input: str | list[dict[str, Any]]
    model: str | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    ignore_eos: bool = False
    stream: bool = False
    stream_options: dict[str, Any] | None = None
    text: dict[str, Any] | None = None
    include: list[str] = []  # msgspec copies it
    tools: list[dict[str, Any]] = []
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool = True


def parse_response(body: bytes) -> tuple[ResponseRequest, Asked]:
    """Understand the body of /v1/responses. Raises ApiError, and RequestError for a value out of range."""
    request = decode(body, ResponseRequest, meaningless=_MEANINGLESS, unsupported=_UNSUPPORTED)
    for name in request.include:
        if name not in _INCLUDED:
            raise ApiError(400, f"include {name[:64]!r} is not supported by this server yet. Leave it out.",
                           param="include", code="unsupported_parameter")  # fmt: skip
    if request.stream_options is not None and not request.stream:
        raise ApiError(400, "stream_options is only for stream=true.", param="stream_options")
    form = dict(request.text or {})
    if form.pop("verbosity", None) not in (None, "medium") or set(form) - {"format"}:
        raise ApiError(400, "text may hold a format and nothing else here.", param="text", code="unsupported_parameter")
    wanted = form.get("format")
    if wanted is not None and not isinstance(wanted, dict):
        raise ApiError(400, "text.format must be an object with a type.", param="text.format")
    sampled = Sampled(
        model=request.model,
        stream=request.stream,
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=request.top_k,
        min_p=request.min_p,
        seed=request.seed,
        ignore_eos=request.ignore_eos,
    )
    try:
        params = sampling(sampled, max_tokens=request.max_output_tokens, logprobs=None)
    except ValueError as error:
        raise ApiError(400, str(error).replace("max_tokens", "max_output_tokens")) from None
    if wanted is not None:
        params = replace(params, structured=form_of_format(wanted, where="text.format"))
    chat_tools = [_chat_tool(f"tools[{index}]", tool) for index, tool in enumerate(request.tools)]
    tools, must_call = checked_tools(chat_tools, request.tool_choice)
    return request, asked(
        sampled,
        (_messages(request),),
        params,
        tools=tools,
        must_call=must_call,
        parallel_tool_calls=request.parallel_tool_calls and not isinstance(request.tool_choice, dict),
    )


def _chat_tool(where: str, tool: Mapping[str, Any]) -> dict[str, Any]:
    if tool.get("type") != "function":
        raise ApiError(400, f"{where} is of the type {str(tool.get('type'))[:64]!r}; this server has only 'function'.",
                       param=where)  # fmt: skip
    function = {key: tool[key] for key in ("name", "description", "parameters", "strict") if tool.get(key) is not None}
    return {"type": "function", "function": function}


def _messages(request: ResponseRequest) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    if request.instructions:
        messages.append({"role": "system", "content": request.instructions})
    items = [{"role": "user", "content": request.input}] if isinstance(request.input, str) else request.input
    if not items:
        raise ApiError(400, "input is empty. Send a text or one message at least.", param="input")
    for index, item in enumerate(items):
        where = f"input[{index}]"
        match item.get("type", "message"):
            case "message":
                kept = {
                    "role": item.get("role"),
                    "content": plain_text(f"{where}.content", item.get("content"), _TEXTS),
                }
                messages.append(plain_message(where, kept))
            case "function_call":
                call = {key: item.get(key) for key in ("name", "arguments")}
                plain = plain_call(where, {"id": item.get("call_id"), "function": call})
                if messages and messages[-1].get("tool_calls"):
                    messages[-1]["tool_calls"].append(plain)
                else:
                    messages.append({"role": "assistant", "content": "", "tool_calls": [plain]})
            case "function_call_output":
                text = plain_text(f"{where}.output", item.get("output"), _TEXTS)
                given = {"role": "tool", "content": text, "tool_call_id": item.get("call_id")}
                messages.append(plain_message(where, given))
            case "reasoning":
                pass  # what the model thought before is not shown to it again, as templates do with it
            case other:
                raise ApiError(400, f"{where} is of the type {str(other)[:64]!r}, which this server does not know.",
                               param=where)  # fmt: skip
    return messages


class ResponseAnswer:
    """A response as it comes: its items, and the events that tell of them."""

    def __init__(self, request: ResponseRequest, reader: MessageReader, *, id: str, created: int, model: str) -> None:  # noqa: A002
        self._request = request
        self._reader = reader
        self._id = id
        self._created = created
        self._model = model
        self._items: list[dict[str, Any]] = []
        self._open = False
        self._number = 0

    def opening(self) -> list[dict[str, Any]]:
        """Return the events that a stream begins with."""
        begun = self._object("in_progress", None)
        return [self._event("response.created", response=begun), self._event("response.in_progress", response=begun)]

    def push(self, output: Output) -> list[dict[str, Any]]:
        """Return the events of what is new."""
        parts = self._reader.push(output.text_delta) if output.text_delta else []
        if output.finished:
            parts += self._reader.end()
        events = [event for part in parts for event in self._take(part)]
        if output.finished:
            if not self._items:  # an answer without a token of text is an empty message
                events += self._begin(_message(), {"type": "output_text", "text": "", "annotations": []})
            cut = output.finish_reason == "length"
            events += self._end("incomplete" if cut else "completed")
            whole = self.whole(output)
            events.append(self._event(f"response.{whole['status']}", response=whole))
        return events

    def whole(self, output: Output) -> dict[str, Any]:
        """Return the response as it is at its end."""
        return self._object("incomplete" if output.finish_reason == "length" else "completed", output.usage)

    def error(self, error: ApiError) -> dict[str, Any]:
        """Return the event that tells of a failure."""
        return self._event("error", code=error.code, message=error.message, param=error.param)

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        number = self._number
        self._number += 1
        return {"type": kind, "sequence_number": number, **fields}

    def _take(self, part: Part) -> list[dict[str, Any]]:
        match part:
            case Text(text):
                return self._goes_on("message", text, "response.output_text.delta", logprobs=[])
            case Thought(text):
                return self._goes_on("reasoning", text, "response.reasoning_text.delta")
            case CallBegins(_, id_, name):
                item = {"id": f"fc_{secrets.token_hex(12)}", "type": "function_call", "status": "in_progress"}
                return [*self._end("completed"), *self._begin({**item, "call_id": id_, "name": name, "arguments": ""})]
            case CallGoesOn(_, arguments):
                item = self._items[-1]
                item["arguments"] += arguments
                return [self._of_item("response.function_call_arguments.delta", delta=arguments)]

    def _goes_on(self, kind: str, text: str, event: str, **fields: Any) -> list[dict[str, Any]]:
        events: list[dict[str, Any]] = []
        if not self._open or self._items[-1]["type"] != kind:
            events += self._end("completed")
            if kind == "message":
                events += self._begin(_message(), {"type": "output_text", "text": "", "annotations": []})
            else:
                item = {"id": f"rs_{secrets.token_hex(12)}", "type": "reasoning", "summary": [], "content": []}
                events += self._begin({**item, "status": "in_progress"}, {"type": "reasoning_text", "text": ""})
        self._items[-1]["content"][0]["text"] += text
        return [*events, self._of_item(event, content_index=0, delta=text, **fields)]

    def _begin(self, item: dict[str, Any], part: dict[str, Any] | None = None) -> list[dict[str, Any]]:
        self._open = True
        self._items.append(item)
        shown = {**item, "content": []} if "content" in item else {**item}
        events = [self._event("response.output_item.added", output_index=len(self._items) - 1, item=shown)]
        if part is not None:
            item["content"] = [part]
            events.append(self._of_item("response.content_part.added", content_index=0, part={**part}))
        return events

    def _end(self, status: str) -> list[dict[str, Any]]:
        if not self._open:
            return []
        self._open = False
        item = self._items[-1]
        item["status"] = status
        events: list[dict[str, Any]] = []
        if item["type"] == "function_call":
            told = {"arguments": item["arguments"], "name": item["name"]}
            events.append(self._of_item("response.function_call_arguments.done", **told))
        else:
            part = item["content"][0]
            kind = "output_text" if item["type"] == "message" else "reasoning_text"
            more: dict[str, Any] = {"logprobs": []} if item["type"] == "message" else {}
            events.append(self._of_item(f"response.{kind}.done", content_index=0, text=part["text"], **more))
            events.append(self._of_item("response.content_part.done", content_index=0, part=part))
        return [*events, self._event("response.output_item.done", output_index=len(self._items) - 1, item=item)]

    def _of_item(self, kind: str, **fields: Any) -> dict[str, Any]:
        return self._event(kind, item_id=self._items[-1]["id"], output_index=len(self._items) - 1, **fields)

    def _object(self, status: str, usage: Usage | None) -> dict[str, Any]:
        request = self._request
        return {
            "id": self._id,
            "object": "response",
            "created_at": float(self._created),
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "metadata": {},
            "model": self._model,
            "output": [*self._items],
            "parallel_tool_calls": request.parallel_tool_calls,
            "previous_response_id": None,
            "store": False,
            "temperature": request.temperature,
            "text": {"format": (request.text or {}).get("format") or {"type": "text"}},
            "tool_choice": request.tool_choice or "auto",
            "tools": [{"strict": None, "parameters": None, **tool} for tool in request.tools],
            "top_p": request.top_p,
            "truncation": "disabled",
            "usage": None if usage is None else _usage(usage),
        }


def _message() -> dict[str, Any]:
    return {
        "id": f"msg_{secrets.token_hex(12)}",
        "type": "message",
        "role": "assistant",
        "status": "in_progress",
        "content": [],
    }


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.total_tokens,
    }
