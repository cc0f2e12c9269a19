"""The embedding's rows in one Triton kernel. Imported only where Triton is; see `ops.embedding`."""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK: Final = 1024


@triton.jit
def _embed_kernel(token_ids, table, out, channels, BLOCK: tl.constexpr):
    """Begins the first piece of a forward: never started early, see `state.replay_triton`."""
    token = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < channels
    row = tl.load(token_ids + token).to(tl.int64)
    value = tl.load(table + row * channels + channel, mask=inside, other=0.0)
    tl.store(out + token * channels + channel, value.to(tl.float32), mask=inside)


def embed(token_ids_T: Tensor, table_VC: Tensor) -> Tensor:
    """See `ops.embedding.embed`. The table must be contiguous."""
    tokens, channels = token_ids_T.shape[0], table_VC.shape[1]
    out_TC = torch.empty((tokens, channels), dtype=torch.float32, device=table_VC.device)
    _embed_kernel[(tokens, triton.cdiv(channels, _BLOCK))](token_ids_T, table_VC, out_TC, channels, BLOCK=_BLOCK)
    return out_TC
