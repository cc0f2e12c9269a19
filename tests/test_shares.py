"""What an engine does with a device's SMs, and without a device that can share them out."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from overlap import assemble
from overlap.config import EngineConfig
from overlap.errors import ConfigError
from overlap.models.config import ModelConfig
from overlap.resolve import Machine, Resolved, resolve
from overlap.streams import green
from overlap.streams.green import NoShares
from overlap.testing import SimDevice

MODEL = ModelConfig(
    architecture="LlamaForCausalLM", vocab_size=512, hidden_size=64, num_layers=3, num_heads=4, num_kv_heads=2,
    head_dim=16, intermediate_size=160, rms_norm_eps=1e-5, rope_theta=1e4, rope_scaling=None, context=1000,
    tied_embeddings=True, attention_bias=False, mlp_bias=False, eos_token_ids=(2,), bos_token_id=1, dtype="float32",
)  # fmt: skip
CUDA = torch.device("cuda:0")
HOPPER = Machine(cuda_devices=1, cuda_name="NVIDIA H100", fast_cpu_bfloat16=False, cores=2)


class Cuts:
    num_sms = 132

    def num_sms_of(self, share: int, half: str) -> int:
        return share if half == "own" else self.num_sms - share


def resolved(**asked: Any) -> Resolved:
    return resolve(EngineConfig(model="m", **asked), MODEL, HOPPER)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(green, "splits", lambda device: Cuts())


@pytest.mark.usefixtures("hopper")
def test_auto_has_a_few_shares_to_choose_from_and_streams_the_one_that_was_asked_for() -> None:
    streams = SimDevice().stream("main"), SimDevice().stream("side")
    shares, notes = assemble._shares(resolved(), CUDA, streams)
    assert shares == (24, 40, 56)
    assert notes == ("lanes: SM shares, decode rows + prompts: 24 + 108, 40 + 92, 56 + 76 of 132",)
    shares, notes = assemble._shares(resolved(lanes="streams", decode_sms=16), CUDA, streams)
    assert (shares, notes) == ((16,), ("lanes: SM shares, decode rows + prompts: 16 + 116 of 132",))
    assert assemble._shares(resolved(lanes="streams"), CUDA, streams) == ((), ())


@pytest.mark.usefixtures("hopper")
def test_a_share_that_leaves_prompts_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="decode_sms is 128; this device has 132 SMs"):
        assemble._shares(resolved(lanes="streams", decode_sms=128), CUDA, ())


@pytest.mark.usefixtures("hopper")
def test_a_stream_that_cannot_be_had_is_no_reason_to_fail() -> None:
    used: list[int] = []

    class Refusing:
        def use(self, share: int) -> None:
            used.append(share)
            if share == 40:
                raise NoShares("cuGreenCtxStreamCreate: CUDA_ERROR_OUT_OF_MEMORY")

    shares, notes = assemble._shares(resolved(), CUDA, (Refusing(),))  # type: ignore[arg-type]
    assert shares == ()
    assert notes == ("lanes: no SM shares: cuGreenCtxStreamCreate: CUDA_ERROR_OUT_OF_MEMORY",)
    assert used == [24, 40, 0], "the lane has all SMs again"


def test_a_driver_without_green_contexts_leaves_the_lanes_to_compete(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(device: int) -> Any:
        raise NoShares("cuGreenCtxCreate: CUDA_ERROR_NOT_SUPPORTED")

    monkeypatch.setattr(green, "splits", none)
    for asked in ({}, {"lanes": "streams", "decode_sms": 24}):
        shares, notes = assemble._shares(resolved(**asked), CUDA, ())
        assert (shares, notes) == ((), ("lanes: no SM shares: cuGreenCtxCreate: CUDA_ERROR_NOT_SUPPORTED",))
