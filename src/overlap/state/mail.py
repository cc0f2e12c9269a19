"""Mail: how a step's plan reaches the device, and how its tokens come back.

On CUDA both ends are pinned memory: the device reads plans there, and writes tokens there. Each has DEPTH places that
take turns: two flights in the air, and one being packed. A place is written again only when the flight that used it has
landed, so neither side ever meets the other's next step.

An eager step is told its place by the host. A step that is one graph can be told nothing, so the device keeps its own
`turn`, the place of the next such step: the graph fetches the plan from there, and moves the turn on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from overlap.cache.pages import Ints
from overlap.ops.host_memory import host_zeros
from overlap.schedule.plan import StepPlan
from overlap.schedule.shaping import MOST_SCORED, TOLD_WORDS
from overlap.state.packing import HEADER, USED

DEPTH: Final = 3
"""Places in rotation."""
EMPTY: Final = DEPTH
"""One place more, whose plan has no rows: for a run that must change nothing."""


class Mail:
    """The places of one lane, and the device's side of them."""

    __slots__ = (
        "_masks",
        "landed_words",
        "landings",
        "packed",
        "plan_words",
        "plans",
        "scored",
        "scored_words",
        "told",
        "told_words",
        "turn",
    )

    def __init__(self, words: int, max_landing: int, device: torch.device | str) -> None:
        """`words` is the `capacity` of a packed plan; `max_landing` tokens come back at most."""
        device = torch.device(device)
        self.plans = host_zeros((DEPTH + 1, words), device)
        """int32 [DEPTH + 1, words] on the host: packed plans."""
        self.plan_words: list[Ints] = list(self.plans.numpy())
        self.plan_words[EMPTY][USED] = HEADER  # the words in use: no section has any
        self.landings = host_zeros((DEPTH + 1, max_landing), device)
        """int32 [DEPTH + 1, max_landing] on the host: the tokens of each flight."""
        self.landed_words: list[Ints] = list(self.landings.numpy())
        self.told = host_zeros((DEPTH + 1, max_landing, TOLD_WORDS), device)
        """int32 [DEPTH + 1, max_landing, TOLD_WORDS] on the host: what is told with tokens, where it is asked for."""
        self.told_words: list[Ints] = list(self.told.numpy())
        self.scored = host_zeros((DEPTH, MOST_SCORED, TOLD_WORDS), device)
        """int32 [DEPTH, MOST_SCORED, TOLD_WORDS] on the host: the scores of each flight's prompts."""
        self.scored_words: list[Ints] = list(self.scored.numpy())
        self.packed = torch.zeros(words, dtype=torch.int32, device=device)
        """int32 [words] on the device: the plan of the step that runs."""
        self.turn = torch.zeros(1, dtype=torch.int32, device=device)
        """int32 [1] on the device: the place of the next step that is a graph."""

        self._masks: list[Tensor | None] = [None] * DEPTH

    def put_masks(self, place: int, rows: Sequence[int], masks: Sequence[Ints]) -> Tensor:
        """Write which tokens may be chosen where, and return it: int32 [M, 1 + B] on the host, for `mask_logits`.

        The memory is there from the first step on that needs it, and grows with the rows that do: up to 16 KiB a row
        for a vocabulary of 128k.
        """
        width = 1 + len(masks[0])
        held = self._masks[place]
        if held is None or len(held) < len(rows):
            size = max(8, 1 << (len(rows) - 1).bit_length())
            held = host_zeros((size, width), self.packed.device)
            self._masks[place] = held
        words = held.numpy()
        for line, (row, mask) in enumerate(zip(rows, masks, strict=True)):
            words[line, 0] = row
            words[line, 1:] = mask
        return held[: len(rows)]

    @property
    def nbytes(self) -> int:
        """Bytes of device memory."""
        return self.packed.nbytes + self.turn.nbytes


def mask_lines(plan: StepPlan, num_words: int) -> tuple[list[int], list[Ints]]:
    """Return where among what lands tokens are masked, and the mask of each place."""
    rows: list[int] = []
    lines: list[Ints] = []
    for emit, masks in zip(plan.masked, plan.masks, strict=True):
        places = masks.reshape(-1, num_words)[: plan.width if emit < plan.num_decode else 1]
        rows += range(plan.landing(emit), plan.landing(emit) + len(places))
        lines += list(places)
    return rows, lines
