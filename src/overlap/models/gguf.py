"""Reading a Llama from a GGUF file: dequantized in blocks of rows, under Hugging Face's names and row order."""

from __future__ import annotations

import math
import mmap
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import gguf
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from overlap.errors import ModelError
from overlap.models.checkpoint import (
    check_nothing_left,
    check_shape,
    missing_tensor,
    row_blocks,
)
from overlap.models.config import ModelConfig, RopeScaling
from overlap.models.gguf_header import GgufHeader, GgufTensor, read_header
from overlap.models.layout import tensor_shapes
from overlap.models.shard import Part
from overlap.text import TokenizerSource

_OUTER: Final = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
_INNER: Final = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_ARCHITECTURES: Final = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_MADE_ANEW: Final = (".attn_rot_embd.weight",)
"""How the names of tensors end that old files keep although they follow from the header."""
_PIECE: Final = 1 << 18
"""Numbers that are dequantized at once: `gguf` cuts what has rows into sixteen of them, of which small ones take three
times as long (SmolLM2: 0.59 s, 0.22 in pieces of this size, 0.78 of four times it)."""
_PAIRED: Final = (".self_attn.q_proj.", ".self_attn.k_proj.")
_LAYER: Final = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")


class GgufCheckpoint:
    """A GGUF file of a Llama or a Qwen3. The file stays mapped until `close`.

    llama.cpp's converter stores the rows of a Llama's q and k so that the two numbers of a rotation are neighbours
    (`LlamaModel.permute` in convert_hf_to_gguf.py); they are put back into halves here. Qwen3's stay as they are.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            with path.open("rb") as file:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
            raise ModelError(f"The GGUF file {str(path)!r} cannot be read: {error}. Fetch it again.") from error
        try:
            header = read_header(path, self._data)
            self._tensors = header.tensors
            self.config = _config(path, header, self._factors(header))
            known = {gguf_name(name) for name in tensor_shapes(self.config)}
            own = (name for name in self._tensors if name.startswith(("blk.", "output")))
            check_nothing_left(path, self.config, own, known, _MADE_ANEW)
        except BaseException:
            self._data.close()
            raise
        self.chat_template: str | None = header.keys.get("tokenizer.chat_template")
        fields = {key: value for key, value in header.keys.items() if key.startswith("tokenizer.")}
        self.tokenizer_source: TokenizerSource | None = TokenizerSource(
            kind="gguf", path=path, fields=MappingProxyType(fields)
        )

    @property
    def path(self) -> Path:
        """The file or directory, for messages."""
        return self._path

    def has(self, name: str) -> bool:
        """Whether there is a tensor of this (Hugging Face) name."""
        return gguf_name(name) in self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return self._find(name).shape

    def read_into(self, name: str, out: Tensor, part: Part | None = None) -> None:
        """Dequantize a tensor, or a part of it, into `out`, in blocks of rows."""
        tensor = self._find(name)
        check_shape(self._path, name, tensor.shape if part is None else part.shape(tensor.shape), tuple(out.shape))
        first = 0 if part is None else part.rows[0]
        columns = None if part is None else part.columns
        paired = self.config.architecture == "LlamaForCausalLM" and any(part in name for part in _PAIRED)
        head = self.config.head_dim if paired else 1
        for start, stop in row_blocks(out.shape[0], math.prod(tensor.shape[1:]), multiple=head):
            rows = self._rows(tensor, first + start, first + stop)
            if columns is not None:  # blocks of quantized numbers run along a row, and need not end with a part
                rows = rows[:, slice(*columns)]
            if head > 1:
                rows = rows.reshape(-1, head // 2, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
            # To the target's dtype first: half the bytes cross to another device.
            out[start:stop].copy_(torch.from_numpy(np.require(rows, requirements=["C", "W"])).to(out.dtype))
        # What was read lies in the page cache; without this it would count as this process's memory, too.
        page = mmap.PAGESIZE
        begin = -(-tensor.start // page) * page
        length = (tensor.start + tensor.num_bytes - begin) // page * page
        if length > 0 and hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
            self._data.madvise(mmap.MADV_DONTNEED, begin, length)

    def close(self) -> None:
        """Unmap the file."""
        self._data.close()

    def _find(self, name: str) -> GgufTensor:
        try:
            return self._tensors[gguf_name(name)]
        except KeyError:
            raise missing_tensor(self._path, f"{gguf_name(name)} ({name})") from None

    def _rows(self, tensor: GgufTensor, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Dequantize rows `start` to `stop`."""
        if len(tensor.shape) < 2:  # norms and biases are small, and one row of blocks
            return self._dequantize(tensor, 0, tensor.num_bytes)[start:stop]
        row_bytes = tensor.num_bytes // tensor.shape[0]
        flat = self._dequantize(tensor, start * row_bytes, stop * row_bytes)
        return flat.reshape(stop - start, *tensor.shape[1:])

    def _dequantize(self, tensor: GgufTensor, begin: int, end: int) -> npt.NDArray[np.float32]:
        raw = np.frombuffer(self._data[tensor.start + begin : tensor.start + end], dtype=np.uint8)
        block, block_bytes = gguf.GGML_QUANT_SIZES[tensor.type]
        step = max(1, _PIECE // block) * block_bytes
        flat = np.empty(len(raw) // block_bytes * block, dtype=np.float32)
        try:
            for at in range(0, len(raw), step):
                piece = gguf.dequantize(raw[None, at : at + step], tensor.type)
                flat[at // block_bytes * block :][: piece.size] = piece.reshape(-1)
        except NotImplementedError:
            raise ModelError(
                f"{str(self._path)!r} is quantized as {tensor.type.name}, which the gguf package cannot dequantize. "
                "Use a file of another quantization (Q4_1, Q4_K_M, Q8_0, ...)."
            ) from None
        return flat

    def _factors(self, header: GgufHeader) -> npt.NDArray[np.float32] | None:
        tensor = header.tensors.get("rope_freqs.weight")
        return None if tensor is None else self._dequantize(tensor, 0, tensor.num_bytes)


def gguf_name(name: str) -> str:
    """Return the GGUF name of a Hugging Face tensor name (itself if there is none).

    The table is `gguf.TensorNameMap`'s for Llama the other way round.
    """
    if match := _LAYER.fullmatch(name):
        layer, module, kind = match.groups()
        if module in _INNER:
            return f"blk.{layer}.{_INNER[module]}.{kind}"
    module, _, kind = name.rpartition(".")
    return f"{_OUTER[module]}.{kind}" if module in _OUTER else name


def _config(path: Path, header: GgufHeader, factors: npt.NDArray[np.float32] | None) -> ModelConfig:
    """Read the shape of the model from the header's keys."""
    keys, tensors = header.keys, header.tensors
    architecture = keys.get("general.architecture")
    if architecture not in _ARCHITECTURES:
        raise ModelError(
            f"{str(path)!r} holds a model of the architecture {architecture!r}. overlap knows: "
            f"{', '.join(map(repr, _ARCHITECTURES))}. Use a model of the Llama family."
        )

    def number(name: str, default: float | None = None) -> float:
        value = keys.get(f"{architecture}.{name}", default)
        if value is None:
            raise ModelError(f"The GGUF file {str(path)!r} has no key '{architecture}.{name}'. Convert it again.")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ModelError(
                f"In {str(path)!r}, '{architecture}.{name}' is {value!r}; it must be above 0. Fetch it again."
            )
        return value

    if experts := keys.get(f"{architecture}.expert_count"):
        raise ModelError(f"{str(path)!r} is a mixture of {experts} experts, which overlap does not know yet.")
    hidden, heads = int(number("embedding_length")), int(number("attention.head_count"))
    head_dim = int(number("attention.key_length", hidden // heads))
    theta = float(number("rope.freq_base", 10000.0))
    if (rotated := keys.get(f"{architecture}.rope.dimension_count", head_dim)) != head_dim:
        raise ModelError(
            f"{str(path)!r} rotates {rotated} of {head_dim} dimensions of a head, which overlap does not know yet."
        )
    embedding = tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise missing_tensor(path, "token_embd.weight (model.embed_tokens.weight)")
    ends = [keys.get(f"tokenizer.ggml.{end}_token_id") for end in ("eos", "eot")]
    bos = keys.get("tokenizer.ggml.bos_token_id")
    return ModelConfig(
        architecture=_ARCHITECTURES[architecture],
        vocab_size=embedding.shape[0],
        hidden_size=hidden,
        num_layers=int(number("block_count")),
        num_heads=heads,
        num_kv_heads=int(number("attention.head_count_kv", heads)),
        head_dim=head_dim,
        intermediate_size=int(number("feed_forward_length")),
        rms_norm_eps=float(number("attention.layer_norm_rms_epsilon")),
        rope_theta=theta,
        rope_scaling=_scaling(path, keys, factors, head_dim, theta),
        context=int(number("context_length")),
        tied_embeddings="output.weight" not in tensors,
        attention_bias="blk.0.attn_q.bias" in tensors,
        mlp_bias="blk.0.ffn_gate.bias" in tensors,
        head_norm=architecture == "qwen3",
        eos_token_ids=tuple(dict.fromkeys(int(end) for end in ends if end is not None)),
        bos_token_id=None if bos is None else int(bos),
        dtype={gguf.GGMLQuantizationType.F32: "float32", gguf.GGMLQuantizationType.F16: "float16"}.get(
            tensors["blk.0.attn_q.weight"].type if "blk.0.attn_q.weight" in tensors else embedding.type, "bfloat16"
        ),
    )


def _scaling(
    path: Path, keys: Mapping[str, Any], factors: npt.NDArray[np.float32] | None, head_dim: int, theta: float
) -> RopeScaling | None:
    """Find the `llama3` scaling behind the factors that llama.cpp's converter leaves of it in `rope_freqs.weight`.

    The file keeps the factors, not what they came from. All published Llama 3 models use the low and high frequency
    factors 1 and 4 and an original context of 8192, and the largest factor is the scaling's own; the guess is taken
    only if it gives every factor back.
    """
    kind = keys.get(f"{keys['general.architecture']}.rope.scaling.type", "none")
    if kind != "none":
        raise ModelError(f"{str(path)!r} has the rope scaling {kind!r}. overlap knows: none and 'llama3'.")
    if factors is None:
        return None
    guess = RopeScaling(
        factor=float(factors.max(initial=1.0)), low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192
    )
    wavelen = 2 * math.pi * theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    turns = guess.original_context / wavelen
    smooth = (turns - guess.low_freq_factor) / (guess.high_freq_factor - guess.low_freq_factor)
    between = 1 / ((1 - smooth) / guess.factor + smooth)
    expected = np.where(
        turns > guess.high_freq_factor, 1.0, np.where(turns < guess.low_freq_factor, guess.factor, between)
    )
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4):
        raise ModelError(
            f"{str(path)!r} scales its rotary frequencies by the factors {factors.min():.4g} to {factors.max():.4g} "
            "(rope_freqs.weight), which are not those of a Llama 3. Use the model's Hugging Face directory instead."
        )
    return guess
