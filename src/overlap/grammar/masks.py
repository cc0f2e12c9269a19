"""Masks: the thread that follows the answers of all requests with a form, and says which tokens may come next.

The engine's loop tells a matcher which tokens were settled and goes on; the mask is made here while the device runs
the steps of others, and the loop is woken for it. A form that is slow to follow (some take 15 ms a token) holds up the
requests that have one, and nobody else: llguidance lets go of the GIL. Forms are compiled on a thread beside it.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from llguidance import LLExecutor, LLMatcher

from overlap.cache.pages import Ints
from overlap.errors import EngineClosed, RequestError
from overlap.grammar.compile import Grammars, refusal
from overlap.structured import StructuredOutput
from overlap.text.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class MaskStatistics:
    """What was made so far."""

    forms_compiled: int = 0
    """Requests whose form was compiled."""
    forms_refused: int = 0
    """Requests whose form could not be used."""
    forms_failed: int = 0
    """Requests that ended by an error because their form allowed no token, or took too much to follow."""
    masks_made: int = 0
    mask_s: float = 0.0
    """Seconds that making them took. The device runs other requests meanwhile."""
    compile_s: float = 0.0
    """Seconds that compiling forms took."""


class LiveMatcher:
    """A request's matcher: told by the engine's loop, moved on by the masks' thread, one at a time."""

    __slots__ = ("_form", "_masks", "drafts", "failure", "mask", "matcher", "ready", "tokens")

    def __init__(self, masks: Masks, form: StructuredOutput, matcher: LLMatcher, mask: Ints) -> None:
        """`mask` is that of the first token."""
        self._masks = masks
        self._form = form
        self.matcher = matcher
        self.mask = mask
        self.failure: RequestError | None = None
        self.ready = True
        self.tokens: Sequence[int] = ()
        """What is to be taken in ..."""
        self.drafts: Sequence[int] = ()
        """... and what may come behind it."""

    def take(self, tokens: Sequence[int], drafts: Sequence[int] = ()) -> None:
        """Take in settled tokens, and begin the next masks. Only once it is ready."""
        self.ready = False
        self.tokens, self.drafts = tokens, drafts
        self._masks.follow(self)

    def fail(self, why: str) -> None:
        """Keep why the request cannot go on."""
        self.failure = refusal(self._form, why)


class Masks:
    """Owns the threads `overlap-masks` and `overlap-forms`, which start when they are first needed."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_ids: tuple[int, ...], *, threads: int = 1) -> None:
        """`end_ids` are the tokens that end an answer, at least one. `threads` make masks of several rows at once."""
        self._making = threading.Thread(target=self._make, name="overlap-vocabulary", daemon=True)
        self._parts = tokenizer, vocab_size, end_ids
        self._grammars: Grammars | None = None
        self._broken: Exception | None = None
        self._threads = threads
        self._compiler = ThreadPoolExecutor(1, thread_name_prefix="overlap-forms")
        self._jobs: queue.SimpleQueue[LiveMatcher | None] = queue.SimpleQueue()
        self._follower: threading.Thread | None = None
        self._wake: Callable[[], None] = lambda: None
        self._closed = False
        self._compiled = self._refused = self._failed = self._made = 0
        self._compile_s = self._mask_s = 0.0
        self._making.start()

    def _make(self) -> None:
        """Build the vocabulary while the model is loaded."""
        try:
            self._grammars = Grammars(*self._parts)
        except Exception as error:  # told to whoever asks for a form: nobody else needs it
            self._broken = error

    def when_made(self, wake: Callable[[], None]) -> None:
        """Call `wake` from the masks' thread after each mask."""
        self._wake = wake

    def compile(self, form: StructuredOutput) -> Future[LiveMatcher]:
        """Return the matcher of a new request, whose first mask is made. The future raises RequestError.

        It is cancelled by `close`. Raises EngineClosed after that.
        """
        try:
            return self._compiler.submit(self._compile, form)
        except RuntimeError:
            if not self._closed:
                raise
            raise EngineClosed("The engine was closed.") from None

    def _compile(self, form: StructuredOutput) -> LiveMatcher:
        self._making.join()
        if self._grammars is None:
            raise RequestError(f"No answer of this model can be held to a form: {self._broken!r:.200}")
        start = time.perf_counter()
        try:
            matcher = self._begun(form, self._grammars)
        except RequestError:
            self._refused += 1
            raise
        except BaseException as error:  # a panic in llguidance is no Exception; whoever waits has to hear of it
            self._refused += 1
            raise refusal(form, f"it could not be compiled ({error!r:.200})") from error
        finally:
            self._compile_s += time.perf_counter() - start
        self._compiled += 1
        return matcher

    def _begun(self, form: StructuredOutput, grammars: Grammars) -> LiveMatcher:
        matcher = grammars.compile(form)
        mask = np.zeros((1, grammars.num_words), dtype=np.int32)
        matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        if matcher.is_error() or not mask.any():
            raise refusal(form, f"no text fits it ({matcher.get_error() or 'no token may come first'})")
        return LiveMatcher(self, form, matcher, mask)

    def follow(self, matcher: LiveMatcher) -> None:
        """Move a matcher on, soon, on the masks' thread."""
        self._jobs.put(matcher)
        if self._follower is None:
            self._follower = threading.Thread(target=self._run, name="overlap-masks", daemon=True)
            self._follower.start()

    def _run(self) -> None:
        executor = LLExecutor(self._threads)
        while (first := self._jobs.get()) is not None:
            matchers = [first]
            while not self._jobs.empty():
                if (more := self._jobs.get()) is None:
                    return
                matchers.append(more)
            start = time.perf_counter()
            try:
                self._follow(matchers, executor)
            except BaseException as error:  # a panic in llguidance is no Exception; whoever waits has to hear of it
                for matcher in matchers:
                    matcher.fail(f"it could not be followed ({error!r:.200})")
                self._failed += len(matchers)
            self._mask_s += time.perf_counter() - start
            self._made += len(matchers)
            for matcher in matchers:
                matcher.ready = True
            self._wake()

    def _follow(self, matchers: list[LiveMatcher], executor: LLExecutor) -> None:
        alive = []
        for matcher in matchers:
            if matcher.matcher.consume_tokens(list(matcher.tokens)) and not matcher.matcher.is_error():
                alive.append(matcher)
            else:
                matcher.fail(f"it cannot go on behind a token that was chosen ({matcher.matcher.get_error()})")
        if self._grammars is None or not alive:
            self._failed += len(matchers) - len(alive)
            return
        ends = np.cumsum([1 + len(matcher.drafts) for matcher in alive]).tolist()
        masks = np.zeros((ends[-1], self._grammars.num_words), dtype=np.int32)
        starts = [0, *ends[:-1]]
        each = list(zip(alive, starts, strict=True))
        where = masks.ctypes.data, 4 * masks.shape[1], len(masks)
        plain = [(matcher.matcher, start) for matcher, start in each if not matcher.drafts]
        drafted = [(matcher.matcher, start, list(matcher.drafts)) for matcher, start in each if matcher.drafts]
        if plain:
            executor.unsafe_compute_mask_ptr(plain, *where)
        if drafted:
            executor.unsafe_compute_mask_ptr_with_draft_token(drafted, *where)
        for matcher, start, end in zip(alive, starts, ends, strict=True):
            matcher.mask = masks[start:end]
            if matcher.matcher.is_error() or not matcher.mask[0].any():
                matcher.fail(f"no token may come next ({matcher.matcher.get_error() or 'the form has no end here'})")
        self._failed += sum(matcher.failure is not None for matcher in matchers)

    def statistics(self) -> MaskStatistics:
        """Return the figures so far. From any thread."""
        return MaskStatistics(
            forms_compiled=self._compiled,
            forms_refused=self._refused,
            forms_failed=self._failed,
            masks_made=self._made,
            mask_s=self._mask_s,
            compile_s=self._compile_s,
        )

    def explain(self) -> tuple[str, ...]:
        """Return what was done, a sentence each."""
        now = self.statistics()
        if not now.forms_compiled + now.forms_refused:
            return ("structured output: none was asked for yet",)
        return (
            f"structured output: {now.forms_compiled} requests held to a form, {now.forms_refused} refused, "
            f"{now.forms_failed} failed on the way; {1e3 * now.compile_s:.1f} ms to compile them",
            f"structured output: {now.masks_made} masks in {1e3 * now.mask_s:.1f} ms, beside the steps; "
            "such a row sits out while its mask is made",
        )

    def close(self) -> None:
        """Let the threads end. What is not made yet never is."""
        self._closed = True
        self._compiler.shutdown(wait=False, cancel_futures=True)
        self._jobs.put(None)
