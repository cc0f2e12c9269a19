"""The engine's own thread: it opens the model, runs the loop on an event loop of its own, and gives all back.

A busy notebook cell or web handler never starves the loop, and the loop never starves them. Nothing global changes:
the event loop belongs to this thread, CUDA's current device is set on this thread only.
"""

from __future__ import annotations

import asyncio
import atexit
import gc
import itertools
import os
import threading
import traceback
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final, ParamSpec, TypeVar

from overlap.errors import EngineClosed, EngineDead, OverlapError, RequestError
from overlap.figures import Statistics, statistics_of
from overlap.front import Front, dead
from overlap.loop import Loop
from overlap.observe.stages import Stages
from overlap.pending import Pending
from overlap.streams.ahead import start_driver
from overlap.turns import Rest

if TYPE_CHECKING:
    from overlap.assemble import Costs, Parts
    from overlap.config import EngineConfig
    from overlap.grammar.masks import Masks
    from overlap.models.config import ModelConfig
    from overlap.observe.timeline import Timeline
    from overlap.parallel.leading import LeadingRunner
    from overlap.parallel.team import Team
    from overlap.resolve import Resolved
    from overlap.runner import Runner
    from overlap.schedule.matcher import Matcher
    from overlap.schedule.planner import Planner
    from overlap.schedule.request import Request
    from overlap.schedule.settled import Settled
    from overlap.structured import StructuredOutput
    from overlap.text import Text

P = ParamSpec("P")
T = TypeVar("T")
F = TypeVar("F", bound=Front)

THREAD: Final = "overlap-engine"
"""The name of an engine's thread."""
LOST_S: Final = 15.0
"""Seconds that the engine has to end by itself once a rank is gone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """What an opened engine is. Plain values, for any thread to read."""

    resolved: Resolved
    model: ModelConfig
    text: Text
    notes: tuple[str, ...]
    refusal: Callable[[int, int], str | None]
    """(prompt tokens, new tokens) -> why such a request could never run, or None."""
    context: int


class Core:
    """One engine's thread, and the only door to its loop. Methods may be called from any thread."""

    def __init__(self, asked: EngineConfig) -> None:
        self._asked = asked
        self._thread = threading.Thread(target=self._run, name=THREAD, daemon=True)
        self._opened: Future[Opened] = Future()
        self._stopped: Future[None] = Future()
        for future in (self._opened, self._stopped):
            future.set_running_or_notify_cancel()  # several may wait: who stops waiting must not cancel it for others
        self._events: asyncio.AbstractEventLoop | None = None
        self._loop: Loop | None = None
        self._planner: Planner | None = None
        self._costs: Costs | None = None
        self._runner: Runner | LeadingRunner | None = None
        self._masks: Masks | None = None
        self._fallbacks: Mapping[str, int] = {}
        self._rest = Rest()
        self._fronts: dict[int, Front] = {}
        self._numbers = itertools.count()
        self._lock = threading.Lock()  # guards the two below: who comes late must hear what those before heard
        self._ended: Callable[[], OverlapError] | None = None
        self._close_asked = False
        self._draining = False
        self._pending = Pending()
        self._process: int | None = None  # where it was started: a fork copies all of this but the threads
        self._leave = partial(Core._at_exit, weakref.ref(self))

    def start(self) -> Future[Opened]:
        """Start the thread, once. The future brings what was opened, or why it could not be."""
        self.check_process()
        with self._lock:
            if self._close_asked:
                raise EngineClosed("The engine was closed. Make a new one.")
            if self._thread.ident is None:
                self._process = os.getpid()
                self._thread.start()
                atexit.register(self._leave)
        return self._opened

    def front(self, loop: asyncio.AbstractEventLoop) -> Front:
        """Return a new front for an event loop of the user's."""
        return self.add_front(lambda number: Front(number, loop, self._rest))

    def add_front(self, make: Callable[[int], F]) -> F:
        """Take in a front of another kind; `make` gets its number."""
        self.check_process()
        for other in tuple(self._fronts.values()):
            if other.loop.is_closed():
                self.remove_front(other)
        with self._lock:
            front = make(next(self._numbers))
            self._fronts = {**self._fronts, front.number: front}
            return front

    def remove_front(self, front: Front) -> None:
        """Let go of a front, and end what it still reads. From any thread."""
        with self._lock:
            self._fronts = {n: other for n, other in self._fronts.items() if other is not front}
        for key in front.open_keys:
            self.end(key)

    @property
    def stopped(self) -> Future[None]:
        """Done once the thread has ended and everything was given back."""
        return self._stopped

    @property
    def forked(self) -> bool:
        """Whether this is a copy in a process that was forked off: it has no thread, and its locks may be held."""
        return self._process is not None and self._process != os.getpid()

    def check_process(self) -> None:
        """Raise EngineClosed in a process that was forked off the engine's own."""
        if self.forked:
            raise EngineClosed(
                f"The engine was opened in process {self._process}, and this is process {os.getpid()}: "
                "open an engine in this process."
            )

    def check_open(self) -> None:
        """Raise EngineClosed or EngineDead if the engine has ended, or runs in another process."""
        self.check_process()
        if self._ended is not None:
            raise self._ended()

    @property
    def draining(self) -> bool:
        """Whether new requests are refused."""
        return self._draining

    @property
    def close_asked(self) -> bool:
        """Whether `close` was called."""
        return self._close_asked

    @property
    def failure(self) -> EngineDead | None:
        """Why the engine died, if it did."""
        error = self._ended() if self._ended is not None else None
        return error if isinstance(error, EngineDead) else None

    def late(self) -> str | None:
        """Return what is wrong if a step takes too long to land, else None."""
        loop = self._loop
        return None if loop is None else loop.late()

    def submit(self, request: Request) -> None:
        """Queue a request. What the loop refuses is told to its front."""
        if self._draining:
            raise EngineClosed("The engine is closing: it ends what it has begun, and begins nothing new.")
        self._post(self._live_loop.submit, request)

    async def matcher(self, form: StructuredOutput) -> Matcher | None:
        """Wait for what holds an answer to a form; None if that is made elsewhere. Raises RequestError."""
        masks = self._masks
        if masks is None:
            self.check_open()
            raise RequestError("No answer of this model can be held to a form: it has no tokenizer, or no end token.")
        try:
            compiling = asyncio.wrap_future(masks.compile(form))
        except EngineClosed:
            self.check_open()  # if it died, that says why
            raise
        try:
            return await asyncio.shield(compiling)  # so that it is known which of the two was cancelled
        except asyncio.CancelledError:
            if not compiling.cancelled():
                compiling.cancel()  # nobody waits for it any more
                raise
            self.check_open()
            raise EngineClosed("The engine was closed before the request's form was compiled.") from None

    def end(self, key: int) -> None:
        """End a request soon, without waiting. Does nothing once the engine has ended."""
        try:
            self._post(self._live_loop.end, key)
        except (EngineClosed, EngineDead):
            return  # every request has ended with it

    def drop(self, key: int) -> None:
        """End a request whose reader is gone, from a finalizer: it takes no lock, since its thread may hold any."""
        events, loop = self._events, self._loop
        if events is not None and loop is not None:
            with suppress(RuntimeError):  # it has just ended, and every request with it
                events.call_soon_threadsafe(loop.end, key)

    def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Call a function on the loop's thread. The future raises EngineClosed, EngineDead if that ends before."""
        future: Future[T] = Future()

        def run() -> None:
            awaited = self._pending.take(future)
            try:
                result = function(*args, **kwargs)
            except BaseException as error:
                if awaited:
                    future.set_exception(error)
            else:
                if awaited:
                    future.set_result(result)

        self._post_awaited(future, run)
        return future

    def end_and_tell(self, key: int) -> Future[bool]:
        """End a request; the future says whether it was still there."""
        return self.call(self._live_loop.end, key)

    def drain(self) -> Future[None]:
        """Take no new request from now on; the future is done when none is left and nothing is in flight.

        It raises EngineClosed, EngineDead if the loop ends before.
        """
        self._draining = True
        return self.idle()

    def idle(self) -> Future[None]:
        """Return a future of the moment when no request is left and nothing is in flight. It may raise as `drain`'s."""
        future: Future[None] = Future()

        def tell() -> None:
            if self._pending.take(future):
                future.set_result(None)

        self._post_awaited(future, self._live_loop.when_idle, tell)
        return future

    def watch(self, timeline: Timeline) -> Future[None]:
        """Let the loop tell `timeline` of each verb, from its own thread. The future may raise ConfigError."""
        return self.call(self._live_loop.watch, timeline)

    def unwatch(self, timeline: Timeline) -> Future[None]:
        """Let the loop tell `timeline` no more, if it does."""
        return self.call(self._live_loop.unwatch, timeline)

    def keep_costs(self) -> Future[None]:
        """Write down what steps have taken, from the engine's thread. Raises EngineClosed, EngineDead."""
        return self.call(self._keep_costs)

    def _keep_costs(self) -> None:
        if self._costs is not None:
            self._costs.keep()

    def explain_graphs(self) -> tuple[str, ...]:
        """Return what runs as which graph at this moment; nothing once the engine has ended."""
        runner, planner = self._runner, self._planner
        if runner is None or planner is None:
            return ()
        forms = self._masks.explain() if self._masks is not None else ()
        return (*runner.explain(), *planner.explain_lanes(), *planner.explain_drafts(), *forms)

    @property
    def parts(self) -> tuple[Planner, Loop]:
        """What has figures to show. Reading them from another thread may mix two moments."""
        self.check_open()
        if self._planner is None:
            raise EngineClosed("The engine was not started. Use `async with` or `await engine.start()`.")
        return self._planner, self._live_loop

    def statistics(self) -> Statistics:
        """Return the figures of this moment. Raises EngineClosed, EngineDead."""
        planner, loop = self.parts
        runner = self._runner
        if runner is None:
            raise EngineClosed("The engine has just ended.")
        return statistics_of(planner, loop, runner.statistics(), self._masks, self._fallbacks)

    def close(self) -> Future[None]:
        """End every request and let the thread give everything back. Idempotent; in a forked process, nothing."""
        if self.forked:
            nothing: Future[None] = Future()
            nothing.set_result(None)
            return nothing
        with self._lock:
            first, self._close_asked = not self._close_asked, True
        if first and self._thread.ident is None:
            self._ended = lambda: EngineClosed("The engine was closed.")
            self._stopped.set_result(None)
        elif first:
            self._end_all(lambda: EngineClosed("The engine was closed."))
            events, loop = self._events, self._loop
            if events is not None and loop is not None:
                with suppress(RuntimeError):  # it has ended by itself meanwhile
                    events.call_soon_threadsafe(loop.close)
        return self._stopped

    def close_soon(self) -> None:
        """Close, from a finalizer: while the thread lives, it does that itself, and no lock is taken here."""
        events = self._events
        if events is None:
            self.close()
            return
        with suppress(RuntimeError):  # it has just ended
            events.call_soon_threadsafe(self.close)

    async def ended(self) -> None:
        """Wait for the thread's end, once `stopped` is done: it has nothing left to do, unless it was left behind."""
        for _ in range(100):
            if not self._thread.is_alive():
                return
            await asyncio.sleep(0.001)

    @staticmethod
    def _at_exit(reference: weakref.ref[Core]) -> None:
        """A program that ends with its engine open: let the device finish before the interpreter goes."""
        core = reference()
        if core is not None:
            with suppress(TimeoutError):
                core.close().result(timeout=10)

    # ── on the thread ────────────────────────────────────────────────────────────────────────────────────────────

    def tell_settled(self, settled: Settled) -> None:
        """Outbox: hand a step's tokens to the fronts that read them."""
        if not len(settled.keys) and not settled.scored:
            return
        for number, part in settled.by_front():
            front = self._fronts.get(number)
            if front is None or not front.post_settled(part):  # its event loop was closed: nobody reads there any more
                for key in (*part.keys.tolist(), *(one.key for one in part.scored)):
                    self.end(key)
                if front is not None:
                    self.remove_front(front)

    def tell_failed(self, key: int, front: int, failure: BaseException) -> None:
        """Outbox: tell a front that a request failed."""
        traceback.clear_frames(failure.__traceback__)  # whoever keeps the error must not keep the step's tensors
        if (reader := self._fronts.get(front)) is not None:
            reader.post_failed(key, failure)

    def _run(self) -> None:
        try:
            self._serve()
        finally:
            if self._masks is not None:
                self._masks.close()
            self._loop = self._planner = self._runner = self._masks = None
            try:
                gc.collect()  # a failed step's traceback may hold tensors in a cycle
                with suppress(ImportError):  # of torch: then there is nothing to give back
                    _give_back_cached_memory()
            finally:
                with suppress(InvalidStateError):  # nobody waits any more: it was left behind
                    self._stopped.set_result(None)
                atexit.unregister(self._leave)

    def _serve(self) -> None:
        try:
            stages = Stages()
            let_go = start_driver(self._asked.device) if self._asked.device != "cpu" else None
            try:
                from overlap.assemble import assemble  # imports torch: here, so that importing overlap stays light

                stages.end("torch")
                parts = assemble(self._asked, stages)
            finally:
                if let_go is not None:
                    let_go()
        except BaseException as error:
            why = str(error)
            self._end_all(lambda: EngineClosed(f"The engine did not start: {why}"))
            self._opened.set_exception(error)
            return
        events = _new_event_loop()
        try:
            events.run_until_complete(self._serve_parts(parts, events))
        except Exception as error:
            cause = error.__cause__ or error
            traceback.clear_frames(cause.__traceback__)
            self._end_all(lambda: dead(cause))
        finally:
            with self._lock:
                self._events = None
            self._pending.fail(self._ended or (lambda: EngineClosed("The engine has ended.")))
            parts.runner.close()
            self._keep_costs()
            events.close()

    async def _serve_parts(self, parts: Parts, events: asyncio.AbstractEventLoop) -> None:
        self._planner, self._costs = parts.planner, parts.costs
        resolved = parts.resolved
        self._loop = Loop(
            parts.planner,
            parts.runner,
            self,
            overlap=resolved.overlap,
            idle_work=parts.runner.warm_up_one,
            step_limit_s=resolved.step_limit,
            rest=None if resolved.device == "cpu" else self._rest,  # steps on a CPU want the interpreter, too
        )
        self._runner = parts.runner
        self._masks = parts.masks
        self._fallbacks = parts.fallbacks
        if parts.masks is not None:
            parts.masks.when_made(self._wake)
        with self._lock:
            self._events = events
            if self._close_asked:
                self._loop.close()
        self._opened.set_result(
            Opened(
                resolved=parts.resolved,
                model=parts.model,
                text=parts.text,
                notes=parts.notes,
                refusal=parts.planner.refusal,
                context=parts.planner.context,
            )
        )
        if parts.team is not None:
            parts.team.when_lost(partial(self._rank_lost, parts.team))
        await self._loop.run()

    def _rank_lost(self, team: Team) -> None:
        """Let the loop end with the reason, and see to it that it does."""
        self._wake()
        timer = threading.Timer(LOST_S, self._leave_behind, (team,))
        timer.daemon = True
        timer.start()

    def _leave_behind(self, team: Team) -> None:
        """End without the engine's thread, if that is still waiting inside a sum for a rank that is gone."""
        if self._stopped.done():
            return
        why = f"{team.why()} This rank does not come back from a sum: the process keeps its memory until it ends"
        self._end_all(lambda: EngineDead(why))
        self._pending.fail(lambda: EngineDead(why))
        team.give_up()
        with suppress(InvalidStateError):  # it has just ended after all
            self._stopped.set_result(None)

    def _wake(self) -> None:
        """Let the loop look again: a rank is gone, or a mask was made. From any thread."""
        with suppress(EngineClosed, EngineDead):
            self._post(self._live_loop.look)

    # ── from any thread ──────────────────────────────────────────────────────────────────────────────────────────

    @property
    def _live_loop(self) -> Loop:
        self.check_open()
        loop = self._loop
        if loop is None:
            raise EngineClosed("The engine was not started. Use `async with` or `await engine.start()`.")
        return loop

    def _post(self, function: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> None:
        self.check_process()
        with self._lock:
            if self._ended is not None:
                raise self._ended()
            if self._events is None:
                raise EngineClosed("The engine was not started. Use `async with` or `await engine.start()`.")
            self._events.call_soon_threadsafe(lambda: function(*args, **kwargs))

    def _post_awaited(
        self, future: Future[T], function: Callable[P, object], *args: P.args, **kwargs: P.kwargs
    ) -> None:
        self._pending.add(future)
        try:
            self._post(function, *args, **kwargs)
        except BaseException:
            self._pending.take(future)
            raise

    def _end_all(self, make: Callable[[], OverlapError]) -> None:
        with self._lock:
            self._ended = self._ended or make
            fronts = list(self._fronts.values())
        for front in fronts:
            front.post_end(self._ended)


def _new_event_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:  # Windows
        return asyncio.new_event_loop()
    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop


def _give_back_cached_memory() -> None:
    """Let torch's allocator return to CUDA what the engine used, so that the next engine finds it."""
    import torch

    from overlap.graphs.capture import POOLS

    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        with POOLS:
            torch.cuda.empty_cache()
