"""RMS norm, alone and with the residual add before it.

Legend: T tokens, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x_TC: Tensor, weight_C: Tensor, eps: float) -> Tensor:
    """Return `weight * (x / rms(x))`, computed in float32 and rounded to x's dtype before the weight (as in Llama).

    x is [T, C], weight is [C] of the same dtype; eps is added to the mean square. Returns [T, C] of x's dtype.
    Source: `LlamaRMSNorm` of transformers.
    """
    if x_TC.is_cuda:
        from overlap.ops import norm_triton

        return norm_triton.rms_norm(x_TC, weight_C, eps)
    if x_TC.dtype is torch.float32:
        return torch.rms_norm(x_TC, weight_C.shape, weight_C, eps)  # the same bits in fewer dispatches
    normed_TC = torch.rms_norm(x_TC.float(), weight_C.shape, None, eps)
    return normed_TC.to(x_TC.dtype).mul_(weight_C)


def add_rms_norm(x_TC: Tensor, residual_TC: Tensor, weight_C: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return `(rms_norm(x + residual), x + residual)`; the sum is rounded to x's dtype first.

    Both inputs are [T, C] of one dtype. Neither is changed.
    """
    if x_TC.is_cuda:
        from overlap.ops import norm_triton

        return norm_triton.add_rms_norm(x_TC, residual_TC, weight_C, eps)
    sum_TC = x_TC + residual_TC
    return rms_norm(sum_TC, weight_C, eps), sum_TC
