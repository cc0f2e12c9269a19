"""Model programs, and loading their weights."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from overlap.models.checkpoint import Checkpoint
    from overlap.models.load import build
    from overlap.models.open import open_checkpoint

__all__ = ["Checkpoint", "build", "open_checkpoint"]


def __getattr__(name: str) -> Any:
    """Import on first use: deciders read `overlap.models.config`, and that must not import torch."""
    homes = {"Checkpoint": "checkpoint", "build": "load", "open_checkpoint": "open"}
    if name not in homes:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{homes[name]}"), name)
