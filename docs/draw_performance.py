"""Draws `images/performance.svg` from `figures/*.jsonl`: python docs/draw_performance.py (needs matplotlib).

The files hold the benches' own lines, as they were printed on the GPU that each names.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
mpl.rcParams.update({"svg.hashsalt": "overlap", "font.size": 9, "font.family": "DejaVu Sans"})
import matplotlib.pyplot as plt  # noqa: E402

HERE = Path(__file__).parent
VLLM = {
    ("smollm2-135m", "single"): 583, ("smollm2-135m", "nano"): 33196, ("qwen3-0.6b", "single"): 596,
    ("qwen3-0.6b", "nano"): 23624, ("llama-8b", "single"): 203, ("llama-8b", "small"): 1549,
    ("llama-8b", "prefill"): 42307, ("llama-8b", "mixed"): 31711,
}  # fmt: skip
"""Tokens a second of vLLM 0.25.1 on an H200, measured elsewhere; see performance.md."""
NAMES = {"smollm2-135m": "SmolLM2-135M", "qwen3-0.6b": "Qwen3-0.6B", "llama-8b": "Llama-8B"}


def lines(name: str) -> list[dict[str, Any]]:
    """Return the JSON lines of a file."""
    text = (HERE / "figures" / name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def main() -> None:
    """Draw."""
    found = {(line["model"], line["workload"]): line for line in lines("offline.jsonl")}
    keys = [key for key in VLLM if key in found]
    figure, axes = plt.subplots(figsize=(8.4, 0.52 * len(keys) + 1.3))
    for place, key in enumerate(reversed(keys)):
        line, limit = found[key], found[key]["limit_tokens_per_s"]
        axes.barh(place, 1.0, color="#eceff3", height=0.72)
        axes.barh(place + 0.17, line["tokens_per_s"] / limit, color="#2f6f5e", height=0.34)
        axes.barh(place - 0.17, VLLM[key] / limit, color="#b9c2cf", height=0.34)
        axes.text(1.015, place, f"{line['tokens_per_s']:,.0f} of {limit:,.0f} tok/s", va="center", color="#39465a")
    axes.set_yticks(range(len(keys)), [f"{NAMES[model]} {workload}" for model, workload in reversed(keys)])
    axes.set_xlim(0, 1.36)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1.0], ["0", "25%", "50%", "75%", "the limit of physics"])
    axes.tick_params(length=0)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
    device = found[keys[0]]["device"]
    axes.set_title(
        f"overlap (green) on one {device}, and vLLM 0.25.1 (grey, measured on an H200)", loc="left", fontsize=10
    )
    figure.tight_layout()
    figure.savefig(HERE / "images" / "performance.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
