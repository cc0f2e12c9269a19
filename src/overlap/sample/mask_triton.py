"""Masks of tokens in one Triton kernel. Imported only where Triton is; see `sample.shaping.mask_logits`."""

from __future__ import annotations

from typing import Final

import triton
import triton.language as tl
from torch import Tensor

_BLOCK: Final = 2048


@triton.jit(do_not_specialize=["width"])
def _mask_kernel(logits, stride, size, masks, width, BLOCK: tl.constexpr):
    line = masks + tl.program_id(0).to(tl.int64) * width
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = token < size
    word = tl.load(line + 1 + token // 32, mask=inside, other=-1)
    refused = ((word >> (token % 32)) & 1) == 0
    row = tl.load(line).to(tl.int64)
    tl.store(logits + row * stride + token, float("-inf"), mask=inside & refused)


def mask_logits(logits_NV: Tensor, masks_MW: Tensor) -> Tensor:
    """See `sample.shaping.mask_logits`."""
    out_NV = logits_NV.clone()
    size = out_NV.shape[1]
    _mask_kernel[(len(masks_MW), triton.cdiv(size, _BLOCK))](
        out_NV, out_NV.stride(0), size, masks_MW, masks_MW.shape[1], BLOCK=_BLOCK
    )
    return out_NV
