"""The loop: plan, launch, tell, land, settle, and nothing else.

    plan N+1 ──► launch N+1 ──► tell N-1 ────► wait until flight N landed ──► settle N ──► (again)
    host only    enqueue only    tokens out    asyncio, no spin               ends, pages fenced

What a step brought is told behind the launch of the next one: readers in the same program hold the interpreter for as
long as they read, and so they do it while the loop has nothing to do but wait. A step with a prompt takes long to
launch, so there it is told first; and nothing stays untold while the loop waits.

Steps run in one lane, or in two at once: then the main lane decodes while the side lane reads prompts, each one step
ahead, and each lands at its own pace. What is in flight are local variables. A step that fails ends the
requests that read from it, and the loop goes on; a failure of the loop itself ends every request, and the loop with it.
A step that does not land is reported.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Final, Protocol

from overlap.cache.pages import Ints
from overlap.errors import ConfigError, DeadlineExceeded, EngineDead, InternalError, RequestError
from overlap.observe.timeline import NoTimeline, Timeline
from overlap.schedule.plan import MAIN, SIDE, StepPlan
from overlap.schedule.planner import Planner
from overlap.schedule.request import Request
from overlap.schedule.settled import Settled
from overlap.streams.stream import Busy
from overlap.turns import Rest
from overlap.watchdog import Watchdog

_NOTHING: Final = nullcontext()
DEPTH: Final = 2
"""Steps of one lane in the air: one that runs, and one behind it."""


class Flight(Protocol):
    """A launched plan."""

    @property
    def plan(self) -> StepPlan:
        """What was launched."""

    @property
    def blocks_left(self) -> int:
        """How many blocks of it are not enqueued yet."""

    def launch_block(self) -> None:
        """Enqueue the next block, so that the step of another lane can be launched between two."""

    @property
    def landed(self) -> bool:
        """Whether the device is done. Never waits."""

    async def wait_landed(self) -> Ints:
        """Return the tokens [E] once the device is done; raise what the step raised."""

    def scored(self) -> Ints | None:
        """Return the scores [S, TOLD_WORDS] of a plan that asks for some. Only once it has landed, and at once then."""

    def busy(self) -> Busy:
        """Return when the device ran it. Only once it has landed, and not if it failed."""


class Runner(Protocol):
    """What turns plans into flights."""

    def launch(self, plan: StepPlan) -> Flight:
        """Enqueue a plan and return at once. Never waits for the device."""

    def usable(self) -> bool:
        """Return whether the device still works, after a step has failed. May wait."""


class Outbox(Protocol):
    """Whom the loop tells. Called on the loop's thread; must not block."""

    def tell_settled(self, settled: Settled) -> None:
        """Some requests got tokens, and some of them ended."""

    def tell_failed(self, key: int, front: int, failure: BaseException) -> None:
        """A request ended by an error: it was refused, its deadline passed (RequestError), or a step failed."""


@dataclass(frozen=True, slots=True)
class _FailedFlight:
    """A plan that could not be launched. Nothing is planned behind it: the device knows none of its changes."""

    plan: StepPlan
    failure: Exception

    blocks_left = 0

    def launch_block(self) -> None:
        """Do nothing: there is none."""

    @property
    def landed(self) -> bool:
        """Whether there is nothing to wait for: so it is."""
        return True

    async def wait_landed(self) -> Ints:
        """Raise why."""
        raise self.failure

    def scored(self) -> Ints | None:
        """Raise why: it never ran."""
        raise self.failure

    def busy(self) -> Busy:
        """Raise why: it never ran."""
        raise self.failure


@dataclass(frozen=True, kw_only=True)
class LoopStatistics:
    """The loop's figures since it started."""

    steps: int
    failed_steps: int
    late_steps: int
    """Steps that were reported because they had not landed in time."""
    expired: int
    """Requests that were ended by their deadline."""
    tokens_in: int
    """Tokens run: prompt and decode."""
    tokens_out: int
    """Tokens that reached a reader."""
    side_steps: int
    """Of the steps, those of the side lane: prompts that were read beside decode steps."""
    busy_s: float
    """Seconds for which the main lane ran steps, measured on the device. Failed steps are left out."""
    side_busy_s: float
    """Seconds for which the side lane did."""
    bubble_s: float
    """Seconds for which the device had nothing queued while work was waiting, measured on the device."""


class Loop:
    """One engine's loop. All methods but `run` return at once; all are called on the loop's thread."""

    def __init__(
        self,
        planner: Planner,
        runner: Runner,
        outbox: Outbox,
        *,
        timeline: Timeline | None = None,
        overlap: bool = True,
        idle_work: Callable[[], bool] | None = None,
        step_limit_s: float = 60.0,
        rest: Rest | None = None,
    ) -> None:
        """`rest` is told when the interpreter is wanted, and until when it is not, where that is about known."""
        self._planner = planner
        self._runner = runner
        self._outbox = outbox
        self._timeline = self._unwatched = timeline or NoTimeline()
        self._overlap = overlap
        self._idle_work = idle_work
        self._work = asyncio.Event()
        self._closing = False
        self._steps = self._failed = self._tokens_in = self._tokens_out = self._expired = self._side_steps = 0
        self._busy_s = self._side_busy_s = self._bubble_s = 0.0
        self._slept = True  # no work waited, or the side lane had it: what the main lane then waits is no bubble
        self._put_back: Flight | None = None  # of the side lane: what came while it was waited for went first
        self._untold: tuple[StepPlan, Settled] | None = None  # the last step's, until the next one is launched
        self._rest = rest or Rest()
        self._idle_waiters: list[Callable[[], None]] = []
        self._deadlines: dict[int, asyncio.TimerHandle] = {}
        self._watchdogs = (Watchdog(step_limit_s), Watchdog(step_limit_s))  # of the lanes

    def submit(self, request: Request) -> None:
        """Queue a request. One that can never run, or finds the queue full, is told so through the outbox."""
        try:
            self._planner.submit(request)
        except RequestError as refusal:
            self._outbox.tell_failed(request.key, request.front, refusal)
            return
        if request.deadline is not None:
            timers = asyncio.get_running_loop()
            at = timers.time() + max(0.0, request.deadline - time.monotonic())
            self._deadlines[request.key] = timers.call_at(at, self._expire, request)
        self._work.set()

    def end(self, key: int) -> bool:
        """End a request now. Nothing more of it is told; its pages come back after the fence."""
        ended = self._planner.end(key)
        self._forget_deadline(key)
        self._work.set()
        return ended

    def close(self) -> None:
        """Let `run` return once no flight is in the air. Requests that still run are the caller's to end."""
        self._closing = True
        self._work.set()

    def look(self) -> None:
        """Look for work again: a mask was made."""
        self._work.set()

    def when_idle(self, call: Callable[[], None]) -> None:
        """Call back once when no request is left and no flight is in the air."""
        self._idle_waiters.append(call)
        self._work.set()

    def watch(self, timeline: Timeline) -> None:
        """Tell `timeline` of each verb from now on. Raises ConfigError if one is told already."""
        if self._timeline is not self._unwatched:
            raise ConfigError("A trace of this engine is being recorded. End it before the next one begins.")
        self._timeline = timeline

    def unwatch(self, timeline: Timeline) -> None:
        """Tell `timeline` no more; does nothing if it is not told."""
        if self._timeline is timeline:
            self._timeline = self._unwatched

    async def run(self) -> None:
        """Serve until closed and the last flight has landed."""
        try:
            await self._serve(deque(), deque())
        except BaseException:
            with suppress(Exception):  # what made the loop fail is to be told
                self._tell()
            raise
        self._tell()

    async def _serve(self, main: deque[Flight], side: deque[Flight]) -> None:
        while main or side or await self._wait_work():
            self._fill(main, MAIN, beside=side)
            # a request's own steps are settled in their order, in whichever lane they ran
            if side and side[0].landed and not (main and main[0].plan.number <= side[0].plan.follows):
                await self._settle(side, beside=main)
                if not main:
                    continue  # whose prompt is through may decode now
            if side or self._planner.wants_side:
                self._fill(side, SIDE, beside=main)
            if main:
                await self._settle(main, beside=side)
            elif side:
                await self._settle(side, beside=main, or_work=True)
            else:
                await self._wait_mask()

    def _fill(self, lane: deque[Flight], number: int, *, beside: deque[Flight]) -> None:
        """Plan and launch until the lane has as many flights as it may.

        The main lane goes first: for the side lane one thing is done, a plan or a block of one, and then others for as
        long as the main lane's step runs. So the main lane never waits for more than one of them.
        """
        if number == SIDE:
            self._tell()  # the main lane's next step is launched, and prompts take long to
        while self._launch_block(lane) or self._launch_next(lane, number, beside=beside):
            if number == SIDE and beside and beside[0].landed:
                return

    def _launch_block(self, lane: deque[Flight]) -> bool:
        """Enqueue the next block of the lane's last step; return whether one was left."""
        if not lane or not lane[-1].blocks_left:
            return False
        with self._timeline.span("launch", lane[-1].plan), self._wanting():
            lane[-1].launch_block()
        return True

    @contextmanager
    def _wanting(self) -> Iterator[None]:
        """Ask readers for the interpreter all the while: what is launched in there are many calls."""
        self._rest.wanted = True
        try:
            yield
        finally:
            self._rest.wanted = False

    def _launch_next(self, lane: deque[Flight], number: int, *, beside: deque[Flight]) -> bool:
        """Plan and launch the lane's next step; return whether there was one, and room for it."""
        if len(lane) >= (DEPTH if self._overlap else 1) or self._closing:
            return False
        if any(isinstance(flight, _FailedFlight) for flight in (*lane, *beside)):
            return False
        self._end_unmatched()
        idle = number == MAIN and not lane and not beside
        waited = idle and self._planner.waits_for_mask  # before planning: it may be made meanwhile, on another thread
        with self._timeline.span("plan"):
            plan = self._planner.plan(number)
        if plan is None:
            if idle and not self._planner.wants_side:
                self._check_why_not(waited=waited)
            return False
        reads = plan.num_rows > plan.num_decode
        if reads and number == MAIN:
            self._tell()
        with self._timeline.span("launch", plan), self._wanting() if reads else _NOTHING:
            lane.append(self._launch(plan, alone=not lane))
        return True

    def _tell(self) -> None:
        """Hand on what the last settled step brought, if that was not done yet. Before anything is waited for."""
        if self._untold is not None:
            (plan, settled), self._untold = self._untold, None
            with self._timeline.span("tell", plan):
                self._outbox.tell_settled(settled)

    def _check_why_not(self, *, waited: bool) -> None:
        """Nothing is in flight, and nothing could be planned: that is right while masks are made, or after an end.

        `waited` says that one was being made before.
        """
        if self._planner.has_work and not (waited or self._planner.waits_for_mask):
            raise InternalError("requests wait, nothing is in flight, and nothing could be planned")

    def _end_unmatched(self) -> None:
        """End the requests whose form allows no token."""
        for request in self._planner.unmatched():
            failure = request.matcher.failure if request.matcher is not None else None
            if failure is not None and self.end(request.key):
                self._tell()
                self._outbox.tell_failed(request.key, request.front, failure)

    def _launch(self, plan: StepPlan, *, alone: bool) -> Flight:
        if alone:
            self._watchdogs[plan.lane].watch(plan)
        try:
            return self._runner.launch(plan)
        except InternalError:
            raise
        except Exception as failure:
            return _FailedFlight(plan, failure)

    async def _settle(self, lane: deque[Flight], *, beside: deque[Flight], or_work: bool = False) -> None:
        """Wait for a lane's first flight, and settle it; with `or_work` only if no news come first."""
        self._tell()
        flight = lane.popleft()
        watchdog = self._watchdogs[flight.plan.lane]
        if flight is not self._put_back:
            watchdog.watch(flight.plan)
        slept, self._slept = self._slept, False
        if flight.plan.again and flight.plan.lane == MAIN:
            self._rest.begin()
        try:
            with self._timeline.span("land", flight.plan):
                tokens = await (self._landed_or_work(flight) if or_work else flight.wait_landed())
            if tokens is None:
                lane.appendleft(flight)
        except Exception as failure:
            self._fail(flight.plan, failure)
            return
        finally:
            self._rest.end()
            put_back = bool(lane) and lane[0] is flight
            if or_work:  # what the other lane settles in between changes nothing
                self._put_back = flight if put_back else None
            if not put_back:
                watchdog.rest()
                if lane:
                    watchdog.watch(lane[0].plan)
        if tokens is None:
            self._slept = True  # the other lane had nothing to run: what it waits is no bubble
            return
        landed_at = time.perf_counter()
        with self._timeline.span("settle", flight.plan):
            settled = self._planner.settle(flight.plan, tokens, flight.scored())
            self._steps += 1
            self._tokens_in += flight.plan.num_tokens
            self._tokens_out += len(settled.keys)
            if self._deadlines:
                for end in settled.ends:
                    self._forget_deadline(end.key)
            self._untold = flight.plan, settled
        busy = flight.busy()
        if flight.plan.lane == SIDE:
            self._side_steps += 1
            self._side_busy_s += busy.end - busy.start
            self._slept = True
            bubble = 0.0
        else:
            self._rest.note(busy.start, busy.end, landed_at)
            bubble = 0.0 if slept or beside else busy.gap
            self._busy_s += busy.end - busy.start
            self._bubble_s += bubble
        if busy.typical:
            waited = 0.0 if slept or flight.plan.lane == SIDE else busy.gap
            self._planner.note_time(flight.plan, busy.end - busy.start, waited)
        else:
            self._planner.note_odd(flight.plan)
        self._timeline.ran(flight.plan, busy, bubble)

    async def _landed_or_work(self, flight: Flight) -> Ints | None:
        """Return the tokens of a flight, or None if news come before it has landed: a mask, a request, an end."""
        await asyncio.sleep(0)
        if not self._work.is_set():
            landing, coming = asyncio.ensure_future(flight.wait_landed()), asyncio.ensure_future(self._work.wait())
            try:
                await asyncio.wait((landing, coming), return_when=asyncio.FIRST_COMPLETED)
                if landing.done():
                    return landing.result()
            finally:
                landing.cancel()
                coming.cancel()
        self._work.clear()
        return None

    def _fail(self, plan: StepPlan, failure: BaseException) -> None:
        self._failed += 1
        if not self._runner.usable():
            raise EngineDead(f"The device does not work any more after: {failure!r}") from failure
        for key, front in self._planner.keys_in(plan):
            if self.end(key):  # telling another may have ended it
                self._outbox.tell_failed(key, front, failure)
        self._planner.pass_step(plan)

    # ── deadlines ───────────────────────────────────────────────────────────────────────────────────────────────

    def _expire(self, request: Request) -> None:
        where = request.life.value
        if self.end(request.key):
            self._expired += 1
            failure = DeadlineExceeded(f"The request had not ended by its deadline; it was {where}.")
            self._outbox.tell_failed(request.key, request.front, failure)

    def _forget_deadline(self, key: int) -> None:
        timer = self._deadlines.pop(key, None)
        if timer is not None:
            timer.cancel()

    def late(self) -> str | None:
        """Return what is wrong if the step that the loop waits for has taken too long, else None. From any thread."""
        return self._watchdogs[MAIN].late() or self._watchdogs[SIDE].late()

    async def _wait_work(self) -> bool:
        """Return True once there is work, False once closed. Called only with no flight in the air."""
        while not self._closing and not self._planner.has_work:
            self._tell()
            self._work.clear()
            waiters, self._idle_waiters = self._idle_waiters, []
            for call in waiters:
                call()
            if self._idle_work is not None and self._idle_work():
                await asyncio.sleep(0)  # what has come meanwhile goes first
                continue
            self._slept = True
            await self._work.wait()
        return not self._closing

    async def _wait_mask(self) -> None:
        """Wait until a mask is made, or anything else has come: nothing is in the air, and nobody can run without."""
        self._tell()
        if self._planner.waits_for_mask and not self._closing:
            self._work.clear()
            await self._work.wait()

    def statistics(self) -> LoopStatistics:
        """Return the figures so far."""
        return LoopStatistics(
            steps=self._steps,
            failed_steps=self._failed,
            late_steps=sum(watchdog.num_late for watchdog in self._watchdogs),
            expired=self._expired,
            tokens_in=self._tokens_in,
            tokens_out=self._tokens_out,
            side_steps=self._side_steps,
            busy_s=self._busy_s,
            side_busy_s=self._side_busy_s,
            bubble_s=self._bubble_s,
        )
