"""Reading a Llama from a Hugging Face directory: config.json, safetensors, tokenizer and chat template."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError, safe_open
from torch import Tensor

from overlap.errors import ModelError
from overlap.models.checkpoint import (
    HEAD,
    check_nothing_left,
    check_shape,
    missing_tensor,
    row_blocks,
)
from overlap.models.config_json import read_config, read_json
from overlap.models.layout import tensor_shapes
from overlap.models.shard import Part
from overlap.text import TokenizerSource

_MADE_ANEW: Final = (".inv_freq", ".original_inv_freq", ".cos_cached", ".sin_cached", ".masked_bias", ".position_ids")
"""How the names of tensors end that old checkpoints keep although they follow from the configuration."""
_DTYPES: Final = ("BF16", "F16", "F32", "F64")
_INDEX = "model.safetensors.index.json"


class DirectoryCheckpoint:
    """A directory with config.json, tokenizer.json and one or several safetensors files, kept open until `close`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.config = read_config(path / "config.json")
        self.chat_template = read_chat_template(path)
        self.tokenizer_source: TokenizerSource | None = find_tokenizer(path)
        self._shards: dict[Path, Any] = {}
        self._shard_of: dict[str, Any] = {}
        try:
            for shard_path, listed in _shards(path).items():
                self._shards[shard_path] = shard = _open_shard(shard_path)
                self._shard_of.update(dict.fromkeys(_names(shard_path, shard, listed), shard))
            self._check_used()
        except BaseException:
            self.close()
            raise

    @property
    def path(self) -> Path:
        """The file or directory, for messages."""
        return self._path

    def has(self, name: str) -> bool:
        """Whether there is a tensor of this name."""
        return name in self._shard_of

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return tuple(self._slice(name).get_shape())

    def read_into(self, name: str, out: Tensor, part: Part | None = None) -> None:
        """Copy a tensor, or a part of it, into `out`, in blocks of rows."""
        tensor = self._slice(name)
        whole = tuple(tensor.get_shape())
        check_shape(self._path, name, whole if part is None else part.shape(whole), tuple(out.shape))
        first = 0 if part is None else part.rows[0]
        for start, stop in row_blocks(out.shape[0], math.prod(out.shape[1:])):
            rows = slice(first + start, first + stop)
            block = tensor[rows] if part is None or part.columns is None else tensor[rows, slice(*part.columns)]
            # To the target's dtype first: fewer bytes cross to another device.
            out[start:stop].copy_(block.to(out.dtype))

    def close(self) -> None:
        """Let the files go."""
        self._shard_of.clear()
        while self._shards:
            _, shard = self._shards.popitem()
            shard.__exit__(None, None, None)

    def _check_used(self) -> None:
        """Refuse tensors that would be left out, and such as hold no plain numbers."""
        known = tensor_shapes(self.config)
        own = (name for name in self._shard_of if name.startswith(("model.", "lm_head.")) and name != HEAD)
        check_nothing_left(self._path, self.config, own, known, _MADE_ANEW)
        for name in known:
            if name in self._shard_of and (dtype := self._slice(name).get_dtype()) not in _DTYPES:
                raise ModelError(
                    f"The tensor {name!r} in {str(self._path)!r} is of the type {dtype}, and no quantization_config "
                    f"says how to read it. overlap reads {', '.join(_DTYPES)}: use the model as it was before it was "
                    "quantized, or a GGUF."
                )

    def _slice(self, name: str) -> Any:
        try:
            return self._shard_of[name].get_slice(name)
        except KeyError:
            raise missing_tensor(self._path, name) from None


def _shards(path: Path) -> dict[Path, list[str]]:
    """Return the safetensors files of a directory, each with the tensors that the index says it has."""
    index_path = path / _INDEX
    if index_path.is_file():
        weight_map = read_json(index_path).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ModelError(f"{str(index_path)!r} has no 'weight_map'. Fetch the model again.")
        shards: dict[Path, list[str]] = {}
        for name, file in weight_map.items():
            shards.setdefault(path / Path(str(file)).name, []).append(name)
        for shard in shards:
            if not shard.is_file():
                raise ModelError(
                    f"{str(index_path)!r} names {shard.name!r}, which is not there. Fetch the model again."
                )
        return shards
    if (path / "model.safetensors").is_file():
        return {path / "model.safetensors": []}
    found = sorted(path.glob("*.safetensors"))
    if len(found) == 1:
        return {found[0]: []}
    if found:
        raise ModelError(
            f"{str(path)!r} has {len(found)} safetensors files but no {_INDEX} that says what is in which. "
            "Fetch the model again."
        )
    pickled = next(path.glob("*.bin"), None)
    also = (
        f" It has {pickled.name!r}, but overlap never unpickles (that could run anything): save it as safetensors."
        if pickled
        else ' Use load_format="dummy" for random weights.'
    )
    raise ModelError(f"{str(path)!r} has no safetensors file.{also}")


def _open_shard(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt").__enter__()  # type: ignore[no-untyped-call]
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"The safetensors file {str(path)!r} ({path.stat().st_size} bytes) is broken or truncated: {error}. "
            "Fetch it again."
        ) from error


def _names(path: Path, shard: Any, listed: list[str]) -> set[str]:
    """Return the tensors in a shard. ModelError if one that the index lists is not there."""
    names = set(shard.keys())
    absent = next((name for name in listed if name not in names), None)
    if absent is not None:
        raise missing_tensor(path, absent)
    return names


def find_tokenizer(path: Path) -> TokenizerSource:
    """Return where the tokenizer of a directory is. ModelError if there is no tokenizer.json."""
    tokenizer_path = path / "tokenizer.json"
    if not tokenizer_path.is_file():
        raise ModelError(
            f"{str(path)!r} has no tokenizer.json. Save the model's fast tokenizer there "
            "(`AutoTokenizer.from_pretrained(...).save_pretrained(...)`)."
        )
    return TokenizerSource(kind="json", path=tokenizer_path, fields=_tokenizer_config(path))


def read_chat_template(path: Path) -> str | None:
    """Return the chat template of a directory: chat_template.jinja, or the (default) one in tokenizer_config.json."""
    template_path = path / "chat_template.jinja"
    if template_path.is_file():
        return template_path.read_text(encoding="utf-8")
    found = _tokenizer_config(path).get("chat_template")
    if isinstance(found, list):
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None


def _tokenizer_config(path: Path) -> dict[str, Any]:
    config_path = path / "tokenizer_config.json"
    return read_json(config_path) if config_path.is_file() else {}
