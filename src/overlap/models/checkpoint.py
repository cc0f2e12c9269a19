"""Checkpoint: a model's files as its program needs them, whatever their format.

Tensors go by their Hugging Face names (`model.layers.0.self_attn.q_proj.weight`) and are read one at a time, in any
order, straight to where they are wanted.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from pathlib import Path
from typing import Final, Protocol

import torch
from torch import Tensor

from overlap.errors import ModelError
from overlap.models.config import ModelConfig
from overlap.models.layout import tensor_shapes
from overlap.models.shard import Part
from overlap.text import TokenizerSource

BLOCK_BYTES: Final = 4 << 20
"""The size that one block of rows aims at as float32 while it is converted; a few of them are alive at once."""
EMBEDDING: Final = "model.embed_tokens.weight"
HEAD: Final = "lm_head.weight"


class Checkpoint(Protocol):
    """An open model. Every method but `close` raises ModelError, naming file and tensor, for what is not as it should.

    `tokenizer_source` is None only for random weights made from a configuration alone.
    """

    config: ModelConfig
    chat_template: str | None
    tokenizer_source: TokenizerSource | None

    @property
    def path(self) -> Path:
        """The file or directory, for messages."""

    def has(self, name: str) -> bool:
        """Whether there is a tensor of this name."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""

    def read_into(self, name: str, out: Tensor, part: Part | None = None) -> None:
        """Fill `out` (any device and floating dtype) with a tensor, in blocks of rows: 16 MiB of host memory at most.

        With `part` only that block of the tensor is read; it begins and ends with whole heads. ModelError if the
        shape of the tensor, or of its part, is not that of `out`.
        """

    def close(self) -> None:
        """Let the files go. Idempotent."""


def missing_tensor(path: Path, name: str) -> ModelError:
    """Return the error for a tensor that is not there."""
    return ModelError(
        f"{str(path)!r} has no tensor {name!r}, which its configuration asks for. The file is incomplete, or its "
        "configuration belongs to another model: fetch the model again."
    )


def check_shape(path: Path, name: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    """Raise ModelError unless a tensor has the shape that the configuration gives it."""
    if found != wanted:
        raise ModelError(
            f"The tensor {name!r} in {str(path)!r} has the shape {list(found)}, but by its configuration it should be "
            f"{list(wanted)}. The configuration belongs to another model: fetch the model again."
        )


def check_complete(checkpoint: Checkpoint) -> None:
    """Raise ModelError unless every tensor that the configuration asks for is there, in its shape.

    A head beside tied embeddings has to be the embedding: it would not be looked at.
    """
    for name, shape in tensor_shapes(checkpoint.config).items():
        if not checkpoint.has(name):
            raise missing_tensor(checkpoint.path, name)
        check_shape(checkpoint.path, name, checkpoint.shape(name), shape)
    if checkpoint.config.tied_embeddings and checkpoint.has(HEAD) and not _same(checkpoint, EMBEDDING, HEAD):
        raise ModelError(
            f"{str(checkpoint.path)!r} ties its embeddings by its configuration, but its {HEAD!r} is not its "
            f"{EMBEDDING!r}. Set tie_word_embeddings to false if the head is meant, or remove the head."
        )


def check_nothing_left(
    path: Path, config: ModelConfig, names: Iterable[str], known: Container[str], made_anew: tuple[str, ...]
) -> None:
    """Raise ModelError if a model has tensors that its configuration has no place for.

    They would change every answer: those of more layers, biases, norms. `known` has a place; what follows from the
    configuration ends as `made_anew` says.
    """
    if left := sorted(name for name in names if name not in known and not name.endswith(made_anew)):
        raise ModelError(
            f"{str(path)!r} has tensors that its configuration ({config.architecture}, num_layers={config.num_layers}) "
            f"has no place for, {len(left)}: {', '.join(map(repr, left[:3]))}{', ...' * (len(left) > 3)}. "
            "The configuration belongs to another model, or overlap does not know this kind: fetch the model again."
        )


def _same(checkpoint: Checkpoint, name: str, other: str) -> bool:
    """Whether two tensors have the same values, as bfloat16: one may be stored with more digits than the other."""
    shape = checkpoint.shape(name)
    if shape != checkpoint.shape(other):
        return False
    for start, stop in row_blocks(shape[0], shape[1]):
        blocks = [torch.empty(stop - start, shape[1], dtype=torch.bfloat16) for _ in range(2)]
        for each, block in zip((name, other), blocks, strict=True):
            checkpoint.read_into(each, block, Part((start, stop)))
        if not torch.equal(*blocks):
            return False
    return True


def row_blocks(num_rows: int, row_elements: int, multiple: int = 1) -> Iterator[tuple[int, int]]:
    """Cut rows into blocks (start, stop) of about BLOCK_BYTES as float32, each but the last a `multiple` of rows."""
    step = max(1, BLOCK_BYTES // (4 * max(1, row_elements)) // multiple) * multiple
    for start in range(0, num_rows, step):
        yield start, min(start + step, num_rows)
