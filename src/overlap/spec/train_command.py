"""`overlap train-drafter`: data, training, report and card, in a directory that a later run goes on from."""

from __future__ import annotations

import asyncio
import gc
import math
import random
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch

from overlap import AsyncEngine
from overlap.environment import cache_directory, package_index
from overlap.errors import ConfigError
from overlap.models import build, open_checkpoint
from overlap.models.llama import Llama
from overlap.spec.data import Corpus, answer, prompts_from, self_asked, split
from overlap.spec.forms import KINDS
from overlap.spec.head_files import write_eagle3
from overlap.spec.shipped import shape_of
from overlap.spec.train import HeadTraining, Report, TrainSettings

DATA_SHARE: Final = 0.3
"""The share of `minutes` that goes into making the texts."""
ASKING_SHARE: Final = 0.3
"""The share of the time for texts that may go into making up questions."""
_MADE_UP: Final = "made_up.txt"
"""How many of the prompts the model has made up itself."""
ROWS: Final = 384
"""Answers at once on a GPU: a small model makes the more tokens a second the more rows it has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What to make, from what, and where."""

    model: str
    output: Path
    """Gets config.json, model.safetensors and README.md; `work/` in it keeps texts and checkpoint."""
    train: TrainSettings
    prompts: Path | None = None
    """A text file of one prompt a line; None for built-in ones."""
    self_asked: float | None = None
    """The share of prompts that the model makes up itself (`data.self_asked`); None for half of them, but for none
    where prompts are given or the model has no chat template."""
    start: Path | None = None
    """The directory of a head to go on from; None begins anew."""
    num_prompts: int = 20000
    held_out: int = 64
    """Prompts that are not trained on, and by which the head is judged."""
    answer_tokens: int = 384
    temperature: float = 0.8
    device: str
    """cpu, cuda or cuda:N"""
    dtype: torch.dtype
    cache_dir: Path | None = None
    progress: bool | None = None

    def __post_init__(self) -> None:
        """Raise ConfigError for a share that is none."""
        if self.self_asked is not None and not 0 <= self.self_asked <= 1:
            raise ConfigError(f"self_asked is a share of the prompts, from 0 to 1, not {self.self_asked!r}.")


def train_drafter(job: Job) -> Report:
    """Make the texts (unless they are there), train (from the checkpoint if one is there), judge, and write the head.

    Runs an event loop of its own for the engine that makes the texts. Raises ConfigError, ModelError.
    """
    work = job.output / "work"
    work.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    corpus_path, judged_path = work / "texts.safetensors", work / "judged.safetensors"
    if not (corpus_path.is_file() and judged_path.is_file()):
        asyncio.run(_make_texts(job, work, corpus_path, judged_path))
        gc.collect()  # the engine's memory is wanted for training
        torch.cuda.empty_cache()
    corpus, judged = Corpus.load(corpus_path), Corpus.load(judged_path)
    training = HeadTraining(_target(job), corpus, _left(job, time.monotonic() - began), job.start)
    before = None if job.start is None else training.report(judged)
    checkpoint = work / "checkpoint.safetensors"
    if checkpoint.is_file():
        training.resume(checkpoint)
    training.run(checkpoint, progress=job.progress)
    report = training.report(judged)
    half = torch.bfloat16 if job.dtype is not torch.float32 else torch.float32
    notes = {"dtype": str(half).removeprefix("torch."), "target": Path(job.model).name, **shape_of(training.target)}
    write_eagle3(job.output, training.config, training.tensors(half), **notes)
    made_up = int((work / _MADE_UP).read_text()) if (work / _MADE_UP).is_file() else 0
    card = _card(job, training, corpus, judged, report, before, made_up)
    (job.output / "README.md").write_text(card, encoding="utf-8")
    return report


async def _make_texts(job: Job, work: Path, corpus_path: Path, judged_path: Path) -> None:
    """Answer the held-out prompts greedily and the others mostly so, and write both."""
    seconds = math.inf if job.train.minutes is None else job.train.minutes * 60 * DATA_SHARE
    options: dict[str, Any] = {"cache_dir": job.cache_dir, "progress": job.progress}
    if job.device != "cpu":
        options |= {"max_rows": ROWS, "token_budget": 8192, "context": job.train.length + job.answer_tokens}
    name = str(job.dtype).removeprefix("torch.")
    began = time.monotonic()
    async with AsyncEngine(job.model, device=job.device, dtype=name, **options) as engine:
        share = job.self_asked
        if share is None:
            share = 0.0 if job.prompts is not None or engine.chat_template is None else 0.5
        wanted = int(job.num_prompts * share)
        own: list[str] = []
        if wanted:
            own = await self_asked(
                engine, wanted, seed=job.train.seed, seconds=seconds * ASKING_SHARE, progress=job.progress
            )
        (work / _MADE_UP).write_text(str(len(own)))
        prompts = prompts_from(job.prompts, job.num_prompts - len(own), job.train.seed) + own
        random.Random(job.train.seed).shuffle(prompts)
        kept, judged = split(prompts, job.held_out)
        seconds = max(seconds - (time.monotonic() - began), seconds * (1 - ASKING_SHARE) / 2)
        for path, some, temperature in ((judged_path, judged, 0.0), (corpus_path, kept, job.temperature)):
            made = await answer(
                engine,
                some,
                answer_tokens=job.answer_tokens,
                temperature=temperature,
                seed=job.train.seed,
                seconds=seconds,
                progress=job.progress,
            )
            made.save(path)


def _left(job: Job, spent_s: float) -> TrainSettings:
    """Return the settings with the minutes that are left."""
    if job.train.minutes is None:
        return job.train
    return replace(job.train, minutes=max(job.train.minutes - spent_s / 60, 0.05))


def _target(job: Job) -> Llama:
    checkpoint = open_checkpoint(
        job.model, cache_dir=cache_directory(job.cache_dir), index_url=package_index(), progress=bool(job.progress)
    )
    try:
        return build(checkpoint, device=job.device, dtype=job.dtype, progress=bool(job.progress))
    finally:
        checkpoint.close()


def _card(
    job: Job,
    training: HeadTraining,
    corpus: Corpus,
    judged: Corpus,
    report: Report,
    before: Report | None,
    made_up: int,
) -> str:
    """Return the README.md of a head."""
    positions = "\n".join(f"| {place} | {share:.3f} |" for place, share in enumerate(report.accepted, 1))
    source = f"built-in prompts of {len(KINDS)} kinds" if job.prompts is None else "the prompts given"
    if made_up:
        source += f" and to questions that the model made up itself ({made_up} of {job.num_prompts})"
    begun = "" if before is None else ", from an earlier head on"
    earlier = "" if before is None else f" (the earlier head: {before.mean_emitted:.2f})"
    loss = (training.losses or [float("nan")])[-1]
    name = Path(job.model).name
    return f"""# An EAGLE-3 head for {name}

Made by `overlap train-drafter`. It drafts for `{name}` and for no other model. Format: that of the published
EAGLE-3 heads (config.json, model.safetensors).

- **Data:** {len(corpus)} answers ({len(corpus.tokens)} tokens with their prompts) to {source},
  sampled from the model itself, {job.answer_tokens} tokens at most each: the first answers to three of four prompts
  greedily, all else at temperature {job.temperature}.
- **Training:** {training.step} steps of {job.train.batch_size} texts of up to {job.train.length} tokens{begun},
  unrolled over {job.train.unroll} drafts, seed {job.train.seed}. Last loss: {loss:.3f}.
- **Draft vocabulary:** the {len(training.ids_N)} most frequent tokens of the data.

## Acceptance

On greedy answers to {len(judged)} prompts that it was not trained on ({report.num_positions} positions). A draft counts
where all drafts before it were accepted.

| draft | accepted |
|---|---|
{positions}

Mean tokens of a verify: **{report.mean_emitted:.2f}**{earlier}.
"""
