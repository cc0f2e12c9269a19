"""What does a drafter bring? Tokens a second with and without, by the number of rows, and how many drafts were right.

Each engine answers the same prompts, as many at once as there are rows, greedily. What it means: a verify reads the
weights once for all its positions, so where reading weights is the bound a confirmed draft is a token for free; where
computing is the bound (many rows, or a CPU) each drafted position costs what a token costs. "accepted" is the mean
number of drafts that a verify confirmed, "tokens a step" one more; "same" says whether the answers are those of the
engine without a drafter, token for token.

    python bench/spec.py [--model smollm2-135m-instruct] [--speculative ngram eagle] [--draft-model DIR] [--rows 1 8 64]

One JSON object a line, one line an engine and number of rows. Reasons to doubt it: how often drafts are right depends
on the text, and prompt lookup lives on answers that repeat their prompt (half of the prompts here ask for that); in
bfloat16 a wide step may round otherwise than a plain one, so that "same" may be False without a fault.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import sys
import time
from typing import Any

import torch

from overlap import AsyncEngine, SamplingParams

PROMPTS = (
    "<|im_start|>user\nRepeat this list three times: apple, pear, plum, cherry, fig, quince, peach.<|im_end|>\n"
    "<|im_start|>assistant\n",
    "<|im_start|>user\nWhy is the sky blue?<|im_end|>\n<|im_start|>assistant\n",
    "def add(a, b):\n    return a + b\n\ndef sub(a, b):\n    return a - b\n\ndef mul(a, b):\n",
    "<|im_start|>user\nWrite a short story about a lighthouse.<|im_end|>\n<|im_start|>assistant\n",
)


async def timed(engine: AsyncEngine, rows: int, params: SamplingParams) -> tuple[float, int, list[list[int]]]:
    """Return the seconds that the answers to `rows` prompts took, their tokens, and the answers."""
    prompts = [PROMPTS[row % len(PROMPTS)] for row in range(rows)]
    answers: list[list[int]] = [[]] * rows
    start = time.perf_counter()
    async for output in engine.generate_batch(prompts, params, progress=False):
        answers[output.index] = output.token_ids
    return time.perf_counter() - start, sum(map(len, answers)), answers


async def measure(arguments: argparse.Namespace) -> None:
    """Print a line for each engine and number of rows."""
    params = SamplingParams(max_tokens=arguments.tokens, temperature=0, ignore_eos=True)
    plain: dict[int, tuple[float, list[list[int]]]] = {}
    for kind in (None, *arguments.speculative):
        options: dict[str, Any] = {"overlap": not arguments.no_overlap, "context": 2048}
        if kind is not None:
            options |= {"speculative": kind, "num_drafts": arguments.num_drafts}
            options |= {"draft_model": arguments.draft_model} if kind != "ngram" else {}
        options |= {"device": arguments.device, "dtype": arguments.dtype, "max_rows": max(arguments.rows)}
        async with AsyncEngine(arguments.model, **options) as engine:
            for rows in arguments.rows:
                await timed(engine, rows, params)
                before, spent = engine.statistics(), []
                for _ in range(arguments.rounds):
                    seconds, tokens, answers = await timed(engine, rows, params)
                    spent.append(tokens / seconds)
                after, rate = engine.statistics(), sorted(spent)[len(spent) // 2]
                drafted = after.drafted_tokens - before.drafted_tokens
                accepted = after.accepted_tokens - before.accepted_tokens
                base_rate, base_answers = plain.setdefault(rows, (rate, answers))
                verified = max(1, arguments.rounds * tokens - accepted)  # a verify brings its accepted and one more
                line = {
                    "drafter": kind, "rows": rows, "tokens_per_s": round(rate, 1), "ratio": round(rate / base_rate, 3),
                    "drafted": drafted, "accepted": accepted,
                    "accepted_share": round(accepted / drafted, 3) if drafted else None,
                    "tokens_a_step": round(1 + accepted / verified, 2),
                    "same": answers == base_answers, "overlap": not arguments.no_overlap,
                    "num_drafts": arguments.num_drafts, "tokens": arguments.tokens, "model": arguments.model,
                    "device": torch.cuda.get_device_name(0) if engine.config.device != "cpu" else platform.processor(),
                    "dtype": engine.config.dtype, "torch": torch.__version__,
                }  # fmt: skip
                print(json.dumps(line), flush=True)


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--speculative", nargs="+", choices=("ngram", "eagle", "draft"), default=["ngram"])
    parser.add_argument("--draft-model", metavar="PATH", help="for eagle the head, for draft the small model")
    parser.add_argument("--num-drafts", type=lambda text: text if text == "auto" else int(text), default="auto")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--tokens", type=int, default=128, help="of each answer (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="the median counts (default: %(default)s)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--no-overlap", action="store_true", help="wait for each step before the next is launched")
    asyncio.run(measure(parser.parse_args()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
