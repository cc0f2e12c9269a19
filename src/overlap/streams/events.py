"""CUDA events by the driver's own calls, made without giving up the interpreter's lock: see `driver`."""

from __future__ import annotations

import ctypes
from typing import Final

from overlap.ops.cuda_driver import check, driver, patient

_BLOCKING: Final = 1
_NOT_READY: Final = 600


class Event:
    """An event with time, waited for without spinning. Made and used while its device's context is current."""

    __slots__ = ("_address", "_cuda")

    def __init__(self) -> None:
        self._cuda = driver()
        address = ctypes.c_void_p()
        check("cuEventCreate", self._cuda.cuEventCreate(ctypes.byref(address), _BLOCKING))
        self._address = address.value

    def record(self, stream: int) -> None:
        """Put it behind what is queued on a stream (its address)."""
        check("cuEventRecord", self._cuda.cuEventRecord(self._address, stream))

    def query(self) -> bool:
        """Return whether the device has passed it. Never waits. Raises RuntimeError for what the device failed at."""
        code = self._cuda.cuEventQuery(self._address)
        if code == _NOT_READY:
            return False
        check("cuEventQuery", code)
        return True

    def wait(self, stream: int) -> None:
        """Let a stream (its address) go on only behind it."""
        check("cuStreamWaitEvent", self._cuda.cuStreamWaitEvent(stream, self._address, 0))

    def elapsed_s(self, later: Event) -> float:
        """Return the seconds from this one to a later one; both must have been passed."""
        milliseconds = ctypes.c_float()
        check(
            "cuEventElapsedTime",
            self._cuda.cuEventElapsedTime(ctypes.byref(milliseconds), self._address, later._address),
        )
        return milliseconds.value / 1e3

    def synchronize(self) -> None:
        """Wait until the device has passed it, asleep, with the interpreter's lock given up."""
        check("cuEventSynchronize", patient().cuEventSynchronize(self._address))

    def __del__(self) -> None:
        if getattr(self, "_address", None):
            self._cuda.cuEventDestroy_v2(self._address)
