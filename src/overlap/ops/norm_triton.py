"""RMS norm in one Triton kernel, the residual add folded in. Imported only where Triton is; see `ops.norm`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


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
    HAS_RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    inside = channel < channels
    value = tl.load(x + row * x_stride + channel, mask=inside, other=0.0)
    if HAS_RESIDUAL:
        addend = tl.load(residual + row * residual_stride + channel, mask=inside, other=0.0)
        value = (value.to(tl.float32) + addend.to(tl.float32)).to(value.dtype)
        tl.store(total + row * channels + channel, value, mask=inside)
    wide = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / channels + eps)
    rounded = (wide * scale).to(value.dtype).to(tl.float32)
    scaled = rounded * tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + row * channels + channel, scaled.to(value.dtype), mask=inside)


def rms_norm(x_TC: Tensor, weight_C: Tensor, eps: float) -> Tensor:
    """See `ops.norm.rms_norm`. Rows may be strided, channels may not."""
    return _launch(x_TC, None, weight_C, eps)[0]


def add_rms_norm(x_TC: Tensor, residual_TC: Tensor, weight_C: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `ops.norm.add_rms_norm`."""
    return _launch(x_TC, residual_TC, weight_C, eps)


def _launch(x_TC: Tensor, residual_TC: Tensor | None, weight_C: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    tokens, channels = x_TC.shape
    normed_TC = torch.empty((tokens, channels), dtype=x_TC.dtype, device=x_TC.device)
    residual = x_TC if residual_TC is None else residual_TC
    total_TC = normed_TC if residual_TC is None else torch.empty_like(normed_TC)
    block = triton.next_power_of_2(channels)
    _rms_norm_kernel[(tokens,)](
        x_TC,
        residual,
        weight_C,
        normed_TC,
        total_TC,
        x_TC.stride(0),
        residual.stride(0),
        channels,
        eps,
        HAS_RESIDUAL=residual_TC is not None,
        BLOCK=block,
        num_warps=min(max(block // 512, 1), 16),
    )
    return normed_TC, total_TC
