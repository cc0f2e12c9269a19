"""Host memory that the device reads and writes: page-locked on CUDA, and not torch's.

torch's own pinned memory notes each stream that copies from or to it, and records an event there when it is freed. That
may be long after an engine has closed, whenever Python gets to it, and by then another engine may be capturing a graph
on the same stream. Such an event makes the next request for pinned memory fail, whoever asks ("CUDA error: invalid
argument", measured: torch 2.11). What an engine keeps therefore comes from here: nothing of CUDA is called when it is
given back, and the next one takes it. Whoever gives it back has waited for the device.
"""

from __future__ import annotations

import ctypes
from collections import deque
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from overlap.ops.cuda_driver import check, driver

_PORTABLE: Final = 1
_IDLE: Final[dict[int, deque[int]]] = {}
"""Addresses that nobody uses, by size. CUDA frees the last of them with the process."""


class _Block:
    """Some page-locked bytes, as NumPy's array interface describes them; idle again when nothing refers to them."""

    def __init__(self, size: int) -> None:
        self._size = size
        idle = _IDLE.setdefault(size, deque())
        try:
            self._address = idle.pop()
        except IndexError:
            address = ctypes.c_void_p()
            check("cuMemHostAlloc", driver().cuMemHostAlloc(ctypes.byref(address), size, _PORTABLE))
            self._address = address.value or 0

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return {"data": (self._address, False), "shape": (self._size,), "typestr": "|u1", "version": 3}

    def __del__(self) -> None:
        if getattr(self, "_address", 0):
            _IDLE[self._size].append(self._address)


def host_zeros(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Return int32 zeros in host memory for `device`: page-locked where that is CUDA, whose context must be current."""
    if device.type != "cuda":
        return torch.zeros(shape, dtype=torch.int32)
    count = int(np.prod(shape))
    words = np.asarray(_Block(4096 * max(1, -(-4 * count // 4096)))).view(np.int32)[:count].reshape(shape)
    words[...] = 0
    return torch.from_numpy(words)
