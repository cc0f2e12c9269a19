"""The reader's side of an engine: what a token, an Output and a wake-up do."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from overlap import SamplingParams
from overlap.config import EngineConfig
from overlap.errors import DeadlineExceeded, RequestAborted
from overlap.front import Answer, Front
from overlap.messages import Output
from overlap.schedule.settled import End, Settled
from overlap.schedule.shaping import TOLD_WORDS
from overlap.serve.remote import RemoteCore
from overlap.text import Tokenizer
from overlap.text.answer import AnswerText
from overlap.turns import Rest

KINDS: dict[str, SamplingParams] = {
    "plain": SamplingParams(),
    "stop string": SamplingParams(stop=["e"]),
    "late stop string": SamplingParams(stop=["e"], min_tokens=20),
    "log-probabilities": SamplingParams(logprobs=2),
    "special tokens shown": SamplingParams(skip_special_tokens=False),
}


@pytest.fixture(scope="module")
def tokenizer(tiny_llama_dir: Path) -> Tokenizer:
    return Tokenizer.from_json_file(tiny_llama_dir / "tokenizer.json")


def answer(
    tokenizer: Tokenizer | None, params: SamplingParams, *, key: int = 0, whole: bool = False, ended: Any = None
) -> Answer:
    return Answer(
        key=key, request_id="r", index=0, num_prompt=3, text=AnswerText(tokenizer, [5], params), own_stop_ids=(),
        end_request=ended or (lambda: None), num_logprobs=params.logprobs, whole=whole,
    )  # fmt: skip


def settled(keys: list[int], tokens: list[int], *ends: End, cached: dict[int, int] | None = None) -> Settled:
    return Settled(np.array(keys), np.zeros(len(keys), np.int32), np.array(tokens, np.int32), ends, cached or {})


def picture(output: Output) -> tuple[Any, ...]:
    return (
        output.token_ids, output.num_tokens, output.text, output.text_delta, output.finish_reason, output.stop_reason,
        output.usage, output.logprobs,
    )  # fmt: skip


def read(one: Answer) -> tuple[Any, ...] | None:
    try:
        output = one.output_nowait()
    except StopAsyncIteration:
        return ()
    return None if output is None else picture(output)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(5))
def test_a_token_taken_does_what_a_token_pushed_does(tokenizer: Tokenizer, kind: str, whole: bool, seed: int) -> None:
    rng = random.Random(seed)
    ended: list[str] = []
    taking = answer(tokenizer, KINDS[kind], whole=whole, ended=lambda: ended.append("taken"))
    pushing = answer(tokenizer, KINDS[kind], whole=whole, ended=lambda: ended.append("pushed"))
    for number in range(40):
        token = rng.randrange(520)
        gone = taking.take(token)
        pushing.push(token, None)
        pushing.wake()
        assert gone == pushing.ended
        if number % 3:
            assert read(taking) == read(pushing)
    assert ended.count("taken") == ended.count("pushed") == ("stop string" in kind)
    for one in (taking, pushing):
        one.push(9, End(0, 0, "length", None))
    assert read(taking) == read(pushing)
    assert read(taking) == ()


async def test_a_step_with_ends_or_told_tokens_tells_the_same_as_one_without(tokenizer: Tokenizer) -> None:
    front = Front(0, asyncio.get_running_loop())
    plain, other = answer(tokenizer, KINDS["plain"], key=1), answer(tokenizer, KINDS["plain"], key=2)
    told = answer(tokenizer, KINDS["log-probabilities"], key=3)
    for one in (plain, other, told):
        front.open(one)
    front._take_settled(settled([1, 2, 1], [40, 40, 41], cached={1: 2, 9: 9}))
    words = np.zeros((3, TOLD_WORDS), np.int32)
    front._take_settled(
        Settled(np.array([2, 3, 7]), np.zeros(3, np.int32), np.array([41, 40, 40], np.int32), (), told=words)
    )
    assert read(plain) == (
        [40, 41], 2, tokenizer.decode([40, 41]), tokenizer.decode([40, 41]), None, None, plain_usage(2, 2), None,
    )  # fmt: skip
    assert read(other) == (
        [40, 41], 2, tokenizer.decode([40, 41]), tokenizer.decode([40, 41]), None, None, plain_usage(2, 0), None,
    )  # fmt: skip
    output = told.output_nowait()
    assert output is not None
    assert [entry.token for entry in output.logprobs or ()] == [40]
    front._take_settled(settled([1], [42], End(1, 0, "length", None)))
    front._take_settled(settled([1], [43]))  # it is not waited for any more
    last = plain.output_nowait()
    assert last is not None
    assert (last.token_ids, last.finish_reason, last.usage.cached_tokens) == ([40, 41, 42], "length", 2)


def plain_usage(completion: int, cached: int) -> Any:
    from overlap.messages import Usage

    return Usage(prompt_tokens=3, completion_tokens=completion, cached_tokens=cached)


def test_an_output_stays_true_while_its_answer_grows(tokenizer: Tokenizer) -> None:
    one, seen = answer(tokenizer, KINDS["plain"]), []
    for token in range(30, 60):
        one.take(token)
        output = one.output_nowait()
        assert output is not None
        seen.append((output, picture(output)))
    assert [picture(output) for output, _ in seen] == [before for _, before in seen]
    assert seen[4][0].token_ids == list(range(30, 35))
    assert repr(seen[0][0]) == f"Output('r', 1 tokens, text_delta={seen[0][0].text_delta!r})"


async def test_a_token_behind_a_cancelled_wait_is_there_for_the_next_look(tokenizer: Tokenizer) -> None:
    one = answer(tokenizer, KINDS["plain"])
    waiting = asyncio.ensure_future(one.news(asyncio.get_running_loop()))
    waiting.cancel()
    one.take(40)
    one.take(41)
    output = one.output_nowait()
    assert output is not None
    assert output.token_ids == [40, 41]
    news = one.news(asyncio.get_running_loop())
    one.take(42)
    assert news.done()


async def test_a_muted_answer_takes_nothing_and_ends_with_what_it_is_told(tokenizer: Tokenizer) -> None:
    one = answer(tokenizer, KINDS["plain"])
    one.take(40)
    one.mute()
    assert not one.take(41)
    assert one.output_nowait() is None
    news = one.news(asyncio.get_running_loop())
    one.abort(RequestAborted("aborted"))
    assert news.done()
    assert one.take(42)
    with pytest.raises(RequestAborted):
        one.output_nowait()


@pytest.mark.parametrize("muted", [False, True])
def test_an_abort_comes_in_place_of_all_that_was_not_read_be_it_the_end(tokenizer: Tokenizer, muted: bool) -> None:
    unread, read_up, late = (answer(tokenizer, KINDS["plain"], key=key) for key in range(3))
    for one in (unread, read_up):
        one.push(40, End(one.key, 0, "length", None))
    late.take(40)
    late.fail(DeadlineExceeded("late"))
    last = read_up.output_nowait()
    assert last is not None
    assert last.finished
    for one in (unread, late, read_up):
        if muted:
            one.mute()
            assert one is late or one.output_nowait() is None, "nothing ends before the failure is there"
        one.abort(RequestAborted("aborted"))
    for one in (unread, late):
        with pytest.raises(RequestAborted):
            one.output_nowait()
    assert read(read_up) == ()


@pytest.mark.parametrize("kind", KINDS)
async def test_a_failure_comes_behind_what_came_before_it(tokenizer: Tokenizer, kind: str) -> None:
    front = Front(0, asyncio.get_running_loop())
    streamed, whole = (answer(tokenizer, KINDS[kind], key=key, whole=key == 1) for key in range(2))
    for one in (streamed, whole):
        front.open(one)
    told = np.zeros((4, TOLD_WORDS), np.int32)
    front._take_settled(
        Settled(np.array([0, 1, 0, 1]), np.zeros(4, np.int32), np.array([40, 40, 41, 41], np.int32), (), told=told)
    )
    for one in (streamed, whole):
        front._take_failed(one.key, DeadlineExceeded("late"))
    output = streamed.output_nowait()
    assert output is not None
    assert (output.token_ids, output.finished) == ([40, 41], False)
    for one in (streamed, whole):
        with pytest.raises(DeadlineExceeded):
            one.output_nowait()


def test_without_a_tokenizer_the_text_stays_empty() -> None:
    one = answer(None, KINDS["plain"])
    one.take(40)
    output = one.output_nowait()
    assert output is not None
    assert (output.text, output.token_ids) == ("", [40])


async def test_only_readers_beside_an_engine_give_up_the_interpreter_for_it() -> None:
    loop = asyncio.get_running_loop()
    assert Front(0, loop, Rest()).turns is not None
    assert RemoteCore(EngineConfig.from_options("remote", {}), "/nowhere").front(loop).turns is None
