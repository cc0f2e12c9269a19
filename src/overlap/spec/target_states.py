"""What a head in training learns from: the target's states of whole texts, computed anew for each batch.

Keeping them would take 4.6 KB a token for a model of 576 channels; computing them costs less than the step itself.

Legend: B texts, L positions, C hidden size, A width of the taps, N draft vocabulary.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from overlap.cache.pages import PAGE
from overlap.graphs.eager import drive
from overlap.models.llama import Llama
from overlap.models.program import Batch
from overlap.ops.attention import AttentionRows, choose_attention
from overlap.spec.taps import eagle3_taps

_ROWS: Final = 4096


class TargetStates:
    """A target, with KV memory for a batch of texts, that answers with what stood in front of its layers."""

    def __init__(self, target: Llama, max_texts: int, max_length: int) -> None:
        """`max_length` is a multiple of PAGE."""
        self._target = target
        self._pages_a_text = max_length // PAGE
        shape = (max_texts * self._pages_a_text, target.num_layers, 2, PAGE, target.num_kv_heads, target.head_dim)
        self._kv = torch.zeros(shape, dtype=target.dtype, device=target.device)
        self._attention, _ = choose_attention(self._kv, target.num_heads, max_pages_per_row=self._pages_a_text)
        self.taps = eagle3_taps(target.num_layers)
        self._narrow: Tensor | None = None

    @torch.no_grad()
    def states(self, tokens_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Return (final states [B, L, C], taps [B, L, A]) of texts on the device; L is a multiple of PAGE."""
        texts, length = tokens_BL.shape
        pages = length // PAGE
        device = tokens_BL.device
        tokens = torch.arange(texts * length, dtype=torch.int32, device=device)
        page_table = torch.arange(texts * pages, dtype=torch.int32, device=device).view(texts, pages)
        batch = Batch(
            token_ids=tokens_BL.reshape(-1).int(),
            positions=tokens % length,
            kv_index=tokens,  # text after text, and each fills its pages
            kv=self._kv,
        )
        rows = AttentionRows(
            num_decode=0,
            seq_lens=torch.full((texts,), length, dtype=torch.int32, device=device),
            page_table=page_table,
            starts=np.zeros(texts, dtype=np.int32),
            counts=np.full(texts, length, dtype=np.int32),
            chunk_pages=np.arange(texts * pages, dtype=np.int32),
        )
        self._attention.plan(rows)
        states = drive(self._target.forward(batch, self.taps), self._attention)
        states_BLX = states.view(texts, length, -1)
        width = self._target.config.hidden_size
        return states_BLX[..., :width], states_BLX[..., width:]

    @torch.no_grad()
    def narrow_logits(self, final_BLC: Tensor, ids_N: Tensor) -> Tensor:
        """Return the logits of some tokens, the same ones each time, float32 [B, L, N]."""
        if self._narrow is None:
            self._narrow = self._target.head_rows(ids_N)
        flat_EC = final_BLC.flatten(0, 1)
        if self._narrow is not None:
            return F.linear(flat_EC, self._narrow).float().view(*final_BLC.shape[:2], -1)
        parts = (self._target.logits(part).index_select(1, ids_N) for part in torch.split(flat_EC, _ROWS))
        return torch.cat(list(parts)).view(*final_BLC.shape[:2], -1)

    @torch.no_grad()
    def likeliest(self, final_BLC: Tensor) -> Tensor:
        """Return the likeliest token of all, int64 [B, L]."""
        parts = torch.split(final_BLC.flatten(0, 1), _ROWS)  # the whole vocabulary is wide
        return torch.cat([self._target.logits(part).argmax(-1) for part in parts]).view(final_BLC.shape[:2])

    @torch.no_grad()
    def embedded(self, tokens_BL: Tensor, steps: int) -> list[Tensor]:
        """Return for each step s the embedding of the token at t + s + 1, [B, L, C] (of token 0 past the end)."""
        table_VC = self._target.embedding
        return [F.embedding(F.pad(tokens_BL[:, step + 1 :], (0, step + 1)), table_VC) for step in range(steps)]
