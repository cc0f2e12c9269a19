"""What clients send: JSON in the shape of the OpenAI API, checked, and turned into what the engine takes.

Every field is either understood, meaningless for us and let pass, or refused by name. None is ignored that would have
changed the answer. A field that is null counts as left out, as clients send null for what they do not set.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import msgspec

from overlap.errors import nearest
from overlap.messages import Prompt, SamplingParams
from overlap.serve.errors import ApiError

MAX_PROMPTS: Final = 256
"""Prompts in one request to /v1/completions."""
MAX_STOPS: Final = 4
"""Stop strings in one request, as in the OpenAI API."""

_MEANINGLESS: Final = frozenset(
    ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention")
)
_UNSUPPORTED: Final[Mapping[str, tuple[object, ...]]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "prompt_logprobs": (),
    "presence_penalty": (0, 0.0),
    "frequency_penalty": (0, 0.0),
    "repetition_penalty": (1, 1.0),
    "logit_bias": ({},),
    "min_tokens": (0,),
    "include_stop_str_in_output": (False,),
    "return_token_ids": (False,),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
    "moderation": (),
    "prompt_cache_options": (),
    "priority": (0,),
    "cache_salt": (),
}
"""Fields that other servers know, each with the values that ask for nothing and so are let pass."""


class StreamOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How to stream."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False  # pads chunks against an eavesdropper on packet sizes; we never pad


class Sampled(msgspec.Struct, frozen=True, kw_only=True):
    """The fields that both kinds of request have."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | list[str] = ()  # type: ignore[assignment]  # msgspec takes an immutable default for a list
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    skip_special_tokens: bool = True


class CompletionRequest(Sampled, frozen=True, kw_only=True):
    """The body of /v1/completions."""

    prompt: str | list[str | int | list[int]]
    max_tokens: int = 16


class ChatRequest(Sampled, frozen=True, kw_only=True):
    """The body of /v1/chat/completions."""

    messages: list[dict[str, Any]]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A request, understood."""

    model: str | None
    prompts: tuple[Prompt, ...]
    params: SamplingParams
    stream: bool
    include_usage: bool
    continuous_usage: bool


R = TypeVar("R", bound=Sampled)


def parse_completion(body: bytes) -> Asked:
    """Understand the body of /v1/completions. Raises ApiError, and RequestError for a value out of range."""
    request = _decode(body, CompletionRequest)
    return _asked(request, _prompts(request.prompt), request.max_tokens)


def parse_chat(body: bytes) -> Asked:
    """Understand the body of /v1/chat/completions. Raises ApiError, and RequestError for a value out of range."""
    request = _decode(body, ChatRequest)
    if not request.messages:
        raise ApiError(400, "messages is empty. Send one message at least.", param="messages")
    messages = [_message(index, message) for index, message in enumerate(request.messages)]
    both = {request.max_tokens, request.max_completion_tokens} - {None}
    if len(both) > 1:
        raise ApiError(
            400,
            f"max_tokens ({request.max_tokens}) and max_completion_tokens ({request.max_completion_tokens}) mean the "
            "same and differ. Send one of them.",
            param="max_completion_tokens",
        )
    return _asked(request, (messages,), both.pop() if both else None)


def _decode(body: bytes, kind: type[R]) -> R:
    """Turn a body into a `kind`, refusing what would not be honoured."""
    try:
        raw = msgspec.json.decode(body, type=dict[str, Any])
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ApiError(400, f"The body is not a JSON object that can be read: {error}.") from None
    known = tuple(field.name for field in msgspec.structs.fields(kind))
    given: dict[str, Any] = {}
    for name, value in raw.items():
        if value is None or name in _MEANINGLESS:
            continue
        if name in known:
            given[name] = value
        elif name not in _UNSUPPORTED:
            near = nearest(name, (*known, *_UNSUPPORTED, *_MEANINGLESS))
            raise ApiError(400, f"Unknown field {name[:64]!r}.{near}", param=name[:64], code="unknown_parameter")
        elif not any(type(value) is type(harmless) and value == harmless for harmless in _UNSUPPORTED[name]):
            raise ApiError(400, _not_supported(name), param=name, code="unsupported_parameter")
    try:
        return msgspec.convert(given, kind, strict=True)
    except msgspec.ValidationError as error:
        field = re.search(r"at `\$\.(\w+)|required field `(\w+)`", str(error))
        param = (field[1] or field[2]) if field else None
        raise ApiError(400, f"{param or 'The body'}: {error}.", param=param) from None


def _not_supported(name: str) -> str:
    if name == "n":
        return "n must be 1: more answers to one prompt are not supported yet. Send the request several times."
    return f"{name} is not supported by this server yet. Leave it out."


def _asked(request: Sampled, prompts: tuple[Prompt, ...], max_tokens: int | None) -> Asked:
    if not 0 <= request.temperature <= 2:
        raise ApiError(400, f"temperature must be in [0, 2], not {request.temperature}.", param="temperature")
    if not isinstance(request.stop, str) and len(request.stop) > MAX_STOPS:
        raise ApiError(400, f"stop has {len(request.stop)} strings; send {MAX_STOPS} at most.", param="stop")
    if request.stream_options is not None and not request.stream:
        raise ApiError(400, "stream_options is only for stream=true.", param="stream_options")
    options = request.stream_options or StreamOptions()
    return Asked(
        model=request.model,
        prompts=prompts,
        params=SamplingParams(
            temperature=request.temperature,
            top_k=request.top_k,
            top_p=request.top_p,
            min_p=request.min_p,
            seed=request.seed,
            max_tokens=max_tokens,
            stop=request.stop,
            stop_token_ids=request.stop_token_ids,
            ignore_eos=request.ignore_eos,
            skip_special_tokens=request.skip_special_tokens,
        ),
        stream=request.stream,
        include_usage=options.include_usage,
        continuous_usage=options.include_usage and options.continuous_usage_stats,
    )


def _prompts(prompt: str | Sequence[str | int | list[int]]) -> tuple[Prompt, ...]:
    """Tell apart a text, the ids of one prompt, several texts, and the ids of several prompts."""
    if isinstance(prompt, str):
        return (prompt,)
    kinds = {type(item) for item in prompt}
    if kinds == {int}:
        return ([token for token in prompt if isinstance(token, int)],)
    if len(kinds) != 1:
        what = "is empty" if not kinds else "mixes kinds"
        raise ApiError(400, f"prompt {what}. Send a text, token ids, a list of texts, or a list of lists of token ids.",
                       param="prompt")  # fmt: skip
    if len(prompt) > MAX_PROMPTS:
        raise ApiError(400, f"prompt has {len(prompt)} prompts; send {MAX_PROMPTS} at most.", param="prompt")
    return tuple(item for item in prompt if not isinstance(item, int))


def _message(index: int, message: Mapping[str, Any]) -> dict[str, Any]:
    """Give a message the plain shape that chat templates expect: role, text, and a name if there is one."""
    where = f"messages[{index}]"
    given = {name: value for name, value in message.items() if value is not None and value != []}
    role = given.pop("role", None)
    if role == "developer":  # OpenAI's newer name for it; templates of open models know only the older one
        role = "system"
    if role not in ("system", "user", "assistant"):
        raise ApiError(400, f"{where}.role must be 'system', 'user' or 'assistant', not {str(role)[:64]!r}.",
                       param=f"{where}.role")  # fmt: skip
    if "content" not in message:
        raise ApiError(400, f"{where}.content is missing.", param=f"{where}.content")
    plain = {"role": role, "content": _text(f"{where}.content", given.pop("content", ""))}
    name = given.pop("name", None)
    if name is not None:
        if not isinstance(name, str):
            raise ApiError(400, f"{where}.name must be a string.", param=f"{where}.name")
        plain["name"] = name
    for other in given:
        raise ApiError(400, f"{where}.{other[:64]} is not supported by this server yet. Leave it out.",
                       param=f"{where}.{other[:64]}", code="unsupported_parameter")  # fmt: skip
    return plain


def _text(where: str, content: object) -> str:
    """Flatten a list of text parts: many templates know only strings. Parts are joined by line ends, as vLLM does."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ApiError(400, f"{where} must be a text or a list of text parts.", param=where)
    texts: list[str] = []
    for number, part in enumerate(content):
        match part:
            case {"type": "text", "text": str(text)}:
                texts.append(text)
            case _:
                raise ApiError(400, f"{where}[{number}] is not a text part: this model reads text only.", param=where)
    return "\n".join(texts)
