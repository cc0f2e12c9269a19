"""RMS norm, alone and with the residual add before it.

The residual stream is float32 whatever the model's dtype: rounding it to bfloat16 at each of 60 additions was most of
the error of SmolLM2's logits (docs/log.md), and on a CPU one wide tensor takes fewer operations than two narrow ones.

Legend: T tokens, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(residual_TC: Tensor, weight_C: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """Return `weight * residual / rms(residual)`, computed in float32 and rounded once, to `dtype`.

    residual [T, C] and weight [C] are float32; eps is added to the mean square. Source: RMSNorm (Zhang and Sennrich,
    2019), as in `LlamaRMSNorm` of transformers, whose bits it has in float32.
    """
    if residual_TC.is_cuda:
        from overlap.ops import norm_triton

        return norm_triton.rms_norm(residual_TC, weight_C, eps, dtype)
    return torch.rms_norm(residual_TC, weight_C.shape, weight_C, eps).to(dtype)


def add_rms_norm(x_TC: Tensor, residual_TC: Tensor, weight_C: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return `(rms_norm(residual + x) in x's dtype, residual + x in float32)`.

    x is [T, C] of any floating dtype, residual [T, C] and weight [C] are float32. Neither input is changed.
    """
    if x_TC.is_cuda:
        from overlap.ops import norm_triton

        return norm_triton.add_rms_norm(x_TC, residual_TC, weight_C, eps)
    sum_TC = residual_TC + x_TC
    return torch.rms_norm(sum_TC, weight_C.shape, weight_C, eps).to(x_TC.dtype), sum_TC
