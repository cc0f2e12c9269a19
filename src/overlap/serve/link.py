"""Between a front and the engine's process: msgspec messages in frames over a Unix socket. Nothing is pickled.

A frame is its length (4 bytes, big-endian), then one message in msgpack. Columns travel as their bytes. A frame that is
longer than its reader allows, or that is no message, ends the connection that it came on, and nothing else.
"""

from __future__ import annotations

import asyncio
import itertools
import struct
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

import msgspec
import numpy as np

from overlap.cache.pages import Ints
from overlap.errors import (
    DeadlineExceeded,
    EngineClosed,
    EngineDead,
    InternalError,
    OverlapError,
    QueueFull,
    RequestAborted,
    RequestError,
    RequestFailed,
)
from overlap.models.config import ModelConfig
from overlap.observe.metrics import FrontFigures
from overlap.schedule.request import Request
from overlap.schedule.scores import Scored
from overlap.schedule.settled import End, Settled
from overlap.schedule.shaping import TOLD_WORDS, Shaping
from overlap.structured import StructuredOutput
from overlap.text import TokenizerSource

MOST_TO_ENGINE: Final = 16 << 20
"""Bytes of a frame from a front: a prompt of four million tokens."""
MOST_TO_FRONT: Final = 256 << 20
"""Bytes of a frame from the engine: the vocabulary of a GGUF is the largest."""
ERRORS: Final = {
    kind.__name__: kind
    for kind in (
        RequestError, RequestAborted, DeadlineExceeded, QueueFull, RequestFailed, EngineClosed, EngineDead,
    )
}  # fmt: skip
"""The errors that cross, by the name that they cross under."""

_LENGTH: Final = struct.Struct("!I")


class Submit(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Begin a request. `key` is the front's own number for it."""

    key: int
    prompt: bytes
    """Token ids, int32 in the machine's order."""
    limit: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    stop_ids: tuple[int, ...]
    shaping: Shaping | None
    logprobs: bool
    structured: StructuredOutput | None
    scores: bool
    priority: int
    fairness_key: str
    salt: str
    seconds: float | None
    """Seconds from now by which it has to have ended: clocks of two processes are not compared."""


class EndRequest(msgspec.Struct, frozen=True, tag=True):
    """End a request. `ask` >= 0 asks for an Ended."""

    key: int
    ask: int = -1


class Look(msgspec.Struct, frozen=True, tag=True):
    """Tell the figures of this moment."""

    ask: int


class Seen(msgspec.Struct, frozen=True, tag=True):
    """What this front has counted so far."""

    figures: FrontFigures


class TokenizerFrom(msgspec.Struct, frozen=True, kw_only=True):
    """What a front makes its tokenizer of: a file, or the fields of a GGUF."""

    kind: Literal["gguf", "json"]
    path: str
    fields: dict[str, Any]

    @classmethod
    def packed(cls, source: TokenizerSource) -> TokenizerFrom:
        """Return it as it goes over the line."""
        return cls(kind=source.kind, path=str(source.path.absolute()), fields=dict(source.fields))

    def unpacked(self) -> TokenizerSource:
        """Return it as it was on the other side."""
        return TokenizerSource(kind=self.kind, path=Path(self.path), fields=self.fields)


class Welcome(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """First: what the engine is."""

    resolved: dict[str, Any]
    model: ModelConfig
    tokenizer: TokenizerFrom | None
    template: str | None
    notes: tuple[str, ...]
    context: int


class Step(msgspec.Struct, frozen=True, tag=True):
    """The tokens of one step, or of several if the front was slow: parallel columns, one entry a token."""

    keys: bytes
    tokens: bytes
    ends: tuple[tuple[int, Literal["stop", "length"], int | None], ...]
    cached: dict[int, int]
    told: bytes | None
    scored: tuple[tuple[int, int, bytes], ...] = ()
    """Of prompts: (key, position of the first token, what is told of it and those behind)."""


class Failed(msgspec.Struct, frozen=True, tag=True):
    """A request ended by an error."""

    key: int
    kind: str
    why: str


class Ended(msgspec.Struct, frozen=True, tag=True):
    """The answer to an EndRequest that asked: whether the request was still there."""

    ask: int
    was: bool


class Pulse(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The engine's figures; several a second, and in answer to a Look."""

    ask: int
    figures: dict[str, Any]
    ill: str | None
    """Why the engine cannot serve at this moment; None if it can."""
    others: tuple[FrontFigures, ...]
    """What the other fronts have counted, those that have ended included."""


class Over(msgspec.Struct, frozen=True, tag=True):
    """The engine has ended, and every request with it."""

    kind: str
    why: str


FromFront: TypeAlias = Submit | EndRequest | Look | Seen
FromEngine: TypeAlias = Welcome | Step | Failed | Ended | Pulse | Over

FROM_FRONT: Final[msgspec.msgpack.Decoder[FromFront]] = msgspec.msgpack.Decoder(FromFront)
FROM_ENGINE: Final[msgspec.msgpack.Decoder[FromEngine]] = msgspec.msgpack.Decoder(FromEngine)
_ENCODER: Final = msgspec.msgpack.Encoder()


class BadFrame(OverlapError):
    """What came is no frame of ours."""


def frame(message: FromFront | FromEngine) -> bytes:
    """Return a message as a frame."""
    data = _ENCODER.encode(message)
    return _LENGTH.pack(len(data)) + data


async def read_frame(reader: asyncio.StreamReader, most: int) -> bytes | None:
    """Wait for a frame and return its message; None once the other end is gone. Raises BadFrame for a longer one."""
    try:
        (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
        if length > most:
            raise BadFrame(f"A frame of {length} bytes came; {most} are allowed.")
        return await reader.readexactly(length)
    except (asyncio.IncompleteReadError, OSError):
        return None


def from_front(data: bytes) -> FromFront:
    """Read a front's message. Raises BadFrame."""
    try:
        return FROM_FRONT.decode(data)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise BadFrame(f"What a front sent is no message: {error}") from None


# ── requests ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def submit_of(request: Request) -> Submit:
    """Return a request as it crosses."""
    return Submit(
        key=request.key,
        prompt=np.ascontiguousarray(request.prompt, dtype=np.int32).tobytes(),
        limit=request.limit,
        temperature=float(request.temperature),
        top_k=request.top_k,
        top_p=float(request.top_p),
        min_p=float(request.min_p),
        seed=request.seed,
        stop_ids=request.stop_ids,
        shaping=request.shaping,
        logprobs=request.logprobs,
        structured=request.structured,
        scores=request.scores > 0,
        priority=request.priority,
        fairness_key=request.fairness_key,
        salt=request.salt,
        seconds=None if request.deadline is None else request.deadline - time.monotonic(),
    )


def request_of(submit: Submit, *, key: int, front: int, vocab_size: int) -> Request:
    """Return what crossed as a request of the engine's own. Raises RequestError for ids that no token has."""
    if len(submit.prompt) % 4:
        raise BadFrame(f"A prompt of {len(submit.prompt)} bytes is no column of int32.")
    prompt = np.frombuffer(submit.prompt, dtype=np.int32)
    if len(prompt) and not (int(prompt.min()) >= 0 and int(prompt.max()) < vocab_size):
        raise RequestError(f"The prompt holds token ids outside of 0 to {vocab_size - 1}, which the model has not.")
    return Request(
        key=key,
        front=front,
        prompt=prompt,
        limit=submit.limit,
        temperature=submit.temperature,
        top_k=submit.top_k,
        top_p=submit.top_p,
        min_p=submit.min_p,
        seed=submit.seed,
        stop_ids=submit.stop_ids,
        shaping=submit.shaping,
        logprobs=submit.logprobs,
        structured=submit.structured,
        scores=len(prompt) if submit.scores else 0,
        priority=submit.priority,
        fairness_key=submit.fairness_key,
        salt=submit.salt,
        deadline=None if submit.seconds is None else time.monotonic() + submit.seconds,
    )


# ── tokens ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def merged(parts: Sequence[Settled]) -> Settled:
    """Return several steps as one, oldest first. At least one."""
    if len(parts) == 1:
        return parts[0]
    cached: dict[int, int] = {}
    for part in parts:
        cached.update(part.cached)
    told: Ints | None = None
    if any(part.told is not None for part in parts):
        blank = [np.zeros((len(part.keys), TOLD_WORDS), np.int32) if part.told is None else part.told for part in parts]
        told = np.concatenate(blank)
    return Settled(
        np.concatenate([part.keys for part in parts]),
        np.concatenate([part.fronts for part in parts]),
        np.concatenate([part.tokens for part in parts]),
        tuple(end for part in parts for end in part.ends),
        cached,
        told,
        tuple(one for part in parts for one in part.scored),
    )


def step_of(settled: Settled, wire_keys: Mapping[int, int]) -> Step:
    """Return a step as it crosses, under the front's keys. What the front does not wait for any more is left out."""
    found = list(map(wire_keys.get, settled.keys.tolist(), itertools.repeat(-1)))
    keys = np.array(found, dtype=np.int64)
    tokens, told = settled.tokens, settled.told
    if -1 in found:
        kept = keys >= 0
        keys, tokens, told = keys[kept], tokens[kept], None if told is None else told[kept]
    return Step(
        keys.tobytes(),
        np.ascontiguousarray(tokens, dtype=np.int32).tobytes(),
        tuple((wire_keys[end.key], end.reason, end.stop_id) for end in settled.ends if end.key in wire_keys),
        {wire_keys[key]: count for key, count in settled.cached.items() if key in wire_keys},
        None if told is None else np.ascontiguousarray(told, dtype=np.int32).tobytes(),
        tuple(
            (wire_keys[one.key], one.start, np.ascontiguousarray(one.words, dtype=np.int32).tobytes())
            for one in settled.scored
            if one.key in wire_keys
        ),
    )


def settled_of(step: Step) -> Settled:
    """Return what crossed as a step of the front's own. The front column is zero: all of it is for this front."""
    keys = np.frombuffer(step.keys, dtype=np.int64)
    told = None if step.told is None else np.frombuffer(step.told, dtype=np.int32).reshape(len(keys), TOLD_WORDS)
    return Settled(
        keys,
        np.zeros(len(keys), np.int32),
        np.frombuffer(step.tokens, dtype=np.int32),
        tuple(End(key, 0, reason, stop_id) for key, reason, stop_id in step.ends),
        step.cached,
        told,
        tuple(
            Scored(key, 0, start, np.frombuffer(words, dtype=np.int32).reshape(-1, TOLD_WORDS))
            for key, start, words in step.scored
        ),
    )


# ── errors ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def failed_of(key: int, failure: BaseException) -> Failed:
    """Return a request's failure as it crosses: its kind and its text."""
    for kind in type(failure).__mro__:
        if kind in ERRORS.values():
            return Failed(key, kind.__name__, str(failure))
    return Failed(key, "RequestFailed", f"The request failed on the device: {failure!r:.500}")


def error_of(message: Failed | Over) -> OverlapError:
    """Return the error that crossed."""
    kind = ERRORS.get(message.kind)
    if kind is None:
        return InternalError(f"the engine sent an error of an unknown kind, {message.kind!r}: {message.why}")
    return kind(message.why)
