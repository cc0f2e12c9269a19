"""The leading rank's side: it starts the followers (or finds those of torchrun), and tells them each step.

A follower is a process of `python -m overlap.parallel.rank` with a socket to this one. It runs the same steps in the
same order, with neither planner nor requests. Whoever of the two ends sees the socket close knows that the other is
gone: the leader then ends what waits for that rank, and the engine with it; a follower ends itself.
"""

from __future__ import annotations

import contextlib
import os
import queue
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

import torch
from torch._C._distributed_c10d import FileStore, PrefixStore, Store, TCPStore

from overlap.config import EngineConfig
from overlap.environment import TorchRun, child_environment, torchrun
from overlap.errors import ConfigError, EngineDead
from overlap.parallel.group import LOCALHOST, SUM_S, Group, SumLate, reason
from overlap.parallel.lockstep import Lockstep
from overlap.parallel.wire import (
    REPORTS,
    Failed,
    Hello,
    Launch,
    Loaded,
    Memory,
    Order,
    Placed,
    Ready,
    Report,
    Setup,
    Stop,
    receive,
    send,
)
from overlap.resolve import Resolved
from overlap.schedule.plan import StepPlan
from overlap.streams.cpu import use_cores
from overlap.streams.stream import Stream

R = TypeVar("R", Hello, Placed, Loaded, Ready)

GONE_S: Final = 3.0
"""How long a rank that does not hear any more may take to be known to have ended."""
START_S: Final = 300.0
"""Seconds that a rank may take to start, load and join."""
STOP_S: Final = 10.0
"""Seconds that a follower may take to end before it is killed."""
CAUSE_S: Final = 1.0
"""Seconds for which a rank that says it has failed is not blamed: if another has died, that is the reason."""
ADDRESS_KEY: Final = "overlap/address"


class _Follower:
    """One follower as the leader sees it: its socket, and a thread that hears what comes over it."""

    def __init__(
        self,
        rank: int,
        connection: socket.socket,
        process: subprocess.Popen[bytes] | None,
        lost: Callable[[str, bool], None],
        *,
        hello: Hello | None = None,
    ) -> None:
        """`lost` is told why it is gone, and whether it said so itself. `hello` is what was heard of it already."""
        self.rank = rank
        self._connection = connection
        self._process = process
        self._lost = lost
        self._pid = process.pid if process is not None else 0
        self._stopping = False
        self.end = ""
        """Why it is gone, once it is."""
        self._reports: queue.SimpleQueue[Report | None] = queue.SimpleQueue()
        if hello is not None:
            self._pid = hello.pid
            self._reports.put(hello)
        self._thread = threading.Thread(target=self._hear, name=f"overlap-rank-{rank}", daemon=True)
        self._thread.start()

    def tell(self, order: Order) -> None:
        """Send an order. Raises OSError once the follower is gone."""
        self._stopping = self._stopping or isinstance(order, Stop)
        send(self._connection, order)

    def expect(self, kind: type[R]) -> R:
        """Wait for the next report. Raises EngineDead if the follower is gone, or says nothing for START_S seconds."""
        try:
            report = self._reports.get(timeout=START_S)
        except queue.Empty:
            report = None
            self.end = self.end or f"rank {self.rank} said nothing for {START_S:.0f} s"
        if isinstance(report, kind):
            return report
        raise EngineDead(f"The engine did not start: {self.end}.")

    def _hear(self) -> None:
        why = ""
        while (data := receive(self._connection)) is not None:
            report = REPORTS.decode(data)
            if isinstance(report, Hello):
                self._pid = report.pid
            if isinstance(report, Failed):
                why = report.why
                break
            self._reports.put(report)
        if not self._stopping:
            self.end = f"rank {self.rank} (process {self._pid}) {self._end(why)}"
            self._lost(self.end, bool(why))
        self._reports.put(None)

    def _end(self, why: str) -> str:
        if why:
            return f"failed: {why}"
        code = None
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = self._process.wait(timeout=GONE_S - 1)
        if code is None:
            return "closed its connection"
        if code < 0:
            return f"was ended by signal {-code} ({signal.Signals(-code).name})"
        return f"ended with status {code}; its last words are on stderr"

    def close(self, *, kill: bool) -> None:
        """Wait for it to end, and kill it if it does not, or at once. Idempotent."""
        self._stopping = True
        if self._process is not None:
            try:
                self._process.wait(timeout=0 if kill else STOP_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)  # wakes the thread
        self._thread.join()
        self._connection.close()


class Team:
    """All followers of this process, and the group with them. Made by `Team.start`."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._group: Group | None = None
        self._followers: list[_Follower] = []
        self._meeting: Path | None = None
        self._cores = 0  # of each rank, where all are processes of ours on one CPU
        self._why: str | None = None
        self._told = False
        """Whether a rank has said that it failed."""
        self._lock = threading.Lock()
        self._lost = threading.Event()
        self._when_lost: Callable[[], None] | None = None
        self._closed = False

    @classmethod
    def start(cls, asked: EngineConfig, resolved: Resolved) -> Team:
        """Start or find the followers, tell them what to load, and join them; the weights come after that.

        Raises EngineDead if one of them cannot start, ConfigError where this platform cannot do it.
        """
        team = cls(resolved.tensor_parallel)
        try:
            place = torchrun()
            store: Store
            if place is None:
                store, path = team._start_processes(resolved)
            else:
                store, path = team._find_processes(place), ""
            for follower in team._followers:
                follower.expect(Hello)
                follower.tell(_setup(asked, resolved, follower.rank, path))
            for follower in team._followers:
                follower.expect(Placed)
            team._join(store, torch.device(resolved.device), local=place is None or place.local)
        except BaseException as failure:
            team.give_up()
            team.close()
            if team.lost is not None and not isinstance(failure, EngineDead):
                raise EngineDead(f"The engine did not start: {team.lost}.") from failure
            raise
        return team

    def _join(self, store: Store, device: torch.device, *, local: bool) -> None:
        try:
            self._group = Group(store, 0, self.size, device, timeout_s=SUM_S, local=local)
        except Exception as failure:
            self.wait_lost(GONE_S)  # if a rank has ended, that is the reason
            why = self.lost or f"rank 0 failed: {reason(failure)}"
            raise EngineDead(f"The engine did not start: {why}.") from failure

    def _start_processes(self, resolved: Resolved) -> tuple[Store, str]:
        if sys.platform == "win32":
            raise ConfigError(
                "tensor_parallel needs a system on which processes inherit sockets, which Windows is not."
            )
        self._meeting = Path(tempfile.mkdtemp(prefix="overlap-ranks-"))
        path = str(self._meeting / "store")
        if resolved.device == "cpu":
            self._cores = max(1, torch.get_num_threads() // self.size)
        threads = {"OMP_NUM_THREADS": str(self._cores)} if self._cores else {}
        for rank in range(1, self.size):
            ours, theirs = socket.socketpair()
            with theirs:
                process = subprocess.Popen(
                    [sys.executable, "-m", "overlap.parallel.rank", str(theirs.fileno())],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    env=child_environment(**threads),
                    start_new_session=True,  # Ctrl-C is the leader's to answer
                )
            self._followers.append(_Follower(rank, ours, process, self._lose))
        return FileStore(path, self.size), path

    def _find_processes(self, place: TorchRun) -> Store:
        """Let the other processes of torchrun connect to this one."""
        if (place.rank, place.size) != (0, self.size):
            raise ConfigError(
                f"tensor_parallel is {self.size}, and torchrun started this process as rank {place.rank} of "
                f"{place.size}. Rank 0 serves, with tensor_parallel={place.size}; the others call "
                "overlap.parallel.rank.follow()."
            )
        store = place_store(place)
        token = secrets.token_hex(16)
        with socket.create_server((LOCALHOST if place.local else "", 0)) as server:
            server.settimeout(START_S)
            host = LOCALHOST if place.local else place.address
            store.set(ADDRESS_KEY, f"{host} {server.getsockname()[1]} {token}")
            found: dict[int, tuple[socket.socket, Hello]] = {}
            while len(found) < self.size - 1:
                try:
                    connection, _ = server.accept()
                    connection.settimeout(START_S)
                    data = receive(connection)
                except TimeoutError:
                    raise ConfigError(
                        f"Of {self.size - 1} other ranks {len(found)} came within {START_S:.0f} s. Each has to call "
                        "overlap.parallel.rank.follow(), which follows one engine: a job has one."
                    ) from None
                hello = None if data is None else REPORTS.decode(data)
                if isinstance(hello, Hello) and secrets.compare_digest(hello.token, token):
                    connection.settimeout(None)
                    found[hello.rank] = connection, hello
                else:
                    connection.close()
        for rank, (connection, hello) in sorted(found.items()):
            self._followers.append(_Follower(rank, connection, None, self._lose, hello=hello))
        return PrefixStore("overlap/group", store)

    # ── starting ─────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def group(self) -> Group:
        """What the model sums with."""
        assert self._group is not None, "a team that was started has joined its group"
        return self._group

    def use_cores(self) -> None:
        """Let this thread's operations use this rank's share of the cores: torchrun gives each of its ranks one."""
        if self._cores:
            use_cores(self._cores)

    def least_free_bytes(self, own: int) -> int:
        """Wait until all followers have their weights; return the least memory that a rank has left."""
        least = min([own, *(follower.expect(Loaded).free_bytes for follower in self._followers)])
        return least if self.group.device.type == "cuda" else least // self.size  # a CPU's memory is everyone's

    def share_memory(self, num_pages: int, context: int) -> None:
        """Tell the followers how much KV there is."""
        self._tell(Memory(num_pages=num_pages, context=context))

    def wait_ready(self) -> None:
        """Wait until all followers wait for plans."""
        for follower in self._followers:
            follower.expect(Ready)

    # ── serving ──────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def lost(self) -> str | None:
        """Why the ranks are no longer complete, or None."""
        return self._why

    def when_lost(self, call: Callable[[], None]) -> None:
        """Call back, from another thread, once a follower is gone."""
        with self._lock:
            self._when_lost = call
            late = self._why is not None
        if late:
            call()

    def blame(self, failure: BaseException) -> None:
        """Take in what a step raised on this rank, before what the others make of it is heard.

        They only see this rank's connections close; so one that has hung names the rank that waited for it.
        """
        if isinstance(failure, SumLate):
            self._lose(f"rank 0 (process {os.getpid()}) failed: {failure}")

    def wait_lost(self, timeout_s: float) -> bool:
        """Wait until a follower is gone, so many seconds at most; return whether one is. Blocks."""
        return self._lost.wait(timeout_s)

    def why(self) -> str:
        """Return the sentence for the user."""
        return f"{self._why}. All ranks are needed for every step."

    def check(self) -> None:
        """Raise EngineDead if a follower is gone."""
        if self._why is not None:
            raise EngineDead(self.why())

    def tell(self, order: Order) -> None:
        """Send an order to all followers. Raises EngineDead if one is gone."""
        self.check()
        self._tell(order)

    def lockstep(self, stream: Stream) -> Stream:
        """Return this rank's stream for the runner."""
        return Lockstep(stream)

    def launch(self, plan: StepPlan) -> None:
        """Let all followers launch a step."""
        self.tell(Launch(plan))

    def _tell(self, order: Order) -> None:
        for follower in self._followers:
            try:
                follower.tell(order)
            except OSError as failure:
                self._lost.wait(GONE_S)  # who listens to it says how it ended
                self._lose(f"rank {follower.rank} is gone ({failure})")
                raise EngineDead(self.why()) from failure

    def _lose(self, why: str, told: bool = False) -> None:
        """Note why the ranks are not complete. The first reason stays, but one that was `told` waits for a better."""
        if told:
            with self._lock:
                late, self._told = self._told, True
            if late:  # it met the end of the one that told before it
                return
            self._lost.wait(CAUSE_S)
        with self._lock:
            if self._why is not None or self._closed:
                return
            self._why = why
            self._lost.set()
            call = self._when_lost
        if self._group is not None:
            self._group.abort()
        if call is not None:
            call()

    def stop(self) -> None:
        """Let the followers finish what was launched and end. Does not wait."""
        for follower in self._followers:
            with contextlib.suppress(OSError):
                follower.tell(Stop())

    def give_up(self) -> None:
        """Kill the followers, and let nothing here wait for them. `close` comes after."""
        self._closed = True
        for follower in self._followers:
            follower.close(kill=True)
        self._followers.clear()
        if self._group is not None:
            self._group.abort()
        self._leave_meeting()

    def close(self) -> None:
        """Wait for the followers to end (they are killed after STOP_S seconds, or at once if one is gone) and clean up.

        What this rank has queued must be done, and its graphs gone. Idempotent.
        """
        self._closed = True
        if self._why is None:
            self.stop()
        for follower in self._followers:
            follower.close(kill=self._why is not None)
        self._followers.clear()
        group, self._group = self._group, None
        if group is not None:
            group.close()
        self._leave_meeting()

    def _leave_meeting(self) -> None:
        meeting, self._meeting = self._meeting, None
        if meeting is not None:
            shutil.rmtree(meeting, ignore_errors=True)


def place_store(place: TorchRun) -> Store:
    """Return torchrun's store, hosted by its agent or by rank 0."""
    hosts = place.rank == 0 and not place.agent_store
    return TCPStore(place.address, place.port, place.size, hosts, wait_for_workers=False)


def _setup(asked: EngineConfig, resolved: Resolved, rank: int, store: str) -> Setup:
    device = resolved.device
    if store and device.startswith("cuda"):  # each of torchrun's ranks knows its own
        device = f"cuda:{int(device[5:]) + rank}"
    return Setup(
        model=os.fspath(Path(asked.model).absolute()) if Path(asked.model).exists() else asked.model,
        load_format=asked.load_format,
        revision=asked.revision,
        cache_dir=None if asked.cache_dir is None else os.fspath(Path(asked.cache_dir).absolute()),
        rank=rank,
        size=resolved.tensor_parallel,
        store=store,
        device=device,
        dtype=resolved.dtype,
        max_rows=resolved.max_rows,
        token_budget=resolved.token_budget,
        graphs=resolved.graphs,
        halves=resolved.lanes == "halves",
        timeout_s=SUM_S,
    )
