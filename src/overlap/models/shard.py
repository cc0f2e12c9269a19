"""Which part of each tensor a rank of a tensor-parallel Llama holds. Imports no torch.

Columns, then rows (Megatron-LM, arXiv:1909.08053): q, k, v, gate and up are cut by outputs, so that whole heads and
whole channels stay together; o and down are cut by inputs, so that their products are parts of a sum, and the layer
sums over the ranks twice. The head is cut by the vocabulary. The embedding is whole on every rank: looking up costs no
sum over ranks at the start of each step, and with tied embeddings a rank's head is some rows of it, for no memory.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from overlap.errors import ConfigError
from overlap.models.config import ModelConfig
from overlap.models.layout import tensor_shapes

_BY_ROWS: Final = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
_BY_COLUMNS: Final = ("self_attn.o_proj.weight", "mlp.down_proj.weight")


@dataclass(frozen=True, slots=True)
class Part:
    """A block of a tensor: rows `rows[0]` to `rows[1]`, and of each the columns `columns[0]` to `columns[1]`.

    `columns` is None for all of them, and for a tensor of one dimension.
    """

    rows: tuple[int, int]
    columns: tuple[int, int] | None = None

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of this part of a tensor of the shape `whole`."""
        rest = whole[1:] if self.columns is None else (self.columns[1] - self.columns[0], *whole[2:])
        return (self.rows[1] - self.rows[0], *rest)


def shard_config(config: ModelConfig, size: int) -> ModelConfig:
    """Return what one of `size` ranks has of a model: fewer heads and channels, the same vocabulary.

    Raises ConfigError, with the numbers, for a model that cannot be cut so.
    """
    if size == 1:
        return config
    for what, number in (
        ("query heads", config.num_heads),
        ("key/value heads", config.num_kv_heads),
        ("channels between gate and down", config.intermediate_size),
    ):
        if number % size:
            raise ConfigError(
                f"tensor_parallel is {size}; the model has {number} {what}, which is not a multiple of it. "
                f"{_possible(config)}"
            )
    if vocabulary_part(config.vocab_size, size - 1, size)[1] <= vocabulary_part(config.vocab_size, size - 1, size)[0]:
        raise ConfigError(f"tensor_parallel is {size}: too many for a vocabulary of {config.vocab_size}.")
    return replace(
        config,
        num_heads=config.num_heads // size,
        num_kv_heads=config.num_kv_heads // size,
        intermediate_size=config.intermediate_size // size,
    )


def _possible(config: ModelConfig) -> str:
    numbers = (config.num_heads, config.num_kv_heads, config.intermediate_size)
    sizes = [size for size in range(1, config.num_kv_heads + 1) if not any(number % size for number in numbers)]
    return f"Possible here: {', '.join(map(str, sizes))}."


def vocabulary_part(vocab_size: int, rank: int, size: int) -> tuple[int, int]:
    """Return the tokens (start, stop) whose logits a rank computes: as many on each, but fewer on the last."""
    most = -(-vocab_size // size)
    return min(rank * most, vocab_size), min((rank + 1) * most, vocab_size)


def part_of(name: str, shape: tuple[int, ...], rank: int, size: int) -> Part | None:
    """Return which part of a tensor (by its Hugging Face name and whole shape) a rank reads; None for all of it.

    The biases of o and down are whole: they belong to the sum, so only rank 0 adds them.
    """
    if size == 1:
        return None
    if name == "lm_head.weight":
        return Part(vocabulary_part(shape[0], rank, size))
    if any(module in name for module in _BY_ROWS):
        each = shape[0] // size
        return Part((rank * each, (rank + 1) * each))
    if name.endswith(_BY_COLUMNS):
        each = shape[1] // size
        return Part((0, shape[0]), (rank * each, (rank + 1) * each))
    return None


def part_shapes(config: ModelConfig, rank: int, size: int) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of what a rank reads; `config` is the whole model's."""
    shapes = tensor_shapes(config)
    for name, whole in shapes.items():
        if (part := part_of(name, whole, rank, size)) is not None:
            shapes[name] = part.shape(whole)
    return shapes
