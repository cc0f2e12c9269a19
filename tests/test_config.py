from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from overlap.assemble import machine
from overlap.cache.pages import PAGE
from overlap.config import EngineConfig, KvBudget, parse_kv_cache
from overlap.environment import TorchRun, cache_directory, package_index, torchrun
from overlap.equivalents import ENGINE_OPTIONS
from overlap.errors import ConfigError
from overlap.models.config import ModelConfig
from overlap.resolve import Machine, Resolved, num_kv_pages, page_bytes, rank_device, resolve

MODEL = ModelConfig(
    architecture="LlamaForCausalLM", vocab_size=512, hidden_size=64, num_layers=3, num_heads=4, num_kv_heads=2,
    head_dim=16, intermediate_size=160, rms_norm_eps=1e-5, rope_theta=1e4, rope_scaling=None, context=1000,
    tied_embeddings=True, attention_bias=False, mlp_bias=False, eos_token_ids=(2,), bos_token_id=1, dtype="float32",
)  # fmt: skip
PLAIN = Machine(cuda_devices=0, cuda_name="", fast_cpu_bfloat16=False, cores=2)
MODERN = replace(PLAIN, fast_cpu_bfloat16=True)
HOPPER = replace(PLAIN, cuda_devices=2, cuda_name="NVIDIA H100")


def resolved(machine: Machine = PLAIN, model: ModelConfig = MODEL, **asked: Any) -> Resolved:
    return resolve(EngineConfig(model="m", **asked), model, machine)


def reason(of: Resolved, name: str) -> str:
    (sentence,) = [sentence for sentence in of.reasons if sentence.startswith(f"{name} = ")]
    return sentence


# ── what is asked for ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "value", "must"),
    [
        ("model", "", "a model's name or path"),
        ("device", "cuda:x", '"auto", "cpu", "cuda" or "cuda:N"'),
        ("device", "tpu", '"auto", "cpu", "cuda" or "cuda:N"'),
        ("dtype", "float8", "one of auto, bfloat16, float16, float32"),
        ("load_format", "npz", "one of auto, dummy"),
        ("max_rows", 0, 'an integer of 1 or more, or "auto"'),
        ("token_budget", -5, 'an integer of 1 or more, or "auto"'),
        ("prefill_chunk", True, 'an integer of 1 or more, or "auto"'),
        ("context", 1.5, 'an integer of 2 or more, or "auto"'),
        ("context", "long", 'an integer of 2 or more, or "auto"'),
        ("context", 1, 'an integer of 2 or more, or "auto"'),
        ("model", 5, "a model's name or path"),
        ("model", None, "a model's name or path"),
        ("device", torch.device("cpu"), '"auto", "cpu", "cuda" or "cuda:N"'),
        ("cache_dir", 5, "a path, or None"),
        ("draft_model", 5, "a path, or None"),
        ("progress", "yes", "True, False or None"),
        ("revision", 5, "a branch, tag or commit of a Hub repo, or None"),
        ("target_itl_ms", float("inf"), "a number of milliseconds above 0, or None"),
        ("target_itl_ms", float("nan"), "a number of milliseconds above 0, or None"),
        ("max_waiting", np.True_, "an integer of 1 or more"),
    ],
)
def test_a_value_out_of_range_is_refused_with_its_name_and_itself(name: str, value: Any, must: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        EngineConfig(**{"model": "m", name: value})
    assert str(refusal.value) == f"{name} must be {must}, not {value!r}."


def test_an_unknown_option_is_refused_with_the_nearest_known_one() -> None:
    with pytest.raises(ConfigError, match=r"Unknown engine option 'max_row'\. Did you mean 'max_rows'\? Known: device"):
        EngineConfig.from_options("m", {"max_row": 3})


@pytest.mark.parametrize("name", ["gpu_memory_utilization", "max_model_len", "enforce_eager", "tensor_parallel_size"])
def test_an_option_of_another_engine_is_refused_with_what_stands_for_it_here(name: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        EngineConfig.from_options("m", {name: 1})
    assert str(refusal.value) == f"There is no engine option {name!r} here. {ENGINE_OPTIONS[name]}"


@pytest.mark.parametrize("model", [5, None])
def test_a_model_that_is_no_name_is_refused(model: Any) -> None:
    with pytest.raises(ConfigError, match=f"model must be a model's name or path, not {model!r}"):
        EngineConfig.from_options(model, {})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_drafts": 3}, "num_drafts is 3, but nothing drafts. Give speculative, one of ngram, eagle, draft."),
        ({"target_itl_ms": 5.0, "tensor_parallel": 2}, "target_itl_ms needs tensor_parallel=1, not 2"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        EngineConfig(model="m", **options)
    assert str(refusal.value).startswith(said)


def test_numbers_of_numpy_are_kept_as_those_of_python() -> None:
    options: dict[str, Any] = {"max_rows": 3, "context": 99, "step_limit": 1.5, "target_itl_ms": 2.5, "kv_cache": 64}
    given: dict[str, Any] = {name: np.array(value)[()] for name, value in options.items()}
    assert repr(resolved(**given)) == repr(resolved(**options))


def test_options_make_a_config_and_a_path_will_do_for_a_model() -> None:
    assert EngineConfig.from_options(Path("/a/b"), {"max_rows": 3}) == EngineConfig(model="/a/b", max_rows=3)


# ── kv_cache ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("asked", "budget"),
    [
        ("auto", KvBudget()),
        (PAGE, KvBudget(tokens=PAGE)),
        (100_000, KvBudget(tokens=100_000)),
        (0.5, KvBudget(share=0.5)),
        ("512B", KvBudget(num_bytes=512)),
        ("3kb", KvBudget(num_bytes=3_000)),
        ("512MB", KvBudget(num_bytes=512_000_000)),
        ("1.5GB", KvBudget(num_bytes=1_500_000_000)),
        ("2TB", KvBudget(num_bytes=2 * 10**12)),
        ("3KiB", KvBudget(num_bytes=3 * 2**10)),
        ("1 MiB", KvBudget(num_bytes=2**20)),
        (" 2GiB ", KvBudget(num_bytes=2 * 2**30)),
        ("0.5TiB", KvBudget(num_bytes=2**39)),
    ],
)
def test_kv_cache_is_tokens_a_size_or_a_share(asked: str | float, budget: KvBudget) -> None:
    assert parse_kv_cache(asked) == budget
    assert resolved(kv_cache=asked).kv_budget == budget


@pytest.mark.parametrize(
    "asked",
    [
        PAGE - 1,
        0,
        -1,
        True,
        0.0,
        1.0,
        -0.5,
        float("nan"),
        "",
        "lots",
        "2",
        "2 G",
        "2iB",
        "-1GB",
        "1e3MB",
        "9" * 400 + "B",
        None,
    ],
)
def test_any_other_kv_cache_is_refused_with_the_ways_to_write_one(asked: Any) -> None:
    with pytest.raises(
        ConfigError, match=r"tokens \(16 or more\), a size such as '2GiB'.*0\.5, or 'auto', not "
    ) as said:
        EngineConfig(model="m", kv_cache=asked)
    assert str(said.value).endswith(f"not {asked!r}.")


# ── resolve ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_on_a_plain_cpu_everything_auto_is_chosen_and_said_why() -> None:
    chosen = resolved()
    assert chosen == Resolved(
        model="m", device="cpu", dtype="float32", kv_budget=KvBudget(), max_rows=32, token_budget=512,
        prefill_chunk=512, context=1000, graphs=True, lanes="mixed", target_itl_s=None, overlap=True,
        prefix_cache=True, max_waiting=16384,
        step_limit=60.0, progress=None, reasons=chosen.reasons,
    )  # fmt: skip
    assert chosen.reasons == (
        "device = cpu: torch sees no CUDA device",
        "dtype = float32: this CPU has no instructions for bfloat16",
        "max_rows = 32: the default on this kind of device",
        "token_budget = 512: the default on this kind of device",
        "lanes = mixed: on a CPU, prompts and decode rows in one step read the weights once",
    )


def test_on_a_gpu_the_defaults_are_larger_and_the_device_is_named() -> None:
    chosen = resolved(HOPPER)
    assert (chosen.device, chosen.max_rows, chosen.token_budget, chosen.prefill_chunk) == ("cuda:0", 256, 4096, 4096)
    assert reason(chosen, "device") == "device = cuda:0: NVIDIA H100"


def test_on_a_gpu_with_much_memory_steps_are_larger_still_and_the_reason_says_so() -> None:
    chosen = resolved(replace(HOPPER, cuda_bytes=80 << 30))
    assert (chosen.max_rows, chosen.token_budget) == (512, 8192)
    assert reason(chosen, "max_rows") == "max_rows = 512: the default on this kind of device with 60 GiB or more"
    assert resolved(replace(HOPPER, cuda_bytes=48 << 30)).max_rows == 256
    assert resolved(replace(PLAIN, cuda_bytes=80 << 30), device="cpu").max_rows == 32


@pytest.mark.parametrize(
    ("asked", "name", "gib"),
    [("auto", "GPU 0", 24), ("cuda", "GPU 0", 24), ("cuda:1", "GPU 1", 141), ("cuda:2", "", 0)],
)
def test_of_several_gpus_the_one_that_is_asked_for_is_looked_at(
    asked: str, name: str, gib: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    sizes = [SimpleNamespace(total_memory=24 << 30), SimpleNamespace(total_memory=141 << 30)]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: sizes[index])
    found = machine(asked)
    assert (found.cuda_devices, found.cuda_name, found.cuda_bytes) == (2, name, gib << 30)


def test_what_is_asked_for_is_taken_as_it_is_and_needs_no_reason() -> None:
    chosen = resolved(
        HOPPER, device="cpu", dtype="float16", max_rows=3, token_budget=40, prefill_chunk=7, context=99,
        graphs=False, lanes="streams", overlap=False, prefix_cache=False, max_waiting=9, step_limit=1.5,
        progress=True,
    )  # fmt: skip
    assert chosen == Resolved(
        model="m", device="cpu", dtype="float16", kv_budget=KvBudget(), max_rows=3, token_budget=40, prefill_chunk=7,
        context=99, graphs=False, lanes="streams", target_itl_s=None, overlap=False, prefix_cache=False,
        max_waiting=9, step_limit=1.5, progress=True, reasons=(),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("asked", "device"), [("auto", "cuda:0"), ("cuda", "cuda:0"), ("cuda:1", "cuda:1"), ("cpu", "cpu")]
)
def test_a_device_can_be_left_open_named_or_numbered(asked: str, device: str) -> None:
    assert resolved(HOPPER, device=asked).device == device


@pytest.mark.parametrize(("machine", "asked"), [(PLAIN, "cuda"), (PLAIN, "cuda:0"), (HOPPER, "cuda:2")])
def test_a_device_that_is_not_there_is_refused_with_how_many_there_are(machine: Machine, asked: str) -> None:
    with pytest.raises(ConfigError, match=f"{asked!r} was asked for; torch sees {machine.cuda_devices} CUDA devices"):
        resolved(machine, device=asked)


EIGHT = replace(HOPPER, cuda_devices=8)


@pytest.mark.parametrize(
    ("machine", "ranks", "asked", "last"),
    [
        (EIGHT, 8, "auto", "cuda:7"),
        (EIGHT, 4, "cuda:4", "cuda:7"),
        (replace(EIGHT, cuda_devices=1), 8, "auto", "cuda:0"),
        (replace(EIGHT, cuda_devices=1), 1, "cuda", "cuda:0"),
        (EIGHT, 8, "cpu", "cpu"),
    ],
    ids=["8 on a machine", "from the fifth on", "each sees its own", "one on a machine", "on the CPU"],
)
def test_of_torchruns_ranks_each_has_a_device_of_its_machine(
    machine: Machine, ranks: int, asked: str, last: str
) -> None:
    first = resolved(replace(machine, local_ranks=ranks), device=asked, tensor_parallel=16).device
    assert rank_device(first, 0, machine.cuda_devices) == first
    assert rank_device(first, ranks - 1, machine.cuda_devices) == last


@pytest.mark.parametrize(("ranks", "asked"), [(9, "auto"), (5, "cuda:4")])
def test_more_ranks_on_a_machine_than_devices_are_refused_with_what_to_do(ranks: int, asked: str) -> None:
    said = rf"LOCAL_RANK {ranks - 1} of torchrun has cuda:8, since LOCAL_RANK 0 has .*sees 8 CUDA.*one rank a device"
    with pytest.raises(ConfigError, match=said):
        resolved(replace(EIGHT, local_ranks=ranks), device=asked, tensor_parallel=16)
    with pytest.raises(ConfigError, match="tensor_parallel is 16, one CUDA device a rank from cuda:0 on; torch sees 8"):
        resolved(EIGHT, tensor_parallel=16)


PLACE = {
    "TORCHELASTIC_RUN_ID": "x", "RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8",
    "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500",
}  # fmt: skip


def test_torchrun_says_which_rank_this_is_and_which_on_its_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    assert torchrun() is None
    for name, value in PLACE.items():
        monkeypatch.setenv(name, value)
    place = torchrun()
    assert place == TorchRun(
        rank=9, size=16, local_rank=1, local_size=8, address="10.0.0.1", port=29500, agent_store=False
    )
    assert not place.local


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("RANK", "one", "torchrun sets RANK to a number; here it is 'one'"),
        ("RANK", "16", "RANK is 16, of WORLD_SIZE 16"),
        ("WORLD_SIZE", "", "torchrun sets WORLD_SIZE to a number; here it is ''"),
        ("LOCAL_RANK", "-1", "torchrun sets LOCAL_RANK to a number; here it is '-1'"),
        ("LOCAL_RANK", "8", "LOCAL_RANK is 8, of LOCAL_WORLD_SIZE 8"),
        ("MASTER_PORT", "x", "torchrun sets MASTER_PORT to a number; here it is 'x'"),
    ],
)
def test_a_place_that_torchrun_does_not_give_is_refused_with_the_variable(
    name: str, value: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for each, usual in (PLACE | {name: value}).items():
        monkeypatch.setenv(each, usual)
    with pytest.raises(ConfigError, match=said):
        torchrun()


@pytest.mark.parametrize(
    ("machine", "checkpoint", "dtype"),
    [
        (HOPPER, "float32", "bfloat16"),
        (HOPPER, "float16", "float16"),
        (HOPPER, "bfloat16", "bfloat16"),
        (MODERN, "float32", "bfloat16"),
        (MODERN, "float16", "bfloat16"),
        (PLAIN, "bfloat16", "float32"),
    ],
)
def test_the_dtype_fits_the_checkpoint_on_a_gpu_and_the_cpu_on_a_cpu(
    machine: Machine, checkpoint: str, dtype: str
) -> None:
    assert resolved(machine, replace(MODEL, dtype=checkpoint)).dtype == dtype


def test_many_rows_raise_the_default_token_budget() -> None:
    assert resolved(max_rows=300).token_budget == 600
    assert resolved(max_rows=256).token_budget == 512


def test_a_token_budget_within_the_default_rows_lowers_the_rows() -> None:
    chosen = resolved(token_budget=20)
    assert (chosen.max_rows, chosen.token_budget, chosen.prefill_chunk) == (10, 20, 20)
    assert "max_rows = 10: half of the token budget of 20" in chosen.reasons


def test_the_least_token_budget_still_leaves_a_token_for_prompts() -> None:
    chosen = resolved(token_budget=1)
    assert (chosen.max_rows, chosen.token_budget) == (1, 2)


@pytest.mark.parametrize(("max_rows", "token_budget"), [(8, 8), (8, 3)])
def test_rows_that_leave_no_budget_for_prompts_are_refused(max_rows: int, token_budget: int) -> None:
    with pytest.raises(
        ConfigError, match=f"token_budget is {token_budget} and max_rows {max_rows}.*Raise token_budget"
    ):
        resolved(max_rows=max_rows, token_budget=token_budget)
    assert resolved(max_rows=8, token_budget=9).token_budget == 9


def test_a_chunk_is_no_larger_than_the_budget() -> None:
    assert resolved(token_budget=100, prefill_chunk=999).prefill_chunk == 100


def test_a_context_beyond_the_models_is_refused() -> None:
    assert resolved(context=1000).context == 1000
    with pytest.raises(ConfigError, match="context is 1001; the model was made for 1000 positions at most"):
        resolved(context=1001)


# ── pages ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("dtype", "size"), [("float32", 12288), ("bfloat16", 6144), ("float16", 6144)])
def test_a_page_has_keys_and_values_of_sixteen_tokens_in_all_layers(dtype: str, size: int) -> None:
    assert page_bytes(MODEL, dtype) == size


@pytest.mark.parametrize(
    ("machine", "kv_cache", "free", "pages"),
    [
        (PLAIN, 160, 10**9, 10),
        (PLAIN, 161, 10**9, 11),
        (PLAIN, "100KB", 10**9, 8),
        (PLAIN, 0.5, 1_000_000, 40),
        (PLAIN, "auto", 1_000_000, 40),
        (HOPPER, "auto", 1_000_000, 138),
    ],
)
def test_the_budget_becomes_pages(machine: Machine, kv_cache: str | float, free: int, pages: int) -> None:
    assert num_kv_pages(resolved(machine, kv_cache=kv_cache), MODEL, free) == pages


def test_on_a_cpu_auto_is_a_gibibyte_at_most() -> None:
    chosen = resolved(max_rows=5000)
    assert num_kv_pages(chosen, MODEL, 2**40) == 2**30 // 12288


@pytest.mark.parametrize("kv_cache", ["auto", 10**9, "100GB", 0.9])
def test_no_more_pages_are_made_than_the_rows_can_ever_use(kv_cache: str | float) -> None:
    assert num_kv_pages(resolved(max_rows=2, context=31, kv_cache=kv_cache), MODEL, 10**12) == 2 * 2
    assert num_kv_pages(resolved(max_rows=2, context=32, kv_cache=kv_cache), MODEL, 10**12) == 2 * 3


@pytest.mark.parametrize(("kv_cache", "free", "pages"), [("auto", 30_000, 1), ("20KB", 10**9, 1), ("auto", -5, 0)])
def test_a_budget_of_less_than_two_pages_is_refused(kv_cache: str, free: int, pages: int) -> None:
    with pytest.raises(ConfigError, match=rf"holds {pages} pages of 16 tokens \(12288 bytes each\); 2 are the least"):
        num_kv_pages(resolved(kv_cache=kv_cache), MODEL, free)


def test_a_budget_beyond_the_free_memory_is_refused_with_both_figures() -> None:
    with pytest.raises(ConfigError, match=r"needs 24,576 bytes; 24,575 are free on cpu\. Lower kv_cache"):
        num_kv_pages(resolved(kv_cache=32), MODEL, 24_575)
    assert num_kv_pages(resolved(kv_cache=32), MODEL, 24_576) == 2


def test_more_rows_than_memory_has_tables_for_are_refused_with_both_figures() -> None:
    with pytest.raises(ConfigError, match=r"max_rows is 100,000,000, whose tables need [\d,]+ bytes .* Lower max_rows"):
        num_kv_pages(resolved(max_rows=10**8), MODEL, 2**34)
    assert num_kv_pages(resolved(max_rows=10**4), MODEL, 2**34)


# ── the environment ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_fetched_models_are_kept_as_asked_else_as_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.delenv("OVERLAP_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_directory(None) == Path("/home/ada/.cache/overlap")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/xdg")
    assert cache_directory(None) == Path("/var/xdg/overlap")
    monkeypatch.setenv("OVERLAP_CACHE", "~/models")
    assert cache_directory(None) == Path("/home/ada/models")
    assert cache_directory("~/mine") == Path("/home/ada/mine")


def test_the_package_index_is_pips_else_pypi(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_INDEX_URL", raising=False)
    assert package_index() == "https://pypi.org/simple"
    monkeypatch.setenv("PIP_INDEX_URL", "https://mirror.example/simple")
    assert package_index() == "https://mirror.example/simple"


# ── lanes ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_lanes_are_left_to_the_engine_on_a_gpu_and_where_a_target_is_given() -> None:
    assert resolved(HOPPER).lanes == "auto"
    assert resolved(PLAIN).lanes == "mixed"
    assert resolved(HOPPER, tensor_parallel=2).lanes == "halves"
    assert resolved(PLAIN, tensor_parallel=2).lanes == "mixed"
    assert resolved(HOPPER, lanes="streams", decode_sms=40).decode_sms == 40
    assert resolved(HOPPER, lanes="streams").decode_sms == 0
    with pytest.raises(ConfigError, match="decode_sms is for CUDA; the device is 'cpu'"):
        resolved(PLAIN, lanes="streams", decode_sms=40)
    chosen = resolved(PLAIN, target_itl_ms=40)
    assert (chosen.lanes, chosen.target_itl_s) == ("auto", 0.04)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lanes": "two"}, "lanes must be one of auto, mixed, serial, streams, halves, not 'two'"),
        ({"target_itl_ms": 0}, "target_itl_ms must be a number of milliseconds above 0, or None, not 0"),
        ({"target_itl_ms": True}, "target_itl_ms must be a number"),
        ({"target_itl_ms": 5.0, "lanes": "serial"}, "nothing is left to choose"),
        ({"decode_sms": 20, "lanes": "streams"}, "decode_sms must be a multiple of 8, or None, not 20"),
        ({"decode_sms": 0, "lanes": "streams"}, "decode_sms must be a multiple of 8, or None, not 0"),
        ({"decode_sms": 24}, "decode_sms is for lanes=\"streams\"; lanes is 'auto'"),
    ],
)
def test_lanes_and_targets_that_mean_nothing_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        EngineConfig(model="m", **options)
