"""What an EAGLE-3 head's layer reads: the next token's embedding and the hidden state, each normed, side by side.

Legend: T tokens, V vocabulary, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from overlap.ops.norm import rms_norm


def normed_pair(
    token_ids_T: Tensor, table_VC: Tensor, hidden_TC: Tensor, embedding_norm_C: Tensor, norm_C: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Return ([norm(embedding), norm(hidden)] [T, 2C] in the table's dtype, the hidden states in float32)."""
    if token_ids_T.is_cuda:
        from overlap.spec import pair_triton

        return pair_triton.normed_pair(token_ids_T, table_VC, hidden_TC, embedding_norm_C, norm_C, eps)
    residual_TC, dtype = hidden_TC.float(), table_VC.dtype
    embedded_TC = rms_norm(table_VC.index_select(0, token_ids_T).float(), embedding_norm_C, eps, dtype)
    return torch.cat([embedded_TC, rms_norm(residual_TC, norm_C, eps, dtype)], dim=1), residual_TC
