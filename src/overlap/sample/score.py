"""Scores of prompt tokens: the model's log-probabilities of the tokens that a prompt has itself.

Legend: T tokens of a step, S of them score the token behind, V vocabulary, W TOLD_WORDS.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from overlap.models.program import Program
from overlap.sample.shaping import told_words
from overlap.schedule.plan import StepPlan
from overlap.state.shapes import to_device

BLOCK: Final = 64
"""Tokens that are scored at once: no more logits than this many rows are ever there."""


def write_scores(program: Program, plan: StepPlan, hidden_TC: Tensor, out_SW: Tensor) -> None:
    """Write what is told of each token that a plan scores to the host's `out`, int32 [S, W]. Does not wait.

    `hidden_TC` are the hidden states of the plan's tokens, those of its decode rows first.
    """
    if plan.scores is None or plan.score_tokens is None:
        return
    places_S = to_device(hidden_TC.device, plan.scores + plan.num_decode * plan.width)
    tokens_S = to_device(hidden_TC.device, plan.score_tokens.copy())  # what crossed to a rank is read-only
    words_SW = [
        told_words(program.logits(hidden_TC.index_select(0, places)), tokens)
        for places, tokens in zip(torch.split(places_S, BLOCK), torch.split(tokens_S, BLOCK), strict=True)
    ]
    out_SW.copy_(torch.cat(words_SW), non_blocking=True)
