"""The shapes of bench/two_lanes.py, and loads that fit them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16", "rope_theta": 100000.0, "max_position_embeddings": 32768, "eos_token_id": 2,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A shape, and loads that fit it."""

    config: dict[str, Any]
    max_rows: int
    requests: int
    """Of the offline load, `tokens_in` and `tokens_out` each."""
    tokens_in: int
    tokens_out: int
    running: int
    """Answers that run under the Poisson load."""
    prompt: int
    """Tokens of each of its prompts."""
    rate: float
    """Prompts a second."""
    seconds: float
    """How long prompts come."""


CASES = {
    "smollm2-135m": Case(
        {**LLAMA, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
         "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True},
        256, 512, 1024, 128, 192, 4096, 16.0, 2.5,
    ),
    "llama-8b": Case(
        {**LLAMA, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
         "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False},
        64, 80, 1024, 96, 48, 4096, 3.0, 3.0,
    ),
    "tiny": Case(
        {**LLAMA, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 500, "tie_word_embeddings": True, "max_position_embeddings": 2048},
        6, 12, 40, 8, 3, 200, 20.0, 0.4,
    ),
}  # fmt: skip
