"""EngineConfig: what was asked for. Imports no torch."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias, get_args

from overlap.cache.pages import PAGE
from overlap.equivalents import ENGINE_OPTIONS
from overlap.errors import ConfigError, nearest
from overlap.plain import plain_float, plain_int

if TYPE_CHECKING:
    pass

DType: TypeAlias = Literal["auto", "bfloat16", "float16", "float32"]
LoadFormat: TypeAlias = Literal["auto", "dummy"]
Lanes: TypeAlias = Literal["auto", "mixed", "serial", "streams", "halves"]
LANES: Final = get_args(Lanes)
DRAFTERS: Final = ("ngram", "eagle", "draft")
MOST_DRAFTS: Final = PAGE - 1

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
    """Seconds that a step may take before the watchdog reports it: a warning in the log, and in `health()`. It ends
    nothing. > 0."""
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
    each step by what steps have taken so far, on CUDA; there it is "halves" with `tensor_parallel`; on a CPU it is
    "mixed"."""
    decode_sms: int | None = None
    """With `lanes="streams"` on CUDA: how many SMs are the decode rows' own while prompts are read beside them; the
    prompts have the others. A multiple of 8. None lets the two compete for all; `lanes="auto"` chooses by itself."""
    target_itl_ms: float | None = None
    """With `lanes="auto"`: the longest time between two tokens of a running answer to aim at, in milliseconds. Of the
    ways that keep it the one with the most tokens a second is taken. None aims at those alone. > 0."""
    tensor_parallel: int = 1
    """Over how many ranks the model is cut, each on a device (or process) of its own; see `models.shard` for which
    models can be. All are on this machine, from `device` on; those of torchrun may be on several. >= 1."""
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
