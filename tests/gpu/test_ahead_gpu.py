from __future__ import annotations

import subprocess
import sys

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CODE = """
import ctypes
from overlap.streams.ahead import start_driver

driver = ctypes.CDLL("libcuda.so.1")

def active():
    flags, state = ctypes.c_uint(), ctypes.c_int()
    assert driver.cuDevicePrimaryCtxGetState(0, ctypes.byref(flags), ctypes.byref(state)) == 0
    return state.value

start_driver("auto")()
assert not active(), "nobody else wanted it"
let_go = start_driver("cuda:0")
import torch
ones = torch.ones(3, device="cuda")
let_go()
assert active(), "torch has a hold of its own"
assert float(ones.sum()) == 3
"""


def test_the_context_that_is_started_ahead_is_torchs_and_goes_if_torch_does_not_come() -> None:
    subprocess.run([sys.executable, "-c", CODE], check=True, timeout=120)
