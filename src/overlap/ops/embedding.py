"""Looking up the rows of an embedding, widened to float32.

Legend: T tokens, V vocabulary, C channels.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def embed(token_ids_T: Tensor, table_VC: Tensor) -> Tensor:
    """Return rows `token_ids` (int32 or int64, [T]) of the table as float32 [T, C]: the start of a residual stream."""
    if table_VC.is_cuda:
        from overlap.ops import embedding_triton

        return embedding_triton.embed(token_ids_T, table_VC)
    return F.embedding(token_ids_T, table_VC).float()
