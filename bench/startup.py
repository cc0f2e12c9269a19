"""How long from `import overlap` to the first token, in a process of its own?

    python bench/startup.py --model smollm2-135m-instruct --shape llama-8b --times 2

The first process of a model finds what the caches hold already: kernels that FlashInfer and Triton have built before,
the model's file in the page cache. A later one finds all that the first one built, so "warm" is what a machine whose
kernels are prebuilt takes (targets: 8 s for SmolLM2, 15 s for a Llama-8B of random weights). A JSON line a process,
with what the seconds went to: import, open and its stages, first token (eager: graphs come later), and the
answer's other 15 tokens. Doubt the first line of a model: what it finds depends on what ran on the machine before.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


async def first_token(model: str, options: dict[str, Any], imported_s: float) -> dict[str, Any]:
    """Open an engine, answer, and return the seconds of each part."""
    from overlap import AsyncEngine, SamplingParams

    began = time.perf_counter()
    async with AsyncEngine(model, **options) as engine:
        opened = time.perf_counter()
        first = 0.0
        params = SamplingParams(max_tokens=16, temperature=0, ignore_eos=True)
        async for _ in engine.generate([1, 2, 3, 4, 5, 6, 7, 8], params):
            first = first or time.perf_counter()
        ended = time.perf_counter()
        said = next(line for line in engine.explain().splitlines() if line.startswith("opened in "))
    parts = {"import_s": imported_s, "open_s": opened - began, "first_token_s": first - opened, "rest_s": ended - first}
    told = {name: round(seconds, 2) for name, seconds in {"total_s": imported_s + first - began, **parts}.items()}
    stages = re.findall(r"(\w+) (\d+\.\d+)", said.partition(": ")[2])
    return {**told, "opening": {stage: float(seconds) for stage, seconds in stages}}


def child(model: str, options: dict[str, Any], line: dict[str, Any]) -> None:
    """Be the process that is measured."""
    began = time.perf_counter()
    import overlap  # noqa: F401 - what is measured

    imported_s = time.perf_counter() - began
    parts = asyncio.run(first_token(model, options, imported_s))
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    print(json.dumps({**line, **parts, "device": device}), flush=True)


def main() -> None:
    """Read the command line and start the processes, one after the other."""
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("--model", nargs="*", default=["smollm2-135m-instruct"])
    arguments.add_argument("--shape", nargs="*", default=[], help="of random weights; see bench/offline.py")
    arguments.add_argument("--times", type=int, default=2)
    arguments.add_argument("--child", help=argparse.SUPPRESS)
    asked = arguments.parse_args()
    if asked.child:
        child(**json.loads(asked.child))
        return
    sys.path.insert(0, str(Path(__file__).parent))
    from offline import SHAPES  # type: ignore[import-not-found]

    with tempfile.TemporaryDirectory() as folder:
        for name in [*asked.model, *asked.shape]:
            model, options = name, {}
            if name in asked.shape:
                model, options = f"{folder}/{name}", {"load_format": "dummy"}
                Path(model).mkdir()
                (Path(model) / "config.json").write_text(json.dumps(SHAPES[name]))
            for number in range(asked.times):
                line = {"bench": "startup", "model": name, "process": number, "warm": number > 0}
                told = json.dumps({"model": model, "options": options, "line": line})
                subprocess.run([sys.executable, __file__, "--child", told], check=True)


if __name__ == "__main__":
    main()
