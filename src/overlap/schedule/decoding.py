"""The decode rows: the slots that run one token, or one run of drafts, in each step of the main lane.

They change when one of them has no more to run, and when another's prompt is through. While they do not, `slots` stays
the same array, by which others know that nothing has changed (`schedule/repeats.py`).
"""

from __future__ import annotations

import numpy as np

from overlap.cache.pages import Ints
from overlap.schedule.slots import Slots

_NONE: Ints = np.empty(0, dtype=np.int32)


class Decoding:
    """Which slots decode. The planner's."""

    def __init__(self, slots: Slots) -> None:
        self.slots: Ints = _NONE
        """In the order in which they came."""
        self.leaving = False
        """One of them has no more to run, or was left by its request."""
        self._at = slots
        self._sampled: Ints = _NONE
        self._truncates = False
        self._joining: list[int] = []

    def __len__(self) -> int:
        return len(self.slots)

    @property
    def changes(self) -> bool:
        """Whether `refresh` has something to do."""
        return self.leaving or bool(self._joining)

    def join(self, slot: int) -> None:
        """A slot decodes from the next plan on: its prompt is through."""
        self._joining.append(slot)

    def advance(self, slots: Ints, starts: Ints, width: int) -> None:
        """A step was planned in which each of `slots` runs `width` positions from its one of `starts` on."""
        at = self._at
        at.next[slots] = starts + width
        at.left[slots] = left = at.left[slots] - 1
        self.leaving = self.leaving or not left.all()

    def note_less_left(self, slots: Ints) -> None:
        """These slots have less left to run than was planned for."""
        self.leaving = self.leaving or bool((self._at.left[slots] <= 0).any())

    def refresh(self) -> None:
        """Drop rows that have no more to run, add those whose prompt is through. Costs nothing in a steady step."""
        if not self.changes:
            return
        at, slots = self._at, self.slots
        if self.leaving:
            slots = slots[at.reading[slots] & (at.left[slots] > 0)]
        if self._joining:
            joining = np.array([slot for slot in self._joining if at.reading[slot]], dtype=np.int32)
            slots = np.concatenate([slots, joining])
        self.leaving, self._joining = False, []
        self.slots = slots
        self._sampled = np.flatnonzero(at.sampled[slots]).astype(np.int32)
        self._truncates = bool(at.truncates[slots].any())

    def sampling(self, slots: Ints) -> tuple[Ints, bool]:
        """Return which of `slots`, of those that decode, are sampled, as indices, and whether one truncates."""
        if len(slots) == len(self.slots):
            return self._sampled, self._truncates
        at = self._at
        return np.flatnonzero(at.sampled[slots]).astype(np.int32), bool(at.truncates[slots].any())
