from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from overlap.errors import ConfigError, ModelError
from overlap.models import build, open_checkpoint
from overlap.models.config_json import read_config


def test_the_weights_are_random_repeatable_and_norms_are_one(tiny_llama_dir: Path) -> None:
    state = torch.get_rng_state()
    readings = []
    for _ in range(2):
        checkpoint = open_checkpoint(tiny_llama_dir, load_format="dummy", cache_dir=tiny_llama_dir)
        out = torch.empty(checkpoint.shape("model.embed_tokens.weight"), dtype=torch.bfloat16)
        checkpoint.read_into("model.embed_tokens.weight", out)
        readings.append(out)
    assert torch.equal(*readings)
    assert readings[0].float().std().item() == pytest.approx(0.02, rel=0.05)
    other = torch.empty(checkpoint.shape("model.layers.0.mlp.up_proj.weight"), dtype=torch.bfloat16)
    checkpoint.read_into("model.layers.0.mlp.up_proj.weight", other)
    assert not torch.equal(other[:64, :64], readings[0][:64, :64])
    norm = torch.empty(64)
    checkpoint.read_into("model.norm.weight", norm)
    assert torch.equal(norm, torch.ones(64))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_config_alone_is_enough(tiny_llama_dir: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_llama_dir / "config.json", tmp_path)
    config = read_config(tmp_path / "config.json")
    for model in (tmp_path, tmp_path / "config.json", str(tmp_path), config):
        checkpoint = open_checkpoint(model, load_format="dummy", cache_dir=tmp_path)
        assert checkpoint.config == config
        assert checkpoint.tokenizer_source is None
        program = build(checkpoint, device="cpu", dtype=torch.bfloat16)
        assert program.logits(torch.ones(2, 64, dtype=torch.bfloat16)).isfinite().all()
        checkpoint.close()


def test_a_tokenizer_beside_it_is_used(tiny_llama_dir: Path, smollm2_path: Path) -> None:
    checkpoint = open_checkpoint(tiny_llama_dir, load_format="dummy", cache_dir=tiny_llama_dir)
    assert checkpoint.tokenizer_source is not None
    assert checkpoint.chat_template is not None
    checkpoint = open_checkpoint(smollm2_path, load_format="dummy", cache_dir=tiny_llama_dir)
    assert checkpoint.tokenizer_source is not None
    assert checkpoint.tokenizer_source.kind == "gguf"
    assert len(checkpoint.tokenizer_source.fields["tokenizer.ggml.tokens"]) == checkpoint.config.vocab_size


def test_a_config_without_weights_needs_to_be_a_dummy(tiny_llama_dir: Path) -> None:
    with pytest.raises(ConfigError, match="has no weights"):
        open_checkpoint(read_config(tiny_llama_dir / "config.json"), cache_dir=tiny_llama_dir)


def test_a_wrong_target_is_told_with_both_shapes(tiny_llama_dir: Path) -> None:
    checkpoint = open_checkpoint(tiny_llama_dir, load_format="dummy", cache_dir=tiny_llama_dir)
    with pytest.raises(ModelError, match=r"\[64\].*\[65\]"):
        checkpoint.read_into("model.norm.weight", torch.empty(65))
