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


def _name(key: tuple[str, str], line: dict[str, Any]) -> str:
    gpu = "H200" if "H200" in line["device"] else "H100"
    return f"{NAMES[key[0]]} {key[1]}, {gpu}"


def main() -> None:
    """Draw: for each shape and workload the default's figure, and in a lighter tone the best way's."""
    auto: dict[tuple[str, str], dict[str, Any]] = {}
    best: dict[tuple[str, str], dict[str, Any]] = {}
    measured = lines("offline.jsonl")
    for line in measured:
        key = line["model"], line["workload"]
        if line["lanes"] == "auto":
            auto[key] = line  # the last one that was measured
    for line in measured:
        key = line["model"], line["workload"]
        told = line is auto.get(key) or line["lanes"] != "auto"
        same = told and key in auto and line["device"] == auto[key]["device"]
        if same and (key not in best or line["tokens_per_s"] > best[key]["tokens_per_s"]):
            best[key] = line
    keys = [key for key in VLLM if key in best]
    figure, axes = plt.subplots(figsize=(9, 0.52 * len(keys) + 1.3))
    for place, key in enumerate(reversed(keys)):
        limit, rate = best[key]["limit_tokens_per_s"], auto[key]["tokens_per_s"]
        axes.barh(place, 1.0, color="#eceff3", height=0.72)
        axes.barh(place + 0.17, best[key]["tokens_per_s"] / limit, color="#8fbfb0", height=0.34)
        axes.barh(place + 0.17, rate / limit, color="#2f6f5e", height=0.34)
        axes.barh(place - 0.17, VLLM[key] / limit, color="#b9c2cf", height=0.34)
        told = f"{rate:,.0f}" if best[key] == auto[key] else f"{rate:,.0f} ({best[key]['tokens_per_s']:,.0f})"
        beside = max(1.0, VLLM[key] / limit) + 0.015
        axes.text(beside, place, f"{told} of {limit:,.0f} tok/s", va="center", color="#39465a")
    axes.set_yticks(range(len(keys)), [_name(key, best[key]) for key in reversed(keys)])
    axes.set_xlim(0, 1.42)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1.0], ["0", "25%", "50%", "75%", "limit of its GPU"])
    axes.tick_params(length=0)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
    lighter = ", and in a lighter tone the best fixed way of sharing steps" if any(
        best[key] is not auto[key] for key in keys
    ) else ""  # fmt: skip
    title = (
        f"Green: overlap on the GPU named, by default{lighter}.\n"
        "Grey: vLLM 0.25.1 on an H200, against the limit of the same bar's GPU."
    )
    axes.set_title(title, loc="left", fontsize=9)
    figure.tight_layout()
    figure.savefig(HERE / "images" / "performance.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
