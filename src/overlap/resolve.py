"""From what was asked for to what runs: `resolve` turns a config, a model and a machine into a Resolved. Pure.

There is no "auto" left in a Resolved, and it says why. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, Protocol, TypeVar

from overlap.cache.pages import PAGE, pages_for
from overlap.config import EngineConfig, KvBudget, Lanes, parse_kv_cache
from overlap.errors import ConfigError
from overlap.schedule.plan import Ladder

if TYPE_CHECKING:
    from overlap.models.config import ModelConfig

T = TypeVar("T")

_ANY_ROWS: Final = 1 << 31
_LARGE_CUDA: Final = 60 << 30
"""Bytes of a device from which on its steps are larger: many contexts fit, so many rows can share a step."""

_BYTES: Final = {"float32": 4, "bfloat16": 2, "float16": 2}


class _Chose(Protocol):
    """Notes why an "auto" became `value`, and returns it."""

    def __call__(self, name: str, value: T, why: str) -> T: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What a machine offers."""

    cuda_devices: int
    cuda_name: str
    """The name of the CUDA device that would be used; empty without one."""
    fast_cpu_bfloat16: bool
    """The CPU has instructions for bfloat16 products."""
    cores: int
    cuda_bytes: int = 0
    """The memory of that device; 0 without one, or where it is not known."""
    local_ranks: int = 0
    """How many ranks torchrun has started on it; 0 if the engine starts them by itself, all of them here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """What an engine runs as. `reasons` has one sentence a choice."""

    model: str
    device: str
    dtype: Literal["bfloat16", "float16", "float32"]
    kv_budget: KvBudget
    max_rows: int
    token_budget: int
    prefill_chunk: int
    context: int
    graphs: bool
    lanes: Lanes
    target_itl_s: float | None
    overlap: bool
    prefix_cache: bool
    max_waiting: int
    step_limit: float
    progress: bool | None
    reasons: tuple[str, ...]
    tensor_parallel: int = 1
    speculative: str | None = None
    draft_model: str | None = None
    num_drafts: int = 0
    """Drafts that a decode row verifies at most; 0 without a drafter."""
    draft_ladder: Ladder = ()
    """How many by the number of rows; empty without a drafter."""
    decode_sms: int = 0
    """0 lets two lanes compete for SMs."""
    drafts_with_prompts: bool = True
    """Whether steps that read prompts draft, too."""
    paces_drafts: bool = False
    """Drafts only while that pays."""


def resolve(asked: EngineConfig, model: ModelConfig, machine: Machine) -> Resolved:
    """Choose every "auto". Pure. Raises ConfigError for what this model or machine cannot do."""
    reasons: list[str] = []

    def chose(name: str, value: T, why: str) -> T:
        reasons.append(f"{name} = {value}: {why}")
        return value

    device = _device(asked, machine, chose)
    dtype = _dtype(asked, model, machine, chose, on_cuda=device.startswith("cuda"))
    max_rows, token_budget = _step_size(asked, chose, machine, on_cuda=device.startswith("cuda"))
    chunk = token_budget if asked.prefill_chunk == "auto" else min(asked.prefill_chunk, token_budget)
    ladder = _draft_ladder(asked, chose, on_cuda=device.startswith("cuda"))
    context = model.context
    if asked.context != "auto":
        if asked.context > model.context:
            raise ConfigError(f"context is {asked.context}; the model was made for {model.context} positions at most.")
        context = asked.context
    return Resolved(
        model=asked.model,
        device=device,
        dtype=dtype,
        kv_budget=parse_kv_cache(asked.kv_cache),
        max_rows=max_rows,
        token_budget=token_budget,
        prefill_chunk=chunk,
        context=context,
        graphs=bool(asked.graphs),
        lanes=_lanes(asked, chose, on_cuda=device.startswith("cuda")),
        target_itl_s=None if asked.target_itl_ms is None else asked.target_itl_ms / 1e3,
        overlap=asked.overlap,
        prefix_cache=asked.prefix_cache,
        max_waiting=asked.max_waiting,
        step_limit=asked.step_limit,
        progress=asked.progress,
        reasons=tuple(reasons),
        tensor_parallel=asked.tensor_parallel,
        speculative=asked.speculative,
        draft_model=asked.draft_model,
        num_drafts=max((drafts for _, drafts in ladder), default=0),
        draft_ladder=ladder,
        drafts_with_prompts=_drafts_with_prompts(asked, device),
        decode_sms=_decode_sms(asked, device),
        paces_drafts=asked.speculative is not None and asked.num_drafts == "auto",
    )


def _decode_sms(asked: EngineConfig, device: str) -> int:
    if asked.decode_sms is not None and not device.startswith("cuda"):
        raise ConfigError(f"decode_sms is for CUDA; the device is {device!r}.")
    return asked.decode_sms or 0


def _draft_ladder(asked: EngineConfig, chose: _Chose, *, on_cuda: bool) -> Ladder:
    """Return how many drafts a row verifies, by the number of rows."""
    if asked.speculative is None:
        return ()
    if asked.num_drafts != "auto":
        return ((_ANY_ROWS, asked.num_drafts),)
    if not on_cuda:
        chose("num_drafts", 4, "past four, few drafts are worth it; none while plain steps bring more")
        return ((_ANY_ROWS, 4),)
    # Three and the token in front of them are four positions, and products are cut for powers of two.
    ladder: Ladder = ((_ANY_ROWS, 3),)
    why = "or none while plain steps bring more"
    if asked.speculative == "eagle":
        ladder = (1, 15), (16, 7), *ladder
        why = "at most, for a row alone; 7 or 3 for up to 16, 3 for more: what brings the most, or none"
    elif asked.speculative == "ngram":
        ladder = (16, 7), *ladder
        why = "at most, for up to 16 rows; 3 for more: what brings the most, or none"
    chose("num_drafts", ladder[0][1], why)
    return ladder


def _drafts_with_prompts(asked: EngineConfig, device: str) -> bool:
    """Return whether all steps that read prompts draft: on a GPU no graph holds those that are not short, and drafting
    takes longer to launch than the one wide step without drafts behind them."""
    return asked.speculative not in ("eagle", "draft") or not device.startswith("cuda")


def _device(asked: EngineConfig, machine: Machine, chose: _Chose) -> str:
    device = asked.device
    if device == "auto":
        device = "cuda:0" if machine.cuda_devices else "cpu"
        chose("device", device, machine.cuda_name if machine.cuda_devices else "torch sees no CUDA device")
    elif device == "cuda":
        device = "cuda:0"
    if device.startswith("cuda") and int(device[5:]) >= machine.cuda_devices:
        raise ConfigError(f"device {asked.device!r} was asked for; torch sees {machine.cuda_devices} CUDA devices.")
    if machine.local_ranks:
        rank_device(device, machine.local_ranks - 1, machine.cuda_devices)  # refuses the last one if any
    elif device.startswith("cuda") and int(device[5:]) + asked.tensor_parallel > machine.cuda_devices:
        raise ConfigError(
            f"tensor_parallel is {asked.tensor_parallel}, one CUDA device a rank from {device} on; torch sees "
            f"{machine.cuda_devices}."
        )
    return device


def rank_device(first: str, local_rank: int, cuda_devices: int) -> str:
    """Return the device of one of torchrun's ranks on a machine, of which rank 0 there has `first`.

    Where a rank sees one device only, that is its own. Raises ConfigError where there are too few.
    """
    if not first.startswith("cuda") or (first == "cuda:0" and cuda_devices == 1):
        return first
    device = f"cuda:{int(first[5:]) + local_rank}"
    if int(device[5:]) >= cuda_devices:
        raise ConfigError(
            f"LOCAL_RANK {local_rank} of torchrun has {device}, since LOCAL_RANK 0 has {first}; torch sees "
            f"{cuda_devices} CUDA devices there. Start one rank a device, or let each see its own only "
            "(CUDA_VISIBLE_DEVICES)."
        )
    return device


def _dtype(
    asked: EngineConfig, model: ModelConfig, machine: Machine, chose: _Chose, *, on_cuda: bool
) -> Literal["bfloat16", "float16", "float32"]:
    if asked.dtype != "auto":
        return asked.dtype
    if on_cuda:
        half: Literal["bfloat16", "float16"] = "float16" if model.dtype == "float16" else "bfloat16"
        return chose("dtype", half, "the checkpoint's, or its half")
    if machine.fast_cpu_bfloat16:
        return chose("dtype", "bfloat16", "this CPU has instructions for it")
    return chose("dtype", "float32", "this CPU has no instructions for bfloat16")


def _lanes(asked: EngineConfig, chose: _Chose, *, on_cuda: bool) -> Lanes:
    if asked.tensor_parallel > 1:
        if asked.lanes == "streams":
            raise ConfigError(
                'lanes="streams" needs tensor_parallel=1: two lanes would sum over the ranks in no common order.'
            )
        if asked.lanes == "auto" and on_cuda:
            return chose("lanes", "halves", "ranks sum in one order, so in one lane; a half hides the other's sums")
        if asked.lanes == "auto":
            return chose("lanes", "mixed", "ranks sum in one order, so in one lane")
    elif asked.lanes == "halves":
        raise ConfigError('lanes="halves" hides the sums of several ranks: give tensor_parallel, or another `lanes`.')
    if asked.speculative is not None and asked.lanes == "auto":
        return chose("lanes", "mixed", "a drafter and its verify share one lane with the prompts so far")
    if asked.lanes == "auto" and not on_cuda and asked.target_itl_ms is None:
        return chose("lanes", "mixed", "on a CPU, prompts and decode rows in one step read the weights once")
    return asked.lanes  # type: ignore[return-value]  # EngineConfig refuses any other


def _step_size(asked: EngineConfig, chose: _Chose, machine: Machine, *, on_cuda: bool) -> tuple[int, int]:
    """Return the most rows and the most tokens of a step."""
    large = on_cuda and machine.cuda_bytes >= _LARGE_CUDA
    most_rows, most_tokens = (512, 8192) if large else (256, 4096) if on_cuda else (32, 512)
    default = "the default on this kind of device" + (" with 60 GiB or more" if large else "")
    if asked.max_rows == "auto":
        max_rows: int = chose("max_rows", most_rows, default)
    else:
        max_rows = asked.max_rows
    if asked.token_budget == "auto":
        token_budget: int = chose("token_budget", max(most_tokens, 2 * max_rows), default)
    else:
        token_budget = asked.token_budget
    if token_budget > max_rows:
        return max_rows, token_budget
    if asked.max_rows != "auto":
        raise ConfigError(
            f"token_budget is {token_budget} and max_rows {max_rows}: prompts would never get a turn beside that "
            "many answers. Raise token_budget above max_rows, or lower max_rows."
        )
    max_rows = chose("max_rows", max(1, token_budget // 2), f"half of the token budget of {token_budget}")
    if token_budget <= max_rows:
        token_budget = chose("token_budget", max_rows + 1, "one row decodes while a prompt is read")
    return max_rows, token_budget


def page_bytes(model: ModelConfig, dtype: str) -> int:
    """Return the bytes of one page of KV, all layers."""
    return 2 * model.num_layers * PAGE * model.num_kv_heads * model.head_dim * _BYTES[dtype]


def _row_bytes(context: int) -> int:
    """Return the bytes that a row takes in tables, of host and device together: its pages and 50 columns, or so."""
    return 9 * pages_for(context) + 200


def num_kv_pages(resolved: Resolved, model: ModelConfig, free_bytes: int, drafter_page_bytes: int = 0) -> int:
    """Turn the KV budget into pages, given the memory that the weights left free. Raises ConfigError if too small.

    `drafter_page_bytes` is what a drafter keeps beside each page.
    """
    size = page_bytes(model, resolved.dtype) + drafter_page_bytes
    budget = resolved.kv_budget
    if budget.tokens is not None:
        pages = pages_for(budget.tokens)
    elif budget.num_bytes is not None:
        pages = budget.num_bytes // size
    elif budget.share is not None:
        pages = int(free_bytes * budget.share) // size
    elif resolved.device == "cpu":
        pages = min(2**30, free_bytes // 2) // size
    else:
        pages = int(free_bytes * 0.85) // size
    pages = min(pages, resolved.max_rows * pages_for(resolved.context + 1))  # more could never be used
    if pages < 2:
        raise ConfigError(
            f"The KV budget holds {max(pages, 0)} pages of {PAGE} tokens ({size} bytes each); 2 are the least. "
            "Raise kv_cache, or free memory on the device."
        )
    if pages * size > free_bytes:
        raise ConfigError(
            f"The KV budget needs {pages * size:,} bytes; {free_bytes:,} are free on {resolved.device}. Lower kv_cache."
        )
    rows = resolved.max_rows * _row_bytes(min(resolved.context, pages * PAGE))
    if rows > free_bytes:
        raise ConfigError(
            f"max_rows is {resolved.max_rows:,}, whose tables need {rows:,} bytes beside the KV; {free_bytes:,} are "
            f"free on {resolved.device}. Lower max_rows."
        )
    return int(pages)
