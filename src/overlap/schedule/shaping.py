"""What a request asks of its logits before a token is drawn: penalties, a bias, tokens that may not come yet.

A request that asks for none of it has no Shaping, and its steps run the code that they would run without this module.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from overlap.cache.pages import Ints

MOST_BIASED: Final = 1024
"""The most entries of a logit bias."""
MOST_BANNED: Final = 256
"""The most tokens that `min_tokens` keeps from coming."""
MOST_ALTERNATIVES: Final = 20
"""The most alternatives whose log-probabilities are told with a token."""
MOST_SCORED: Final = 512
"""The most prompt tokens that one step scores (see `schedule.scores`): longer prompts take more steps, and no more
memory."""
TOLD_WORDS: Final = 1 + 2 * MOST_ALTERNATIVES
"""What lands with a token whose log-probability is asked for, in words: see `Settled.told`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shaping:
    """Changes of a request's logits. The definitions are those of the OpenAI API and of vLLM."""

    presence_penalty: float = 0.0
    """Taken once from the logit of each token that the answer has."""
    frequency_penalty: float = 0.0
    """Taken from the logit of a token for each time that the answer has it."""
    repetition_penalty: float = 1.0
    """Divides a positive logit of a token that prompt or answer have, and multiplies a negative one."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token, what is added to its logit), tokens unique and within the vocabulary."""
    min_tokens: int = 0
    """As long as the answer is shorter than this ..."""
    banned: tuple[int, ...] = ()
    """... these tokens, unique and within the vocabulary, cannot come."""

    @property
    def counts(self) -> bool:
        """Whether it matters which tokens there are so far."""
        return self.presence_penalty != 0 or self.frequency_penalty != 0 or self.repetition_penalty != 1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Shaped:
    """A Shaping as a request brings it to its slot, with what the device must know of its tokens."""

    shaping: Shaping
    tokens: Ints
    """What the user sent and, after a preemption, the answer so far."""
    made: int
    """How many of them are the answer's."""
