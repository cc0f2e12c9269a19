from __future__ import annotations

import asyncio
import subprocess
import sys
from dataclasses import fields
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from overlap import StructuredOutput
from overlap.errors import OverlapError, RequestError
from overlap.schedule.request import Request
from overlap.schedule.scores import Scored
from overlap.schedule.settled import End, Settled
from overlap.schedule.shaping import TOLD_WORDS, Shaping
from overlap.serve.engine_process import HELD_BYTES, Line
from overlap.serve.link import (
    ERRORS,
    FROM_ENGINE,
    MOST_TO_ENGINE,
    BadFrame,
    Step,
    Submit,
    error_of,
    failed_of,
    frame,
    from_front,
    merged,
    read_frame,
    request_of,
    settled_of,
    step_of,
    submit_of,
)

PLANNERS_OWN = {
    "matcher", "queued_at", "life", "slot", "made", "chunked", "node", "num_hit", "coming", "cached", "scored",
}  # fmt: skip
INT32 = st.integers(-(2**31), 2**31 - 1)


async def read(data: bytes) -> bytes | None:
    reader = asyncio.StreamReader()
    reader.feed_data(data)
    reader.feed_eof()
    return await read_frame(reader, MOST_TO_ENGINE)


def across(request: Request) -> Request:
    message = from_front(frame(submit_of(request))[4:])
    assert isinstance(message, Submit)
    return request_of(message, key=request.key, front=request.front, vocab_size=2**31 - 1)


def settled(rows: list[tuple[int, int, bool]], *, told: bool = False) -> Settled:
    return Settled(
        np.array([key for key, _, _ in rows], np.int64),
        np.zeros(len(rows), np.int32),
        np.array([token for _, token, _ in rows], np.int32),
        tuple(End(key, 0, "stop", token) for key, token, ends in rows if ends),
        {key: token for key, token, _ in rows if token % 3 == 0},
        np.arange(len(rows) * TOLD_WORDS, dtype=np.int32).reshape(-1, TOLD_WORDS) if told else None,
        tuple(
            Scored(key, 0, 1 + token % 5, np.full((2, TOLD_WORDS), token, dtype=np.int32))
            for key, token, _ in rows
            if told and token % 2
        ),
    )


def rows_of(step: Settled) -> list[tuple[int, int]]:
    return list(zip(step.keys.tolist(), step.tokens.tolist(), strict=True))


@given(
    prompt=st.lists(st.integers(0, 2**31 - 2)),
    seed=st.integers(0, 2**64 - 1),
    temperature=st.floats(0, 100),
    bias=st.dictionaries(st.integers(0, 100), st.floats(-100, 100)),
    salt=st.text(st.characters(codec="utf-8")),
    deadline=st.none() | st.floats(1, 1e9),
)
def test_a_request_crosses_as_it_is(
    prompt: list[int], seed: int, temperature: float, bias: dict[int, float], salt: str, deadline: float | None
) -> None:
    request = Request(
        key=7, front=3, prompt=np.array(prompt, np.int32), limit=9, temperature=temperature, top_k=5, top_p=0.5,
        min_p=0.25, seed=seed, stop_ids=(1, 2), shaping=Shaping(logit_bias=tuple(bias.items())), logprobs=True,
        priority=-4, fairness_key="who", salt=salt, deadline=deadline,
        structured=StructuredOutput.choice([salt, "b"]) if salt else None,
    )  # fmt: skip
    found = across(request)
    for field in fields(Request):
        if field.name in PLANNERS_OWN | {"prompt", "deadline"}:
            continue
        assert getattr(found, field.name) == getattr(request, field.name), field.name
    assert found.prompt.tolist() == prompt
    assert (found.deadline is None) == (deadline is None)
    assert found.deadline is None or deadline is None or abs(found.deadline - deadline) < 10


def test_every_field_of_a_request_crosses_or_is_the_planners_own() -> None:
    sent = set(Submit.__struct_fields__) - {"seconds"} | {"deadline", "front"}
    assert {field.name for field in fields(Request)} == sent | PLANNERS_OWN


STEPS = st.lists(st.lists(st.tuples(st.integers(0, 20), INT32, st.booleans()), max_size=8), min_size=1, max_size=5)


@given(steps=STEPS, told=st.lists(st.booleans(), min_size=5, max_size=5), known=st.sets(st.integers(0, 20)))
def test_steps_cross_merged_and_without_what_nobody_waits_for(
    steps: list[list[tuple[int, int, bool]]], told: list[bool], known: set[int]
) -> None:
    parts = [settled(rows, told=wants) for rows, wants in zip(steps, told, strict=False)]
    wire_keys = {key: 1000 + key for key in known}
    message = FROM_ENGINE.decode(frame(step_of(merged(parts), wire_keys))[4:])
    assert isinstance(message, Step)
    found = settled_of(message)
    rows = [row for part in steps for row in part]
    assert rows_of(found) == [(1000 + key, token) for key, token, _ in rows if key in known]
    assert [end.key for end in found.ends] == [1000 + key for key, _, ends in rows if ends and key in known]
    sent = [one for part in parts for one in part.scored if one.key in known]
    assert [(one.key, one.start) for one in found.scored] == [(1000 + one.key, one.start) for one in sent]
    assert all(np.array_equal(a.words, b.words) for a, b in zip(found.scored, sent, strict=True))
    assert (found.told is not None) == any(part.told is not None for part in parts)
    assert found.told is None or found.told.shape == (len(found.keys), TOLD_WORDS)


@pytest.mark.parametrize("kind", ERRORS.values())
def test_an_error_crosses_with_its_kind_and_its_text(kind: type[OverlapError]) -> None:
    crossed = error_of(failed_of(1, kind("what and why")))
    assert "what and why" in str(crossed)
    assert type(crossed) is kind or type(crossed).__name__ == "RequestFailed"


@given(data=st.binary(max_size=200))
def test_hostile_bytes_are_no_message(data: bytes) -> None:
    try:
        message = from_front(data)
    except BadFrame:
        return
    assert isinstance(message, msgspec.Struct)


async def test_a_frame_that_is_too_long_is_refused_before_it_is_read() -> None:
    with pytest.raises(BadFrame, match="allowed"):
        await read((2**32 - 1).to_bytes(4, "big") + b"x")


@pytest.mark.parametrize("prompt", [b"123", np.array([-1], np.int32).tobytes(), np.array([512], np.int32).tobytes()])
def test_tokens_that_are_none_do_not_reach_the_engine(prompt: bytes) -> None:
    settings: dict[str, Any] = {
        "limit": 1, "temperature": 0, "top_k": 0, "top_p": 1, "min_p": 0, "seed": 0, "stop_ids": (), "shaping": None,
        "logprobs": False, "scores": False, "priority": 0, "fairness_key": "", "salt": "", "seconds": None,
        "structured": None,
    }  # fmt: skip
    with pytest.raises((BadFrame, RequestError)):
        request_of(Submit(key=0, prompt=prompt, **settings), key=0, front=0, vocab_size=512)


def test_a_front_loads_no_torch() -> None:
    code = "import sys, overlap.serve.front_process; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


class FullSocket:
    """A front's connection that takes nothing while `waiting` is more than the engine lets wait."""

    def __init__(self) -> None:
        self.waiting = 0
        self.transport = self

    def get_write_buffer_size(self) -> int:
        return self.waiting

    async def drain(self) -> None:
        await asyncio.sleep(0.01)


async def test_a_step_that_comes_when_the_socket_has_just_drained_goes_behind_those_that_waited(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    full: Any = FullSocket()
    line = Line(1, asyncio.get_running_loop(), full)
    sent: list[list[int]] = []
    monkeypatch.setattr(line, "send", lambda message: sent.append(np.frombuffer(message.tokens, np.int32).tolist()))
    line.begin(0, 7)
    for token, waiting in ((1, 0), (2, HELD_BYTES + 1), (3, HELD_BYTES + 1), (4, 0)):
        full.waiting = waiting
        line._take_settled(Settled(np.array([7]), np.zeros(1, np.int32), np.array([token], np.int32), ()))
    while sum(map(len, sent)) < 4:
        await asyncio.sleep(0.005)
    assert sent == [[1], [2, 3, 4]]
