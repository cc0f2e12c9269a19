"""What the planner tells a splitter of the next step, and what it is told to do. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, NamedTuple, Protocol, TypeAlias

Mode: TypeAlias = Literal["mixed", "serial", "lanes"]
"""Prompt chunks and decode rows in one step; in steps of their own, in turn; or at the same time, in two lanes."""
Route: TypeAlias = tuple[Mode, int]
"""A mode, and the SMs that are the decode rows' own."""


@dataclass(frozen=True, slots=True)
class Outlook:
    """What there is to run: rows that decode, and prompts that wait."""

    num_decode: int
    decode_context: int
    """Tokens in KV of all decode rows together."""
    prefill_tokens: int
    """Tokens of all prompts that are read or wait, for a step or for a slot: while many wait, chunks can be large."""
    side_busy: bool
    """Whether the side lane has a step in the air."""
    num_prompts: int = 0
    """How many of the prompts have a slot, or one is free for: rows that will decode, too, once they are read. With
    those whose reading is in the air."""
    owed: float = float("inf")
    """Tokens that all answers still have for each of `prefill_tokens`, as far as is known."""
    left: float = float("inf")
    """Tokens that a running answer still has, on the mean, and..."""
    answer: float = float("inf")
    """...an answer to a prompt that waits or is read."""
    saved: float = float("inf")
    """How many decode steps all work is shorter by, for each of `prefill_tokens`, if they pass while prompts are read:
    those that have to pass for slots and pages to be free, and those that running answers have more than the last one
    to come. Infinite while more requests are to be expected."""
    ready_tokens: int = 2**31
    """Of `prefill_tokens`, those of prompts that could be read now: they have a slot, or one is free."""


class Prompts(NamedTuple):
    """What is still to be read."""

    tokens: int
    """Of the prompts that could run now: they have a slot, or one is free."""
    number: int
    """How many these are, with those that are being read in the air."""
    all_tokens: int
    """Of these and of all that wait."""
    answers: int
    """The most tokens that the answers to all of them may have, and to those in the air."""
    num_answers: int = 1
    """How many those are."""
    longest: float = 0.0
    """The most tokens that one of these answers may have; those that are not read yet count by their mean."""
    slot_steps: float = 0.0
    """Decode steps of all rows that have to pass until there are a slot and pages for each."""


@dataclass(frozen=True, slots=True)
class Choice:
    """How to run it."""

    mode: Mode
    prefill_tokens: int
    """The most prompt tokens of one step. >= 1."""
    share: int = 0
    """SMs that are the decode rows' own while both lanes run; 0 lets them compete."""
    why: str = ""


@dataclass(frozen=True, slots=True)
class Ran:
    """A step that was run, and what it took on the device."""

    num_decode: int
    decode_context: int
    """Tokens in KV of its decode rows together."""
    prefill_tokens: int
    beside: bool
    """Whether the other lane ran too."""
    seconds: float
    share: int = 0
    """SMs that were the decode rows' own."""
    attended: float = 0.0
    """To how many tokens its prompt tokens attend, all together."""


class Splitter(Protocol):
    """Decides how prompts and decode rows share the device. Asked once a step while both are there."""

    @property
    def shares(self) -> tuple[int, ...]:
        """The shares of SMs that it may choose, 0 apart."""

    def choose(self, outlook: Outlook) -> Choice:
        """Return how to run the next step. Fast: it is on the way between two steps."""

    def note(self, ran: Ran) -> None:
        """Take in what a step took."""

    def spoil(self, *, chunk: bool) -> None:
        """Something held up the host: what runs in the two lanes now takes longer than it will.

        `chunk` says that it was a chunk's launch, and that the chunk has landed.
        """

    def explain(self) -> tuple[str, ...]:
        """Return what is chosen and why, a sentence each."""


class Always:
    """A splitter that was told what to do."""

    def __init__(self, mode: Mode, *, prefill_tokens: int = 2**31, share: int = 0) -> None:
        self._choice = Choice(mode, prefill_tokens, share, "as asked")
        self.shares: Final[tuple[int, ...]] = (share,) if share else ()

    def choose(self, outlook: Outlook) -> Choice:  # noqa: ARG002 - the promise's
        """Return it."""
        return self._choice

    def note(self, ran: Ran) -> None:
        """Learn nothing."""

    def spoil(self, *, chunk: bool) -> None:
        """Nothing was learned."""

    def explain(self) -> tuple[str, ...]:
        """Return what it was told."""
        own = f", {self._choice.share} SMs for decode rows" if self._choice.share else ""
        asked = "streams" if self._choice.mode == "lanes" else self._choice.mode
        return (f"lanes: {asked}{own}, as asked",)


def name_of(route: Route) -> str:
    """Return what a way is called where it is told of."""
    return route[0] if not route[1] else f"{route[0]} sm:{route[1]}"
