"""ModelConfig: the shape of a model, read from a config.json or a GGUF header. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """The `llama3` rope scaling (Llama 3.1's; the arithmetic is `transformers`' `_compute_llama3_parameters`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The shape of a Llama-family model."""

    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    context: int
    """The most positions that the model was made for."""
    tied_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    head_norm: bool = False
    """Whether each head of q and k has an RMS norm before the rotation (Qwen3)."""
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    dtype: str
    """What the checkpoint says its weights are: "bfloat16", "float16" or "float32"; quantized GGUF says "bfloat16"."""
