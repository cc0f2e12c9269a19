"""The files of an EAGLE head in the published Hugging Face format: config.json and one safetensors file.

EAGLE-3: `fc`, `midlayer.*`, `norm`, `lm_head`, `d2t`, `t2d`. EAGLE-1 and 2: `fc` and `layers.N.*`. The embedding (and
EAGLE-1's head) are the target's. Source: the EAGLE repository (Li et al., arXiv:2401.15077 and arXiv:2503.01840) and
the checkpoints that it links to.

Legend: C hidden size of the head, H query heads, K key/value heads, D head size, I intermediate size, N draft
vocabulary, V vocabulary, A width of the target's taps.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from overlap.errors import ModelError
from overlap.models.config import RopeScaling
from overlap.models.config_json import read_json

HeadKind: TypeAlias = Literal["eagle3", "eagle"]


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadConfig:
    """The shape of an EAGLE head."""

    kind: HeadKind
    """"eagle3", or "eagle" for EAGLE-1 and 2, whose heads are alike."""
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    vocab_size: int
    draft_vocab_size: int
    """EAGLE-3's own vocabulary; that of the target where there is no other."""


def read_head(path: Path) -> tuple[HeadConfig, dict[str, Tensor]]:
    """Read a directory; the tensors lie on the CPU. Raises ModelError, with what is wrong, for no EAGLE head."""
    files = sorted(path.glob("*.safetensors"))
    if len(files) != 1:
        raise ModelError(
            f"{str(path)!r} has {len(files)} safetensors files; an EAGLE head has one. overlap never unpickles a "
            "pytorch_model.bin: save it as model.safetensors."
        )
    try:
        tensors = {name.removeprefix("model."): tensor for name, tensor in load_file(files[0]).items()}
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{str(files[0])!r} is broken or truncated: {error}. Fetch it again.") from error
    kind: HeadKind = "eagle3" if any(name.startswith("midlayer.") for name in tensors) else "eagle"
    raw = read_json(path / "config.json")
    config = _config(path, raw, kind, tensors)
    shapes = head_shapes(config, tensors["fc.weight"].shape[1] if kind == "eagle3" and "fc.weight" in tensors else 0)
    for name, shape in shapes.items():
        if name not in tensors:
            raise ModelError(f"{str(path)!r} has no tensor {name!r}: it is not an {kind} head, or incomplete.")
        if tuple(tensors[name].shape) != shape:
            found = list(tensors[name].shape)
            raise ModelError(f"The tensor {name!r} in {str(path)!r} has the shape {found}; it should be {list(shape)}.")
    return config, tensors


def _config(path: Path, raw: Mapping[str, Any], kind: HeadKind, tensors: Mapping[str, Tensor]) -> HeadConfig:
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", "llama3"):
        raise ModelError(f"The rope of {str(path)!r} is {rope_type!r}; it must be 'default' or 'llama3'.")
    try:
        scaling = None
        if rope_type == "llama3":
            scaling = RopeScaling(
                factor=float(rope["factor"]),
                low_freq_factor=float(rope["low_freq_factor"]),
                high_freq_factor=float(rope["high_freq_factor"]),
                original_context=int(rope["original_max_position_embeddings"]),
            )
        hidden, heads = int(raw["hidden_size"]), int(raw["num_attention_heads"])
        vocabulary = int(raw["vocab_size"])
        return HeadConfig(
            kind=kind,
            hidden_size=hidden,
            num_layers=1 if kind == "eagle3" else int(raw.get("num_hidden_layers", 1)),
            num_heads=heads,
            num_kv_heads=int(raw.get("num_key_value_heads") or heads),
            head_dim=int(raw.get("head_dim") or hidden // heads),
            intermediate_size=int(raw["intermediate_size"]),
            rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
            rope_theta=float(rope.get("rope_theta") or raw.get("rope_theta") or 10000.0),
            rope_scaling=scaling,
            vocab_size=vocabulary,
            draft_vocab_size=int(tensors["lm_head.weight"].shape[0]) if "lm_head.weight" in tensors else vocabulary,
        )
    except KeyError as missing:
        raise ModelError(f"The configuration in {str(path)!r} has no {missing}.") from None


def head_shapes(config: HeadConfig, tap_width: int) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of what a head must have; `tap_width` is A, the columns of EAGLE-3's fc."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    eagle3 = config.kind == "eagle3"
    shapes: dict[str, tuple[int, ...]] = {"fc.weight": (hidden, tap_width if eagle3 else 2 * hidden)}
    for index in range(config.num_layers):
        prefix = "midlayer." if eagle3 else f"layers.{index}."
        inputs = 2 * hidden if eagle3 else hidden
        for part, rows in (("q", q_size), ("k", kv_size), ("v", kv_size)):
            shapes[f"{prefix}self_attn.{part}_proj.weight"] = (rows, inputs)
        shapes[f"{prefix}self_attn.o_proj.weight"] = (hidden, q_size)
        shapes[f"{prefix}mlp.gate_proj.weight"] = (inner, hidden)
        shapes[f"{prefix}mlp.up_proj.weight"] = (inner, hidden)
        shapes[f"{prefix}mlp.down_proj.weight"] = (hidden, inner)
        shapes[f"{prefix}post_attention_layernorm.weight"] = (hidden,)
        if eagle3 or index:
            shapes[f"{prefix}input_layernorm.weight"] = (hidden,)
    if eagle3:
        shapes["midlayer.hidden_norm.weight"] = (hidden,)
        shapes["norm.weight"] = (hidden,)
        shapes["lm_head.weight"] = (config.draft_vocab_size, hidden)
        if config.draft_vocab_size < config.vocab_size:
            shapes["d2t"] = (config.draft_vocab_size,)
    return shapes


def write_eagle3(path: Path, config: HeadConfig, tensors: Mapping[str, Tensor], **notes: Any) -> None:
    """Write an EAGLE-3 head into a directory, which is made. `notes` go into config.json beside the shape."""
    path.mkdir(parents=True, exist_ok=True)
    raw = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": 1,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "vocab_size": config.vocab_size,
        "draft_vocab_size": config.draft_vocab_size,
        "attention_bias": False,
        "tie_word_embeddings": False,
        **notes,
    }
    if config.rope_scaling is not None:
        scaling = config.rope_scaling
        raw["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_context,
        }
    (path / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
    save_file(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path / "model.safetensors"
    )
