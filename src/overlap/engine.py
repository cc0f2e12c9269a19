"""AsyncEngine: open, generate, abort, explain, trace, calibrate, aclose."""

from __future__ import annotations

import asyncio
import itertools
import os
import secrets
import threading
import time
import warnings
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any

from overlap.arguments import checked, listed, request_of
from overlap.calibrate import calibrate
from overlap.config import EngineConfig
from overlap.core import Core, Opened
from overlap.errors import EngineClosed, EngineDead, RequestError
from overlap.figures import Statistics
from overlap.front import Answer, Front, PromptScores
from overlap.generation import Generation
from overlap.messages import ChatMessage, Output, Prompt, SamplingParams, Terms
from overlap.observe.progress import bar
from overlap.observe.trace import Trace, Tracing
from overlap.register import Entry, Register
from overlap.resolve import Resolved
from overlap.text.answer import AnswerText
from overlap.text.prompts import PromptEncoder

if TYPE_CHECKING:
    from overlap.text import Tokenizer


@dataclass(frozen=True, slots=True)
class Health:
    """Whether an engine lives, and whether it takes requests; if not, why."""

    ok: bool
    reason: str
    draining: bool = False
    """Whether it ends what it has begun, and begins nothing new."""

    @property
    def ready(self) -> bool:
        """Whether it takes new requests."""
        return self.ok and not self.draining


class AsyncEngine:
    """An LLM engine inside your program.

    ```python
    async with AsyncEngine("smollm2-135m-instruct") as engine:
        async for out in engine.generate("The capital of France is", SamplingParams(max_tokens=16)):
            print(out.text_delta, end="")
    ```

    `model` is a known name, a GGUF file, a Hugging Face directory or a Hub repo id. The keyword arguments are
    `EngineConfig`'s fields; an unknown one raises ConfigError and names the nearest. The engine runs on a thread of
    its own and changes nothing global; any number of engines live in one process, and any number of event loops may
    use one. Raises ConfigError (ModelError) from `start` for what cannot be opened.
    """

    def __init__(self, model: str | os.PathLike[str], **options: Any) -> None:
        self._opened: Opened | None = None  # first: the finalizer looks at these even if an option is refused
        self._prompts: PromptEncoder | None = None
        self._asked = EngineConfig.from_options(model, options)
        self._core = self._make_core()
        self._keys = itertools.count()
        self._requests = Register(self._core)
        self._lock = threading.Lock()  # guards those below, which threads of several event loops share
        self._num_starting = 0
        self._fronts: dict[asyncio.AbstractEventLoop, Front] = {}

    # ── life ─────────────────────────────────────────────────────────────────────────────────────────────────────

    async def start(self) -> None:
        """Open the model and start serving. The event loop runs on meanwhile. Raises ConfigError, EngineClosed.

        Any number of tasks may start one engine: it is opened once, and all of them wait for it. Once the last of them
        has stopped waiting, the engine is closed.
        """
        self._core.check_process()
        if self._opened is not None:
            self._core.check_open()
            return
        with self._lock:
            self._num_starting += 1
        try:
            opened = await asyncio.wrap_future(self._core.start())
            self._core.check_open()  # it may have been closed meanwhile
            with self._lock:
                if self._opened is None:
                    text, vocab_size = opened.text, opened.model.vocab_size
                    self._prompts = PromptEncoder(self.model_name, vocab_size, text.tokenizer, text.template)
                    self._opened = opened
        finally:
            with self._lock:
                self._num_starting -= 1
                given_up = self._opened is None and not self._num_starting
            if given_up:
                self._core.close()

    async def aclose(self, *, drain: bool = False) -> None:
        """Close the engine and give all its memory back. Idempotent.

        `drain=True` lets every request end first, and takes no new ones; otherwise those that still run end with
        EngineClosed. In a process that was forked off the engine's own there is nothing to close.
        """
        if self._core.forked:
            return
        if drain and self._opened is not None:
            with suppress(EngineClosed, EngineDead):  # it may end by itself: then nothing is left to drain
                await asyncio.wrap_future(self._core.drain())
        stopped = self._core.close()
        self._requests.forget_dropped()
        if self._prompts is not None:
            self._prompts.close()
        await asyncio.shield(asyncio.wrap_future(stopped))
        await self._core.ended()

    async def __aenter__(self) -> AsyncEngine:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def __del__(self) -> None:
        if self._opened is not None and not self._core.close_asked and not self._core.forked:
            warnings.warn(f"unclosed engine of {self._asked.model!r}: use `async with`", ResourceWarning, stacklevel=2)
            self._core.close_soon()
            if self._prompts is not None:
                self._prompts.close()

    def __repr__(self) -> str:
        health, core = self.health(), self._core
        if self._opened is None and not core.close_asked:
            state = "not started"
        elif core.close_asked and not core.forked:
            state = "closed"
        else:
            state = "draining" if health.ok and health.draining else health.reason
        return f"<{type(self).__name__} of {self._asked.model!r}: {state}>"

    # ── requests ─────────────────────────────────────────────────────────────────────────────────────────────────

    def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        deadline: float | None = None,
        fairness_key: str = "",
        cache_salt: str = "",
        whole: bool = False,
    ) -> Generation:
        """Return the answer to `prompt`: an async iterator of Outputs; `await` it for the last. See Generation.

        `prompt` is text, token ids, or chat messages (which go through the model's chat template). `params` are the
        defaults of SamplingParams if not given. A `request_id` of your own must not be in use. `priority`, `deadline`
        (seconds), `fairness_key` and `cache_salt` say how it is served beside others; see Terms. With `whole` there is
        one Output, the last: for answers that nobody reads as they grow, at a tenth of what each token costs the
        reader's thread; `await` does so by itself. Raises RequestError for arguments that are none of these. Iterating
        raises RequestError for a request that cannot be served, QueueFull when too many wait, DeadlineExceeded,
        RequestAborted after `abort`, RequestFailed when a step of it failed, EngineClosed and EngineDead when the
        engine ended before the answer did. An error comes behind what was made before it, but RequestAborted at once.
        """
        terms = Terms(priority=priority, deadline=deadline, fairness_key=fairness_key, cache_salt=cache_salt)
        return self._generation(prompt, params, terms, request_id, 0, whole=whole)

    async def generate_batch(
        self,
        prompts: Iterable[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool | None = None,
        priority: int = 0,
        fairness_key: str = "",
        cache_salt: str = "",
    ) -> AsyncIterator[Output]:
        """Yield the last Output of each prompt as it completes; `Output.index` says which prompt it answers.

        `params` is one for all, or one a prompt; the other terms are those of `generate`. `progress` shows a bar on
        stderr; None shows it in a terminal and in a notebook. The first error ends the batch, with a note that says
        which prompt it was.
        """
        terms = Terms(priority=priority, fairness_key=fairness_key, cache_salt=cache_salt)
        items = listed(prompts)
        given: object = params
        if isinstance(given, Sequence) and not isinstance(given, str):
            each = [checked(one) for one in given]
        else:
            each = [checked(given)] * len(items)
        if len(each) != len(items):
            raise RequestError(f"{len(items)} prompts came with {len(each)} params. Give one, or one for each.")
        todo = iter(list(enumerate(zip(items, each, strict=True))))
        resolved = self._live.resolved
        window = min(4 * resolved.max_rows, resolved.max_waiting)  # enough to keep every slot taken, if all may wait
        tasks: set[asyncio.Task[Output]] = set()
        try:
            with bar(len(items), "generating", "answer", asked=progress) as shown:
                num_tokens = 0
                while True:
                    for index, (prompt, one) in itertools.islice(todo, window - len(tasks)):
                        tasks.add(asyncio.create_task(self._last_output(prompt, one, terms, index)))
                    if not tasks:
                        return
                    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                    for task in done:
                        output = task.result()
                        tasks.remove(task)
                        num_tokens += output.usage.completion_tokens
                        shown.update(1)
                        shown.set_postfix_str(f"{num_tokens} tokens", refresh=False)
                        yield output
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def abort(self, request_id: str) -> bool:
        """End a request now; its reader gets RequestAborted. False if there is none of this id (any more).

        When this returns, nothing more of the request is seen, and the engine runs it no further.
        """
        self._core.check_process()
        entry = self._requests.abort(request_id)
        if entry is None:
            return False
        answer, front = entry.answer, entry.front
        if answer is None:
            return True  # it is not submitted yet, and never will be
        if asyncio.get_running_loop() is front.loop:
            front.abort(answer)
        else:
            front.post_abort(answer)
        try:
            await asyncio.wrap_future(self._core.end_and_tell(answer.key))
        except (EngineClosed, EngineDead):
            return True
        return True

    # ── what it is ───────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def model_name(self) -> str:
        """The model as it was asked for."""
        return self._asked.model

    @property
    def config(self) -> Resolved:
        """What runs: the configuration with every "auto" chosen."""
        return self._live.resolved

    @property
    def context(self) -> int:
        """The most tokens of one request, prompt and answer together."""
        return self._live.context

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer. Raises RequestError for random weights that came without one."""
        return self._encoder.tokenizer

    @property
    def chat_template(self) -> str | None:
        """The Jinja text of the model's chat template, if it has one."""
        return self._encoder.chat_template

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of `text`, made on another thread if it is long. Raises RequestError."""
        self._core.check_process()
        return await self._encoder.encode_text(text, special=add_special_tokens)

    async def encode_chat(
        self,
        messages: Sequence[ChatMessage],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Return the token ids of `messages`, with the functions that the model may call. Raises RequestError."""
        self._core.check_process()
        return await self._encoder.encode_chat(messages, tools, add_generation_prompt=add_generation_prompt)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Return the text of `ids`. Raises RequestError for what is no list of ids, and for ids that no token has."""
        return self._encoder.decode(ids, skip_special_tokens=skip_special_tokens)

    def statistics(self) -> Statistics:
        """Return the figures of this moment."""
        return self._core.statistics()

    def health(self) -> Health:
        """Return whether the engine can serve, and if not why."""
        try:
            self._core.check_open()
            self._live  # noqa: B018 - raises when it was not started
        except (EngineClosed, EngineDead) as error:
            return Health(ok=False, reason=str(error))
        if (late := self._core.late()) is not None:
            return Health(ok=False, reason=late)
        if self._core.draining:
            return Health(ok=True, reason="It is ending: it finishes what it has begun.", draining=True)
        return Health(ok=True, reason="serving")

    def trace(self, path: str | os.PathLike[str]) -> Tracing:
        """Record each step of the engine for as long as a `with` or `async with` of this lasts, then write `path`.

        `.json` opens in ui.perfetto.dev: plan, launch, tell, land and settle on the host, and every step on the device
        with the bubbles in front of it. `.svg` is a picture of a few steps from the middle. The target of the `with` is
        the Trace, which a notebook shows as that picture. Raises ConfigError for another ending, a directory that is
        not there, and while another trace is recorded; OverlapError if the engine does not answer for 5 s.
        """
        planner, _ = self._core.parts
        return Tracing(path, Trace(self.model_name, queue=planner.queue), self._core.watch, self._core.unwatch)

    def explain(self) -> str:
        """Return what was chosen and why, a line each."""
        live = self._live
        return "\n".join(
            [f"model = {self.model_name}", *live.resolved.reasons, *live.notes, *self._core.explain_graphs()]
        )

    async def calibrate(self, *, progress: bool | None = None) -> None:
        """Measure how prompts and decode rows get on best beside each other.

        Prompts and answers of random tokens run in every way there is: mixed, in turn, in two lanes at each share of
        SMs. What they took is kept on disk with what other steps took, so each model, type and device needs this once.
        Without it the engine learns from the requests it gets. Call it when nothing else runs: requests of others go
        first, but `target_itl_ms` is not kept meanwhile, and cached prefixes may have to go. Its requests are in the
        figures. An H200 took 3 s for a model of 135 million parameters, and 26 for one of 8 billion
        (`bench/two_lanes.py`).

        `progress` shows a bar on stderr; None shows it in a terminal and in a notebook. Raises ConfigError where
        nothing is chosen, as with `lanes="serial"`, where there is room for one request only, while another
        calibration runs, and if some way could not be measured.
        """
        await calibrate(self, self._core, vocab_size=self._live.model.vocab_size, progress=progress)

    async def clear_cache(self) -> int:
        """Forget every cached prefix that no request reads now; return how many pages came free."""
        planner, _ = self._core.parts
        return await asyncio.wrap_future(self._core.call(planner.clear_cache))

    # ── inside ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _make_core(self) -> Core:
        """Return the door to the loop. Once: all that is told to the loop goes through it."""
        return Core(self._asked)

    @property
    def _live(self) -> Opened:
        if self._opened is None:
            self._core.check_open()
            raise EngineClosed("The engine was not started. Use `async with` or `await engine.start()`.")
        return self._opened

    @property
    def _encoder(self) -> PromptEncoder:
        if self._prompts is None:
            raise EngineClosed("The engine was not started. Use `async with` or `await engine.start()`.")
        return self._prompts

    def _generation(
        self,
        prompt: Prompt,
        params: SamplingParams | None,
        terms: Terms,
        request_id: str | None,
        index: int,
        *,
        whole: bool = False,
    ) -> Generation:
        if request_id is not None and not (isinstance(request_id, str) and request_id):
            raise RequestError(f"request_id must be a string that is not empty, or None, not {request_id!r:.80}.")
        if not isinstance(whole, bool):
            raise RequestError(f"whole must be True or False, not {whole!r:.80}.")
        begin = partial(self._begin, prompt, checked(params), terms)
        request_id = request_id or f"req-{secrets.token_hex(8)}"
        return Generation(begin, self._requests, request_id, index, whole=whole)

    async def _last_output(self, prompt: Prompt, params: SamplingParams | None, terms: Terms, index: int) -> Output:
        try:
            return await self._generation(prompt, params, terms, None, index)
        except Exception as error:
            error.add_note(f"This was prompt {index} of the batch.")
            raise

    async def _begin(
        self, prompt: Prompt, params: SamplingParams, terms: Terms, request_id: str, index: int, whole: bool
    ) -> Answer:
        """Check, encode and submit a request, and open its answer."""
        self._core.check_open()
        entry = self._requests.enter(request_id, self._front())
        try:
            return await self._submit(entry, prompt, params, terms, index, whole=whole)
        except GeneratorExit:  # as in Generation: a finalizer may have ended this
            self._requests.drop(entry)
            raise
        except BaseException:
            self._requests.forget(entry)
            raise

    async def _submit(
        self, entry: Entry, prompt: Prompt, params: SamplingParams, terms: Terms, index: int, *, whole: bool
    ) -> Answer:
        live = self._live
        deadline = None if terms.deadline is None else time.monotonic() + terms.deadline
        matcher = None if params.structured is None else await self._core.matcher(params.structured)
        tokens = await self._encoder.encode(prompt)
        entry.check()
        limit = params.max_tokens or max(1, live.context - len(tokens))
        refusal = live.refusal(len(tokens), limit)
        if refusal is not None:
            raise RequestError(refusal)
        key, front = next(self._keys), entry.front
        answer = Answer(
            key=key,
            request_id=entry.request_id,
            index=index,
            num_prompt=len(tokens),
            text=AnswerText(live.text.tokenizer, tokens.tolist(), params),
            own_stop_ids=params.stop_token_ids,
            end_request=lambda: self._core.end(key),
            num_logprobs=params.logprobs,
            whole=whole,
            turns=front.turns,
            scored=None if params.prompt_logprobs is None else PromptScores(tokens.tolist(), params.prompt_logprobs),
        )
        request = request_of(
            params,
            terms,
            key=key,
            front=front.number,
            prompt=tokens,
            limit=limit,
            matcher=matcher,
            deadline=deadline,
            end_ids=live.text.end_ids(live.model),
            vocab_size=live.model.vocab_size,
        )
        self._requests.note_answer(entry, answer)
        front.open(answer)
        self._core.submit(request)
        if entry.aborted:  # by another thread at this moment: it may have ended what was not there yet
            self._core.end(key)
        return answer

    def _front(self) -> Front:
        loop = asyncio.get_running_loop()
        with self._lock:
            front = self._fronts.get(loop)
            if front is None:
                self._fronts = {loop: front for loop, front in self._fronts.items() if not loop.is_closed()}
                self._requests.forget_closed()
                front = self._fronts[loop] = self._core.front(loop)
            return front
