from __future__ import annotations

import contextlib
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F

from overlap.errors import ModelError
from overlap.models import build, open_checkpoint
from overlap.models.config import RopeScaling
from overlap.models.gguf import GgufCheckpoint, gguf_name
from overlap.models.layout import tensor_shapes
from overlap.models.program import Attend, Batch

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INNER, LAYERS, VOCAB = 64, 4, 2, 16, 96, 2, 96
Q = gguf.GGMLQuantizationType
Array = npt.NDArray[np.float32]


def as_converted(rows: Array, heads: int) -> Array:
    """Order rows as llama.cpp's converter does, the obvious way: of each head row i and row i + D/2 side by side."""
    half = HEAD_DIM // 2
    order = [h * HEAD_DIM + part * half + i for h in range(heads) for i in range(half) for part in (0, 1)]
    return rows[order]


def random_weights(config_of: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    return {
        name: (rng.normal(0, 0.1, shape) + ("norm" in name)).astype(np.float32) for name, shape in config_of.items()
    }


def write_gguf(
    path: Path,
    weights: dict[str, Array],
    kind: Any = Q.F32,
    *,
    edit: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
    architecture: str = "llama",
    dimensions: int = HEAD_DIM,
) -> None:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_context_length(128)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(dimensions)
    writer.add_rope_freq_base(20000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"tök{i}" for i in range(VOCAB)])
    writer.add_token_types([1] * VOCAB)
    writer.add_eos_token_id(2)
    writer.add_eot_token_id(5)
    writer.add_bos_token_id(1)
    writer.add_chat_template("{{ messages }}")
    edit(writer)
    for name, values in weights.items():
        if architecture == "llama" and (".q_proj." in name or ".k_proj." in name):
            values = as_converted(values, HEADS if ".q_proj." in name else KV_HEADS)
        if values.ndim > 1 and kind is not Q.F32:
            writer.add_tensor(gguf_name(name), gguf.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(gguf_name(name), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def shapes(*, tied: bool = True, biased: bool = False, head_norm: bool = False) -> dict[str, tuple[int, ...]]:
    from overlap.models.config import ModelConfig

    return tensor_shapes(
        ModelConfig(
            architecture="", vocab_size=VOCAB, hidden_size=HIDDEN, num_layers=LAYERS, num_heads=HEADS,
            num_kv_heads=KV_HEADS, head_dim=HEAD_DIM, intermediate_size=INNER, rms_norm_eps=1e-5, rope_theta=20000.0,
            rope_scaling=None, context=128, tied_embeddings=tied, attention_bias=biased, mlp_bias=biased,
            head_norm=head_norm,
            eos_token_ids=(), bos_token_id=None, dtype="float32",
        )
    )  # fmt: skip


def read(checkpoint: GgufCheckpoint, name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    out = torch.full(checkpoint.shape(name), float("nan"), dtype=dtype)
    checkpoint.read_into(name, out)
    return out


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_gguf(tmp_path / "tiny.gguf", random_weights(shapes()))
    return tmp_path / "tiny.gguf"


@pytest.mark.parametrize(
    "kind", [Q.F32, Q.F16, Q.BF16, Q.Q8_0, Q.Q4_0, Q.Q4_1, Q.Q5_0, Q.Q5_1], ids=lambda kind: kind.name
)
@pytest.mark.parametrize("biased", [False, True])
def test_each_tensor_is_what_was_quantized_in_the_order_of_hugging_face(
    kind: Any, biased: bool, tmp_path: Path
) -> None:
    weights = random_weights(shapes(tied=not biased, biased=biased))
    write_gguf(tmp_path / "a.gguf", weights, kind)
    checkpoint = GgufCheckpoint(tmp_path / "a.gguf")
    assert (checkpoint.config.attention_bias, checkpoint.config.mlp_bias) == (biased, biased)
    assert checkpoint.config.tied_embeddings is not biased
    for name, values in weights.items():
        quantized = kind is not Q.F32 and values.ndim > 1
        # Quantization is by row, so the order of rows does not matter to it.
        expected = gguf.dequantize(gguf.quantize(values, kind), kind) if quantized else values
        assert checkpoint.has(name)
        assert torch.equal(read(checkpoint, name), torch.from_numpy(np.ascontiguousarray(expected))), name
        wanted = torch.from_numpy(np.ascontiguousarray(expected)).to(torch.bfloat16)
        assert torch.equal(read(checkpoint, name, torch.bfloat16), wanted)
    checkpoint.close()


def test_a_qwen3_has_head_norms_and_its_rows_in_their_own_order(tmp_path: Path) -> None:
    weights = random_weights(shapes(head_norm=True))
    write_gguf(tmp_path / "a.gguf", weights, architecture="qwen3")
    checkpoint = GgufCheckpoint(tmp_path / "a.gguf")
    assert checkpoint.config.architecture == "Qwen3ForCausalLM"
    assert checkpoint.config.head_norm
    assert gguf_name("model.layers.1.self_attn.q_norm.weight") == "blk.1.attn_q_norm.weight"
    for name, values in weights.items():
        assert torch.equal(read(checkpoint, name), torch.from_numpy(values)), name
    program = build(checkpoint, device="cpu", dtype=torch.float32)
    checkpoint.close()
    assert program.config.head_norm


def test_a_tensor_of_many_blocks_is_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("overlap.models.checkpoint.BLOCK_BYTES", 1)  # one head, or one row, a block
    weights = random_weights(shapes())
    write_gguf(tmp_path / "a.gguf", weights, Q.Q8_0)
    checkpoint = GgufCheckpoint(tmp_path / "a.gguf")
    for name in ("model.layers.1.self_attn.k_proj.weight", "model.embed_tokens.weight"):
        expected = gguf.dequantize(gguf.quantize(weights[name], Q.Q8_0), Q.Q8_0)
        assert torch.equal(read(checkpoint, name), torch.from_numpy(expected))
    checkpoint.close()


def test_keys_and_places_are_those_that_the_gguf_package_reads(path: Path, smollm2_path: Path) -> None:
    for file in (path, smollm2_path):
        checkpoint, reader = GgufCheckpoint(file), gguf.GGUFReader(file)
        assert checkpoint.tokenizer_source is not None
        fields = checkpoint.tokenizer_source.fields
        assert {key: reader.fields[key].contents() for key in reader.fields if key.startswith("tokenizer.")} == fields
        places = {
            t.name: (t.tensor_type, tuple(reversed(t.shape.tolist())), t.data_offset, t.n_bytes) for t in reader.tensors
        }
        ours = {n: (t.type, t.shape, t.start, t.num_bytes) for n, t in checkpoint._tensors.items()}
        assert ours == places
        checkpoint.close()


def test_smollm2_is_read_as_an_independent_reading_has_it(smollm2_path: Path) -> None:
    reader = gguf.GGUFReader(smollm2_path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    checkpoint = GgufCheckpoint(smollm2_path)
    for name in ("model.embed_tokens.weight", "model.layers.3.self_attn.q_proj.weight", "model.norm.weight"):
        tensor = tensors[gguf_name(name)]
        expected = torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type)))
        if "q_proj" in name:
            expected = torch.cat([torch.cat((head[0::2], head[1::2])) for head in torch.split(expected, 64)])
        assert torch.equal(read(checkpoint, name), expected)
    checkpoint.close()


def test_the_configuration_is_that_of_the_header(path: Path) -> None:
    checkpoint = open_checkpoint(path, cache_dir=path.parent)
    config = checkpoint.config
    checkpoint.close()
    assert (config.vocab_size, config.hidden_size, config.num_layers) == (VOCAB, HIDDEN, LAYERS)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (HEADS, KV_HEADS, HEAD_DIM)
    assert (config.rope_theta, config.context, config.intermediate_size) == (20000.0, 128, INNER)
    assert (config.eos_token_ids, config.bos_token_id) == ((2, 5), 1)
    assert config.rms_norm_eps == pytest.approx(1e-5)
    assert checkpoint.chat_template == "{{ messages }}"
    assert config.dtype == "float32"


def test_the_program_computes_what_transformers_computes(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    weights = random_weights(shapes())
    write_gguf(tmp_path / "a.gguf", weights)
    reference = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=LAYERS,
            num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, rms_norm_eps=1e-5, tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 20000.0}, pad_token_id=0,
        )
    ).eval()  # fmt: skip
    reference.load_state_dict({name: torch.from_numpy(values) for name, values in weights.items()}, strict=False)
    checkpoint = GgufCheckpoint(tmp_path / "a.gguf")
    program = build(checkpoint, device="cpu", dtype=torch.float32)
    checkpoint.close()
    ids = torch.arange(16)
    kv = torch.zeros(1, LAYERS, 2, 16, KV_HEADS, HEAD_DIM)
    with torch.inference_mode():
        forward = program.forward(Batch(token_ids=ids.int(), positions=ids.int(), kv_index=ids.int(), kv=kv))
        joint = next(forward)
        while True:
            assert isinstance(joint, Attend)
            k_TKD, v_TKD = kv[0, joint.layer]
            attended = F.scaled_dot_product_attention(
                joint.q_THD.transpose(0, 1), k_TKD.repeat_interleave(2, 1).transpose(0, 1),
                v_TKD.repeat_interleave(2, 1).transpose(0, 1), is_causal=True,
            )  # fmt: skip
            try:
                joint = forward.send(attended.transpose(0, 1).reshape(16, -1))
            except StopIteration as end:
                logits = program.logits(end.value)
                break
        torch.testing.assert_close(logits, reference(ids[None]).logits[0], atol=1e-4, rtol=0)


def converter_factors(factor: float, original: int, theta: float = 20000.0) -> Array:
    """The loop of llama.cpp's `LlamaModel.generate_extra_tensors`."""
    factors = []
    for i in range(0, HEAD_DIM, 2):
        wavelen = 2 * math.pi * theta ** (i / HEAD_DIM)
        if wavelen < original / 4:
            factors.append(1.0)
        elif wavelen > original / 1:
            factors.append(factor)
        else:
            smooth = (original / wavelen - 1) / (4 - 1)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, dtype=np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_is_recognised_by_its_factors(factor: float, tmp_path: Path) -> None:
    factors = converter_factors(factor, 8192)
    write_gguf(tmp_path / "a.gguf", {**random_weights(shapes()), "rope_freqs.weight": factors})
    checkpoint = GgufCheckpoint(tmp_path / "a.gguf")
    checkpoint.close()
    assert checkpoint.config.rope_scaling == RopeScaling(
        factor=factor, low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192
    )


@pytest.mark.parametrize("factors", [converter_factors(8.0, 4096), np.ones(3, dtype=np.float32) * 2])
def test_other_rope_factors_are_refused(factors: Array, tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf", {**random_weights(shapes()), "rope_freqs.weight": factors})
    with pytest.raises(ModelError, match="not those of a Llama 3"):
        GgufCheckpoint(tmp_path / "a.gguf")


def add_experts(writer: gguf.GGUFWriter) -> None:
    writer.add_expert_count(8)


def add_zero_heads(writer: gguf.GGUFWriter) -> None:
    writer.kv_data[0]["llama.attention.head_count_kv"].value = 0


def add_linear_scaling(writer: gguf.GGUFWriter) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"edit": add_zero_heads}, r"'llama\.attention\.head_count_kv' is 0"),
        ({"architecture": "mamba"}, "architecture 'mamba'. overlap knows: 'llama', 'qwen3'"),
        ({"edit": add_experts}, "mixture of 8 experts"),
        ({"edit": add_linear_scaling}, "rope scaling 'linear'. overlap knows"),
        ({"dimensions": 8}, "rotates 8 of 16 dimensions"),
    ],
)
def test_what_would_be_computed_wrongly_is_refused_by_name(given: dict[str, Any], says: str, tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf", random_weights(shapes()), **given)
    with pytest.raises(ModelError, match=says):
        GgufCheckpoint(tmp_path / "a.gguf")


def test_a_gguf_cut_anywhere_is_refused_with_its_size(path: Path) -> None:
    whole = path.read_bytes()
    header = len(whole) - sum(4 * math.prod(shape) for shape in shapes().values())
    cut = path.with_name("cut.gguf")
    for size in [*range(5, header, 97), header, len(whole) // 2, len(whole) - 33]:
        cut.write_bytes(whole[:size])
        with pytest.raises(ModelError, match=rf"cut\.gguf' is truncated: it has {size} bytes.*Fetch it again"):
            GgufCheckpoint(cut)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "cannot be read"),
        (b"PK\x03\x04 something else", "is no GGUF file: it begins with"),
        (b"GG", "is no GGUF file"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "GGUF version 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "GGUF version"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0), "is broken: it claims 0 keys"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**62), "is truncated"),
        (b"GGUF" + struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"a", 99), "unknown type 99"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"a", 9, 4, 2**61), "is truncated"),
        (b"GGUF" + struct.pack("<IQQQ1sIQ2s", 3, 0, 1, 1, b"a", 8, 2, b"\xff\xff"), "is no UTF-8"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 0) + bytes(64), "architecture None"),
    ],
)
def test_what_is_no_gguf_is_refused(content: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(content)
    with pytest.raises(ModelError, match=says):
        GgufCheckpoint(tmp_path / "a.gguf")


def test_random_damage_to_a_header_is_a_model_error_or_harmless(path: Path) -> None:
    whole = path.read_bytes()
    header = len(whole) - sum(4 * math.prod(shape) for shape in shapes().values())
    rng = np.random.default_rng(0)
    for _ in range(400):
        damaged = bytearray(whole)
        damaged[rng.integers(0, header)] = rng.integers(0, 256)
        path.write_bytes(damaged)
        with contextlib.suppress(ModelError):
            GgufCheckpoint(path).close()


@pytest.mark.parametrize("name", ["model.layers.2.input_layernorm.weight", "model.layers.1.self_attn.q_norm.weight"])
def test_a_tensor_that_the_header_has_no_place_for_is_refused(name: str, tmp_path: Path) -> None:
    weights = random_weights(shapes())
    write_gguf(tmp_path / "more.gguf", {**weights, name: weights["model.norm.weight"]})
    with pytest.raises(ModelError, match=rf"has tensors that its .* has no place for, 1: '{gguf_name(name)}'"):
        GgufCheckpoint(tmp_path / "more.gguf")


def test_a_missing_tensor_is_named_in_both_ways(tmp_path: Path) -> None:
    weights = random_weights(shapes())
    del weights["model.layers.1.mlp.up_proj.weight"]
    write_gguf(tmp_path / "a.gguf", weights)
    checkpoint = GgufCheckpoint(tmp_path / "a.gguf")
    with pytest.raises(ModelError, match=r"has no tensor 'blk\.1\.ffn_up\.weight \(model\.layers\.1\.mlp"):
        checkpoint.shape("model.layers.1.mlp.up_proj.weight")
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        build(checkpoint, device="cpu", dtype=torch.float32)
    checkpoint.close()
