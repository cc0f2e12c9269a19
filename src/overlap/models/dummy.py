"""Random weights for a configuration: for speed and memory, where the answer does not matter."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from overlap.models.checkpoint import check_shape
from overlap.models.config import ModelConfig
from overlap.models.layout import tensor_shapes
from overlap.models.shard import Part
from overlap.text import TokenizerSource

SCALE: Final = 0.02
"""Standard deviation of the random weights, as most models are initialised."""


class DummyCheckpoint:
    """Random weights, made where and as they are wanted (on the device, in its dtype), norms 1.

    A tensor depends on nothing but `seed` and its name, so every reading gives the same on one kind of device.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        seed: int = 0,
        chat_template: str | None = None,
        tokenizer_source: TokenizerSource | None = None,
    ) -> None:
        self.config = config
        self.chat_template = chat_template
        self.tokenizer_source = tokenizer_source
        self._seed = seed
        self._shapes = tensor_shapes(config)

    @property
    def path(self) -> Path:
        """A name for messages."""
        return Path("dummy")

    def has(self, name: str) -> bool:
        """Whether the configuration has a tensor of this name."""
        return name in self._shapes

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor; KeyError if there is none."""
        return self._shapes[name]

    def read_into(self, name: str, out: Tensor, part: Part | None = None) -> None:
        """Fill `out` with the random tensor of this name, or a part of it: of the same numbers however it is cut."""
        whole = self._shapes[name]
        check_shape(self.path, name, whole if part is None else part.shape(whole), tuple(out.shape))
        if "norm" in name:
            out.fill_(1.0)
            return
        generator = torch.Generator(device=out.device)
        generator.manual_seed(zlib.crc32(f"{self._seed} {name}".encode()))
        if part is None:
            out.normal_(0.0, SCALE, generator=generator)
            return
        tensor = torch.empty(whole, device=out.device, dtype=out.dtype).normal_(0.0, SCALE, generator=generator)
        tensor = tensor[slice(*part.rows)]
        out.copy_(tensor if part.columns is None else tensor[:, slice(*part.columns)])

    def close(self) -> None:
        """Do nothing: there are no files."""
