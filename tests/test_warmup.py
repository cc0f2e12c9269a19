from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from overlap import warmup
from overlap.cli import main
from overlap.errors import ConfigError
from overlap.models.config import ModelConfig
from overlap.warmup import Module, modules_of

MODEL = ModelConfig(
    architecture="Qwen3ForCausalLM", vocab_size=99, hidden_size=64, num_layers=1, num_heads=16, num_kv_heads=8,
    head_dim=128, intermediate_size=64, rms_norm_eps=1e-6, rope_theta=1e6, rope_scaling=None, context=64,
    tied_embeddings=True, attention_bias=False, mlp_bias=False, eos_token_ids=(), bos_token_id=None, dtype="bfloat16",
)  # fmt: skip

# A package that looks like FlashInfer to the builder, and writes down what it was asked for.
FLASHINFER = """
import os, pathlib

ASKED = pathlib.Path(__file__).with_name("asked")


class Spec:
    def __init__(self, *asked):
        self.asked, self.is_compiled = asked, asked[0] == "fa2" and 128 in asked

    def build(self, verbose):
        with ASKED.open("a") as file:
            print(os.environ["FLASHINFER_CUDA_ARCH_LIST"], *self.asked, file=file)
        if self.asked[0] == "fa3":
            raise RuntimeError("no\\nnvcc")


def gen_batch_prefill_module(backend, *rest):
    return Spec(backend, *rest)
"""


def test_a_model_wants_prefill_of_its_head_size() -> None:
    assert modules_of(MODEL) == (Module("fa2", "bfloat16", 128), Module("fa3", "bfloat16", 128))
    assert modules_of(MODEL, fa3=False, dtype="float16") == (Module("fa2", "float16", 128),)
    assert "fa3" not in {module.kind for module in modules_of(MODEL, architecture="10.0a")}
    assert [module.kind for module in modules_of(replace(MODEL, head_dim=64))] == ["fa2"]


def test_a_model_that_flashinfer_cannot_run_wants_nothing() -> None:
    assert modules_of(replace(MODEL, head_dim=80)) == ()
    assert modules_of(MODEL, dtype="float32") == ()


def test_an_architecture_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="'hopper'"):
        warmup.check("hopper")


def test_without_flashinfer_the_command_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(warmup, "find_spec", lambda name: None)
    assert main(["warmup"]) == 2
    assert "Install overlap[cuda]" in capsys.readouterr().err


def test_each_module_is_built_once_for_the_architecture_and_failures_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jit = tmp_path / "flashinfer" / "jit"
    jit.mkdir(parents=True)
    (tmp_path / "flashinfer" / "__init__.py").touch()
    (jit / "__init__.py").write_text(FLASHINFER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    monkeypatch.syspath_prepend(str(tmp_path))
    config = {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 64, "intermediate_size": 64,
        "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 99,
    }  # fmt: skip
    for head_dim in (128, 64):
        (tmp_path / str(head_dim)).mkdir()
        (tmp_path / str(head_dim) / "config.json").write_text(json.dumps({**config, "head_dim": head_dim}))
    models = [str(tmp_path / name) for name in ("128", "64", "128")]
    command = [sys.executable, "-m", "overlap", "warmup", "--arch", "9.0a", *models]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 1, run.stderr
    said = run.stderr.splitlines()
    assert len(said) == 3, run.stderr
    assert "fa2 of bfloat16 heads of 128: is there already" in said
    assert any(line.startswith("fa2 of bfloat16 heads of 64: built in ") for line in said)
    assert "fa3 of bfloat16 heads of 128: failed (RuntimeError: no nvcc)" in said
    bfloat16 = "torch.bfloat16"
    assert sorted((jit / "asked").read_text().splitlines()) == [
        f"9.0a fa2 {bfloat16} {bfloat16} {bfloat16} torch.int32 64 64 0 False False False",
        f"9.0a fa3 {bfloat16} {bfloat16} {bfloat16} torch.int32 128 128 0 False False False",
    ]
