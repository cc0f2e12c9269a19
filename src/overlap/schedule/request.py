"""Request: what the planner knows of one request."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from overlap.cache.pages import Ints
from overlap.schedule.life import Change, Life, after
from overlap.schedule.shaping import Shaped, Shaping

if TYPE_CHECKING:
    from overlap.cache.tree import Node
    from overlap.schedule.matcher import Matcher
    from overlap.structured import StructuredOutput


@dataclass(slots=True, kw_only=True, eq=False)
class Request:
    """A request in numbers. The planner is its only writer once it has been submitted."""

    key: int
    """Counts up with arrival; unique in an engine."""
    front: int
    """Whom to tell of its tokens."""
    prompt: Ints
    """The tokens to run before the next new one: what the user sent and, after a preemption, the answer so far."""
    limit: int
    """The most new tokens, over all stays. >= 1."""
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    stop_ids: tuple[int, ...] = ()
    """Tokens that end the answer."""
    shaping: Shaping | None = None
    """What is done to its logits before a token is drawn; None for nothing."""
    logprobs: bool = False
    """Whether log-probabilities are told with each token."""
    structured: StructuredOutput | None = None
    """The form that the answer is held to ..."""
    matcher: Matcher | None = None
    """... and what says which tokens may come next, once it is made. It stays over preemptions."""

    scores: int = 0
    """How many tokens its prompt has, if they are to be scored (see `schedule.scores`); 0 if not."""

    priority: int = 0
    """Higher goes first, and is preempted last."""
    fairness_key: str = ""
    """Whose request it is: keys of one priority get equal shares."""
    salt: str = ""
    """Prefixes are shared among requests of equal salt only."""
    deadline: float | None = None
    """When it has to have ended, in `time.monotonic` seconds."""

    scored: int = 1
    """The position of the first token whose score has not been told."""
    life: Life = field(default=Life.WAITING)
    queued_at: float = 0.0
    """When it came, in `time.monotonic` seconds. For figures only."""
    slot: int = -1
    """The slot of this stay; -1 while waiting."""
    made: int = 0
    """Tokens of the answer that were settled in earlier stays."""
    chunked: int = 0
    """How many tokens of `prompt` are planned in this stay, or came from the prefix cache."""
    node: Node | None = None
    """What this stay holds of the prefix tree."""
    num_hit: int = 0
    """How many pages of this stay came from the prefix cache."""
    coming: tuple[str, int, bytes] | None = None
    """The next page that this stay computes and will share, while there is one. The desk's."""
    cached: int | None = None
    """How many tokens of the user's prompt the prefix cache spared in the first stay; None before that."""

    def change(self, change: Change) -> None:
        """Move on in the table of lives."""
        self.life = after(self.life, change)

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0

    @property
    def shaped(self) -> Shaped | None:
        """What the device must know to shape its logits in a stay that begins now."""
        if self.shaping is None:
            return None
        return Shaped(shaping=self.shaping, tokens=self.prompt, made=self.made)

    @property
    def scoring(self) -> bool:
        """Whether scores of its prompt are still to be told."""
        return self.scored < self.scores

    @property
    def truncates(self) -> bool:
        """Whether the tokens to choose from are filtered."""
        return not self.greedy and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)


def refusal_of(num_prompt: int, limit: int, context: int) -> str | None:
    """Return why a request of this size could never run in an engine that holds `context` tokens of it, or None."""
    if num_prompt < 1:
        return "The prompt is empty. Give at least one token."
    if num_prompt + limit > context:
        return (
            f"The prompt has {num_prompt} token{'s' * (num_prompt != 1)} and asks for up to {limit} more; "
            f"the engine holds {context} for one request. "
            "Shorten the prompt, lower max_tokens, or open the engine with more context or kv_cache."
        )
    return None
