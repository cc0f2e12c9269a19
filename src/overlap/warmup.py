"""`overlap warmup`: builds ahead of time what FlashInfer would compile when an engine first starts.

FlashInfer reads prompts for us, and compiles a module for each (head size, dtype) with nvcc, into its cache in the home
directory. Built into an image, no start waits for that; no GPU is needed, only nvcc, and the architecture that is
built for. (Triton's kernels need no such step: a start compiles them in seconds, and Triton keeps them in a cache.)

The building is done by a process of its own (this file run as a program), since FlashInfer reads the architecture from
the environment when it is imported.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Any, Final, Literal

from overlap.environment import child_environment
from overlap.errors import ConfigError
from overlap.models.config import ModelConfig

ARCHITECTURE: Final = "9.0a"
"""Hopper."""
HEAD_DIMS: Final = (64, 128, 256)
"""Head sizes that FlashInfer's paged prefill takes."""


@dataclass(frozen=True, slots=True)
class Module:
    """A module that FlashInfer compiles."""

    kind: Literal["fa2", "fa3"]
    dtype: str
    head_dim: int

    def __str__(self) -> str:
        return f"{self.kind} of {self.dtype} heads of {self.head_dim}"


def modules_of(
    model: ModelConfig, *, dtype: str = "bfloat16", architecture: str = ARCHITECTURE, fa3: bool = True
) -> tuple[Module, ...]:
    """Return what an engine of `model` on a GPU of `architecture` wants: nothing if FlashInfer has no kernel for it.

    `fa3` includes the fastest prefill of Hopper (heads of 128), which takes ten minutes to build; without it the second
    fastest runs.
    """
    if model.head_dim not in HEAD_DIMS or dtype not in ("bfloat16", "float16"):
        return ()
    modules = [Module("fa2", dtype, model.head_dim)]
    if fa3 and model.head_dim == 128 and architecture.startswith("9."):
        modules.append(Module("fa3", dtype, model.head_dim))
    return tuple(modules)


def check(architecture: str) -> None:
    """Raise ConfigError for what cannot be built, and where FlashInfer is missing."""
    if not re.fullmatch(r"\d+\.\d[af]?", architecture):
        raise ConfigError(f"arch is {architecture!r}; it must be a compute capability such as 9.0a (Hopper) or 10.0a.")
    if find_spec("flashinfer") is None:
        raise ConfigError("FlashInfer is not installed, so there is nothing to build. Install overlap[cuda].")


def build(modules: Iterable[Module], architecture: str, note: Callable[[str], None]) -> int:
    """Build modules, one after the other, and say each; return how many failed.

    What is built already is not built again. `note` gets a line a module. Raises ConfigError as `check` does.
    """
    check(architecture)
    wanted = json.dumps([asdict(module) for module in dict.fromkeys(modules)])
    child = subprocess.Popen(
        [sys.executable, "-m", "overlap.warmup", wanted],
        env=child_environment(FLASHINFER_CUDA_ARCH_LIST=architecture),
        stdout=subprocess.PIPE,
        text=True,
    )
    with child:
        assert child.stdout is not None
        for line in child.stdout:
            note(line.rstrip())
    return child.returncode


def _main(arguments: Sequence[str]) -> int:
    """Build what the one argument names, in the process that FlashInfer is imported into; return how many failed."""
    modules = [Module(**fields) for fields in json.loads(arguments[0])]
    failed = 0
    for line, ok in _build_here(modules):
        failed += not ok
        print(line, flush=True)  # noqa: T201  (the parent reads it)
    return min(failed, 100)


def _build_here(modules: Sequence[Module]) -> Iterator[tuple[str, bool]]:
    for module in modules:
        start = time.monotonic()
        try:
            spec = _spec(module)
            if spec.is_compiled:
                yield f"{module}: is there already", True
                continue
            spec.build(False)
        except Exception as failure:  # whatever nvcc, ninja or another version of FlashInfer raises
            reason = " ".join(str(failure).split())[-600:]
            yield f"{module}: failed ({type(failure).__name__}: {reason})", False
        else:
            yield f"{module}: built in {time.monotonic() - start:.0f} s", True


def _spec(module: Module) -> Any:
    """Return FlashInfer's description of a module, the very one that `ops.attention_flashinfer` will ask for."""
    import torch
    from flashinfer.jit import gen_batch_prefill_module

    dtype = getattr(torch, module.dtype)
    heads = (module.head_dim, module.head_dim)
    return gen_batch_prefill_module(module.kind, dtype, dtype, dtype, torch.int32, *heads, 0, False, False, False)


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
