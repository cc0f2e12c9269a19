"""RMS norm in one Triton kernel, the residual add folded in. Imported only where Triton is; see `ops.norm`."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from overlap.ops import launch_triton


@triton.jit
def _rms_norm_kernel(
    x,
    residual,
    weight,
    normed,
    total,
    x_stride,
    residual_stride,
    channels,
    eps,
    HAS_X: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    inside = channel < channels
    factor = tl.load(weight + channel, mask=inside, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
    value = tl.load(residual + row * residual_stride + channel, mask=inside, other=0.0)
    if HAS_X:
        value += tl.load(x + row * x_stride + channel, mask=inside, other=0.0).to(tl.float32)
        tl.store(total + row * channels + channel, value, mask=inside)
    scale = tl.rsqrt(tl.sum(value * value, axis=0) / channels + eps)
    scaled = value * scale * factor
    tl.store(normed + row * channels + channel, scaled.to(normed.dtype.element_ty), mask=inside)


def rms_norm(residual_TC: Tensor, weight_C: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """See `ops.norm.rms_norm`."""
    return _launch(None, residual_TC, weight_C, eps, dtype)[0]


def add_rms_norm(x_TC: Tensor, residual_TC: Tensor, weight_C: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `ops.norm.add_rms_norm`."""
    return _launch(x_TC, residual_TC, weight_C, eps, x_TC.dtype)


def _launch(
    x_TC: Tensor | None, residual_TC: Tensor, weight_C: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    tokens, channels = residual_TC.shape
    normed_TC = torch.empty((tokens, channels), dtype=dtype, device=residual_TC.device)
    total_TC = residual_TC if x_TC is None else torch.empty_like(residual_TC, memory_format=torch.contiguous_format)
    x = residual_TC if x_TC is None else x_TC
    block = triton.next_power_of_2(channels)
    options: dict[str, Any] = launch_triton.early(residual_TC.device)
    _rms_norm_kernel[(tokens,)](
        x,
        residual_TC,
        weight_C,
        normed_TC,
        total_TC,
        x.stride(0),
        residual_TC.stride(0),
        channels,
        eps,
        HAS_X=x_TC is not None,
        BLOCK=block,
        num_warps=min(max(block // 512, 1), 16),
        **options,
    )
    return normed_TC, total_TC
