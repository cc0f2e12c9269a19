"""Compiles every Triton kernel for sm_90a's machine code, with no GPU. Run by test_kernels_interpreted.py.

The launchers are called with CPU tensors; a stand-in for Triton's driver says that the target is sm_90, and each launch
is turned into a compilation. It finds what the interpreter does not: whatever the compiler refuses.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from overlap.ops import activation_triton, norm_triton, rope_triton
from overlap.sample import philox_triton
from overlap.schedule.planner import Planner
from overlap.schedule.request import Request
from overlap.state import inputs_triton
from overlap.state.inputs import empty_inputs
from overlap.state.packing import pack
from overlap.state.rows import SlotRows


class Sm90:
    """What Triton asks of its driver before it compiles."""

    def get_current_target(self) -> Any:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_only() -> None:
    driver.set_active(Sm90())
    launch = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
        assert kernel.asm["cubin"]
        print(self.fn.__name__)
        return kernel

    JITFunction.run = run


def main() -> None:
    compile_only()
    for dtype in (torch.bfloat16, torch.float32):
        residual = torch.randn(4, 64)
        norm_triton.rms_norm(residual, residual[0], 1e-5, dtype)
        norm_triton.add_rms_norm(residual.to(dtype), residual, residual[0], 1e-5)
        activation_triton.silu_mul(torch.randn(4, 128).to(dtype))
        kv = torch.zeros(4, 2, 2, 16, 3, 64).to(dtype)
        index = torch.arange(4, dtype=torch.int32)
        rope_triton.rope_and_write(torch.randn(4, 15 * 64).to(dtype), index, torch.randn(100, 64), kv, 1, index, 9, 3)
    philox_triton.gumbel(index, index, index, 1000, None)
    philox_triton.gumbel(index, index, index, 1000, torch.zeros(4, 1000))
    planner = Planner(max_rows=4, num_pages=10, token_budget=64, prefill_chunk=64, context=100)
    planner.submit(Request(key=0, front=0, prompt=np.arange(20, dtype=np.int32), limit=5))
    plan = planner.plan()
    assert plan is not None
    words = np.zeros(1000, dtype=np.int32)
    layout = pack(plan, words)
    inputs_triton.build_inputs(torch.from_numpy(words), layout, SlotRows(4, 8, "cpu"), empty_inputs(64, 4, 8, "cpu"))


if __name__ == "__main__":
    main()
