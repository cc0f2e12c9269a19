"""From a checkpoint to a program: tensor by tensor, so that little more than the weights is ever in memory."""

from __future__ import annotations

import math
from types import TracebackType

import torch
from torch import Tensor

from overlap.bars import Bar
from overlap.errors import ModelError
from overlap.models.checkpoint import BLOCK_BYTES, Checkpoint, check_complete
from overlap.models.layout import tensor_shapes
from overlap.models.llama import Layer, Llama
from overlap.models.program import Ranks
from overlap.models.shard import part_of, part_shapes, shard_config, vocabulary_part
from overlap.ops.linear import Linear
from overlap.ops.rope import rope_table


def build(
    checkpoint: Checkpoint,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    progress: bool = False,
    ranks: Ranks | None = None,
) -> Llama:
    """Load a Llama's weights onto `device` as `dtype`; with `ranks`, those of one rank (see `models.shard`).

    Memory peaks at the weights, the largest matrix once more (while the CPU packs it; the head and the embedding, the
    largest, come first, when little else is there), and 16 MiB of staging. `progress` shows a bar on stderr. Raises
    ModelError for a tensor that is missing or of a wrong shape before anything is read, and for one with values that
    are not finite as `dtype`; ConfigError for a model that cannot be cut for so many ranks. The checkpoint stays open.
    """
    with torch.inference_mode(), _Loading(checkpoint, torch.device(device), dtype, ranks, progress=progress) as loading:
        llama = loading.llama()
        loading.check_finite()
        return llama


class _Loading:
    """One run of `build`: where tensors come from and where they go."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        dtype: torch.dtype,
        ranks: Ranks | None,
        *,
        progress: bool,
    ) -> None:
        self._checkpoint = checkpoint
        self._rank, self._size = (0, 1) if ranks is None else (ranks.rank, ranks.size)
        self._ranks = ranks if self._size > 1 else None
        self._config = shard_config(checkpoint.config, self._size)
        self._device = device
        self._dtype = dtype
        self._whole = tensor_shapes(checkpoint.config)
        self._shapes = part_shapes(checkpoint.config, self._rank, self._size)
        self._sums: dict[str, Tensor] = {}
        """By name: the sum of a tensor's values, on its device; finite if they all are."""
        check_complete(checkpoint)
        total = sum(math.prod(shape) for shape in self._shapes.values()) * dtype.itemsize
        self._bar = Bar(
            total=total, desc="loading weights", unit="B", unit_scale=True, unit_divisor=1024, disable=not progress
        )

    def __enter__(self) -> _Loading:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def llama(self) -> Llama:
        config = self._config
        if config.tied_embeddings:
            embedding_VC = self._tensor("model.embed_tokens.weight")
            # The rows stay plain for looking up, and the CPU packs a copy of them for the head.
            start, stop = vocabulary_part(config.vocab_size, self._rank, self._size)
            head = Linear.sharing(embedding_VC[start:stop]).finish()
        else:
            head = self._linear("lm_head", bias=False)
            embedding_VC = self._tensor("model.embed_tokens.weight")
        return Llama(
            config,
            embedding_VC=embedding_VC,
            head=head,
            layers=tuple(self._layer(f"model.layers.{index}") for index in range(config.num_layers)),
            norm_C=self._norm("model.norm.weight"),
            rope_table=rope_table(
                config.head_dim, config.context, config.rope_theta, config.rope_scaling, self._device
            ),
            ranks=self._ranks,
        )

    def _layer(self, prefix: str) -> Layer:
        attention, mlp = self._config.attention_bias, self._config.mlp_bias
        return Layer(
            gate_up=self._linear(f"{prefix}.mlp.gate_proj", f"{prefix}.mlp.up_proj", bias=mlp),
            down=self._linear(f"{prefix}.mlp.down_proj", bias=mlp),
            qkv=self._linear(*(f"{prefix}.self_attn.{part}_proj" for part in "qkv"), bias=attention),
            o=self._linear(f"{prefix}.self_attn.o_proj", bias=attention),
            head_norm_ND=self._head_norm(prefix) if self._config.head_norm else None,
            attention_norm_C=self._norm(f"{prefix}.input_layernorm.weight"),
            mlp_norm_C=self._norm(f"{prefix}.post_attention_layernorm.weight"),
        )

    def _linear(self, *modules: str, bias: bool) -> Linear:
        """Read the matrices of some modules as one, the rows of each below those of the one before."""
        rows = [self._shapes[f"{module}.weight"][0] for module in modules]
        columns = self._shapes[f"{modules[0]}.weight"][1]
        linear = Linear.empty(sum(rows), columns, bias=bias, device=self._device, dtype=self._dtype)
        start = 0
        for module, count in zip(modules, rows, strict=True):
            self._read(f"{module}.weight", linear.weight_rows(start, start + count))
            if bias:
                self._read_bias(f"{module}.bias", linear.bias_rows(start, start + count))
            start += count
        return linear.finish()

    def _tensor(self, name: str) -> Tensor:
        tensor = torch.empty(self._shapes[name], device=self._device, dtype=self._dtype)
        self._read(name, tensor)
        return tensor

    def _norm(self, name: str) -> Tensor:
        tensor = torch.empty(self._shapes[name], device=self._device)  # float32, as the residual stream it scales
        self._read(name, tensor)
        return tensor

    def _head_norm(self, prefix: str) -> Tensor:
        """Return q's norm once for each of its heads, then k's."""
        norms = (self._norm(f"{prefix}.self_attn.{part}_norm.weight") for part in "qk")
        heads = (self._config.num_heads, self._config.num_kv_heads)
        return torch.cat([norm.expand(count, -1) for norm, count in zip(norms, heads, strict=True)])

    def _read_bias(self, name: str, out: Tensor) -> None:
        """Read a bias; one that belongs to a sum over ranks is added by rank 0 alone."""
        if self._rank and part_of(name, self._whole[name], self._rank, self._size) is None:
            out.zero_()
        else:
            self._read(name, out)

    def _read(self, name: str, out: Tensor) -> None:
        part = part_of(name, self._whole[name], self._rank, self._size)
        if part is None:
            self._checkpoint.read_into(name, out)
        else:
            self._checkpoint.read_into(name, out, part)
        # In small blocks of rows, for a CPU makes a copy of what it sums.
        rows = len(out) if out.is_cuda else max(1, (BLOCK_BYTES // 64 * len(out)) // out.numel())
        self._sums[name] = torch.stack([block.sum(dtype=torch.float32) for block in torch.split(out, rows)]).sum()
        self._bar.update(out.nbytes)

    def check_finite(self) -> None:
        """Raise ModelError if a value is none, or too large for the dtype: every answer would be of the same token."""
        finite = torch.stack(list(self._sums.values())).isfinite().tolist()  # the device is waited for here, once
        broken = [name for name, is_finite in zip(self._sums, finite, strict=True) if not is_finite]
        if broken:
            raise ModelError(
                f"{str(self._checkpoint.path)!r} has values that are not finite as {self._dtype}, in "
                f"{', '.join(map(repr, broken[:3]))}{', ...' * (len(broken) > 3)}. Fetch the model again, or give "
                "another dtype if they are too large for this one."
            )
