"""/v1/chat/completions: conversations, with tools and reasoning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, TypeVar

import msgspec
from msgspec import UNSET

from overlap.messages import Output
from overlap.serve.errors import ApiError
from overlap.serve.grammar import functions_to_call
from overlap.serve.logprobs import ChatLogprobs, Decode, chat_logprobs
from overlap.serve.protocol import MAX_LOGPROBS, Asked, Sampled, asked, decode, sampling
from overlap.serve.shapes import (
    ChatChoice,
    ChatChunkChoice,
    Choice,
    Delta,
    FunctionCall,
    FunctionDelta,
    Message,
    Progress,
    Reason,
    ToolCall,
    ToolCallDelta,
)
from overlap.serve.tools import CallBegins, CallGoesOn, MessageReader, Part, Text, Thought

MAX_TOOLS: Final = 128
"""Tools of one request, as in the OpenAI API."""
_ROLES: Final = ("system", "user", "assistant", "tool")


class ChatRequest(Sampled, frozen=True, kw_only=True):
    """The body of /v1/chat/completions."""

    messages: list[dict[str, Any]]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] = []  # noqa: RUF012 - msgspec copies it
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool = True


def parse_chat(body: bytes) -> Asked:
    """Understand the body of /v1/chat/completions. Raises ApiError, and RequestError for a value out of range."""
    request = decode(body, ChatRequest)
    if not request.messages:
        raise ApiError(400, "messages is empty. Send one message at least.", param="messages")
    messages = [plain_message(f"messages[{index}]", message) for index, message in enumerate(request.messages)]
    both = {request.max_tokens, request.max_completion_tokens} - {None}
    if len(both) > 1:
        raise ApiError(
            400,
            f"max_tokens ({request.max_tokens}) and max_completion_tokens ({request.max_completion_tokens}) mean the "
            "same and differ. Send one of them.",
            param="max_completion_tokens",
        )
    top = request.top_logprobs
    if top is not None and not 0 <= top <= MAX_LOGPROBS:
        raise ApiError(400, f"top_logprobs must be from 0 to {MAX_LOGPROBS}, not {top}.", param="top_logprobs")
    if top and not request.logprobs:
        raise ApiError(400, "top_logprobs is only for logprobs=true.", param="top_logprobs")
    params = sampling(
        request, max_tokens=both.pop() if both else None, logprobs=(top or 0) if request.logprobs else None
    )
    tools, must_call = checked_tools(request.tools, request.tool_choice)
    return asked(
        request,
        (messages,),
        params,
        tools=tools,
        must_call=must_call,
        parallel_tool_calls=request.parallel_tool_calls and not isinstance(request.tool_choice, dict),
    )


# ---------------------------------------------------------------- what comes


class _Function(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class _Tool(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    type: str
    function: _Function


class _Call(msgspec.Struct, frozen=True, kw_only=True):
    class Function(msgspec.Struct, frozen=True, kw_only=True):
        name: str
        arguments: str

    id: str
    function: Function
    type: str = "function"


S = TypeVar("S", bound=msgspec.Struct)


def convert(where: str, value: object, kind: type[S]) -> S:
    """Return `value` as a `kind`. Raises an ApiError that names the field."""
    try:
        return msgspec.convert(value, kind, strict=True)
    except msgspec.ValidationError as error:
        raise ApiError(400, f"{where}: {error}.", param=where) from None


def checked_tools(
    tools: list[dict[str, Any]], choice: str | Mapping[str, Any] | None
) -> tuple[tuple[Mapping[str, Any], ...], tuple[str, ...]]:
    """Return the tools that the model may call, and the names of those of which it must call one. Raises ApiError."""
    if choice is not None and choice != "none" and not tools:
        raise ApiError(400, "tool_choice is only for a request with tools.", param="tool_choice")
    if len(tools) > MAX_TOOLS:
        raise ApiError(400, f"tools has {len(tools)} tools; send {MAX_TOOLS} at most.", param="tools")
    for index, tool in enumerate(tools):
        checked = convert(f"tools[{index}]", tool, _Tool)
        if checked.type != "function":
            raise ApiError(400, f"tools[{index}].type must be 'function', not {checked.type[:64]!r}.",
                           param=f"tools[{index}].type")  # fmt: skip
        if not 1 <= len(checked.function.name) <= 64:
            raise ApiError(400, f"tools[{index}].function.name must have 1 to 64 characters.",
                           param=f"tools[{index}].function.name")  # fmt: skip
    names = [tool["function"]["name"] for tool in tools]
    may_call, must_call = functions_to_call("auto" if choice is None else choice, names)
    return tuple(tools) if may_call else (), must_call


def plain_message(where: str, message: Mapping[str, Any]) -> dict[str, Any]:
    """Give a message the shape that chat templates expect: role, text, and what belongs to tools. Raises ApiError."""
    given = {name: value for name, value in message.items() if value is not None and value != []}
    role = given.pop("role", None)
    if role == "developer":  # OpenAI's newer name for it; templates of open models know only the older one
        role = "system"
    if role not in _ROLES:
        raise ApiError(400, f"{where}.role must be 'system', 'user', 'assistant' or 'tool', not {str(role)[:64]!r}.",
                       param=f"{where}.role")  # fmt: skip
    calls = given.pop("tool_calls", None) if role == "assistant" else None
    if "content" not in message and calls is None:
        raise ApiError(400, f"{where}.content is missing.", param=f"{where}.content")
    plain: dict[str, Any] = {"role": role, "content": plain_text(f"{where}.content", given.pop("content", ""))}
    strings = {"assistant": ("name", "reasoning_content"), "tool": ("name", "tool_call_id")}.get(role, ("name",))
    for name in strings:
        value = given.pop(name, None)
        if value is not None and not isinstance(value, str):
            raise ApiError(400, f"{where}.{name} must be a string.", param=f"{where}.{name}")
        if value is not None:
            plain[name] = value
    if calls is not None:
        plain["tool_calls"] = _plain_calls(f"{where}.tool_calls", calls)
    for other in given:
        raise ApiError(400, f"{where}.{other[:64]} is not supported by this server yet. Leave it out.",
                       param=f"{where}.{other[:64]}", code="unsupported_parameter")  # fmt: skip
    return plain


def _plain_calls(where: str, calls: object) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise ApiError(400, f"{where} must be a list of tool calls.", param=where)
    return [plain_call(f"{where}[{index}]", call) for index, call in enumerate(calls)]


def plain_call(where: str, call: object) -> dict[str, Any]:
    """Return a tool call with its arguments as an object, which templates write as JSON. Raises ApiError."""
    checked = convert(where, call, _Call)
    at = f"{where}.function.arguments"
    try:
        arguments = msgspec.json.decode(checked.function.arguments or "{}", type=dict[str, Any])
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ApiError(400, f"{at} is not the JSON text of an object: {error}.", param=at) from None
    return {"id": checked.id, "type": "function", "function": {"name": checked.function.name, "arguments": arguments}}


def plain_text(where: str, content: object, kinds: tuple[str, ...] = ("text",)) -> str:
    """Flatten a list of text parts: many templates know only strings. Parts are joined by line ends, as vLLM does."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ApiError(400, f"{where} must be a text or a list of text parts.", param=where)
    texts: list[str] = []
    for number, part in enumerate(content):
        match part:
            case {"type": str(kind), "text": str(text)} if kind in kinds:
                texts.append(text)
            case _:
                raise ApiError(400, f"{where}[{number}] is not a text part: this model reads text only.", param=where)
    return "\n".join(texts)


# ---------------------------------------------------------------- what goes


class ChatAnswer:
    """One choice of a chat answer as it comes."""

    def __init__(self, index: int, decode: Decode, reader: MessageReader, *, token_ids: bool = False) -> None:
        self._index = index
        self._decode = decode
        self._reader = reader
        self._token_ids = token_ids
        self._progress = Progress()

    def opening(self) -> list[Choice]:
        """Clients learn the role from the first delta."""
        return [ChatChunkChoice(index=self._index, delta=Delta(role="assistant", content=""))]

    def plain(self, output: Output) -> str | None:
        """Return what is new, if that is text and nothing else."""
        if self._token_ids or output.finish_reason is not None or output.logprobs is not None:
            return None
        return output.text_delta if self._reader.passes else None

    def choice(self, text: str) -> Choice:
        """Return some text as the choice of a chunk."""
        return ChatChunkChoice(index=self._index, delta=Delta(content=text))

    def chunks(self, output: Output) -> list[Choice]:
        """Return what is new as the choices of chunks; the last has the finish reason."""
        parts = self._reader.push(output.text_delta) if output.text_delta else []
        if output.finished:
            parts += self._reader.end()
        deltas = [_delta(part) for part in parts]
        logprobs, tokens = self._logprobs(output), self._progress.tokens(output)
        if not deltas and (logprobs is not None or (self._token_ids and tokens)):
            deltas = [Delta(content="")]
        choices: list[Choice] = [
            ChatChunkChoice(
                index=self._index,
                delta=delta,
                logprobs=logprobs if number == 0 else None,
                token_ids=tuple(tokens) if self._token_ids and number == 0 else UNSET,
            )
            for number, delta in enumerate(deltas)
        ]
        if output.finished:
            choices.append(ChatChunkChoice(index=self._index, delta=Delta(), finish_reason=self._reason(output)))
        return choices

    def whole(self, output: Output) -> Choice:
        """Return the answer in one piece."""
        content, reasoning, calls = collect([*self._reader.push(output.text), *self._reader.end()])
        message = Message(
            content=None if calls and not content else content,
            reasoning_content=reasoning or UNSET,
            tool_calls=calls or UNSET,
        )
        return ChatChoice(
            index=self._index,
            message=message,
            logprobs=self._logprobs(output),
            finish_reason=self._reason(output),
            token_ids=tuple(output.token_ids) if self._token_ids else UNSET,
        )

    def _reason(self, output: Output) -> Reason | None:
        return "tool_calls" if output.finish_reason == "stop" and self._reader.called else output.finish_reason

    def _logprobs(self, output: Output) -> ChatLogprobs | None:
        entries = self._progress.logprobs(output)
        return chat_logprobs(entries, self._decode) if entries else None


def _delta(part: Part) -> Delta:
    match part:
        case Text(text):
            return Delta(content=text)
        case Thought(text):
            return Delta(reasoning_content=text)
        case CallBegins(index, id_, name):
            function = FunctionDelta(name=name, arguments="")
            return Delta(tool_calls=(ToolCallDelta(index=index, id=id_, type="function", function=function),))
        case CallGoesOn(index, arguments):
            return Delta(tool_calls=(ToolCallDelta(index=index, function=FunctionDelta(arguments=arguments)),))


def collect(parts: list[Part]) -> tuple[str, str, tuple[ToolCall, ...]]:
    """Return the text, the reasoning and the calls of a whole answer."""
    content = "".join(part.text for part in parts if isinstance(part, Text))
    reasoning = "".join(part.text for part in parts if isinstance(part, Thought))
    arguments: dict[int, str] = {}
    for part in parts:
        if isinstance(part, CallGoesOn):
            arguments[part.index] = arguments.get(part.index, "") + part.arguments
    calls = tuple(
        ToolCall(id=part.id, function=FunctionCall(name=part.name, arguments=arguments.get(part.index, "")))
        for part in parts
        if isinstance(part, CallBegins)
    )
    return content, reasoning, calls
