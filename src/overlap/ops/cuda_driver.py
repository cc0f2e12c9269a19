"""CUDA's driver, called without giving up the interpreter's lock.

torch lets go of the lock at each call. While another thread computes in Python, the engine's thread would then wait for
it behind every record and query, up to 5 ms each, though the calls take a microsecond. What waits for the device,
or takes long (capturing), is called through `patient`, which lets go of it.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any, Final

_pointer, _number, _out = ctypes.c_void_p, ctypes.c_uint, ctypes.POINTER(ctypes.c_void_p)
_TYPES: Final[dict[str, tuple[Any, ...]]] = {
    "cuInit": (_number,),
    "cuDeviceGet": (ctypes.POINTER(ctypes.c_int), ctypes.c_int),
    "cuDevicePrimaryCtxRetain": (_out, ctypes.c_int),
    "cuDevicePrimaryCtxRelease_v2": (ctypes.c_int,),
    "cuEventCreate": (_out, _number),
    "cuEventRecord": (_pointer, _pointer),
    "cuEventQuery": (_pointer,),
    "cuEventSynchronize": (_pointer,),
    "cuEventElapsedTime": (ctypes.POINTER(ctypes.c_float), _pointer, _pointer),
    "cuEventDestroy_v2": (_pointer,),
    "cuMemHostAlloc": (_out, ctypes.c_size_t, _number),
    "cuStreamWaitEvent": (_pointer, _pointer, _number),
    "cuStreamBeginCapture_v2": (_pointer, ctypes.c_int),
    "cuStreamEndCapture": (_pointer, _out),
    "cuGraphGetNodes": (_pointer, _pointer, ctypes.POINTER(ctypes.c_size_t)),
    "cuGraphInstantiateWithFlags": (_out, _pointer, ctypes.c_ulonglong),
    "cuGraphLaunch": (_pointer, _pointer),
    "cuGraphExecDestroy": (_pointer,),
    "cuGraphDestroy": (_pointer,),
    "cuGetErrorName": (ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)),
}


@cache
def driver() -> Any:
    """Return the library with the types of what is called here."""
    return _typed(ctypes.PyDLL("libcuda.so.1"))


@cache
def patient() -> Any:
    """Return the same, for what may take long."""
    return _typed(ctypes.CDLL("libcuda.so.1"))


def _typed(library: Any) -> Any:
    for name, types in _TYPES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = types, ctypes.c_int
    return library


def told(call: str, code: int) -> str:
    """Return what a call returned, in words."""
    name = ctypes.c_char_p()
    driver().cuGetErrorName(code, ctypes.byref(name))
    return f"{call}: {(name.value or b'unknown error').decode()} ({code})"


def check(call: str, code: int) -> None:
    """Raise RuntimeError for what a call returned, if that is an error."""
    if code:
        raise RuntimeError(f"CUDA error: {told(call, code)}")
