"""Embedding, two norms and a cast in one kernel. Imported only where Triton is; see `spec.pair`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from overlap.ops import launch_triton


@triton.jit(do_not_specialize=["hidden_stride"])
def _normed_pair_kernel(
    token_ids,
    table,
    hidden,
    hidden_stride,
    embedding_norm,
    norm,
    pair,
    residual,
    channels,
    eps,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program a token and side: 0 is the embedding's, 1 the hidden state's."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    side = tl.program_id(1)
    channel = tl.arange(0, BLOCK)
    inside = channel < channels
    if side == 0:
        factor = tl.load(embedding_norm + channel, mask=inside, other=0.0)
    else:
        factor = tl.load(norm + channel, mask=inside, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
    if side == 0:
        token = tl.load(token_ids + row).to(tl.int64)
        value = tl.load(table + token * channels + channel, mask=inside, other=0.0).to(tl.float32)
    else:
        value = tl.load(hidden + row * hidden_stride + channel, mask=inside, other=0.0).to(tl.float32)
        tl.store(residual + row * channels + channel, value, mask=inside)
    scale = tl.rsqrt(tl.sum(value * value, axis=0) / channels + eps)
    scaled = (value * scale * factor).to(pair.dtype.element_ty)
    tl.store(pair + row * 2 * channels + side * channels + channel, scaled, mask=inside)


def normed_pair(
    token_ids_T: Tensor, table_VC: Tensor, hidden_TC: Tensor, embedding_norm_C: Tensor, norm_C: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """See `spec.pair.normed_pair`."""
    tokens, channels = hidden_TC.shape
    pair_TX = torch.empty((tokens, 2 * channels), dtype=table_VC.dtype, device=table_VC.device)
    residual_TC = torch.empty((tokens, channels), dtype=torch.float32, device=table_VC.device)
    block = triton.next_power_of_2(channels)
    _normed_pair_kernel[(tokens, 2)](
        token_ids_T,
        table_VC,
        hidden_TC,
        hidden_TC.stride(0),
        embedding_norm_C,
        norm_C,
        pair_TX,
        residual_TC,
        channels,
        eps,
        BLOCK=block,
        num_warps=min(max(block // 512, 1), 16),
        **launch_triton.early(table_VC.device),
    )
    return pair_TX, residual_TC
