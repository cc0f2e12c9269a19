"""Scores: log-probabilities of a prompt's own tokens, which come as its chunks are run.

The token at position p is scored by what the model says at position p - 1, so the first token has no score, and a page
that comes from the prefix cache brings none. Scores are told in order, each once: after a preemption they go on behind
the last one that was told, and pages before that may come from the cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from overlap.cache.pages import Ints

if TYPE_CHECKING:
    from overlap.schedule.plan import StepPlan
    from overlap.schedule.request import Request


@dataclass(frozen=True, slots=True)
class Scored:
    """Scores of some tokens of one prompt, in order."""

    key: int
    front: int
    start: int
    """The position of the first of them. >= 1."""
    words: Ints
    """[n, TOLD_WORDS] of each token what `Settled.told` has of one."""


def scores_of(chunks: Sequence[tuple[Request, int, int]]) -> tuple[Ints, Ints] | None:
    """Return which of a step's prompt tokens say a score, and of which token behind them; None for none.

    `chunks` are (request, start, count). Both columns are int32 [S]; the first indexes the tokens of all chunks.
    """
    places: list[Ints] = []
    tokens: list[Ints] = []
    at = 0
    for request, start, count in chunks:
        if request.scoring:
            first, end = max(request.scored, start + 1), min(start + count + 1, request.scores)
            if first < end:
                places.append(np.arange(at + first - 1 - start, at + end - 1 - start, dtype=np.int32))
                tokens.append(request.prompt[first:end])
        at += count
    return (np.concatenate(places), np.concatenate(tokens)) if places else None


def cut_scores(plan: StepPlan, words: Ints) -> Iterator[tuple[int, int, Ints]]:
    """Cut what landed, [S, TOLD_WORDS], into (slot, position of the first token, words) of each chunk that has any."""
    if plan.scores is None:
        return
    firsts = np.cumsum(np.r_[0, plan.counts[plan.num_decode :]])
    cuts = np.searchsorted(plan.scores, firsts)
    for chunk, (begin, end) in enumerate(zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True)):
        if begin < end:
            row = plan.num_decode + chunk
            start = int(plan.starts[row] + plan.scores[begin] - firsts[chunk]) + 1
            yield int(plan.slots[row]), start, words[begin:end]
