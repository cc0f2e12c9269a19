"""The EAGLE-3 head as it is trained: whole texts at once, unrolled over the steps that it will draft.

Step 0 reads the target's states; step s reads what step s - 1 made of the same text, so the head learns to go on from
its own states ("training-time test", arXiv:2503.01840). Index t of step s is the draft that begins at position t: it
stands at position t + s, sees the entries 0..t of step 0 (the target's) and its own of steps 1..s.

Legend: B texts, L positions, C hidden size, A width of the taps, N draft vocabulary, H query heads, K key/value heads,
D head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from overlap.ops.rope import rope_table
from overlap.spec.head_files import HeadConfig, head_shapes


class HeadModule(nn.Module):
    """Its parameters carry the published names, with dots; float32."""

    def __init__(self, config: HeadConfig, tap_width: int, context: int, seed: int) -> None:
        super().__init__()
        self.config = config
        generator = torch.Generator().manual_seed(seed)
        self.weights = nn.ParameterDict()
        for name, shape in head_shapes(config, tap_width).items():
            if name != "d2t":
                start = torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator) * 0.02
                self.weights[_key(name)] = nn.Parameter(start)
        table = rope_table(config.head_dim, context, config.rope_theta, config.rope_scaling, "cpu")
        self.register_buffer("rope", table, persistent=False)
        self.rope: Tensor

    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the weights of a head, by their published names; what is not among them stays as it is."""
        for name, parameter in self.weights.items():
            found = tensors.get(name.replace("/", "."))
            if found is not None:
                parameter.data.copy_(found)

    def named_tensors(self) -> dict[str, Tensor]:
        """Return the parameters under their published names."""
        return {name.replace("/", "."): parameter.data for name, parameter in self.weights.items()}

    def forward(self, embedded_SBLC: list[Tensor], taps_BLA: Tensor) -> Iterator[Tensor]:
        """Yield the logits of each step, [B, L, N]. `embedded[s]` is the embedding of the token at t + s + 1."""
        hidden_BLC = F.linear(taps_BLA, self._weight("fc"))
        keys: list[Tensor] = []
        values: list[Tensor] = []
        for step, embedded_BLC in enumerate(embedded_SBLC):
            hidden_BLC = self._layer(embedded_BLC, hidden_BLC, step, keys, values)
            yield F.linear(self._norm(hidden_BLC, "norm"), self._weight("lm_head"))

    def _layer(
        self, embedded_BLC: Tensor, hidden_BLC: Tensor, step: int, keys: list[Tensor], values: list[Tensor]
    ) -> Tensor:
        config, (texts, length, _) = self.config, hidden_BLC.shape
        pair_BLX = torch.cat(
            [self._norm(embedded_BLC, "midlayer.input_layernorm"), self._norm(hidden_BLC, "midlayer.hidden_norm")], -1
        )
        q_BHLD, k_BKLD, v_BKLD = (
            F.linear(pair_BLX, self._weight(f"midlayer.self_attn.{part}_proj"))
            .view(texts, length, -1, config.head_dim)
            .transpose(1, 2)
            for part in "qkv"
        )
        group = config.num_heads // config.num_kv_heads
        keys.append(self._rotate(k_BKLD, step).repeat_interleave(group, dim=1))
        values.append(v_BKLD.repeat_interleave(group, dim=1))
        out_BHLD = F.scaled_dot_product_attention(
            self._rotate(q_BHLD, step), torch.cat(keys, 2), torch.cat(values, 2), attn_mask=_mask(hidden_BLC, step)
        )
        flat_BLX = out_BHLD.transpose(1, 2).reshape(texts, length, -1)
        hidden_BLC = hidden_BLC + F.linear(flat_BLX, self._weight("midlayer.self_attn.o_proj"))
        normed_BLC = self._norm(hidden_BLC, "midlayer.post_attention_layernorm")
        gate, up = (F.linear(normed_BLC, self._weight(f"midlayer.mlp.{part}_proj")) for part in ("gate", "up"))
        return hidden_BLC + F.linear(F.silu(gate) * up, self._weight("midlayer.mlp.down_proj"))

    def _rotate(self, x_BNLD: Tensor, step: int) -> Tensor:
        cos, sin = self.rope[step : step + x_BNLD.shape[2]].chunk(2, dim=-1)
        first, second = x_BNLD.float().chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x_BNLD.dtype)

    def _norm(self, x_BLC: Tensor, module: str) -> Tensor:
        wide = x_BLC.float()
        return F.rms_norm(wide, wide.shape[-1:], self._weight(module), self.config.rms_norm_eps).to(x_BLC.dtype)

    def _weight(self, module: str) -> Tensor:
        weight: Tensor = self.weights[_key(f"{module}.weight")]
        return weight


def _key(name: str) -> str:
    return name.replace(".", "/")  # a ParameterDict takes no dots


def _mask(like: Tensor, step: int) -> Tensor:
    """Return bool [L, (step + 1) * L]: causal over step 0, then the own entry of each later step."""
    length = like.shape[1]
    own = torch.eye(length, dtype=torch.bool, device=like.device)
    causal = torch.ones(length, length, dtype=torch.bool, device=like.device).tril()
    return torch.cat([causal, *([own] * step)], dim=1)
