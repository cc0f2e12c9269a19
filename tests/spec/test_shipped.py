"""Heads that come with overlap: found by name, then by shape; a clear error where there is none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from overlap.errors import ConfigError
from overlap.models import build, open_checkpoint
from overlap.models.llama import Llama
from overlap.spec.eagle import load_head
from overlap.spec.shipped import HEADS, shape_of, shipped_head

SMOLLM2 = HEADS / "smollm2-135m-instruct"
MOST_BYTES = 12 * 2**20


def write(heads: Path, name: str, shape: dict[str, int]) -> None:
    (heads / name).mkdir(parents=True)
    (heads / name / "config.json").write_text(json.dumps(shape))


def test_a_head_is_found_by_the_models_name_and_then_by_its_shape(target: Llama, tmp_path: Path) -> None:
    shape = shape_of(target)
    write(tmp_path, "other", {**shape, "target_num_layers": 99})
    write(tmp_path, "a-tiny", shape)
    write(tmp_path, "tiny", shape)
    assert shipped_head("somebody/Tiny", target, tmp_path) == tmp_path / "tiny"
    assert shipped_head("/models/tiny-q8.gguf", target, tmp_path) == tmp_path / "a-tiny"
    assert shipped_head("other", target, tmp_path) == tmp_path / "a-tiny", "a head of another shape would not load"


def test_where_none_is_shipped_the_error_says_what_there_is_and_what_to_do(target: Llama, tmp_path: Path) -> None:
    write(tmp_path, "other", {})
    with pytest.raises(ConfigError, match=r"no EAGLE head for 'mine' .* it ships: other\. .* overlap train-drafter"):
        shipped_head("mine", target, tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(not (SMOLLM2 / "model.safetensors").is_file(), reason="the head for SmolLM2 is not there yet")
def test_the_head_for_smollm2_is_small_carded_and_loads(smollm2_path: Path) -> None:
    assert sum(file.stat().st_size for file in SMOLLM2.iterdir()) <= MOST_BYTES
    assert "Acceptance" in (SMOLLM2 / "README.md").read_text(encoding="utf-8")
    checkpoint = open_checkpoint(smollm2_path, cache_dir=smollm2_path)
    program = build(checkpoint, device="cpu", dtype=torch.float32)
    checkpoint.close()
    path = shipped_head("HuggingFaceTB/SmolLM2-135M-Instruct", program)
    assert path == SMOLLM2
    assert load_head(path, program).vocab_size == program.vocab_size
