"""The target's hidden states for a drafter: its program once more, giving what stood in front of some layers, too.

"The hidden state after layer k" is off by one in half of the ports of EAGLE. Here tap t is the residual stream in
front of layer t (counted from 0), which is `hidden_states[t]` of transformers, and what the published EAGLE-3 code
and SGLang collect for (2, n // 2, n - 3).

Legend: T tokens, C hidden size, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from overlap.models.llama import Llama
from overlap.models.program import Attend, Batch, Forward
from overlap.ops import fused
from overlap.ops.embedding import embed


def eagle3_taps(num_layers: int) -> tuple[int, int, int]:
    """Return the layers in front of which EAGLE-3 looks: (2, n // 2, n - 3). Of tiny models some are the same."""
    return (min(2, num_layers - 1), num_layers // 2, max(num_layers - 3, 0))


def tapped_forward(program: Llama, batch: Batch, taps: tuple[int, ...]) -> Forward:
    """Run a Llama of one rank as `Llama.forward` does; return [T, C + len(taps) * C]: final states, then the taps.

    A tap of `num_layers` is the final states once more (what EAGLE-1 reads).
    """
    eps = program.config.rms_norm_eps
    stream: fused.Stream = (None, embed(batch.token_ids, program._embedding_VC))
    seen: dict[int, Tensor] = {}
    for index, layer in enumerate(program._layers):
        if index in taps:
            seen[index] = whole(stream).to(program.dtype)
        q_THD, residual_TC = fused.norm_qkv(
            layer.qkv,
            stream,
            layer.attention_norm_C,
            eps,
            batch.positions,
            program._rope_table,
            batch.kv,
            index,
            batch.kv_index,
            program.num_heads,
            program.num_kv_heads,
            layer.head_norm_ND,
        )
        attended_TX = yield Attend(index, q_THD)
        stream = fused.linear_add(layer.o, attended_TX, residual_TC)
        gated_TI, residual_TC = fused.norm_gated(layer.gate_up, stream, layer.mlp_norm_C, eps)
        stream = fused.linear_add(layer.down, gated_TI, residual_TC)
    seen[program.num_layers] = final_TC = fused.norm(stream, program._norm_C, eps, program.dtype)
    return torch.cat([final_TC, *(seen[tap] for tap in taps)], dim=1)


def whole(stream: fused.Stream) -> Tensor:
    """Return the residual stream with nothing left to add, float32 [T, C]."""
    x_TC, residual_TC = stream
    return residual_TC if x_TC is None else residual_TC + x_TC


def embedding_of(program: Llama) -> Tensor:
    """Return the target's embedding [V, C], which EAGLE heads share."""
    return program._embedding_VC
