"""Capture: what is enqueued on a stream between `begin` and `end` becomes a graph, whose memory comes from one pool.

The driver's own functions are called here, not `torch.cuda.CUDAGraph`, for what that one does besides. It brings the
process's random number generator into the capture: while it lasts, and for ever after one that fails, another thread
that draws numbers on CUDA gets an error; and `torch.cuda.graph` waits for the device. torch's kernels ask the stream
itself whether it is being captured, and its allocator serves this thread from the pool, so nothing is missing.

Capture is thread-local: what other threads do with CUDA meanwhile neither breaks it nor is broken by it. Nothing here
waits for the device; work that is queued on the stream goes on.

A graph holds addresses, not tensors. Memory that was freed during a capture serves the next one too, so all graphs of a
pool share their intermediates, and must run one after the other: on one stream.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor

from overlap.ops.cuda_driver import driver, patient, told

_THREAD_LOCAL: Final = 1
_FREE_ON_LAUNCH: Final = 1


POOLS: Final = threading.Lock()
"""Held while one engine of the process records, and while one gives memory back to CUDA.

torch's allocator ends the process ("captures_underway.empty() INTERNAL ASSERT FAILED") if a pool is given up while any
thread allocates for a capture."""


class CaptureError(RuntimeError):
    """CUDA refused to record, build or launch a graph. Never reaches a user: the step runs without a graph."""


class Graph:
    """Work that one call launches. Made by `Recorder.end`."""

    __slots__ = ("_address", "_recorder", "num_nodes")

    def __init__(self, recorder: Recorder, address: int, num_nodes: int) -> None:
        self._recorder = recorder
        self._address = address
        self.num_nodes = num_nodes
        """How many kernels and copies it has."""

    def launch(self) -> None:
        """Enqueue all of it on the stream that it was recorded on. Raises CaptureError, and then nothing was."""
        self._recorder.launch(self._address)

    def close(self) -> None:
        """Free it. It must not be running. Idempotent."""
        if self._address:
            address, self._address = self._address, 0
            self._recorder.destroy(address)


class Recorder:
    """Records on the stream that is torch's current one when it is made; use it on that stream and thread only."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream)
        self._cuda = patient()
        self._launch = driver().cuGraphLaunch
        self._pool: Any = torch.cuda.MemPool()
        self._capturing = False
        self.pool_bytes = 0
        """Device memory that captures have added to the process's, as torch's allocator counts it."""

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Serve this thread's allocations from the pool; whatever ends the block, no capture is left open."""
        before = torch.cuda.memory_reserved(self._device)
        with POOLS, torch.cuda.use_mem_pool(self._pool, self._device):
            try:
                yield
            finally:
                if self._capturing:
                    self._abandon()
        self.pool_bytes += max(0, torch.cuda.memory_reserved(self._device) - before)

    def begin(self) -> None:
        """Start to record. Only inside `recording`."""
        self._check("cuStreamBeginCapture", self._cuda.cuStreamBeginCapture_v2(self._stream, _THREAD_LOCAL))
        self._capturing = True

    def end(self) -> Graph:
        """Return what was enqueued since `begin`, ready to be launched."""
        self._capturing = False
        graph, executable, count = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_size_t()
        self._check("cuStreamEndCapture", self._cuda.cuStreamEndCapture(self._stream, ctypes.byref(graph)))
        try:
            self._check("cuGraphGetNodes", self._cuda.cuGraphGetNodes(graph, None, ctypes.byref(count)))
            build = self._cuda.cuGraphInstantiateWithFlags
            self._check("cuGraphInstantiate", build(ctypes.byref(executable), graph, _FREE_ON_LAUNCH))
        finally:
            self._cuda.cuGraphDestroy(graph)
        return Graph(self, executable.value or 0, count.value)

    def launch(self, address: int) -> None:
        """Enqueue a graph: see `Graph.launch`."""
        self._check("cuGraphLaunch", self._launch(address, self._stream))

    def destroy(self, address: int) -> None:
        """Free a graph: see `Graph.close`."""
        self._check("cuGraphExecDestroy", self._cuda.cuGraphExecDestroy(address))

    def close(self) -> None:
        """Give up the pool; its memory goes back to CUDA once nothing is left in it and torch's cache is emptied."""
        with POOLS:
            self._pool = None

    def _abandon(self) -> None:
        """End a capture that came to nothing. CUDA takes the stream out of it even where it reports an error."""
        self._capturing = False
        graph = ctypes.c_void_p()
        self._cuda.cuStreamEndCapture(self._stream, ctypes.byref(graph))
        if graph.value:
            self._cuda.cuGraphDestroy(graph)

    def _check(self, call: str, code: int) -> None:
        if code:
            raise CaptureError(told(call, code))


class _Array:
    """Device memory that is somebody else's, as numba's array interface describes it: how torch takes an address."""

    def __init__(self, address: int, shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> None:
        self.__cuda_array_interface__ = {
            "data": (address, False),
            "shape": shape,
            "strides": tuple(stride * itemsize for stride in strides),
            "typestr": f"<i{itemsize}",
            "version": 2,
        }


class Place:
    """Where a tensor of a graph lies: what is kept of it, so that its memory can serve other graphs as well."""

    __slots__ = ("_address", "_device", "_dtype", "_shape", "_strides")

    def __init__(self, tensor: Tensor) -> None:
        self._address, self._shape, self._strides = tensor.data_ptr(), tuple(tensor.shape), tensor.stride()
        self._dtype, self._device = tensor.dtype, tensor.device

    def __eq__(self, other: object) -> bool:
        """Whether it is the same memory, seen the same way."""
        return isinstance(other, Place) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    @property
    def _key(self) -> tuple[object, ...]:
        return self._address, self._shape, self._strides, self._dtype, self._device

    def tensor(self) -> Tensor:
        """Return the place as a tensor that owns nothing. What it holds is the graph's until another one runs."""
        array = _Array(self._address, self._shape, self._strides, self._dtype.itemsize)
        return torch.as_tensor(array, device=self._device).view(self._dtype)
