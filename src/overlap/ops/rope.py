"""Rotary position embedding, and the write of new keys and values into their pages, in one op.

Legend: T tokens, H query heads, K key/value heads, N = H + K, D head size, X = (H + 2 * K) * D.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from overlap.cache.pages import PAGE

if TYPE_CHECKING:
    from overlap.models.config import RopeScaling

_FEW: Final = 4
"""Up to so many tokens, single row copies beat the index arithmetic of one scatter (measured: even at about 4)."""


def rope_table(
    head_dim: int, context: int, theta: float, scaling: RopeScaling | None, device: torch.device | str
) -> Tensor:
    """Return float32 [context, D]: for each position the D/2 cosines, then the D/2 sines.

    The arithmetic is that of transformers' `LlamaRotaryEmbedding`, on the CPU whatever the device, so that the table
    has the same bits everywhere.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64, device="cpu").float() / head_dim
    frequencies = 1.0 / (theta**exponents)
    if scaling is not None:
        frequencies = _llama3(frequencies, scaling)
    positions = torch.arange(context, dtype=torch.float32, device="cpu")
    angles = positions[:, None] * frequencies[None, :]
    return torch.cat((angles.cos(), angles.sin()), dim=-1).to(device)


def _llama3(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Slow the low frequencies by `factor`, keep the high ones, and blend between (Llama 3.1's rope scaling).

    Source: transformers' `_compute_llama3_parameters`, in its order of operations.
    """
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    longest, shortest = scaling.original_context / low, scaling.original_context / high
    wavelengths = 2 * math.pi / frequencies
    slowed = torch.where(wavelengths > longest, frequencies / scaling.factor, frequencies)
    blend = (scaling.original_context / wavelengths - low) / (high - low)
    smooth = (1 - blend) * slowed / scaling.factor + blend * slowed
    between = ~(wavelengths < shortest) * ~(wavelengths > longest)
    return torch.where(between, smooth, slowed)


def rope_and_write(
    qkv_TX: Tensor,
    positions_T: Tensor,
    table: Tensor,
    kv: Tensor,
    layer: int,
    kv_index_T: Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_norm_ND: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """Rotate q and k by their positions, write k and v into their pages, and return the rotated q, [T, H, D].

    `qkv` is [T, (H + 2K) * D]: q, k, v side by side. `positions` and `kv_index` are int32 [T]; a kv_index is
    page * PAGE + offset, or -1 for padding, which is written nowhere. `table` comes from `rope_table` and is as long
    as any position. `kv` is [pages, layers, 2, PAGE, K, D], contiguous, of qkv's dtype, and is changed. The rotation
    (halves, not pairs) is computed in float32.

    `head_norm_ND` is float32, a row for each of q's and then k's heads: the weight of an RMS norm of each head before
    its rotation, with `eps` added to the mean square (as in transformers' `Qwen3Attention`). None for no norm.
    """
    if qkv_TX.is_cuda:
        from overlap.ops import rope_triton

        return rope_triton.rope_and_write(
            qkv_TX, positions_T, table, kv, layer, kv_index_T, num_heads, num_kv_heads, head_norm_ND, eps
        )
    tokens, half, num_rotated = qkv_TX.shape[0], table.shape[1] // 2, num_heads + num_kv_heads
    # The few dispatches below are what this costs at one row: mixed dtypes would double the price of each.
    heads_TN2D = qkv_TX.float().view(tokens, -1, 2, half)
    rotating_TN2D = heads_TN2D.narrow(1, 0, num_rotated)
    if head_norm_ND is not None:
        flat_TND = rotating_TN2D.reshape(tokens, num_rotated, 2 * half)
        rotating_TN2D = (torch.rms_norm(flat_TND, (2 * half,), None, eps) * head_norm_ND).view_as(rotating_TN2D)
    straight, across = rotating_TN2D.unbind(2)
    cos, sin = table.index_select(0, positions_T).view(tokens, 1, 2, half).unbind(2)
    rotated = torch.empty((tokens, num_rotated, 2, half))
    first, second = rotated.unbind(2)
    torch.mul(straight, cos, out=first).addcmul_(across, sin, value=-1)
    torch.mul(across, cos, out=second).addcmul_(straight, sin)
    qk_TND = rotated.view(tokens, num_rotated, 2 * half).to(qkv_TX.dtype)
    v_TKD = qkv_TX.view(tokens, -1, 2 * half).narrow(1, num_rotated, num_kv_heads)
    _write(kv, layer, kv_index_T, qk_TND.narrow(1, num_heads, num_kv_heads), v_TKD)
    return qk_TND.narrow(1, 0, num_heads)


def _write(kv: Tensor, layer: int, kv_index_T: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> None:
    layers = kv.shape[1]
    if kv_index_T.shape[0] <= _FEW:
        for token, index in enumerate(kv_index_T.tolist()):
            if index >= 0:
                row = kv[index // PAGE, layer, :, index % PAGE]
                row[0].copy_(k_TKD[token])
                row[1].copy_(v_TKD[token])
        return
    index = kv_index_T.numpy()
    kept = index >= 0
    if not kept.all():
        tokens = torch.from_numpy(kept.nonzero()[0])
        k_TKD, v_TKD, index = k_TKD[tokens], v_TKD[tokens], index[kept]
    rows = torch.from_numpy((index // PAGE).astype("int64") * (layers * 2 * PAGE) + (index % PAGE + layer * 2 * PAGE))
    flat = kv.view(-1, *kv.shape[-2:])
    flat.index_copy_(0, rows, k_TKD)
    flat.index_copy_(0, rows.add_(PAGE), v_TKD)
