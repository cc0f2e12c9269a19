"""What users send and receive: SamplingParams, Output, Usage. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Final, Literal, TypeAlias

from overlap.equivalents import SAMPLING_PARAMETERS
from overlap.errors import RequestError, nearest
from overlap.plain import plain_bool, plain_float, plain_int
from overlap.schedule.shaping import MOST_ALTERNATIVES, MOST_BANNED, MOST_BIASED, Shaping
from overlap.structured import StructuredOutput

FinishReason: TypeAlias = Literal["stop", "length"]
"""Why an answer ended: a stop token, stop id or stop string ("stop"), or `max_tokens` or the context ("length")."""

ChatMessage: TypeAlias = Mapping[str, Any]
"""A chat message as in the OpenAI API: at least `role` and `content`."""

Prompt: TypeAlias = str | Sequence[int] | Sequence[ChatMessage]
"""Text, token ids, or chat messages (which go through the model's chat template)."""

MAX_STOP_STRINGS: Final = 64
MAX_STOP_TOKEN_IDS: Final = 256
"""Each step looks for all of them in every row."""
MAX_PRIORITY: Final = 2**31 - 1
_FLOATS: Final = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
_INTEGERS: Final = ("top_k", "min_tokens", "seed", "max_tokens", "logprobs", "prompt_logprobs")
_OPTIONAL: Final = ("seed", "max_tokens", "logprobs", "prompt_logprobs")
_BOOLEANS: Final = ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output")


def _keep(frozen: object, name: str, value: object) -> None:
    """Give a field of a frozen object the form in which it is kept; only for its `__post_init__`."""
    object.__setattr__(frozen, name, value)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to choose the tokens of an answer. The names are those of the OpenAI API and of vLLM.

    The filters apply in the order temperature, top-k, top-p, min-p, each on the distribution that the one before left
    (the order of `transformers`). The token is then drawn by the Gumbel-max trick with Philox noise keyed by
    (seed, absolute position, token id), so a seeded request meets the same noise alone and in any batch, preempted or
    not, and gives the same tokens wherever the model gives the same logits. That is so in float32 on a CPU, bit for
    bit; in bfloat16 the matrix products may round differently with the number of rows.

    Before all that the logits are changed in the order of vLLM: `logit_bias` and `min_tokens`, then
    `repetition_penalty`, `frequency_penalty`, `presence_penalty`. A greedy request takes the most likely token of what
    they leave.

    Numbers may be numpy's; what is kept are Python's. Raises RequestError for a value out of range and for an unknown
    name (the nearest known one is named).
    """

    temperature: float = 1.0
    """0 is greedy. Finite, >= 0."""
    top_k: int = 0
    """Keep the k most likely tokens (ties at the k-th value all stay); 0 or -1 keeps all."""
    top_p: float = 1.0
    """Keep the fewest most likely tokens whose probabilities reach this sum. In (0, 1]."""
    min_p: float = 0.0
    """Keep tokens at least this times as likely as the most likely one. In [0, 1]."""
    seed: int | None = None
    """Any integer of 64 bits, signed or unsigned. None draws one from the operating system."""
    presence_penalty: float = 0.0
    """Taken once from the logit of each token that the answer has so far. In [-2, 2]."""
    frequency_penalty: float = 0.0
    """Taken from a token's logit for each time that the answer has it so far. In [-2, 2]."""
    repetition_penalty: float = 1.0
    """Divides the logit of a token that prompt or answer have, if it is positive, and multiplies it otherwise. > 0."""
    logit_bias: Mapping[int, float] | None = None
    """What to add to the logits of these token ids, in [-100, 100] each; 1024 at most. Kept as a tuple of pairs."""
    max_tokens: int | None = None
    """The most tokens to answer with, >= 1. None goes on to a stop or the end of the context."""
    min_tokens: int = 0
    """While the answer is shorter than this, no stop id and no end token of the model can be chosen, and stop strings
    are looked for only in the text behind so many tokens."""
    logprobs: int | None = None
    """Tell with each token its log-probability, and the ids and log-probabilities of this many most likely tokens, 0 to
    20. They are the model's own: the log-softmax of its logits before penalties, bias, temperature and filters. None
    tells nothing."""
    prompt_logprobs: int | None = None
    """Tell also of each token of the prompt its log-probability given those before it, and this many most likely
    tokens in its place, 0 to 20: `Output.prompt_logprobs`. The prompt is then run whole: nothing of it comes from the
    prefix cache. None tells nothing."""
    stop: str | Sequence[str] | None = None
    """End the answer before any of these strings. No part of one is ever emitted."""
    stop_token_ids: Sequence[int] = field(default=())
    """End the answer at any of these tokens, beside the model's own end tokens; 256 at most. The token that ends an
    answer is in `Output.token_ids`, and no part of its text."""
    ignore_eos: bool = False
    """Do not end the answer at the model's own end tokens."""
    structured: StructuredOutput | None = None
    """Hold the answer to a form: a JSON schema, a regex, a choice, a grammar. The filters above choose among the tokens
    that it allows; log-probabilities stay the model's own."""
    skip_special_tokens: bool = True
    """Leave special tokens (such as `<|im_end|>`) out of the text."""
    include_stop_str_in_output: bool = False
    """Let the text end with the stop string, or with the text of the stop token, that ended the answer."""

    def __new__(cls, *unnamed: object, **given: object) -> SamplingParams:
        """Refuse unknown names before the dataclass' own, poorer, TypeError does."""
        known = [f.name for f in fields(cls)]
        if unnamed:
            raise RequestError(
                "SamplingParams takes its values by name, as in SamplingParams(temperature=0.5), not "
                f"{unnamed[0]!r:.80}."
            )
        for name in given:
            if name in known:
                continue
            if name in SAMPLING_PARAMETERS:
                raise RequestError(f"There is no sampling parameter {name!r} here. {SAMPLING_PARAMETERS[name]}")
            raise RequestError(
                f"Unknown sampling parameter {name!r}.{nearest(name, known)} Known ones: {', '.join(known)}."
            )
        return object.__new__(cls)

    def __post_init__(self) -> None:
        def refuse(name: str, must: str) -> RequestError:
            return RequestError(f"{name} must be {must}, not {getattr(self, name)!r}.")

        for name in _FLOATS:
            number = plain_float(getattr(self, name))
            if number is None or not math.isfinite(number):
                raise refuse(name, "a finite number")
            _keep(self, name, number)
        for name in _INTEGERS:
            value = getattr(self, name)
            if value is None and name in _OPTIONAL:
                continue
            whole = plain_int(value)
            if whole is None:
                raise refuse(name, "an integer")
            _keep(self, name, whole)
        for name in _BOOLEANS:
            if (chosen := plain_bool(getattr(self, name))) is None:
                raise refuse(name, "True or False")
            _keep(self, name, chosen)
        if self.temperature < 0:
            raise refuse("temperature", "0 (greedy) or more")
        if self.top_k < -1 or self.top_k > 2**31 - 1:
            raise refuse("top_k", "1 or more, or 0 or -1 to keep all tokens")
        if not 0 < self.top_p <= 1:
            raise refuse("top_p", "in (0, 1]")
        if not 0 <= self.min_p <= 1:
            raise refuse("min_p", "in [0, 1]")
        if self.seed is not None and not -(2**63) <= self.seed < 2**64:
            raise refuse("seed", "an integer of 64 bits")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise refuse("max_tokens", "1 or more, or None")
        self._check_stops(refuse)
        self._check_shaping(refuse)
        if self.structured is not None and not isinstance(self.structured, StructuredOutput):
            raise refuse("structured", "a StructuredOutput, as in StructuredOutput.json_schema({...}), or None")
        if self.structured is not None and self.min_tokens:
            raise RequestError(
                f"min_tokens ({self.min_tokens}) and structured exclude each other: an answer ends where its form is "
                "complete. Leave min_tokens out, or ask for a form that is long enough."
            )

    def _check_stops(self, refuse: Callable[[str, str], RequestError]) -> None:
        given = () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else self.stop
        must = "a non-empty string or a sequence of them"
        if not isinstance(given, Iterable) or isinstance(given, Mapping):
            raise refuse("stop", must)
        stops = tuple(given)
        if len(stops) > MAX_STOP_STRINGS:
            raise RequestError(f"stop has {len(stops)} strings; give {MAX_STOP_STRINGS} at most.")
        if not all(isinstance(stop, str) and stop for stop in stops):
            raise refuse("stop", must)
        _keep(self, "stop", stops)
        if not isinstance(self.stop_token_ids, Iterable) or isinstance(self.stop_token_ids, (Mapping, str, bytes)):
            raise refuse("stop_token_ids", "a sequence of token ids")
        tokens = tuple(self.stop_token_ids)
        if len(tokens) > MAX_STOP_TOKEN_IDS:
            raise RequestError(f"stop_token_ids has {len(tokens)} ids; give {MAX_STOP_TOKEN_IDS} at most.")
        ids = tuple(plain_int(token) for token in tokens)
        if any(token is None or token < 0 for token in ids):
            raise refuse("stop_token_ids", "a sequence of token ids")
        _keep(self, "stop_token_ids", ids)

    def _check_shaping(self, refuse: Callable[[str, str], RequestError]) -> None:
        for name in ("presence_penalty", "frequency_penalty"):
            if not -2 <= getattr(self, name) <= 2:
                raise refuse(name, "in [-2, 2]")
        if not 1e-6 <= self.repetition_penalty <= 1e6:
            raise refuse("repetition_penalty", "above 0: 1 is none, more makes repetition less likely (1e-6 to 1e6)")
        if self.min_tokens < 0 or (self.max_tokens is not None and self.min_tokens > self.max_tokens):
            raise refuse("min_tokens", "from 0 to max_tokens")
        for name in ("logprobs", "prompt_logprobs"):
            if (value := getattr(self, name)) is not None and not 0 <= value <= MOST_ALTERNATIVES:
                raise refuse(name, f"from 0 to {MOST_ALTERNATIVES}, or None")
        _keep(self, "logit_bias", self._biases(refuse) or None)

    def _biases(self, refuse: Callable[[str, str], RequestError]) -> tuple[tuple[int, float], ...]:
        """Return `logit_bias` as pairs."""
        given: object = () if self.logit_bias is None else self.logit_bias
        must = "a mapping of token ids to numbers, as in {42: -5.0}"
        if not isinstance(given, Iterable) or isinstance(given, (str, bytes)):
            raise refuse("logit_bias", must)
        pairs = tuple(given.items() if isinstance(given, Mapping) else given)
        if len(pairs) > MOST_BIASED:
            raise RequestError(f"logit_bias has {len(pairs)} entries; give {MOST_BIASED} at most.")
        biases: dict[int, float] = {}
        for pair in pairs:
            if not isinstance(pair, (tuple, list)) or len(pair) != 2:
                raise refuse("logit_bias", must)
            token, bias = plain_int(pair[0]), plain_float(pair[1])
            if token is None or token < 0:
                raise RequestError(f"logit_bias has the key {pair[0]!r}; give token ids, as integers.")
            if bias is None or not -100 <= bias <= 100:
                raise RequestError(f"logit_bias gives {pair[1]!r} to token {token}; give a number in [-100, 100].")
            if token in biases:
                raise RequestError(f"logit_bias has token {token} twice. Give each token one bias.")
            biases[token] = bias
        return tuple(biases.items())

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple."""
        return self.stop  # type: ignore[return-value]  # __post_init__ made it one

    def shaping(self, stop_ids: Iterable[int], vocab_size: int) -> Shaping | None:
        """Return what is done to the logits before a token is drawn; None for nothing.

        `stop_ids` are all tokens that end the answer. Raises RequestError for a bias and a stop id of a token that the
        vocabulary does not have, and where `min_tokens` would have to hold back too many stop ids.
        """
        for token in self.stop_token_ids:
            if token >= vocab_size:
                raise RequestError(
                    f"stop_token_ids has token {token}, but the vocabulary has {vocab_size} tokens. Leave it out."
                )
        pairs: tuple[tuple[int, float], ...] = self.logit_bias or ()  # type: ignore[assignment]  # __post_init__ made it one
        for token, _ in pairs:
            if token >= vocab_size:
                raise RequestError(f"logit_bias has token {token}, but the vocabulary has {vocab_size} tokens.")
        banned = tuple(sorted({token for token in stop_ids if token < vocab_size})) if self.min_tokens else ()
        if len(banned) > MOST_BANNED:
            raise RequestError(
                f"min_tokens holds back {MOST_BANNED} stop ids at most, and there are {len(banned)}. Give fewer."
            )
        shaping = Shaping(
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            logit_bias=pairs,
            min_tokens=self.min_tokens if banned else 0,
            banned=banned,
        )
        return None if shaping == Shaping() else shaping

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """How a request is served beside others. Raises RequestError for a value out of range."""

    priority: int = 0
    """Higher goes first: requests of a higher priority are admitted before all others, and take the place of running
    ones of a lower priority, which go on later with the tokens that they would have had. Within ±(2**31 - 1)."""
    deadline: float | None = None
    """Seconds from its start within which the request has to end; then it ends with DeadlineExceeded. > 0."""
    fairness_key: str = ""
    """Whose request it is (a user, a tenant). Keys of one priority get equal shares of the engine, in tokens."""
    cache_salt: str = ""
    """Cached prefixes are shared among requests of equal salt only, so that nobody can tell from the time to the first
    token what others have asked."""

    def __post_init__(self) -> None:
        priority = plain_int(self.priority)
        if priority is None:
            raise RequestError(f"priority must be an integer, not {self.priority!r}. Higher goes first.")
        if abs(priority) > MAX_PRIORITY:
            raise RequestError(f"priority must be within ±{MAX_PRIORITY}, not {priority}.")
        _keep(self, "priority", priority)
        if self.deadline is not None:
            deadline = plain_float(self.deadline)
            if deadline is None or not 0 < deadline < math.inf:
                raise RequestError(f"deadline must be a number of seconds above 0, not {self.deadline!r}.")
            _keep(self, "deadline", deadline)
        for name in ("fairness_key", "cache_salt"):
            text = getattr(self, name)
            if not isinstance(text, str):
                raise RequestError(f"{name} must be a string, not {text!r}.")
            try:
                text.encode()
            except UnicodeEncodeError:
                raise RequestError(f"{name} has half of a surrogate pair: {text!r:.80}. Remove it.") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What a request has cost so far, in tokens."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    """Prompt tokens whose KV came from the prefix cache."""

    @property
    def total_tokens(self) -> int:
        """Prompt and completion together."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token with its log-probability, as the model had it: before penalties, bias, temperature and filters."""

    token: int
    logprob: float
    alternatives: tuple[tuple[int, float], ...] = ()
    """(token, log-probability) of the most likely tokens, as many as were asked for, the most likely first."""


class Grows:
    """What all Outputs of one answer share. It grows behind them; each Output knows how much of it was there."""

    __slots__ = ("first_at", "index", "logprobs", "num_cached", "num_prompt", "prompt_logprobs", "request_id", "tokens")

    def __init__(
        self,
        request_id: str,
        index: int,
        tokens: list[int],
        num_prompt: int,
        num_cached: int = 0,
        logprobs: list[TokenLogprob] | None = None,
        prompt_logprobs: list[TokenLogprob | None] | None = None,
    ) -> None:
        """`num_cached` may change until there is an Output; the rest stays, and the lists grow."""
        self.request_id = request_id
        self.index = index
        self.tokens = tokens
        self.num_prompt = num_prompt
        self.num_cached = num_cached
        self.logprobs = logprobs
        self.prompt_logprobs = prompt_logprobs
        self.first_at: float | None = None


class Output:
    """What has arrived of one answer. Each one is a whole picture so far, plus what is new in it.

    An Output stays true for ever: later tokens do not change it.
    """

    __slots__ = ("_grows", "finish_reason", "num_tokens", "stop_reason", "text", "text_delta")

    def __init__(
        self,
        *,
        request_id: str,
        index: int,
        tokens: list[int],
        text: str,
        text_delta: str,
        finish_reason: FinishReason | None,
        stop_reason: int | str | None,
        usage: Usage,
        logprobs: list[TokenLogprob] | None = None,
        prompt_logprobs: list[TokenLogprob | None] | None = None,
    ) -> None:
        self.text = text
        """All text so far. Never ends in half a character or in part of a stop string."""
        self.text_delta = text_delta
        """What is new in `text` since the Output before."""
        self.finish_reason: FinishReason | None = finish_reason
        """None while more may come."""
        self.stop_reason = stop_reason
        """The stop token id or stop string that ended the answer, if one of the request's own did."""
        self.num_tokens = len(tokens)
        """How many tokens there are so far."""
        self._grows = Grows(
            request_id, index, tokens, usage.prompt_tokens, usage.cached_tokens, logprobs, prompt_logprobs
        )

    @classmethod
    def of(
        cls, grows: Grows, text: str, delta: str, finish_reason: FinishReason | None, stop_reason: int | str | None
    ) -> Output:
        """Return the picture of this moment. An answer makes one for nearly each of its tokens: it has to be cheap."""
        self = cls.__new__(cls)
        self._grows = grows
        self.num_tokens = len(grows.tokens)
        self.text = text
        self.text_delta = delta
        self.finish_reason = finish_reason
        self.stop_reason = stop_reason
        return self

    @property
    def request_id(self) -> str:
        """Which request this is of."""
        return self._grows.request_id

    @property
    def index(self) -> int:
        """Which prompt of a batch this answers; 0 for `generate`."""
        return self._grows.index

    @property
    def usage(self) -> Usage:
        """What the request has cost so far."""
        grows = self._grows
        return Usage(prompt_tokens=grows.num_prompt, completion_tokens=self.num_tokens, cached_tokens=grows.num_cached)

    @property
    def token_ids(self) -> list[int]:
        """All token ids so far, including the one that ended the answer."""
        return self._grows.tokens[: self.num_tokens]

    @property
    def logprobs(self) -> list[TokenLogprob] | None:
        """One entry for each of `token_ids`; None if `SamplingParams.logprobs` did not ask for it."""
        logprobs = self._grows.logprobs
        return None if logprobs is None else logprobs[: self.num_tokens]

    @property
    def prompt_logprobs(self) -> list[TokenLogprob | None] | None:
        """One entry for each token of the prompt, None for the first; all are there from the first Output on.

        None if `SamplingParams.prompt_logprobs` did not ask for it.
        """
        return self._grows.prompt_logprobs

    @property
    def first_token_at(self) -> float | None:
        """When the first token came to its reader, in seconds of `time.perf_counter`; None before it has."""
        return self._grows.first_at

    @property
    def finished(self) -> bool:
        """Whether this is the answer's last Output."""
        return self.finish_reason is not None

    def __repr__(self) -> str:
        end = f", finish_reason={self.finish_reason!r}" if self.finished else ""
        return f"Output({self.request_id!r}, {self.num_tokens} tokens, text_delta={self.text_delta!r}{end})"
