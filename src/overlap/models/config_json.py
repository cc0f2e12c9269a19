"""Reading a ModelConfig from the config.json of a Hugging Face directory. Imports no torch.

Both ways of writing it are read: `rope_parameters` and `dtype` (transformers 5), and `rope_theta`, `rope_scaling` and
`torch_dtype` (before). What a config.json leaves out has the default that `transformers.LlamaConfig` gives it, or, of a
Qwen3, `Qwen3Config`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from overlap.errors import ModelError
from overlap.models.config import ModelConfig, RopeScaling

KNOWN_ARCHITECTURES: Final = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen3ForCausalLM")
_OF_TYPE: Final = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_DTYPES: Final = ("bfloat16", "float16", "float32")


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file. ModelError if it cannot be read or is no object."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{str(path)!r} cannot be read: {error}. Fetch the model again.") from error
    if not isinstance(found, dict):
        raise ModelError(f"{str(path)!r} holds {type(found).__name__}, not an object. Fetch the model again.")
    return found


def read_config(path: Path) -> ModelConfig:
    """Read `path` (a config.json) and the generation_config.json beside it, whose end tokens win.

    Raises ModelError for an architecture, activation or rope scaling that overlap does not know, by name.
    """
    raw = read_json(path)
    generation_path = path.with_name("generation_config.json")
    generation = read_json(generation_path) if generation_path.is_file() else {}
    return _Reader(path, raw).config(_Reader(generation_path, generation))


class _Reader:
    """One config.json or generation_config.json, and errors that name it."""

    def __init__(self, path: Path, raw: Mapping[str, Any]) -> None:
        self._path = path
        self._raw = raw

    def config(self, generation: _Reader) -> ModelConfig:
        """Return what this config.json says, with the tokens of `generation`."""
        raw = self._raw
        architecture = self._architecture()
        self._refuse_unknown()
        hidden, heads = self._count("hidden_size"), self._count("num_attention_heads")
        qwen3 = architecture == "Qwen3ForCausalLM"
        head_dim = self._count("head_dim", 128 if qwen3 else hidden // heads)
        kv_heads = self._count("num_key_value_heads", heads)
        if heads % kv_heads or head_dim % 2:
            raise self._wrong("num_key_value_heads", kv_heads, f"a divisor of the {heads} query heads, with even heads")
        theta, scaling = self._rope()
        eos, bos = (
            generation.ids(name) if generation.has(name) else self.ids(name)
            for name in ("eos_token_id", "bos_token_id")
        )
        dtype = str(raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix("torch.")
        return ModelConfig(
            architecture=architecture,
            vocab_size=self._count("vocab_size"),
            hidden_size=hidden,
            num_layers=self._count("num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            intermediate_size=self._count("intermediate_size"),
            rms_norm_eps=self._above_0("rms_norm_eps", raw.get("rms_norm_eps"), 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            context=self._count("max_position_embeddings", 32768 if qwen3 else 2048),
            tied_embeddings=self._flag("tie_word_embeddings"),
            attention_bias=self._flag("attention_bias"),
            mlp_bias=self._flag("mlp_bias") and not qwen3,
            head_norm=qwen3,
            eos_token_ids=eos,
            bos_token_id=next(iter(bos), None),
            dtype=dtype if dtype in _DTYPES else "float32",
        )

    def _architecture(self) -> str:
        given = self._raw.get("architectures")
        if given is not None and not isinstance(given, list):
            raise self._wrong("architectures", given, f"a list of names, as in ['{KNOWN_ARCHITECTURES[0]}']")
        names = given or [_OF_TYPE.get(str(self._raw.get("model_type")))]
        known = next((name for name in names if name in KNOWN_ARCHITECTURES), None)
        if known is None:
            asked = ", ".join(map(repr, given or [self._raw.get("model_type")]))
            raise ModelError(
                f"{str(self._path)!r} is of the architecture {asked}. overlap knows: "
                f"{', '.join(KNOWN_ARCHITECTURES)}. Use a model of the Llama family."
            )
        return str(known)

    def _refuse_unknown(self) -> None:
        """Refuse by name what would change the arithmetic, rather than answer wrongly."""
        raw = self._raw
        if raw.get("hidden_act", "silu") != "silu":
            raise self._wrong("hidden_act", raw["hidden_act"], "'silu'")
        if quantized := self._object("quantization_config"):
            method = quantized.get("quant_method", "unknown")
            raise self._wrong(
                "quantization_config", method, "absent: overlap reads 16- and 32-bit safetensors, or a GGUF"
            )
        # A Mistral that says nothing has transformers' default, a window of 4096; a Llama never has one, and a Qwen3
        # only if it says so.
        architecture = self._architecture()
        windowed = architecture == "MistralForCausalLM" or (
            architecture == "Qwen3ForCausalLM" and self._flag("use_sliding_window")
        )
        window = raw.get("sliding_window", 4096) if windowed else None
        if window is not None:
            raise self._wrong("sliding_window", window, "null: attention in a window is not known yet")
        for given in (raw, self._object("rope_parameters"), self._object("rope_scaling")):
            if given.get("partial_rotary_factor") not in (None, 1.0):
                raise self._wrong("partial_rotary_factor", given["partial_rotary_factor"], "1.0")

    def _rope(self) -> tuple[float, RopeScaling | None]:
        """Return theta and the scaling, of either way of writing."""
        given = [found for name in ("rope_parameters", "rope_scaling") if (found := self._object(name))]
        scalings = [self._scaling(one) for one in given if "rope_type" in one or "type" in one]
        if len(scalings) == 2 and scalings[0] != scalings[1]:
            raise self._wrong("rope_scaling", given[1], f"what rope_parameters says, {given[0]!r}, or left out")
        theta = next((one["rope_theta"] for one in [*given, self._raw] if one.get("rope_theta") is not None), None)
        return self._above_0("rope_theta", theta, 10000.0), next(iter(scalings), None)

    def _scaling(self, given: Mapping[str, Any]) -> RopeScaling | None:
        kind = given.get("rope_type", given.get("type", "default"))
        if kind == "default":
            return None
        if kind != "llama3":
            raise self._wrong("rope_type", kind, "'default' or 'llama3'")

        def number(name: str) -> float:
            if name not in given:
                raise ModelError(f"The rope scaling in {str(self._path)!r} has no {name!r}.")
            return self._above_0(name, given[name])

        factor, low, high = number("factor"), number("low_freq_factor"), number("high_freq_factor")
        if low >= high:
            raise self._wrong("low_freq_factor", low, f"below high_freq_factor, {high}")
        return RopeScaling(
            factor=factor,
            low_freq_factor=low,
            high_freq_factor=high,
            original_context=int(number("original_max_position_embeddings")),
        )

    def has(self, name: str) -> bool:
        """Whether there is a value of this name, and not null."""
        return self._raw.get(name) is not None

    def ids(self, name: str) -> tuple[int, ...]:
        """Return the token ids of this name: one, several or none."""
        value = self._raw.get(name)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if not all(isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in ids):
            raise self._wrong(name, value, "a token id or a list of them")
        return tuple(ids)

    def _object(self, name: str) -> Mapping[str, Any]:
        """Return the object of this name; an empty one if there is none."""
        value = self._raw.get(name)
        if value is not None and not isinstance(value, dict):
            raise self._wrong(name, value, "an object or null")
        return value or {}

    def _flag(self, name: str) -> bool:
        value = self._raw.get(name)
        if value is not None and not isinstance(value, bool):
            raise self._wrong(name, value, "true or false")
        return bool(value)

    def _above_0(self, name: str, value: object, default: float | None = None) -> float:
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise self._wrong(name, value, "a number above 0")
        return float(value)

    def _count(self, name: str, default: int | None = None) -> int:
        value = self._raw.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self._wrong(name, value, "a whole number of 1 or more")
        return value

    def _wrong(self, name: str, value: object, must: str) -> ModelError:
        return ModelError(f"In {str(self._path)!r}, {name} is {value!r}; it must be {must}.")
