"""The header of a GGUF file: its keys and where its tensors lie.

`gguf.GGUFReader` makes several NumPy objects of every token of the vocabulary (2.6 s for SmolLM2's 49,152 tokens) and
does not look whether the file ends before its header says so. This reads the same bytes in 0.04 s, with bounds; the
constants and all arithmetic on quantized data are the `gguf` package's. Its reader is the oracle in the tests. The
format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little-endian).
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from overlap.errors import ModelError

_MAGIC: Final = b"GGUF"
_MAX_KEYS: Final = 1 << 16
_MAX_DEPTH: Final = 4
_FORMATS: Final = {
    GGUFValueType.UINT8: "B", GGUFValueType.INT8: "b", GGUFValueType.UINT16: "H", GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I", GGUFValueType.INT32: "i", GGUFValueType.FLOAT32: "f", GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q", GGUFValueType.INT64: "q", GGUFValueType.FLOAT64: "d",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Where a tensor lies in the file."""

    type: GGMLQuantizationType
    shape: tuple[int, ...]
    """Rows first, as NumPy and torch have it."""
    start: int
    """Bytes from the file's begin."""
    num_bytes: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """All keys (arrays as lists) and all tensors of a file."""

    keys: dict[str, Any]
    tensors: dict[str, GgufTensor]


def read_header(path: Path, data: mmap.mmap) -> GgufHeader:
    """Read the header of the mapped file `path`. ModelError if it is no GGUF, broken, or shorter than it says."""
    if data[:4] != _MAGIC:
        raise ModelError(
            f"{str(path)!r} is no GGUF file: it begins with {bytes(data[:4])!r}, not {_MAGIC!r}. Pass a .gguf file."
        )
    cursor = _Cursor(path, data)
    version, num_tensors, num_keys = cursor.unpack("<IQQ")
    if version not in (2, 3):
        raise ModelError(
            f"{str(path)!r} is of GGUF version {version}; overlap reads the little-endian versions 2 and 3. "
            "Convert it with a current llama.cpp."
        )
    if num_keys > _MAX_KEYS or num_tensors > _MAX_KEYS:
        raise cursor.broken(f"it claims {num_keys} keys and {num_tensors} tensors")
    keys: dict[str, Any] = {}
    for _ in range(num_keys):
        name = cursor.string()
        keys[name] = cursor.value(cursor.unpack("<I")[0])
    infos = [_tensor_info(cursor) for _ in range(num_tensors)]
    alignment = keys.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment <= 0:
        raise cursor.broken(f"general.alignment is {alignment!r}")
    base = -(-cursor.at // alignment) * alignment
    tensors = {name: GgufTensor(kind, shape, base + start, num_bytes) for name, kind, shape, start, num_bytes in infos}
    whole = max((tensor.start + tensor.num_bytes for tensor in tensors.values()), default=base)
    if whole > len(data):
        raise cursor.truncated(whole)
    return GgufHeader(keys, tensors)


def _tensor_info(cursor: _Cursor) -> tuple[str, GGMLQuantizationType, tuple[int, ...], int, int]:
    name = cursor.string()
    (rank,) = cursor.unpack("<I")
    if rank > 8:
        raise cursor.broken(f"the tensor {name!r} has {rank} dimensions")
    shape = tuple(reversed(cursor.unpack(f"<{rank}Q")))
    raw_type, start = cursor.unpack("<IQ")
    try:
        kind = GGMLQuantizationType(raw_type)
    except ValueError:
        raise cursor.broken(
            f"the tensor {name!r} is of the type {raw_type}, which the gguf package does not know"
        ) from None
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if shape and shape[-1] % block:
        raise cursor.broken(f"the rows of {name!r} have {shape[-1]} elements, which is no multiple of {block}")
    count = 1
    for size in shape:
        count *= size
    return name, kind, shape, start, count // block * block_bytes


class _Cursor:
    """A place in the header that never leaves the file."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path = path
        self._data = data
        self.at = len(_MAGIC)

    def broken(self, what: str) -> ModelError:
        return ModelError(f"The GGUF file {str(self._path)!r} is broken: {what}. Fetch it again.")

    def truncated(self, wanted: int) -> ModelError:
        return ModelError(
            f"The GGUF file {str(self._path)!r} is truncated: it has {len(self._data)} bytes, and its header asks for "
            f"{wanted} at least. Fetch it again."
        )

    def unpack(self, form: str) -> tuple[Any, ...]:
        end = self.at + struct.calcsize(form)
        if end > len(self._data):
            raise self.truncated(end)
        values = struct.unpack_from(form, self._data, self.at)
        self.at = end
        return values

    def string(self) -> str:
        return self.strings(1)[0]

    def strings(self, count: int) -> list[str]:
        """Read strings, each behind its length. The hot loop of opening a file: everything is a local."""
        data, at, end = self._data, self.at, len(self._data)
        length_at = struct.Struct("<Q").unpack_from
        found: list[str] = []
        try:
            for _ in range(count):
                (length,) = length_at(data, at)
                at += 8
                if at + length > end:
                    raise self.truncated(at + length)
                found.append(data[at : at + length].decode("utf-8"))
                at += length
        except struct.error:
            raise self.truncated(at + 8) from None
        except UnicodeDecodeError:
            raise self.broken(f"the text at byte {at} is no UTF-8") from None
        self.at = at
        return found

    def value(self, raw_type: int, depth: int = 0) -> Any:
        """Read one value of a key."""
        try:
            kind = GGUFValueType(raw_type)
        except ValueError:
            raise self.broken(f"there is a value of the unknown type {raw_type} at byte {self.at}") from None
        if kind is GGUFValueType.STRING:
            return self.string()
        if kind is not GGUFValueType.ARRAY:
            return self.unpack("<" + _FORMATS[kind])[0]
        inner, count = self.unpack("<IQ")
        if count > len(self._data) - self.at:  # each element takes a byte at least
            raise self.truncated(self.at + count)
        if inner == GGUFValueType.STRING:
            return self.strings(count)
        if inner in (kind.value for kind in _FORMATS):
            return list(self.unpack(f"<{count}{_FORMATS[GGUFValueType(inner)]}"))
        if depth >= _MAX_DEPTH:
            raise self.broken(f"arrays are nested {depth} deep at byte {self.at}")
        return [self.value(inner, depth + 1) for _ in range(count)]
