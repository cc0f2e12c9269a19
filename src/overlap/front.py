"""The reader's side of an engine: tokens become text, and wait for whoever iterates.

A Front belongs to one event loop of the user's, and is touched on that loop's thread only. The engine's loop posts one
message a step to it, and wakes it only if it is not awake already; detokenizing and stop strings are done here, so the
engine never waits for them and a slow reader finds what came meanwhile in one Output.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np

from overlap.errors import (
    EngineClosed,
    EngineDead,
    InternalError,
    OverlapError,
    RequestAborted,
    RequestError,
    RequestFailed,
)
from overlap.messages import FinishReason, Grows, Output, TokenLogprob
from overlap.schedule.shaping import MOST_ALTERNATIVES
from overlap.turns import Rest, Turns

if TYPE_CHECKING:
    from overlap.cache.pages import Ints
    from overlap.schedule.settled import End, Settled
    from overlap.text.answer import AnswerText


class Answer:
    """One answer as it grows."""

    def __init__(
        self,
        *,
        key: int,
        request_id: str,
        index: int,
        num_prompt: int,
        text: AnswerText,
        own_stop_ids: Collection[int],
        end_request: Callable[[], None],
        num_logprobs: int | None = None,
        whole: bool = False,
        turns: Turns | None = None,
        scored: PromptScores | None = None,
    ) -> None:
        """With `whole` the reader is woken once, at the end: for answers of which nobody reads the beginning.

        `turns` is for readers that share the interpreter with an engine.
        """
        self.key = key
        self.request_id = request_id
        self._answer_text = text
        self._own_stop_ids = own_stop_ids
        self._end_request = end_request
        self._tokens: list[int] = []
        self._turns = turns
        self._whole = whole
        self._plain = None if num_logprobs is not None else text.plain
        self._collects = whole and self._plain is not None
        self._num_logprobs = num_logprobs or 0
        self._logprobs: list[TokenLogprob] | None = None if num_logprobs is None else []
        self._scored = scored
        self._grows = Grows(
            request_id, index, self._tokens, num_prompt, 0, self._logprobs, None if scored is None else scored.entries
        )
        self._text = ""
        self._unread = 0  # length of the text that the reader has seen
        self._news = False
        self._finish_reason: FinishReason | None = None
        self._stop_reason: int | str | None = None
        self._failure: BaseException | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._muted = False

    @property
    def ended(self) -> bool:
        """Whether nothing more will come."""
        return self._finish_reason is not None or self._failure is not None

    def push(self, token: int, end: End | None, told: Ints | None = None) -> None:
        """Take in a token, the end of the answer if this is its last, and what is told with it (`Settled.told`)."""
        if self._finish_reason is not None or self._failure is not None or self._muted:
            return  # a stop string or an abort was faster than the engine
        if not self._tokens:
            self._grows.first_at = perf_counter()
        self._tokens.append(token)
        if self._collects and self._plain is not None:
            if end is None:
                return
            self._text = "".join(map(self._plain, self._tokens[:-1]))
        if self._logprobs is not None and told is not None:
            self._logprobs.append(_logprob(token, told, self._num_logprobs))
        self._news = True
        matched = None
        # the token that stops an answer is no part of its text, unless that was asked for
        if end is None or end.stop_id is None or self._answer_text.includes_stops:
            emit, matched = self._answer_text.push(token)
            self._text += emit
        if end is not None and matched is None:
            emit, matched = self._answer_text.end()
            self._text += emit
        if matched is not None:
            self._finish_reason, self._stop_reason = "stop", matched
            if end is None:
                self._end_request()
        elif end is not None:
            self._finish_reason = end.reason
            self._stop_reason = end.stop_id if end.stop_id in self._own_stop_ids else None

    def take(self, token: int) -> bool:
        """Take in a token that the engine does not end the answer with; return whether it has ended all the same."""
        if self._plain is None or self._finish_reason is not None or self._failure is not None or self._muted:
            self.push(token, None)
            self.wake()
            return self.ended
        if not self._tokens:  # what `push` does to it, in one go: nearly all tokens of nearly all answers
            self._grows.first_at = perf_counter()
        self._tokens.append(token)
        if self._collects:
            return False
        self._text += self._plain(token)
        self._news = True
        waiter = self._waiter
        if waiter is not None:
            self._waiter = None
            if not waiter.done():
                waiter.set_result(None)
        return False

    def tell_cached(self, num_cached: int) -> None:
        """Before its first token: so many of its prompt's tokens came from the prefix cache."""
        self._grows.num_cached = num_cached

    def push_scores(self, start: int, words: Ints) -> None:
        """Take in what is told of the prompt's tokens from `start` on (`Settled.scored`). No news by itself."""
        if self._scored is not None:
            self._scored.push(start, words)

    def fail(self, failure: BaseException) -> None:
        """End the answer with an error, behind what came before it."""
        if not self.ended:
            self._failure = failure
            self.wake()

    def abort(self, failure: BaseException) -> None:
        """End the answer with an error in place of all that was not read, its end too."""
        if self._news or self._finish_reason is None:
            self._failure, self._news = failure, False
        self._muted = False
        self.wake()

    def mute(self) -> None:
        """From any thread: let nothing more be seen; `abort` follows on the reader's own thread."""
        self._muted = True

    def wake(self) -> None:
        """Let the reader look, unless it wants the whole answer and there is more to come."""
        waiter = self._waiter
        if waiter is None or (self._whole and not self.ended):
            return
        self._waiter = None
        _look(waiter)

    def stop_waiting(self) -> None:
        """Let whoever waits for news look: the reading is over. From any thread."""
        waiter, self._waiter = self._waiter, None
        if waiter is not None:
            with suppress(RuntimeError):  # that loop was closed meanwhile: nobody waits there any more
                waiter.get_loop().call_soon_threadsafe(_look, waiter)

    def output_nowait(self) -> Output | None:
        """Return what is new, or None; raise StopAsyncIteration behind the last Output, or the failure."""
        if not self._news or self._muted or (self._whole and self._finish_reason is None):
            if self._failure is not None:
                failure, self._failure = self._failure, EngineClosed(f"request {self.request_id!r} has ended")
                raise failure
            if self._finish_reason is not None and not self._muted:
                raise StopAsyncIteration
            return None
        if self._turns is not None:
            self._turns.take()
        self._news = False
        text = self._text
        delta, self._unread = text[self._unread :], len(text)
        return Output.of(self._grows, text, delta, self._finish_reason, self._stop_reason)

    def news(self, loop: asyncio.AbstractEventLoop) -> asyncio.Future[None]:
        """Return what is done once it is worth to look again. One reader at a time, on the front's event loop."""
        self._waiter = waiter = loop.create_future()
        return waiter


class PromptScores:
    """The log-probabilities of one prompt's tokens, as they come."""

    def __init__(self, prompt: Sequence[int], num: int) -> None:
        """`num` alternatives to each token."""
        self._prompt = prompt
        self._num = num
        self.entries: list[TokenLogprob | None] = [None]
        """One for each token so far; the first has none."""

    def push(self, start: int, words: Ints) -> None:
        """Take in what is told of the tokens from `start` on."""
        if start != len(self.entries):
            raise InternalError(f"scores from {start} on came behind {len(self.entries)}")
        tokens = self._prompt[start : start + len(words)]
        self.entries += [_logprob(token, told, self._num) for token, told in zip(tokens, words, strict=True)]


class Front:
    """All answers that are read on one event loop."""

    def __init__(self, number: int, loop: asyncio.AbstractEventLoop, rest: Rest | None = None) -> None:
        """`rest` is that of the engine in this process; None if there is none that waits for the interpreter."""
        self.number = number
        self.loop = loop
        self.turns = None if rest is None else Turns(rest)
        self._answers: dict[int, Answer] = {}
        self._lock = threading.Lock()  # guards the two below: the engine posts, the event loop reads
        self._mail: list[tuple[Callable[..., None], tuple[object, ...]]] = []
        self._called = False

    @property
    def open_keys(self) -> tuple[int, ...]:
        """The keys of the answers that have not ended. From any thread."""
        return tuple(self._answers)

    def open(self, answer: Answer) -> None:
        """Take in a new answer. On the front's own thread, like all but `post_*`."""
        self._answers[answer.key] = answer

    def close(self, answer: Answer) -> None:
        """Forget an answer. From any thread."""
        self._answers.pop(answer.key, None)

    def post_settled(self, settled: Settled) -> bool:
        """From any thread: bring tokens. False if the front's event loop was closed: nobody reads there any more."""
        return self._post(self._take_settled, settled)

    def post_failed(self, key: int, failure: BaseException) -> bool:
        """From any thread: one request failed."""
        return self._post(self._take_failed, key, failure)

    def post_end(self, make: Callable[[], OverlapError]) -> bool:
        """From any thread: the engine ends, and every answer with it."""
        return self._post(self._take_end, make)

    def post_abort(self, answer: Answer) -> bool:
        """From any thread: somebody aborted an answer."""
        answer.mute()
        return self._post(self.abort, answer)

    def _post(self, take: Callable[..., None], *what: object) -> bool:
        with self._lock:
            self._mail.append((take, what))
            if self._called:
                return not self.loop.is_closed()
            self._called = True
        try:
            self.loop.call_soon_threadsafe(self._read_mail)
        except RuntimeError:
            return False
        return True

    def _read_mail(self) -> None:
        with self._lock:
            mail, self._mail = self._mail, []
            self._called = False
        for take, what in mail:
            take(*what)

    def _take_settled(self, settled: Settled) -> None:
        answers, ends = self._answers, {end.key: end for end in settled.ends}
        for key, cached in settled.cached.items():
            if (answer := answers.get(key)) is not None:
                answer.tell_cached(cached)
        for scored in settled.scored:
            if (answer := answers.get(scored.key)) is not None:
                answer.push_scores(scored.start, scored.words)
        told, keys = settled.told, settled.keys.tolist()
        if not ends and told is None:  # nearly all steps
            for key, token in zip(keys, settled.tokens.tolist(), strict=True):
                if (answer := answers.get(key)) is not None and answer.take(token):
                    answers.pop(key, None)
            return
        last = {key: row for row, key in enumerate(keys)} if ends else {}  # of a key there may be several tokens
        for row, (key, token) in enumerate(zip(keys, settled.tokens.tolist(), strict=True)):
            answer = answers.get(key)
            if answer is not None:
                end = ends.get(key) if last.get(key) == row else None
                answer.push(token, end, None if told is None else told[row])
                answer.wake()
                if answer.ended:
                    answers.pop(key, None)

    def _take_failed(self, key: int, failure: BaseException) -> None:
        answer = self._answers.pop(key, None)
        if answer is not None and isinstance(failure, (RequestError, EngineClosed, EngineDead)):
            answer.fail(failure)
        elif answer is not None:
            error = RequestFailed(f"Request {answer.request_id!r} failed on the device: {failure!r}")
            error.__cause__ = failure
            answer.fail(error)

    def _take_end(self, make: Callable[[], OverlapError]) -> None:
        answers, self._answers = self._answers, {}
        for answer in answers.values():
            answer.fail(make())

    def abort(self, answer: Answer) -> None:
        """End an answer with RequestAborted, unless its last Output was read."""
        self.close(answer)
        answer.abort(RequestAborted(f"Request {answer.request_id!r} was aborted."))


def _look(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


def _logprob(token: int, told: Ints, num: int) -> TokenLogprob:
    """Read what was told with a token."""
    ids, values = told[1 : 1 + num].tolist(), told.view(np.float32)
    behind = 1 + MOST_ALTERNATIVES
    pairs = zip(ids, values[behind : behind + num].tolist(), strict=True)
    return TokenLogprob(token, float(values[0]), tuple((id_, value) for id_, value in pairs if id_ >= 0))


def dead(cause: BaseException) -> EngineDead:
    """Return an EngineDead with its cause attached."""
    error = EngineDead(f"The engine can not go on: {cause if isinstance(cause, EngineDead) else repr(cause)}")
    error.__cause__ = cause
    return error
