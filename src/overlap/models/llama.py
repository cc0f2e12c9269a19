"""Llama, and its near kin Mistral and Qwen3, as a program of pieces and joints.

Legend: T tokens, E emitting rows, H query heads, K key/value heads, D head size, C hidden size, I intermediate size,
V vocabulary, X = (H + 2K) * D.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from overlap.models.config import ModelConfig
from overlap.models.program import Attend, Batch, Forward, Ranks, Reduce
from overlap.models.shard import vocabulary_part
from overlap.ops import fused
from overlap.ops.embedding import embed
from overlap.ops.linear import Linear


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """The parameters of one decoder layer."""

    attention_norm_C: Tensor
    qkv: Linear
    """[X, C]: q, k and v side by side."""
    head_norm_ND: Tensor | None
    """Qwen3's norms of each head of q and k, one row a head (N = H + K), float32."""
    o: Linear
    """[C, H * D]"""
    mlp_norm_C: Tensor
    gate_up: Linear
    """[2I, C]: gate, then up."""
    down: Linear
    """[C, I]"""

    @property
    def linears(self) -> tuple[Linear, ...]:
        """All matrices of the layer."""
        return (self.qkv, self.o, self.gate_up, self.down)

    @property
    def attention_ahead(self) -> fused.Ahead:
        """What reads the stream in front of the layer."""
        normed_head = None if self.head_norm_ND is None else self.head_norm_ND.shape[1]
        return fused.Ahead(self.attention_norm_C, self.qkv, "rope", normed_head)

    @property
    def mlp_ahead(self) -> fused.Ahead:
        """What reads the stream behind attention."""
        return fused.Ahead(self.mlp_norm_C, self.gate_up, "gated")


class Llama:
    """A loaded Llama. Made by `overlap.models.load.build`; keeps the Program protocol.

    The caller runs it under `torch.inference_mode`. Architecture and arithmetic: transformers' `LlamaForCausalLM`
    and `Qwen3ForCausalLM`.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        embedding_VC: Tensor,
        layers: tuple[Layer, ...],
        norm_C: Tensor,
        head: Linear,
        rope_table: Tensor,
        ranks: Ranks | None = None,
    ) -> None:
        """With `ranks` this is one rank's part of a model, and `config` the part's (`shard.shard_config`)."""
        self.config = config
        self.num_layers = config.num_layers
        self.num_heads = config.num_heads
        self.num_kv_heads = config.num_kv_heads
        self.head_dim = config.head_dim
        self.vocab_size = config.vocab_size
        self.dtype = embedding_VC.dtype
        self.device = embedding_VC.device
        self._embedding_VC = embedding_VC
        self._layers = layers
        self._norm_C = norm_C
        self._head = head
        self._rope_table = rope_table
        self._ranks = ranks

    def forward(self, batch: Batch, taps: tuple[int, ...] = ()) -> Forward:
        """Yield one `Attend` a layer, be sent [T, H * D], and return the hidden states after the final norm, [T, C].

        One of several ranks yields two `Reduce` a layer, too, and is sent [T, C]. With `taps` it returns
        [T, C + len(taps) * C]: the final states, then for each tap t the residual stream in front of layer t (from 0;
        `hidden_states[t]` of transformers), the final states once more for t = num_layers.
        """
        eps = self.config.rms_norm_eps
        stream = fused.Stream(None, embed(batch.token_ids, self._embedding_VC))
        seen: dict[int, Tensor] = {}
        for index, layer in enumerate(self._layers):
            if index in taps:
                seen[index] = fused.whole(stream).to(self.dtype)
            q_THD, residual_TC = fused.norm_qkv(
                layer.qkv,
                stream,
                layer.attention_norm_C,
                eps,
                batch.positions,
                self._rope_table,
                batch.kv,
                index,
                batch.kv_index,
                self.num_heads,
                self.num_kv_heads,
                layer.head_norm_ND,
            )
            attended_TX = yield Attend(index, q_THD)
            if self._ranks is None:
                stream = fused.linear_add(layer.o, attended_TX, residual_TC, layer.mlp_ahead)
            else:
                summed_TC = yield Reduce(layer.o(attended_TX), self._ranks)
                stream = fused.Stream(summed_TC, residual_TC)
            gated_TI, residual_TC = fused.norm_gated(layer.gate_up, stream, layer.mlp_norm_C, eps)
            if self._ranks is None:
                ahead = self._layers[index + 1].attention_ahead if index + 1 < len(self._layers) else None
                stream = fused.linear_add(layer.down, gated_TI, residual_TC, ahead)
            else:
                summed_TC = yield Reduce(layer.down(gated_TI), self._ranks)
                stream = fused.Stream(summed_TC, residual_TC)
        seen[self.num_layers] = final_TC = fused.norm(stream, self._norm_C, eps, self.dtype)
        return torch.cat([final_TC, *(seen[tap] for tap in taps)], dim=1) if taps else final_TC

    @property
    def embedding(self) -> Tensor:
        """[V, C], which EAGLE heads share."""
        return self._embedding_VC

    def head_rows(self, ids_N: Tensor) -> Tensor | None:
        """Return the head's weights for some tokens, [N, C]; None where they are packed, cut over ranks, or biased."""
        if self._ranks is not None or self._head.packed or self._head.bias is not None:
            return None
        return self._head.weight.index_select(0, ids_N)

    def logits(self, hidden_EC: Tensor) -> Tensor:
        """Return float32 [E, V]. Of several ranks each returns the whole, the same bits on each."""
        own_EV = self._head.wide(hidden_EC)
        if self._ranks is None:
            return own_EV
        most = -(-self.vocab_size // self._ranks.size)
        padded_EV = F.pad(own_EV, (0, most - own_EV.shape[1]), value=-torch.inf)
        parts_NEV = self._ranks.gather(padded_EV.contiguous())
        return parts_NEV.transpose(0, 1).reshape(len(own_EV), -1)[:, : self.vocab_size]

    def greedy(self, hidden_EC: Tensor) -> Tensor:
        """Return the likeliest tokens, int32 [E]: `logits(hidden).argmax(-1)`, the lowest of equals."""
        if self._ranks is None:
            return fused.greedy_head(hidden_EC, self._head)
        own_EV = self._head.wide(hidden_EC)
        best_E1 = own_EV.argmax(-1, keepdim=True)
        start, _ = vocabulary_part(self.vocab_size, self._ranks.rank, self._ranks.size)
        # As float32 an id is exact below 2**24. The ranks stand in the order of their ids: the first of equals wins.
        pair_E2 = torch.cat([own_EV.gather(1, best_E1), (best_E1 + start).float()], dim=1)
        pairs_NE2 = self._ranks.gather(pair_E2)
        winner_1E = pairs_NE2[:, :, 0].argmax(0, keepdim=True)
        return pairs_NE2[:, :, 1].gather(0, winner_1E)[0].int()

    def weight_bytes(self) -> int:
        """Bytes that the parameters take on the device, the rope table included."""
        tensors = [self._embedding_VC, self._norm_C, self._rope_table]
        linears = [self._head]
        for layer in self._layers:
            norms = (layer.attention_norm_C, layer.mlp_norm_C, layer.head_norm_ND)
            tensors += [norm for norm in norms if norm is not None]
            linears += layer.linears
        return sum(tensor.nbytes for tensor in tensors) + sum(linear.num_bytes for linear in linears)

    def kinds(self) -> tuple[str, ...]:
        """What runs the matrices, each kind once: see `Linear.kind`."""
        linears = [self._head, *(linear for layer in self._layers for linear in layer.linears)]
        return tuple(dict.fromkeys(linear.kind for linear in linears))
