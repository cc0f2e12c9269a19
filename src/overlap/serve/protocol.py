"""What clients send: JSON in the shape of the OpenAI API, checked, and turned into what the engine takes.

Every field is either understood, meaningless for us and let pass, or refused by name. None is ignored that would have
changed the answer. A field that is null counts as left out, as clients send null for what they do not set.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, TypeVar

import msgspec

from overlap.errors import nearest
from overlap.messages import MAX_PRIORITY, Prompt, SamplingParams
from overlap.serve.errors import ApiError
from overlap.serve.grammar import form_of

MAX_ANSWERS: Final = 256
"""Answers of one request: its prompts times `n`."""
MAX_N: Final = 128
"""Answers to one prompt, as in the OpenAI API."""
MAX_STOPS: Final = 4
"""Stop strings in one request, as in the OpenAI API."""
MAX_LOGPROBS: Final = 20
"""Alternatives to each token, as in the OpenAI API."""
MAX_DEPTH: Final = 64
"""How deep messages, tools and schemas may be nested."""

FORM_EXTRAS: Final = ("guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs")
"""The fields of vLLM's that ask for a form."""

MEANINGLESS: Final = frozenset(
    (
        "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
        "prompt_cache_options", "prediction",
    )
)  # fmt: skip
"""Fields that ask for nothing that would change an answer: labels, and hints for another kind of cache."""
UNSUPPORTED: Final[Mapping[str, tuple[object, ...]]] = {
    "best_of": (1,),
    "suffix": ("",),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "reasoning_effort": ("medium",),
    "verbosity": ("medium",),
    "web_search_options": (),
    "moderation": (),
}
"""Fields that other servers know, each with the values that ask for nothing and so are let pass."""


class StreamOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How to stream."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False  # pads chunks against an eavesdropper on packet sizes; we never pad


class Sampled(msgspec.Struct, frozen=True, kw_only=True):
    """The fields that both kinds of completion have."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | list[str] = ()  # type: ignore[assignment]  # msgspec takes an immutable default for a list
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}  # msgspec copies it
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    return_token_ids: bool = False
    prompt_logprobs: int | None = None
    response_format: dict[str, Any] | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    structured_outputs: dict[str, Any] | None = None
    priority: int = 0
    cache_salt: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A request, understood."""

    model: str | None
    prompts: tuple[Prompt, ...]
    """Texts or token ids, and one list of messages for a chat."""
    params: SamplingParams
    n: int = 1
    stream: bool
    include_usage: bool
    continuous_usage: bool
    return_token_ids: bool = False
    echo: bool = False
    prompt_logprobs: int | None = None
    """How many alternatives to each token of the prompt go into the answer; None for no such table."""
    only_echo: bool = False
    """Whether nothing but the prompt is wanted back: `max_tokens` 0."""
    priority: int = 0
    cache_salt: str = ""
    tools: tuple[Mapping[str, Any], ...] = ()
    """The functions that the model may call; none with tool_choice "none"."""
    must_call: tuple[str, ...] = ()
    """The names of those of which it has to call one, if it has to."""
    parallel_tool_calls: bool = True

    def params_of(self, number: int) -> SamplingParams:
        """Return the sampling parameters of answer `number` to a prompt: seeds count up, or are random."""
        if self.params.seed is None or number == 0:
            return self.params
        return replace(self.params, seed=(self.params.seed + number) % 2**64)


R = TypeVar("R", bound=msgspec.Struct)


def decode(
    body: bytes,
    kind: type[R],
    *,
    meaningless: frozenset[str] = MEANINGLESS,
    unsupported: Mapping[str, tuple[object, ...]] = UNSUPPORTED,
) -> R:
    """Turn a body into a `kind`, refusing what would not be honoured. Raises ApiError."""
    try:
        raw = msgspec.json.decode(body, type=dict[str, Any])
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ApiError(400, f"The body is not a JSON object that can be read: {error}.") from None
    known = kind.__struct_encode_fields__  # `msgspec.structs.fields` takes a third of a millisecond
    given: dict[str, Any] = {}
    for name, value in raw.items():
        if value is None or name in meaningless:
            continue
        if name in known:
            _check_depth(name, value)
            given[name] = value
        elif name not in unsupported:
            near = nearest(name[:64], (*known, *unsupported, *meaningless))
            raise ApiError(400, f"Unknown field {name[:64]!r}.{near}", param=name[:64], code="unknown_parameter")
        elif not any(type(value) is type(harmless) and value == harmless for harmless in unsupported[name]):
            raise ApiError(400, f"{name} is not supported by this server yet. Leave it out.", param=name,
                           code="unsupported_parameter")  # fmt: skip
    try:
        return msgspec.convert(given, kind, strict=True, str_keys=True)
    except msgspec.ValidationError as error:
        field = re.search(r"at `(?:key in )?\$\.(\w+)|required field `(\w+)`", str(error))
        param = (field[1] or field[2]) if field else None
        raise ApiError(400, f"{param or 'The body'}: {error}.", param=param) from None


def _check_depth(name: str, value: object) -> None:
    level: list[object] = [value]
    for _ in range(MAX_DEPTH):
        inner: list[object] = []
        for item in level:
            if isinstance(item, dict):
                inner += [one for one in item.values() if isinstance(one, (dict, list))]
            elif isinstance(item, list):
                inner += [one for one in item if isinstance(one, (dict, list))]
        if not inner:
            return
        level = inner
    raise ApiError(400, f"{name} is nested deeper than {MAX_DEPTH} levels.", param=name)


def sampling(
    request: Sampled, *, max_tokens: int | None, logprobs: int | None, echoed_logprobs: int | None = None
) -> SamplingParams:
    """Return how the engine is to sample. Raises ApiError, and RequestError for a value out of range.

    `echoed_logprobs` is what an echo needs of the prompt's tokens.
    """
    if not 0 <= request.temperature <= 2:
        raise ApiError(400, f"temperature must be in [0, 2], not {request.temperature}.", param="temperature")
    if not isinstance(request.stop, str) and len(request.stop) > MAX_STOPS:
        raise ApiError(400, f"stop has {len(request.stop)} strings; send {MAX_STOPS} at most.", param="stop")
    wanted = [num for num in (echoed_logprobs, request.prompt_logprobs) if num is not None]
    return SamplingParams(
        temperature=request.temperature,
        top_k=request.top_k,
        top_p=request.top_p,
        min_p=request.min_p,
        seed=request.seed,
        max_tokens=max_tokens,
        min_tokens=request.min_tokens,
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        repetition_penalty=request.repetition_penalty,
        logit_bias=request.logit_bias or None,
        logprobs=logprobs,
        prompt_logprobs=max(wanted) if wanted else None,
        stop=request.stop,
        stop_token_ids=request.stop_token_ids,
        ignore_eos=request.ignore_eos,
        skip_special_tokens=request.skip_special_tokens,
        include_stop_str_in_output=request.include_stop_str_in_output,
        structured=form_of(
            request.response_format,
            {name: value for name in FORM_EXTRAS if (value := getattr(request, name)) is not None},
        ),
    )


def asked(
    request: Sampled,
    prompts: tuple[Prompt, ...],
    params: SamplingParams,
    *,
    echo: bool = False,
    only_echo: bool = False,
    tools: tuple[Mapping[str, Any], ...] = (),
    must_call: tuple[str, ...] = (),
    parallel_tool_calls: bool = True,
) -> Asked:
    """Put together what was asked for. Raises ApiError for what is out of bounds."""
    if not 1 <= request.n <= MAX_N:
        raise ApiError(400, f"n must be from 1 to {MAX_N}, not {request.n}.", param="n")
    if request.n * len(prompts) > MAX_ANSWERS:
        raise ApiError(400, f"{len(prompts)} prompts with n={request.n} are more than {MAX_ANSWERS} answers. "
                       "Send several requests.", param="n" if request.n > 1 else "prompt")  # fmt: skip
    if request.stream_options is not None and not request.stream:
        raise ApiError(400, "stream_options is only for stream=true.", param="stream_options")
    if request.prompt_logprobs is not None and request.stream:
        raise ApiError(400, "prompt_logprobs is only for stream=false.", param="prompt_logprobs")
    if abs(request.priority) > MAX_PRIORITY:
        raise ApiError(400, f"priority must be within ±{MAX_PRIORITY}, not {request.priority}.", param="priority")
    options = request.stream_options or StreamOptions()
    return Asked(
        model=request.model,
        prompts=prompts,
        params=params,
        n=request.n,
        stream=request.stream,
        include_usage=options.include_usage,
        continuous_usage=options.include_usage and options.continuous_usage_stats,
        return_token_ids=request.return_token_ids,
        echo=echo,
        prompt_logprobs=request.prompt_logprobs,
        only_echo=only_echo,
        priority=request.priority,
        cache_salt=request.cache_salt,
        tools=tools,
        must_call=must_call,
        parallel_tool_calls=parallel_tool_calls,
    )
