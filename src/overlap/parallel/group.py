"""A group of ranks over torch.distributed: gloo between CPUs, NCCL between GPUs.

The group is an object of its own (`ProcessGroupGloo`, `ProcessGroupNCCL`), not torch's default group: nothing global
changes, and two engines with groups live in one process.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final, TypeVar

import torch
from torch import Tensor
from torch._C import _DistBackendError
from torch._C._distributed_c10d import ProcessGroupGloo, Store

from overlap.errors import EngineDead, OverlapError

SUM_S: Final = 600.0
"""Seconds that a sum may wait for another rank. One that ends is noticed at once, by its socket, and one that is slow
may be slow (`step_limit` reports it): this is for one that hangs and cannot say so."""
T = TypeVar("T")

LOCALHOST: Final = "127.0.0.1"
ABORT_S: Final = 10.0
"""How long NCCL may take to give up before its thread is left behind."""
_CONNECTING: Final = (1, 1 << 14, 1 << 18, 1 << 22)
"""Numbers in the first sums. NCCL connects with the first sum of each way that it has, and a way is for some sizes.
Then it waits for the others on the host, which `abort` does not end: not inside a step, where a rank may be gone."""


class SumLate(EngineDead):
    """A sum has waited for another rank for as long as it may: this rank is whole, and that one is to blame."""


@dataclass(frozen=True, slots=True)
class _Started:
    """A sum that torch runs: gloo on a thread of its own, NCCL on a stream of its own."""

    group: Group
    work: Any
    x: Tensor  # kept until it has been summed

    def wait(self) -> Tensor:
        self.group._run(self.work.wait)
        return self.x


class Group:
    """This rank's end of a group. Keeps the Ranks protocol; use it on one thread at a time."""

    def __init__(
        self, store: Store, rank: int, size: int, device: torch.device, *, timeout_s: float, local: bool = True
    ) -> None:
        """Join `size` ranks, of which this is `rank`; returns once all are there.

        All meet in `store`. A collective (and the joining) that takes longer than `timeout_s` seconds fails. `local`
        says that all ranks are on this machine: then gloo listens on localhost only.

        What fails in gloo or NCCL is raised as EngineDead, with what it means.
        """
        self.rank = rank
        self.size = size
        self.device: Final = device
        self._aborting: threading.Thread | None = None
        self._timeout_s = timeout_s
        timeout = timedelta(seconds=timeout_s)
        self._backend: Any
        if device.type == "cuda":
            from torch._C._distributed_c10d import ProcessGroupNCCL  # only in torch's CUDA builds

            options = ProcessGroupNCCL.Options()
            options._timeout = timeout
            options.is_high_priority_stream = True  # a sum needs few SMs, but not when a product has left them all
            self._backend = ProcessGroupNCCL(store, rank, size, options)
        else:
            gloo: Any = ProcessGroupGloo
            own = gloo._Options()
            own._timeout = timeout
            own._devices = [gloo.create_device(hostname=LOCALHOST) if local else gloo.create_default_device()]
            self._backend = self._run(lambda: gloo(store, rank, size, own), "to join")
        for count in _CONNECTING if device.type == "cuda" else (1,):
            self.sum(torch.ones(count, device=device))

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum of `x` over all ranks, written over `x`; the same bits on each."""
        self._run(lambda: self._backend.allreduce([x]).wait())
        return x

    def start_sum(self, x: Tensor) -> _Started:
        """Begin `sum` and return at once."""
        return _Started(self, self._run(lambda: self._backend.allreduce([x])), x)

    def gather(self, x: Tensor) -> Tensor:
        """Return the `x` of all ranks, [size, *x.shape]."""
        out = x.new_empty((self.size, *x.shape))
        self._run(lambda: self._backend.allgather([list(out.unbind(0))], [x]).wait())
        return out

    def _run(self, call: Callable[[], T], what: str = "in a sum") -> T:
        """Call gloo or NCCL, and say what their errors mean. One of CUDA stays what it is."""
        began = time.monotonic()
        try:
            return call()
        except RuntimeError as failure:
            if self.device.type == "cuda" and not isinstance(failure, _DistBackendError):
                raise
            raise self._meaning(failure, what, time.monotonic() - began) from failure

    def _meaning(self, failure: RuntimeError, what: str, waited_s: float) -> EngineDead:
        said = f"({'NCCL' if self.device.type == 'cuda' else 'gloo'}: {_shortened(failure)})"
        if re.search("timed out|timeout", str(failure), re.IGNORECASE):
            return SumLate(
                f"it waited {self._timeout_s:g} s for another rank {what}, as long as it may: that rank hangs. See "
                f"what its process does, end it, and open a new engine {said}"
            )
        if "connection" in str(failure).lower():
            return EngineDead(
                f"its connection to another rank was lost after {waited_s:.1f} s {what}: that rank has ended or given "
                f"up, and its last words are on stderr {said}"
            )
        return EngineDead(f"it failed {what}, after {waited_s:.1f} s {said}")

    def abort(self) -> None:
        """End whatever waits for another rank, here, with an error. From any thread; nothing can be summed after.

        Does not wait. NCCL gives the device up at once, but comes back only when no graph with its sums is left, so
        whoever destroys the graphs must not wait for it.
        """
        if self.device.type == "cuda" and self._aborting is None:
            backend = self._backend
            self._aborting = threading.Thread(target=backend.abort, name="overlap-nccl-abort", daemon=True)
            self._aborting.start()
        # gloo has nothing to abort: when a rank's process ends, its connections do, and every wait for it fails.

    def close(self) -> None:
        """Leave: end the threads that gloo or NCCL keeps for this rank. Waits for them; nothing can be summed after.

        A process that ends while they run may be killed by them (gloo: "terminate called without an active
        exception"). Graphs with sums in them must be gone, and this rank's sums done. NCCL is told to give up, which
        asks nobody else: merely dropped, it waits for ranks that may have left, in a destructor, for ever.
        """
        self.abort()
        if self._aborting is not None:
            self._aborting.join(ABORT_S)
        self._backend = None


def reason(failure: BaseException) -> str:
    """Return what an error says, as one line."""
    first = (str(failure).strip().splitlines() or ["no message"])[0]
    return first if isinstance(failure, OverlapError) else f"{type(failure).__name__}: {first}"


def _shortened(failure: BaseException) -> str:
    """Return what an error of torch's says: its first sentence, without the place in the source."""
    lines = str(failure).strip().splitlines() or ["no message"]
    first = re.sub(r"^(\[[^\]]*\] *)+", "", lines[0]).partition(". ")[0]
    return first if len(first) <= 160 else first[:159] + "…"
