"""What a step brought to its readers, and the planner's figures."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from overlap.cache.pages import Ints
from overlap.schedule.scores import Scored


@dataclass(frozen=True, slots=True)
class End:
    """A request ended by itself. `stop_id` is the token that ended it, if one did."""

    key: int
    front: int
    reason: Literal["stop", "length"]
    stop_id: int | None


@dataclass(frozen=True, slots=True)
class Settled:
    """What a step brought to its readers: parallel columns, one entry a token.

    A request may have several, in order; an End belongs to the last of them.
    """

    keys: npt.NDArray[np.int64]
    fronts: Ints
    tokens: Ints
    ends: tuple[End, ...]
    cached: Mapping[int, int] = field(default_factory=dict)
    """For requests whose first token this is: how many of their prompt's tokens came from the prefix cache, if any."""
    told: Ints | None = None
    """[n, TOLD_WORDS] if any row of the step asked for log-probabilities: the bits of the token's own (float32), then
    the ids of the MOST_ALTERNATIVES most likely tokens (-1 past the vocabulary), then the bits of theirs."""
    scored: tuple[Scored, ...] = ()
    """Scores of prompts. Those of one request come in order, and none after its first token."""
    only_front: int | None = None
    """The front of all entries, where that is known already."""

    @property
    def all_fronts(self) -> set[int]:
        """Whose entries there are."""
        if self.only_front is not None:
            return {self.only_front}
        return {*self.fronts.tolist(), *(one.front for one in self.scored)}

    def of_front(self, front: int) -> Settled:
        """Return the entries of one front."""
        if self.only_front == front:
            return self
        mine = self.fronts == front
        if mine.all() and all(one.front == front for one in self.scored):
            return self
        ends = tuple(end for end in self.ends if end.front == front)
        told = None if self.told is None else self.told[mine]
        scored = tuple(one for one in self.scored if one.front == front)
        return Settled(self.keys[mine], self.fronts[mine], self.tokens[mine], ends, self.cached, told, scored)

    def by_front(self) -> list[tuple[int, Settled]]:
        """Return (front, its entries) for each front that has some: `of_front` of all, with one sort in its place."""
        if self.only_front is not None:
            return [(self.only_front, self)]
        if self.told is not None or self.scored or self.ends or not len(self.keys):
            return [(front, self.of_front(front)) for front in sorted(self.all_fronts)]
        order = self.fronts.argsort(kind="stable")
        fronts, keys, tokens = self.fronts[order], self.keys[order], self.tokens[order]
        cuts = [0, *((fronts[1:] != fronts[:-1]).nonzero()[0] + 1).tolist(), len(fronts)]
        return [
            (int(fronts[a]), Settled(keys[a:b], fronts[a:b], tokens[a:b], (), self.cached))
            for a, b in itertools.pairwise(cuts)
        ]


@dataclass(frozen=True, kw_only=True)
class PlannerStatistics:
    """The planner's figures at one moment. Counters count from the start."""

    waiting: int
    running: int
    draining: int
    """Slots that wait behind a fence."""
    free_pages: int
    fenced_pages: int
    cached_pages: int
    """Pages that the prefix cache keeps."""
    evictable_pages: int
    """Of those, the ones that no request reads now: as good as free."""
    num_pages: int
    planned_steps: int
    settled_steps: int
    preemptions: int
    evicted_pages: int
    prompt_tokens: int
    """Tokens of all prompts that were admitted, each time they were."""
    cached_tokens: int
    """Of those, the ones that the prefix cache spared."""
    drafted_tokens: int = 0
    """Tokens that a drafter proposed for rows that still had a reader when the target had verified them."""
    accepted_tokens: int = 0
    """Of those, the ones that the target confirmed."""
    tried_at: tuple[int, ...] = ()
    """For each place of a draft in its run: how many stood there, all before them confirmed."""
    accepted_at: tuple[int, ...] = ()
    """Of those, how many were confirmed."""
    structured_requests: int = 0
    """Requests whose answer is held to a form, that were queued."""
    masked_steps: int = 0
    """Steps with a row of one of those."""

    @property
    def hit_rate(self) -> float:
        """The share of prompt tokens that the prefix cache spared; 0.0 before the first prompt."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    @property
    def mean_emitted(self) -> float:
        """How many tokens a row got of a verify on average: 1 and its confirmed drafts; 1.0 before the first."""
        return 1 + self.accepted_tokens / self.tried_at[0] if self.tried_at and self.tried_at[0] else 1.0
