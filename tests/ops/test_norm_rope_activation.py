from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding, apply_rotary_pos_emb

from overlap.models.config import RopeScaling
from overlap.ops.activation import silu_mul
from overlap.ops.norm import add_rms_norm, rms_norm
from overlap.ops.rope import rope_and_write, rope_table

LLAMA3 = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_has_the_bits_of_llama_in_float32_and_is_rounded_once(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    theirs = LlamaRMSNorm(96, eps=1e-5)
    theirs.weight.data.normal_()
    x, residual = torch.randn(5, 96).to(dtype), torch.randn(5, 96)
    with torch.no_grad():
        assert torch.equal(rms_norm(residual, theirs.weight, 1e-5, dtype), theirs(residual).to(dtype))
        normed, total = add_rms_norm(x, residual, theirs.weight, 1e-5)
        assert torch.equal(total, x.float() + residual)
        assert torch.equal(normed, theirs(x.float() + residual).to(dtype))


def test_silu_mul_has_the_bits_of_two_ops() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        gate_up = torch.randn(3, 64).to(dtype)
        assert torch.equal(silu_mul(gate_up), torch.nn.functional.silu(gate_up[:, :32]) * gate_up[:, 32:])


def rotary(scaling: RopeScaling | None) -> LlamaRotaryEmbedding:
    parameters: dict[str, object] = {"rope_type": "default", "rope_theta": 500000.0}
    if scaling is not None:
        parameters |= {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_context,
        }
    config = LlamaConfig(
        hidden_size=256, num_attention_heads=2, max_position_embeddings=20000, rope_parameters=parameters
    )
    return LlamaRotaryEmbedding(config)


@pytest.mark.parametrize("scaling", [None, LLAMA3], ids=["plain", "llama3"])
def test_the_rope_table_has_the_bits_of_transformers(scaling: RopeScaling | None) -> None:
    cos, sin = rotary(scaling)(torch.zeros(1), torch.arange(20000)[None])
    table = rope_table(128, 20000, 500000.0, scaling, "cpu")
    assert table.dtype is torch.float32
    torch.testing.assert_close(table, torch.cat((cos[0, :, :64], sin[0, :, :64]), dim=-1), rtol=0, atol=1e-7)


@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 40])
def test_rope_and_write_rotates_as_llama_does_and_writes_each_token_into_its_page_only(tokens: int) -> None:
    torch.manual_seed(tokens)
    num_heads, num_kv_heads, head_dim, layer = 6, 2, 128, 1
    qkv = torch.randn(tokens, (num_heads + 2 * num_kv_heads) * head_dim)
    positions = torch.randint(0, 20000, (tokens,), dtype=torch.int32)
    kv = torch.randn(4, 3, 2, 16, num_kv_heads, head_dim)
    kv_index = torch.randperm(64)[:tokens].int()
    if tokens > 1:
        kv_index[-1] = -1
    expected_kv = kv.clone()
    q, k, v = qkv.view(tokens, -1, head_dim).tensor_split((num_heads, num_heads + num_kv_heads), 1)
    cos, sin = rotary(None)(torch.zeros(1), positions[None])
    expected_q, expected_k = apply_rotary_pos_emb(q[None], k[None], cos, sin, unsqueeze_dim=2)
    for token, index in enumerate(kv_index.tolist()):
        if index >= 0:
            expected_kv[index // 16, layer, 0, index % 16] = expected_k[0, token]
            expected_kv[index // 16, layer, 1, index % 16] = v[token]

    table = rope_table(head_dim, 20000, 500000.0, None, "cpu")
    got_q = rope_and_write(qkv, positions, table, kv, layer, kv_index, num_heads, num_kv_heads)

    torch.testing.assert_close(got_q, expected_q[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(kv, expected_kv, rtol=1e-6, atol=1e-6)
