"""The tensors of a Llama: their Hugging Face names and shapes, from its configuration. Imports no torch."""

from __future__ import annotations

from overlap.models.config import ModelConfig


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of all tensors that a checkpoint of `config` must have."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    if not config.tied_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    matrices = (
        ("self_attn.q_proj", q_size, hidden, config.attention_bias),
        ("self_attn.k_proj", kv_size, hidden, config.attention_bias),
        ("self_attn.v_proj", kv_size, hidden, config.attention_bias),
        ("self_attn.o_proj", hidden, q_size, config.attention_bias),
        ("mlp.gate_proj", inner, hidden, config.mlp_bias),
        ("mlp.up_proj", inner, hidden, config.mlp_bias),
        ("mlp.down_proj", hidden, inner, config.mlp_bias),
    )
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        shapes[prefix + "input_layernorm.weight"] = (hidden,)
        shapes[prefix + "post_attention_layernorm.weight"] = (hidden,)
        if config.head_norm:
            shapes[prefix + "self_attn.q_norm.weight"] = (config.head_dim,)
            shapes[prefix + "self_attn.k_norm.weight"] = (config.head_dim,)
        for module, rows, columns, biased in matrices:
            shapes[f"{prefix}{module}.weight"] = (rows, columns)
            if biased:
                shapes[f"{prefix}{module}.bias"] = (rows,)
    shapes["model.norm.weight"] = (hidden,)
    return shapes
