"""CUDA events by the driver's own calls, made without giving up the interpreter's lock.

torch's events let go of the lock at each call. While another thread computes in Python, the engine's thread would then
wait for it behind every record and every query, up to 5 ms each, though the calls take a microsecond. Only
`synchronize`, which waits for the device, lets go of it here.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any, Final

_BLOCKING: Final = 1
_NOT_READY: Final = 600


class Event:
    """An event with time, waited for without spinning. Made and used while its device's context is current."""

    __slots__ = ("_address", "_cuda")

    def __init__(self) -> None:
        self._cuda = _driver()
        address = ctypes.c_void_p()
        _check("cuEventCreate", self._cuda.cuEventCreate(ctypes.byref(address), _BLOCKING))
        self._address = address.value

    def record(self, stream: int) -> None:
        """Put it behind what is queued on a stream (its address)."""
        _check("cuEventRecord", self._cuda.cuEventRecord(self._address, stream))

    def query(self) -> bool:
        """Return whether the device has passed it. Never waits. Raises RuntimeError for what the device failed at."""
        code = self._cuda.cuEventQuery(self._address)
        if code == _NOT_READY:
            return False
        _check("cuEventQuery", code)
        return True

    def wait(self, stream: int) -> None:
        """Let a stream (its address) go on only behind it."""
        _check("cuStreamWaitEvent", self._cuda.cuStreamWaitEvent(stream, self._address, 0))

    def elapsed_s(self, later: Event) -> float:
        """Return the seconds from this one to a later one; both must have been passed."""
        milliseconds = ctypes.c_float()
        _check(
            "cuEventElapsedTime",
            self._cuda.cuEventElapsedTime(ctypes.byref(milliseconds), self._address, later._address),
        )
        return milliseconds.value / 1e3

    def synchronize(self) -> None:
        """Wait until the device has passed it, asleep, with the interpreter's lock given up."""
        _check("cuEventSynchronize", _patient_driver().cuEventSynchronize(self._address))

    def __del__(self) -> None:
        if getattr(self, "_address", None):
            self._cuda.cuEventDestroy_v2(self._address)


def _check(call: str, code: int) -> None:
    if code:
        name = ctypes.c_char_p()
        _patient_driver().cuGetErrorName(code, ctypes.byref(name))
        raise RuntimeError(f"CUDA error: {call}: {(name.value or b'unknown error').decode()} ({code})")


@cache
def _driver() -> Any:
    library = ctypes.PyDLL("libcuda.so.1")
    pointer, number = ctypes.c_void_p, ctypes.c_uint
    for name, types in {
        "cuEventCreate": (ctypes.POINTER(pointer), number),
        "cuEventRecord": (pointer, pointer),
        "cuEventQuery": (pointer,),
        "cuStreamWaitEvent": (pointer, pointer, number),
        "cuEventElapsedTime": (ctypes.POINTER(ctypes.c_float), pointer, pointer),
        "cuEventDestroy_v2": (pointer,),
    }.items():
        function = getattr(library, name)
        function.argtypes, function.restype = types, ctypes.c_int
    return library


@cache
def _patient_driver() -> Any:
    library = ctypes.CDLL("libcuda.so.1")
    library.cuEventSynchronize.argtypes = (ctypes.c_void_p,)
    library.cuGetErrorName.argtypes = (ctypes.c_int, ctypes.POINTER(ctypes.c_char_p))
    return library
