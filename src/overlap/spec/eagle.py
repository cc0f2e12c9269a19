"""EAGLE heads as programs of pieces and joints: EAGLE-3, and the chain of EAGLE-1 and 2.

Position i of a head reads (token i + 1, hidden state i) and says token i + 2. While it reads what the target has read,
the hidden states are the target's; past that they are the head's own. EAGLE-3 joins three of the target's layers by
`fc`, norms embedding and hidden state each, and runs one decoder layer on the two side by side; its logits are over a
draft vocabulary, whose token i is the target's token i + d2t[i]. EAGLE-1 joins embedding and hidden state by `fc` and
runs plain layers, the first without its input norm, and asks the target's own head. Source: see `head_files`.

Legend: T tokens, E emitting rows, C hidden size, A width of the taps, N draft vocabulary, V vocabulary, H query heads,
K key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from overlap.errors import ModelError
from overlap.models.llama import Layer, Llama
from overlap.models.program import Attend, Forward, Joint
from overlap.ops import fused
from overlap.ops.linear import Linear
from overlap.ops.norm import rms_norm
from overlap.ops.rope import rope_table
from overlap.spec.drafter import Entry
from overlap.spec.head_files import HeadConfig, read_head
from overlap.spec.pair import normed_pair
from overlap.spec.taps import eagle3_taps


class EagleHead:
    """A loaded EAGLE head, bound to the target whose embedding it shares. Made by `load_head`; a `drafter.Head`."""

    ahead = 2
    """Reading at position i, it says token i + 2."""

    def __init__(self, config: HeadConfig, tensors: Mapping[str, Tensor], target: Llama) -> None:
        """`tensors` have the published names. Moved to the target's device and dtype; norms to float32."""
        self.config = config
        self.num_layers, self.num_heads = config.num_layers, config.num_heads
        self.num_kv_heads, self.head_dim = config.num_kv_heads, config.head_dim
        self.vocab_size = target.vocab_size
        self.dtype, self.device = target.dtype, target.device
        self.taps: tuple[int, ...] = eagle3_taps(target.num_layers) if config.kind == "eagle3" else (target.num_layers,)
        self._target = target
        self._tensors = tensors
        self._embedding_VC = target.embedding
        self._fc = self._linear("fc")
        self._layers = tuple(self._layer(index) for index in range(config.num_layers))
        self._rope_table = rope_table(
            config.head_dim, target.config.context, config.rope_theta, config.rope_scaling, self.device
        )
        self._eagle3 = config.kind == "eagle3"
        if self._eagle3:
            self._embedding_norm_C = self._norm("midlayer.input_layernorm")
            self._norm_C = self._norm("norm")
            self._head = self._linear("lm_head")
            offsets_N = tensors.get("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.int64)).long()
            self._target_ids_N = (torch.arange(config.draft_vocab_size) + offsets_N).to(self.device)
            self._short_ids_N = self._target_ids_N.int()
        del self._tensors

    def forward(self, entry: Entry, kv: Tensor) -> Forward:
        """Return the head's hidden states, [T, C] in float32. Yields an `Attend` a layer."""
        hidden_TA = entry.hidden
        assert hidden_TA is not None, "an EAGLE head reads hidden states"
        if self._eagle3:
            # The target's taps are wider than the head's own states: only they go through fc.
            hidden_TC = self._fc(hidden_TA) if hidden_TA.shape[1] != self.config.hidden_size else hidden_TA
            norms = self._embedding_norm_C, self._layers[0].attention_norm_C
            pair_TX, residual_TC = normed_pair(
                entry.token_ids, self._embedding_VC, hidden_TC, *norms, self.config.rms_norm_eps
            )
            return fused.whole((yield from self._attend(0, pair_TX, residual_TC, entry, kv)))
        embedded_TC = self._embedding_VC.index_select(0, entry.token_ids)
        residual_TC = self._fc(torch.cat([embedded_TC, hidden_TA.to(self.dtype)], dim=1)).float()
        for index, layer in enumerate(self._layers):
            eps = self.config.rms_norm_eps
            normed_TC = rms_norm(residual_TC, layer.attention_norm_C, eps, self.dtype)
            x_TC = normed_TC if index else residual_TC.to(self.dtype)  # the first layer has no norm here
            residual_TC = fused.whole((yield from self._attend(index, x_TC, residual_TC, entry, kv)))
        return residual_TC

    def logits(self, state_EC: Tensor) -> Tensor:
        """Return float32 [E, V]; -inf for tokens out of the draft vocabulary."""
        if not self._eagle3:
            return self._target.logits(state_EC.to(self.dtype))
        normed_EC = rms_norm(state_EC.float(), self._norm_C, self.config.rms_norm_eps, self.dtype)
        own_EN = self._head.wide(normed_EC)
        wide_EV = own_EN.new_full((own_EN.shape[0], self.vocab_size), -torch.inf)
        return wide_EV.index_copy_(1, self._target_ids_N, own_EN)

    def greedy(self, state_EC: Tensor) -> Tensor:
        """Return the likeliest tokens, int32 [E]."""
        if not self._eagle3:
            return self._target.greedy(state_EC.to(self.dtype))
        eps = self.config.rms_norm_eps
        return fused.norm_greedy_head(state_EC.float(), self._norm_C, eps, self._head, self._short_ids_N)

    def weight_bytes(self) -> int:
        """Bytes that the head takes on the device beside its target."""
        linears = [self._fc, *(linear for layer in self._layers for linear in layer.linears)]
        linears += [self._head] if self._eagle3 else []
        return sum(linear.num_bytes for linear in linears) + self._rope_table.nbytes

    def _attend(
        self, index: int, x_TX: Tensor, residual_TC: Tensor, entry: Entry, kv: Tensor
    ) -> Generator[Joint, Tensor, fused.Stream]:
        """Run a decoder layer behind its first norm."""
        layer = self._layers[index]
        where = (entry.positions, self._rope_table, kv, index, entry.kv_index, self.num_heads, self.num_kv_heads)
        q_THD = fused.rotated(layer.qkv, x_TX, *where)
        attended_TX = yield Attend(index, q_THD)
        stream = fused.linear_add(layer.o, attended_TX, residual_TC, layer.mlp_ahead)
        gated_TI, residual_TC = fused.norm_gated(layer.gate_up, stream, layer.mlp_norm_C, self.config.rms_norm_eps)
        return fused.linear_add(layer.down, gated_TI, residual_TC)

    def _layer(self, index: int) -> Layer:
        eagle3 = self.config.kind == "eagle3"
        prefix = "midlayer" if eagle3 else f"layers.{index}"
        first_norm = f"{prefix}.hidden_norm" if eagle3 else f"{prefix}.input_layernorm"
        return Layer(
            attention_norm_C=self._norm(first_norm),
            qkv=self._linear(*(f"{prefix}.self_attn.{part}_proj" for part in "qkv")),
            head_norm_ND=None,
            o=self._linear(f"{prefix}.self_attn.o_proj"),
            mlp_norm_C=self._norm(f"{prefix}.post_attention_layernorm"),
            gate_up=self._linear(f"{prefix}.mlp.gate_proj", f"{prefix}.mlp.up_proj"),
            down=self._linear(f"{prefix}.mlp.down_proj"),
        )

    def _linear(self, *modules: str) -> Linear:
        weight_OI = torch.cat([self._tensors[f"{module}.weight"] for module in modules]).to(self.device, self.dtype)
        biases = [self._tensors.get(f"{module}.bias") for module in modules]
        given = [bias for bias in biases if bias is not None]
        bias_O = torch.cat(given).to(self.device, self.dtype) if len(given) == len(modules) else None
        return Linear(weight_OI.contiguous(), bias_O).finish()

    def _norm(self, module: str) -> Tensor:
        found = self._tensors.get(f"{module}.weight")  # EAGLE-1's first layer has no input norm
        return (
            torch.ones(self.config.hidden_size, device=self.device) if found is None else found.to(self.device).float()
        )


def load_head(path: Path, target: Llama) -> EagleHead:
    """Load a head from its directory. Raises ModelError for what is no head, or one of another target."""
    config, tensors = read_head(path)
    if config.vocab_size != target.vocab_size or config.hidden_size != target.config.hidden_size:
        raise ModelError(
            f"The head in {str(path)!r} was made for a model of {config.vocab_size} tokens and a hidden size of "
            f"{config.hidden_size}; this model has {target.vocab_size} and {target.config.hidden_size}. Use the head "
            "that belongs to the model, or train one: overlap train-drafter MODEL."
        )
    ids = torch.arange(config.draft_vocab_size) + tensors.get("d2t", torch.zeros((), dtype=torch.int64)).long()
    if int(ids.min()) < 0 or int(ids.max()) >= target.vocab_size:
        raise ModelError(f"d2t in {str(path)!r} leads to the token {int(ids.max())} of {target.vocab_size}.")
    with torch.inference_mode():
        return EagleHead(config, tensors, target)
