"""The gated SiLU in one Triton kernel. Imported only where Triton is; see `ops.activation`."""

from __future__ import annotations

from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from overlap.ops import launch_triton

_BLOCK: Final = 1024


@triton.jit
def _silu_mul_kernel(gate_up, out, row_stride, size, BLOCK: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    gate = tl.load(gate_up + row * row_stride + column, mask=inside, other=0.0)
    up = tl.load(gate_up + row * row_stride + size + column, mask=inside, other=0.0)
    wide = gate.to(tl.float32)
    silu = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype)
    tl.store(out + row * size + column, (silu.to(tl.float32) * up.to(tl.float32)).to(gate.dtype), mask=inside)


def silu_mul(gate_up_TX: Tensor) -> Tensor:
    """See `ops.activation.silu_mul`. Rows may be strided, columns may not."""
    tokens, size = gate_up_TX.shape[0], gate_up_TX.shape[1] // 2
    out = torch.empty((tokens, size), dtype=gate_up_TX.dtype, device=gate_up_TX.device)
    options: dict[str, Any] = launch_triton.early(gate_up_TX.device)
    _silu_mul_kernel[(tokens, triton.cdiv(size, _BLOCK))](
        gate_up_TX, out, gate_up_TX.stride(0), size, BLOCK=_BLOCK, **options
    )
    return out
