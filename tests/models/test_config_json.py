from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from overlap.errors import ModelError
from overlap.models.config import RopeScaling
from overlap.models.config_json import read_config

LEAST: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def write(directory: Path, given: dict[str, Any], generation: dict[str, Any] | None = None) -> Path:
    (directory / "config.json").write_text(json.dumps({**LEAST, **given}), encoding="utf-8")
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
    return directory / "config.json"


def test_what_is_left_out_has_the_defaults_of_transformers(tmp_path: Path) -> None:
    from transformers import LlamaConfig

    config, theirs = read_config(write(tmp_path, {})), LlamaConfig(**LEAST)
    assert config.architecture == "LlamaForCausalLM"
    assert (config.num_kv_heads, config.head_dim) == (theirs.num_key_value_heads, theirs.head_dim) == (4, 16)
    assert config.rms_norm_eps == theirs.rms_norm_eps
    assert config.context == theirs.max_position_embeddings
    assert config.tied_embeddings == theirs.tie_word_embeddings
    assert (config.attention_bias, config.mlp_bias) == (theirs.attention_bias, theirs.mlp_bias)
    assert config.rope_theta == theirs.rope_parameters["rope_theta"]
    assert config.rope_scaling is None
    assert config.dtype == "float32"


@pytest.mark.parametrize(
    "given",
    [
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}},
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
        {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **LLAMA3}},
    ],
)
def test_rope_scaling_is_read_as_old_and_new_transformers_write_it(given: dict[str, Any], tmp_path: Path) -> None:
    config = read_config(write(tmp_path, given))
    assert config.rope_theta == 5e5
    assert config.rope_scaling == RopeScaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192
    )


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_the_dtype_is_read_under_both_names(name: str, tmp_path: Path) -> None:
    assert read_config(write(tmp_path, {name: "bfloat16"})).dtype == "bfloat16"


@pytest.mark.parametrize(
    ("given", "generation", "ends"),
    [
        ({"eos_token_id": 2}, None, (2,)),
        ({"eos_token_id": [2, 3]}, {}, (2, 3)),
        ({"eos_token_id": 2}, {"eos_token_id": [7, 8]}, (7, 8)),
        ({"eos_token_id": 2}, {"eos_token_id": None}, (2,)),
        ({}, None, ()),
    ],
)
def test_the_end_tokens_of_the_generation_config_win(
    given: dict[str, Any], generation: dict[str, Any] | None, ends: tuple[int, ...], tmp_path: Path
) -> None:
    assert read_config(write(tmp_path, given, generation)).eos_token_ids == ends


def test_a_mistral_without_a_window_is_a_llama(tmp_path: Path) -> None:
    given = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": None}
    assert read_config(write(tmp_path, given)).architecture == "MistralForCausalLM"


def test_a_qwen3_norms_its_heads_and_has_the_head_size_that_it_says(tmp_path: Path) -> None:
    given = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "sliding_window": 4096}
    config = read_config(write(tmp_path, {**given, "head_dim": 64, "rope_theta": 1e6}))
    assert config.head_norm
    assert config.head_dim == 64
    assert config.rope_theta == 1e6
    assert read_config(write(tmp_path, given)).head_dim == 128  # as in transformers.Qwen3Config
    assert not read_config(write(tmp_path, {})).head_norm


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"model_type": "qwen3", "use_sliding_window": True, "sliding_window": 64}, "sliding_window is 64"),
        ({"architectures": ["GPT2LMHeadModel"]}, "architecture 'GPT2LMHeadModel'. overlap knows: LlamaForCausalLM"),
        ({"model_type": "gpt2"}, "architecture 'gpt2'"),
        ({"model_type": None}, "architecture None"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; it must be 'silu'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type is 'linear'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type is 'yarn'"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "rope scaling in .* has no 'factor'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config is 'fp8'"),
        ({"model_type": "mistral", "sliding_window": 4096}, "sliding_window is 4096"),
        ({"model_type": "mistral"}, "sliding_window is 4096; it must be null"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"hidden_size": "big"}, "hidden_size is 'big'; it must be a whole number"),
        ({"vocab_size": None}, "vocab_size is None"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3"),
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'"),
        ({"architectures": "Llama"}, r"architectures is 'Llama'; it must be a list of names"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'; it must be true or false"),
        ({"attention_bias": 1}, "attention_bias is 1; it must be true or false"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan; it must be a number above 0"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0; it must be a number above 0"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps is 'small'; it must be a number above 0"),
        ({"rope_theta": "big"}, "rope_theta is 'big'; it must be a number above 0"),
        ({"rope_scaling": "llama3"}, "rope_scaling is 'llama3'; it must be an object or null"),
        ({"rope_parameters": [1]}, r"rope_parameters is \[1\]; it must be an object or null"),
        ({"rope_scaling": {"rope_type": "llama3", **LLAMA3, "factor": "8"}}, "factor is '8'; it must be a number"),
        ({"rope_scaling": {"rope_type": "llama3", **LLAMA3, "high_freq_factor": 1}}, "low_freq_factor is 1.0"),
        (
            {"rope_scaling": {"rope_type": "llama3", **LLAMA3}, "rope_parameters": {"rope_type": "default"}},
            "rope_scaling is .* it must be what rope_parameters says",
        ),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
        ({"quantization_config": "fp8"}, "quantization_config is 'fp8'; it must be an object or null"),
    ],
)
def test_what_is_not_known_is_refused_by_name(given: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=says):
        read_config(write(tmp_path, given))


def test_both_ways_of_writing_may_say_the_same(tmp_path: Path) -> None:
    scaling = {"rope_type": "llama3", **LLAMA3}
    given = {"rope_parameters": {"rope_theta": 5e5, **scaling}, "rope_scaling": scaling}
    assert read_config(write(tmp_path, given)) == read_config(write(tmp_path, {"rope_theta": 5e5, **given}))
    of_theta_only = {"rope_parameters": {"rope_theta": 5e5}, "rope_scaling": scaling}
    assert read_config(write(tmp_path, of_theta_only)) == read_config(write(tmp_path, given))


def test_a_bad_end_token_is_told_with_the_file_that_has_it(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"generation_config\.json', eos_token_id is '</s>'"):
        read_config(write(tmp_path, {"eos_token_id": 2}, {"eos_token_id": "</s>"}))


@pytest.mark.parametrize(("content", "says"), [("{", "cannot be read"), ("[]", "holds list, not an object")])
def test_a_broken_file_is_named(content: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError, match=rf"config\.json' {says}"):
        read_config(tmp_path / "config.json")
