"""What steps took, and what the cost model learns of it. Imports no torch.

A step that ran alone says what it takes. In two lanes decode steps run beside a chunk for a part of their time, so they
are taken together: a spell is what ran from when decode steps were planned beside prompts to when they are not any
more.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from overlap.microbatch.cost import CLIP, FIRM, CostModel
from overlap.schedule.split import Choice, Outlook, Ran

_STALLED: Final = 0.05
"""The least share of their pace that decode steps are taken to keep beside a chunk."""


class Learner:
    """Tells a cost model what landed steps took. The policy's."""

    def __init__(self, cost: CostModel, token_budget: int) -> None:
        self._cost = cost
        self._budget = token_budget
        self._beside = Outlook(0, 0, 0, side_busy=False)
        self._spell: _Spell | None = None
        self._share = 0
        self._spoiled = False

    def note_choice(self, choice: Choice, outlook: Outlook) -> None:
        """A step was planned so."""
        if outlook.side_busy and choice.share != self._share:  # what is being read has other SMs from now on
            self._end_spell(over=False)
            self.spoil(chunk=False)
        self._share = choice.share
        if choice.mode == "lanes":
            self._beside = outlook

    def spoil(self, *, chunk: bool) -> None:
        """Forget what ran in two lanes since the last chunk, and do not learn from one that is on its way."""
        self._spell, self._spoiled = None, not chunk

    def note(self, ran: Ran) -> None:
        """Take in what a step took."""
        cost, rows, context, tokens = self._cost, ran.num_decode, ran.decode_context, ran.prefill_tokens
        if self._spoiled:
            self._spoiled = ran.beside and not (tokens and not rows)
            if ran.beside:
                return
        if rows and tokens:
            if not ran.beside:
                cost.note("mixed", rows, context, tokens, ran.seconds, attended=ran.attended)
        elif rows:
            if ran.beside:
                alone_s = cost.seconds("decode", rows, context, 0)
                self._spell_of(ran.share).steps.append((ran.seconds, alone_s))
            else:
                self._end_spell(over=True)
                cost.note("decode", rows, context, 0, ran.seconds)
        elif ran.beside:
            if self._spell is not None and len(self._spell.chunks) >= FIRM:
                self._end_spell(over=False)  # what lasts long is told in parts
            self._spell_of(ran.share).note_chunk(tokens, ran.seconds, ran.attended)
        else:
            cost.note("prefill", 0, 0, tokens, ran.seconds, attended=ran.attended)

    def _spell_of(self, share: int) -> _Spell:
        """Return the spell that goes on, or a new one for another share."""
        spell = self._spell
        if spell is None or spell.share != share:
            self._end_spell(over=True)
            beside = self._beside
            waiting = min(beside.prefill_tokens, self._budget)
            spell = self._spell = _Spell(share, beside.num_decode, beside.decode_context, waiting)
        return spell

    def _end_spell(self, *, over: bool) -> None:
        spell, self._spell = self._spell, None
        if spell is not None:
            spell.teach(self._cost, over=over)
            if not over:
                self._spell_of(spell.share).steps += spell.steps[spell.whole :]


@dataclass(slots=True)
class _Spell:
    """What ran beside each other, from when decode steps are planned beside prompts to when they are not any more.

    The first and the last step ran beside a chunk for a part of their time, or not at all: so a single one says little,
    but by how much all of them together took longer than alone is what the chunks have cost them.
    """

    share: int
    rows: int
    """Of the decode steps, when it began, and..."""
    context: int
    """...tokens in KV of all of them."""
    waiting: int
    """Prompt tokens, in one step at most."""
    chunks: list[tuple[int, float, float]] = field(default_factory=list)
    """Tokens of each, seconds, and to how many tokens those attend."""
    steps: list[tuple[float, float]] = field(default_factory=list)
    """Seconds of each decode step, and what it would have taken alone."""
    whole: int = 0
    """How many of them had landed when the last chunk had: the next ones may be beside a chunk that is not in here."""

    def note_chunk(self, tokens: int, seconds: float, attended: float) -> None:
        """Take in a chunk that has landed."""
        self.chunks.append((tokens, seconds, attended))
        self.whole = len(self.steps)

    def teach(self, cost: CostModel, *, over: bool) -> None:
        """Tell what a chunk and a decode step take beside each other; `over` if no chunk is on its way any more.

        If decode steps take X longer for chunks of T, then in T they get done what takes T - X alone. The longest
        counts as CLIP times the next longest at most.
        """
        steps = self.steps if over else self.steps[: self.whole]
        longest = sorted(seconds for seconds, _ in steps)[-2:]
        most_s = CLIP * longest[0] if steps else 0.0
        passed_s = sum(min(seconds, most_s) for seconds, _ in steps)
        longer_s = passed_s - sum(alone_s for _, alone_s in steps)
        both_s = min(passed_s, sum(seconds for _, seconds, _ in self.chunks))  # the answers may have ended before
        slower = both_s / max(both_s - longer_s, _STALLED * both_s) if both_s > 0 else 0.0
        decode_s = slower * cost.seconds("decode", self.rows, self.context, 0)
        for tokens, seconds, attended in self.chunks:
            cost.note("prefill beside", self.rows, self.context, tokens, seconds, self.share, attended)
            cost.note("decode beside", self.rows, self.context, self.waiting, decode_s, self.share)
