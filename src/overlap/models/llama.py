"""Llama, and its near kin Mistral and Qwen3, as a program of pieces and joints.

Legend: T tokens, E emitting rows, H query heads, K key/value heads, D head size, C hidden size, I intermediate size,
V vocabulary, X = (H + 2K) * D.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from overlap.models.config import ModelConfig
from overlap.models.program import Attend, Batch, Forward
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
    ) -> None:
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

    def forward(self, batch: Batch) -> Forward:
        """Yield one `Attend` a layer, be sent [T, H * D], and return the hidden states after the final norm, [T, C]."""
        eps = self.config.rms_norm_eps
        stream: fused.Stream = (None, embed(batch.token_ids, self._embedding_VC))
        for index, layer in enumerate(self._layers):
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
            stream = fused.linear_add(layer.o, attended_TX, residual_TC)
            gated_TI, residual_TC = fused.norm_gated(layer.gate_up, stream, layer.mlp_norm_C, eps)
            stream = fused.linear_add(layer.down, gated_TI, residual_TC)
        return fused.norm(stream, self._norm_C, eps, self.dtype)

    def logits(self, hidden_EC: Tensor) -> Tensor:
        """Return float32 [E, V]."""
        return self._head.wide(hidden_EC)

    def greedy(self, hidden_EC: Tensor) -> Tensor:
        """Return the likeliest tokens, int32 [E]: `logits(hidden).argmax(-1)`, the lowest of equals."""
        return fused.greedy_head(hidden_EC, self._head)

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
