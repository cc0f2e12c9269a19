from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from overlap import ModelError, models
from overlap.models import build, open_checkpoint
from overlap.models.config import ModelConfig
from overlap.models.dummy import DummyCheckpoint
from overlap.models.layout import tensor_shapes
from overlap.models.shard import Part

MEASURE = """
import sys, threading, time
from pathlib import Path
import torch
from overlap import ModelError, models
from overlap.models import build, open_checkpoint

def anonymous_bytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

torch.set_num_threads(1)
dtype = getattr(torch, sys.argv[2])
torch.nn.functional.linear(torch.ones(64, 64, dtype=dtype), torch.ones(64, 64, dtype=dtype))  # the library's own memory
before, peak, done = anonymous_bytes(), 0, threading.Event()

def sample():
    global peak
    while not done.is_set():
        peak = max(peak, anonymous_bytes())
        time.sleep(0.005)

thread = threading.Thread(target=sample)
thread.start()
checkpoint = open_checkpoint(sys.argv[1], cache_dir=Path("."))
program = build(checkpoint, device="cpu", dtype=dtype)
checkpoint.close()
done.set()
thread.join()
peak = max(peak, anonymous_bytes())  # what came in the last 5 ms
print(peak - before, anonymous_bytes() - before, program.weight_bytes())
"""


def large(*, tied: bool) -> ModelConfig:
    """About 280 MB in float32."""
    return ModelConfig(
        architecture="LlamaForCausalLM", vocab_size=8000, hidden_size=1024, num_layers=5, num_heads=16, num_kv_heads=4,
        head_dim=64, intermediate_size=2816, rms_norm_eps=1e-5, rope_theta=10000.0, rope_scaling=None, context=512,
        tied_embeddings=tied, attention_bias=False, mlp_bias=False, eos_token_ids=(), bos_token_id=None,
        dtype="float32",
    )  # fmt: skip


def save(config: ModelConfig, path: Path) -> None:
    """Write a dummy as a directory of safetensors."""
    from safetensors.torch import save_file

    checkpoint = DummyCheckpoint(config)
    tensors = {name: torch.empty(shape) for name, shape in tensor_shapes(config).items()}
    for name, tensor in tensors.items():
        checkpoint.read_into(name, tensor)
    save_file(tensors, path / "model.safetensors")
    (path / "tokenizer.json").write_text("{}")
    (path / "config.json").write_text(
        f'{{"model_type": "llama", "vocab_size": {config.vocab_size}, "hidden_size": {config.hidden_size}, '
        f'"num_hidden_layers": {config.num_layers}, "num_attention_heads": {config.num_heads}, '
        f'"num_key_value_heads": {config.num_kv_heads}, "intermediate_size": {config.intermediate_size}, '
        f'"max_position_embeddings": {config.context}, "tie_word_embeddings": {str(config.tied_embeddings).lower()}}}'
    )


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize("tied", [True, False])
def test_loading_takes_little_more_memory_than_the_weights(tied: bool, tmp_path: Path) -> None:
    save(large(tied=tied), tmp_path)
    for dtype in ("float32", "bfloat16"):
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, str(tmp_path), dtype], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        peak, after, weights = map(int, done.stdout.split())
        assert 0.9 * weights < after  # so the measure sees them
        assert after <= peak + 2**20
        assert peak < 1.3 * weights, f"{peak / weights:.3f} x the weights"


def test_progress_goes_to_stderr_and_only_if_asked(tiny_llama_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for progress in (False, True):
        checkpoint = open_checkpoint(tiny_llama_dir, cache_dir=tiny_llama_dir)
        build(checkpoint, device="cpu", dtype=torch.float32, progress=progress)
        checkpoint.close()
        out, err = capsys.readouterr()
        assert out == ""
        assert ("loading weights: 100%" in err) == progress


def test_a_program_outlives_its_checkpoint(tiny_llama_dir: Path) -> None:
    checkpoint = open_checkpoint(tiny_llama_dir, cache_dir=tiny_llama_dir)
    program = build(checkpoint, device="cpu", dtype=torch.float32)
    before = program.logits(torch.ones(1, 64))
    checkpoint.close()
    assert torch.equal(program.logits(torch.ones(1, 64)), before)


def test_a_name_that_the_package_has_not_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"overlap\.models' has no attribute 'nonsense'"):
        models.__getattr__("nonsense")


@pytest.mark.parametrize(
    ("value", "dtype"), [(float("nan"), torch.float32), (float("-inf"), torch.float32), (1e5, torch.float16)]
)
def test_a_value_that_is_none_or_too_large_for_the_dtype_is_refused_with_its_tensor(
    value: float, dtype: torch.dtype
) -> None:
    class Broken(DummyCheckpoint):
        """One value is spoilt."""

        def read_into(self, name: str, out: torch.Tensor, part: Part | None = None) -> None:
            super().read_into(name, out, part)
            if name == "model.layers.3.mlp.down_proj.weight":
                out[1, 1] = value

    with pytest.raises(ModelError, match=r"not finite as torch.float\d\d, in 'model.layers.3.mlp.down_proj.weight'"):
        build(Broken(large(tied=True)), device="cpu", dtype=dtype)
