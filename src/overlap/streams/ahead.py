"""Starting CUDA's driver while torch is imported: each takes the better part of a second. Imports no torch."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from contextlib import suppress

from overlap.ops.cuda_driver import patient


def start_driver(device: str) -> Callable[[], None]:
    """Start the driver on a thread of its own, and hold the context that torch will use.

    `device` is as `EngineConfig.device`. Call what is returned once torch has started on the device, or is not to: it
    waits for the thread and takes that hold away; torch has its own by then, and without one the context goes. On a
    machine without a driver, or without that device, nothing happens; whoever needs them will say so.
    """
    held: list[int] = []

    def hold() -> None:
        with suppress(OSError, AttributeError, ValueError):  # no driver here, a very old one, or no such name
            library, found, context = patient(), ctypes.c_int(), ctypes.c_void_p()
            index = int(device.partition(":")[2] or 0)
            if library.cuInit(0) or library.cuDeviceGet(ctypes.byref(found), index):
                return
            if not library.cuDevicePrimaryCtxRetain(ctypes.byref(context), found):
                held.append(found.value)

    thread = threading.Thread(target=hold, name="overlap-driver", daemon=True)
    thread.start()

    def let_go() -> None:
        thread.join()
        while held:
            patient().cuDevicePrimaryCtxRelease_v2(held.pop())

    return let_go
