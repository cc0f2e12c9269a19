from __future__ import annotations

import json
import shutil
from contextlib import closing
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from overlap.errors import ConfigError, ModelError
from overlap.models import build, open_checkpoint
from overlap.models.directory import DirectoryCheckpoint, read_chat_template

NOTHING = torch.zeros(1)
NAME = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def directory(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    """A copy of the tiny Llama to be broken."""
    return Path(shutil.copytree(tiny_llama_dir, tmp_path / "model"))


def split(directory: Path) -> Path:
    """Cut the weights into two files with an index; return the index."""
    tensors = load_file(directory / "model.safetensors")
    names = sorted(tensors)
    weight_map = {}
    for part, half in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), 1):
        file = f"model-0000{part}-of-00002.safetensors"
        save_file({name: tensors[name] for name in half}, directory / file)
        weight_map.update(dict.fromkeys(half, file))
    (directory / "model.safetensors").unlink()
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    return index


@pytest.mark.parametrize("several", [False, True])
def test_every_tensor_is_read_as_it_was_saved(directory: Path, several: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = load_file(directory / "model.safetensors")
    if several:
        split(directory)
    monkeypatch.setattr("overlap.models.checkpoint.BLOCK_BYTES", 4 * 64 * 7)  # blocks of 7 rows
    checkpoint = DirectoryCheckpoint(directory)
    for name, tensor in expected.items():
        for dtype in (torch.float32, torch.bfloat16):
            out = torch.full(checkpoint.shape(name), float("nan"), dtype=dtype)
            checkpoint.read_into(name, out)
            assert torch.equal(out, tensor.to(dtype))
    assert not checkpoint.has("lm_head.weight")
    checkpoint.close()
    checkpoint.close()


def test_a_missing_shard_is_named(directory: Path) -> None:
    split(directory)
    (directory / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelError, match=r"names 'model-00002-of-00002\.safetensors', which is not there"):
        DirectoryCheckpoint(directory)


def test_a_tensor_that_only_the_index_has_is_named(directory: Path) -> None:
    index = split(directory)
    content = json.loads(index.read_text())
    content["weight_map"]["model.extra"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(ModelError, match=r"00001-of-00002\.safetensors' has no tensor 'model\.extra'"):
        DirectoryCheckpoint(directory)


def test_a_missing_tensor_is_named_before_anything_is_read(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    del tensors[NAME]
    save_file(tensors, directory / "model.safetensors")
    checkpoint = DirectoryCheckpoint(directory)
    with pytest.raises(ModelError, match=rf"has no tensor '{NAME}'"):
        build(checkpoint, device="cpu", dtype=torch.float32)
    with pytest.raises(ModelError, match=rf"has no tensor '{NAME}'"):
        checkpoint.read_into(NAME, torch.empty(64, 160))
    checkpoint.close()


def test_a_tensor_of_a_wrong_shape_is_told_with_both_shapes(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    tensors[NAME] = torch.zeros(64, 161)
    save_file(tensors, directory / "model.safetensors")
    checkpoint = DirectoryCheckpoint(directory)
    with pytest.raises(ModelError, match=r"has the shape \[64, 161\].*should be \[64, 160\]"):
        build(checkpoint, device="cpu", dtype=torch.float32)
    checkpoint.close()


def rewrite(directory: Path, tensors: dict[str, torch.Tensor] | None = None, **config: object) -> None:
    """Put tensors into the checkpoint, and values into its config.json."""
    weights, settings = directory / "model.safetensors", directory / "config.json"
    save_file({**load_file(weights), **(tensors or {})}, weights)
    settings.write_text(json.dumps({**json.loads(settings.read_text()), **config}))


@pytest.mark.parametrize(
    "name", ["self_attn.q_proj.bias", "self_attn.q_norm.weight", "mlp.gate_proj.weight_scale", "mlp.up_proj.bias"]
)
def test_a_tensor_that_the_configuration_has_no_place_for_is_refused(directory: Path, name: str) -> None:
    rewrite(directory, {f"model.layers.0.{name}": torch.ones(64)})
    with pytest.raises(ModelError, match=rf"has tensors that its .*no place for, 1: 'model\.layers\.0\.{name}'\."):
        DirectoryCheckpoint(directory)


def test_layers_beyond_those_of_the_configuration_are_refused(directory: Path) -> None:
    rewrite(directory, num_hidden_layers=1)
    with pytest.raises(ModelError, match=r"num_layers=1\) has no place for, 18: 'model\.layers\.1\..*, \.\.\."):
        DirectoryCheckpoint(directory)


def test_what_follows_from_the_configuration_may_be_stored_as_well(directory: Path) -> None:
    rewrite(directory, {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8), "value_head.weight": NOTHING})
    with closing(DirectoryCheckpoint(directory)) as checkpoint:
        assert checkpoint.has(NAME)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantized_weights_that_nothing_says_how_to_read_are_refused(directory: Path, dtype: torch.dtype) -> None:
    rewrite(directory, {NAME: torch.ones(64, 160).to(dtype)})
    with pytest.raises(ModelError, match=rf"'{NAME}' .* is of the type (I8|F8_E4M3), and no quantization_config"):
        DirectoryCheckpoint(directory)


def test_a_head_beside_tied_embeddings_has_to_be_the_embedding(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("overlap.models.checkpoint.BLOCK_BYTES", 4 * 64 * 100)  # blocks of 100 rows
    embedding = load_file(directory / "model.safetensors")["model.embed_tokens.weight"]
    rewrite(directory, {"lm_head.weight": embedding.clone()})
    with closing(DirectoryCheckpoint(directory)) as checkpoint:
        build(checkpoint, device="cpu", dtype=torch.float32)
    embedding[-1, -1] += 1
    for head in (embedding, embedding[:-1].clone()):
        rewrite(directory, {"lm_head.weight": head})
        with (
            closing(DirectoryCheckpoint(directory)) as checkpoint,
            pytest.raises(ModelError, match=r"'lm_head\.weight' is not its 'model\.embed_tokens\.weight'"),
        ):
            build(checkpoint, device="cpu", dtype=torch.float32)


@pytest.mark.parametrize("size", [0, 5, 100, -10])
def test_a_truncated_safetensors_file_is_refused_with_its_size(directory: Path, size: int) -> None:
    path = directory / "model.safetensors"
    content = path.read_bytes()[:size]
    path.write_bytes(content)
    with pytest.raises(ModelError, match=rf"model\.safetensors' \({len(content)} bytes\) is broken or truncated"):
        DirectoryCheckpoint(directory)


def test_pickled_weights_are_never_opened(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r'has no safetensors file. Use load_format="dummy"'):
        DirectoryCheckpoint(directory)
    (directory / "pytorch_model.bin").touch()
    with pytest.raises(ModelError, match=r"'pytorch_model\.bin', but overlap never unpickles"):
        DirectoryCheckpoint(directory)


def test_one_file_of_any_name_will_do_but_several_need_an_index(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "weights.safetensors")
    DirectoryCheckpoint(directory).close()
    shutil.copy(directory / "weights.safetensors", directory / "more.safetensors")
    with pytest.raises(ModelError, match=r"2 safetensors files but no model\.safetensors\.index\.json"):
        DirectoryCheckpoint(directory)


def test_a_missing_tokenizer_is_named(directory: Path) -> None:
    (directory / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"has no tokenizer\.json"):
        DirectoryCheckpoint(directory)


def test_the_tokenizer_source_is_the_file_and_its_settings(tiny_llama_dir: Path) -> None:
    checkpoint = open_checkpoint(tiny_llama_dir, cache_dir=tiny_llama_dir)
    checkpoint.close()
    source = checkpoint.tokenizer_source
    assert source is not None
    assert (source.kind, source.path) == ("json", tiny_llama_dir / "tokenizer.json")
    assert source.fields["eos_token"] == "<|im_end|>"
    assert checkpoint.config.eos_token_ids == (2,)
    assert checkpoint.chat_template is not None
    assert "<|im_start|>" in checkpoint.chat_template


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ a }}", "{{ a }}"),
        ([{"name": "tool", "template": "t"}, {"name": "default", "template": "d"}], "d"),
        ([{"name": "tool", "template": "t"}], None),
        (None, None),
    ],
)
def test_the_chat_template_is_the_default_one(template: object, expected: str | None, tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    assert read_chat_template(tmp_path) == expected


def test_a_template_in_its_own_file_wins(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ a }}"}))
    (tmp_path / "chat_template.jinja").write_text("{{ ü }}", encoding="utf-8")
    assert read_chat_template(tmp_path) == "{{ ü }}"


def test_an_unknown_load_format_is_refused_with_the_nearest(tiny_llama_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"load_format is 'dumy'\. Did you mean 'dummy'\?"):
        open_checkpoint(tiny_llama_dir, load_format="dumy", cache_dir=tiny_llama_dir)  # type: ignore[arg-type]
