"""What does a drafter bring? Tokens a second with and without, by the number of rows, and how many drafts were right.

Each engine answers the same prompts greedily, as many at once as there are rows, and several times as many in all: an
answer that ends makes place for the next, so that rows are busy nearly to the end. Questions that `overlap
train-drafter` does not ask, about subjects that it does not know, in the model's chat template where it has one. An
answer ends where the model ends it. A verify reads the weights once for all its positions, so where reading weights is
the bound a confirmed draft is a token for free; where computing is (many rows, or a CPU) each drafted position costs
what a token costs. The limit at few rows is the tokens that a verify brings, less drafting.

"ratio" is to the engine without a drafter at as many rows. "emitted" is the mean number of tokens that a verify
brought, and "accepted" the share of drafts confirmed at each place of a run, of those with all before them confirmed.
"sync" is to the same engine that waits for each step (`overlap=False`). "same" is how many answers are those without a
drafter.

    python bench/spec.py [--model smollm2-135m-instruct] [--speculative eagle ngram] [--draft-model DIR]
        [--rows 1 8 64 256] [--picture FILE.png]

One JSON object a line, one line an engine and number of rows, and all of them in one object on the last. Reasons to
doubt it: how often drafts are right depends on the text; and in bfloat16 a wide step may round otherwise than a plain
one, so that an answer may differ without a fault, and with it what is drafted.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from overlap import AsyncEngine, SamplingParams
from overlap.spec.asking import encode_question

sys.path.insert(0, str(Path(__file__).parent))
from offline import settled  # type: ignore[import-not-found]

SUBJECTS = (
    "lemon trees", "the trumpet", "sundials", "penguins", "knitting", "the Eiffel Tower", "avalanches", "sourdough",
    "origami", "beekeeping in cities", "the telegraph", "hot air balloons", "crossword puzzles", "marathons",
    "kites", "the metric system",
)  # fmt: skip
ASKED = (
    "Write a short paragraph about {}.", "Why do people care about {}?", "Give me four tips concerning {}.",
    "Explain {} to my grandmother.", "Write a story in which {} play a part.", "What should I read about {}?",
    "Name three surprising things about {}.", "Describe a day that is all about {}.", "Is {} worth my time?",
    "Write a short review of a film about {}.", "Which words belong to {}?", "How would you teach {} to a class?",
    "Write a message to a friend who loves {}.", "What is the hardest part of {}?", "Make a plan for a visit to {}.",
    "Write code that prints a poem about {}.",
)  # fmt: skip
Line = dict[str, Any]


def prompts_for(rows: int) -> int:
    """Return how many prompts are asked with so many at once: drafts are righter in one text than in another, and the
    last answers are left alone.
    """
    return max(12, min(4 * rows, rows + 256))


def questions_of(count: int) -> list[str]:
    """Return so many questions, all different up to 256."""
    return [ASKED[(row + row // 16) % 16].format(SUBJECTS[row % 16]) for row in range(count)]


async def timed(engine: AsyncEngine, rows: int, params: SamplingParams) -> tuple[float, list[list[int]]]:
    """Return the tokens a second at which answers came, `rows` at once, and the answers."""
    prompts = [await encode_question(engine, question) for question in questions_of(prompts_for(rows))]
    answers: list[list[int]] = [[]] * len(prompts)
    waiting = iter(range(len(prompts)))

    async def work() -> None:
        for number in waiting:
            async for output in engine.generate_batch([prompts[number]], params, progress=False):
                answers[number] = output.token_ids

    start = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(rows)))
    return sum(map(len, answers)) / (time.perf_counter() - start), answers


async def measure(engine: AsyncEngine, name: str, arguments: argparse.Namespace, **facts: Any) -> list[Line]:
    """Return a line for each number of rows."""
    params = SamplingParams(max_tokens=arguments.tokens, temperature=0)
    for rows in arguments.rows:
        await timed(engine, rows, params)  # what is measured first would pay for captures and for the pace's trials
    await settled(engine, most_s=arguments.settle)
    lines = []
    for rows in arguments.rows:
        await timed(engine, rows, params)
        before, rates = engine.statistics(), []
        for _ in range(arguments.rounds):
            rate, answers = await timed(engine, rows, params)
            rates.append(rate)
        after = engine.statistics()
        if arguments.trace:
            async with engine.trace(Path(arguments.trace) / f"{name.replace(', ', '-')}-{rows}.json"):
                await timed(engine, rows, params)
        tried = [b - a for a, b in zip(before.tried_at, after.tried_at, strict=True)]
        accepted = [b - a for a, b in zip(before.accepted_at, after.accepted_at, strict=True)]
        lines.append({
            "engine": name, **facts, "rows": rows, "tokens_per_s": round(sorted(rates)[len(rates) // 2], 1),
            "spread": round(max(rates) / min(rates) - 1, 3),
            "emitted": round(1 + sum(accepted) / tried[0], 3) if tried and tried[0] else None,
            "accepted": [round(hit / max(1, count), 3) for hit, count in zip(accepted, tried, strict=True)],
            "steps": after.steps - before.steps,
            "bubble_share": round((after.bubble_s - before.bubble_s) / max(1e-9, after.busy_s - before.busy_s), 4),
            "eager_steps": after.graphs["eager_steps"] - before.graphs["eager_steps"],
            "answers": answers,
        })  # fmt: skip
    return lines


async def run(arguments: argparse.Namespace) -> list[Line]:
    """Measure each engine, and compare."""
    lines: list[Line] = []
    ways: list[tuple[str | None, bool]] = [(None, True)]
    ways += [(kind, overlap) for kind in arguments.speculative for overlap in (True, False)]
    for kind, overlap in ways:
        options: Line = {"overlap": overlap, "context": arguments.context, "max_rows": max(arguments.rows)}
        options |= {"device": arguments.device, "dtype": arguments.dtype, "kv_cache": arguments.kv_cache}
        if kind is not None:
            options |= {"speculative": kind, "num_drafts": arguments.num_drafts}
            options |= {"draft_model": arguments.draft_model} if kind != "ngram" else {}
        async with AsyncEngine(arguments.model, **options) as engine:
            if arguments.explain:
                sys.stderr.write(engine.explain() + "\n")
            name = f"{kind or 'none'}{'' if overlap else ', waiting'}"
            found = await measure(engine, name, arguments, kind=kind, overlap=overlap, dtype=engine.config.dtype)
            if arguments.explain:
                sys.stderr.write(engine.explain() + "\n")
        for line in found:
            lines.append(line)
            compared(line, lines)
            sys.stdout.write(json.dumps({key: value for key, value in line.items() if key != "answers"}) + "\n")
            sys.stdout.flush()
    return lines


def compared(line: Line, lines: list[Line]) -> None:
    """Set a line against the plain engine's, and against that of the engine which does not wait."""
    for other in lines:
        if other["rows"] == line["rows"] and other["engine"] == "none":
            line["ratio"] = round(line["tokens_per_s"] / other["tokens_per_s"], 3)
            line["same"] = sum(mine == theirs for mine, theirs in zip(line["answers"], other["answers"], strict=True))
        if other["rows"] == line["rows"] and other["engine"] == line["kind"] and not line["overlap"]:
            line["sync"] = round(other["tokens_per_s"] / line["tokens_per_s"], 3)


def draw(lines: list[Line], path: Path) -> None:
    """Draw tokens a second by rows, and acceptance by the place of a draft."""
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    for name in dict.fromkeys(line["engine"] for line in lines):
        own = [line for line in lines if line["engine"] == name]
        left.plot([line["rows"] for line in own], [line["tokens_per_s"] for line in own], marker="o", label=name)
        if own[0]["accepted"] and own[0]["overlap"]:
            right.plot(range(1, len(own[0]["accepted"]) + 1), own[0]["accepted"], marker="o", label=name)
    left.set(xscale="log", yscale="log", xlabel="rows", ylabel="tokens a second")
    right.set(xlabel="place of a draft", ylabel="share confirmed, all before it confirmed", ylim=(0, 1))
    for axes in (left, right):
        axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--speculative", nargs="+", choices=("ngram", "eagle", "draft"), default=["eagle", "ngram"])
    parser.add_argument("--draft-model", metavar="PATH", help="for eagle the head (default: ours), for draft the model")
    parser.add_argument("--num-drafts", type=lambda text: text if text == "auto" else int(text), default="auto")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--tokens", type=int, default=256, help="of each answer (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="the median counts (default: %(default)s)")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--kv-cache", default="auto", help="as EngineConfig.kv_cache (default: %(default)s)")
    parser.add_argument("--settle", type=float, default=40, help="seconds to wait for captures (default: %(default)s)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--picture", metavar="FILE", help="draw the figures, too")
    parser.add_argument("--trace", metavar="FOLDER", help="record one more round of each, for ui.perfetto.dev")
    parser.add_argument("--explain", action="store_true", help="say on stderr what each engine chose")
    arguments = parser.parse_args()
    lines = asyncio.run(run(arguments))
    if arguments.picture:
        draw(lines, Path(arguments.picture))
    last = [{key: value for key, value in line.items() if key != "answers"} for line in lines]
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu"
    facts = {"model": arguments.model, "tokens": arguments.tokens, "device": device, "torch": torch.__version__}
    sys.stdout.write(json.dumps({**facts, "lines": last}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
