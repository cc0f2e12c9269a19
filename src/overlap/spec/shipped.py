"""The EAGLE heads that come with overlap: `heads/<model>/` with config.json, model.safetensors and a card.

A head belongs to one model. It is found by the model's name; a model of another name (a GGUF file, a directory) gets
the head of one that is shaped alike. That cannot make an answer wrong, only drafts: every draft is verified.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from overlap.errors import ConfigError
from overlap.models.llama import Llama

HEADS: Final = Path(__file__).with_name("heads")


def shape_of(target: Llama) -> dict[str, int]:
    """Return what a head must know its target by: written into its config.json by `overlap train-drafter`."""
    return {
        "target_vocab_size": target.vocab_size,
        "target_hidden_size": target.config.hidden_size,
        "target_num_layers": target.num_layers,
        "target_num_heads": target.num_heads,
    }


def shipped_head(model: str, target: Llama, heads: Path = HEADS) -> Path:
    """Return the directory of the head for a model. ConfigError, with what to do, if none is shipped."""
    shape = shape_of(target)
    named = Path(model).name.lower()
    fitting: list[Path] = []
    for config in sorted(heads.glob("*/config.json")):
        found: dict[str, Any] = json.loads(config.read_text(encoding="utf-8"))
        if {name: found.get(name) for name in shape} == shape:
            fitting.append(config.parent)
    for path in fitting:
        if path.name == named:
            return path
    if fitting:
        return fitting[0]
    known = ", ".join(sorted(path.parent.name for path in heads.glob("*/config.json"))) or "none so far"
    raise ConfigError(
        f"overlap ships no EAGLE head for {model!r} ({target.num_layers} layers of {target.config.hidden_size}, "
        f"{target.vocab_size} tokens); it ships: {known}. Give draft_model=, the directory of a head, or train one: "
        "overlap train-drafter MODEL --output DIR."
    )
