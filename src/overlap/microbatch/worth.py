"""What decode steps are worth that pass while prompts are read. Imports no torch.

A step's tokens are worth what they would cost later.

r rows of which there will be R once the waiting prompts are read can be had later for r / R of a step of R rows. Such a
step costs no more than in the best mix: with R rows each way reads a chunk in some time, in which some steps pass;
answers need some steps for each chunk; and of the mix of ways (and of steps alone) that gives these in the least time
one more step has a price: the slope of the lower convex hull. So where prompts are what takes long, what reads them
fastest wins.

Of a batch that nothing more is expected to come to, the last answer to begin decides when it ends. Then only those
steps are worth that which must pass for slots to be free, or which running answers have more than the last one
(`Outlook.saved`); others are worth what their rows would add to later steps.

And with short answers and SMs of their own, decode rows would wait for prompts in the end, and what they did so quickly
was worth nothing: steps count as many as steps of r rows do what is done while all prompts are read. Meanwhile answers
end, and others begin one after the other.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from overlap.microbatch.cost import CostModel
from overlap.schedule.split import Outlook, Route


@dataclass(frozen=True, slots=True)
class Work:
    """What there is to do, and what decode steps of it are worth."""

    outlook: Outlook
    tokens: int
    """Of prompts, in one step at most."""
    ready: int
    """Of them, those of prompts that could be read now."""
    worth_s: float
    """What a decode step is worth, ..."""
    saved: float
    """... so many of them for each prompt token, ..."""
    rest_s: float
    """... and what those beyond are."""

    @property
    def rows(self) -> int:
        """That decode."""
        return self.outlook.num_decode

    @property
    def context(self) -> int:
        """Tokens in KV of all of them."""
        return self.outlook.decode_context

    def steps_worth_s(self, steps: float, tokens: int) -> float:
        """Return what decode steps are worth that pass while so many prompt tokens are read."""
        steps = self._with_all_rows(steps, tokens)
        full = min(steps, self.saved * tokens)
        return self.worth_s * full + self.rest_s * (steps - full)

    def _with_all_rows(self, steps: float, tokens: int) -> float:
        """Return how many steps of these rows do what so many for each chunk do until all prompts are read.

        Running answers end one after the other (they have between nothing and twice the mean to go), and the others
        begin one after the other.
        """
        outlook, rows = self.outlook, max(1, self.rows)
        owed, left, answer = outlook.owed * outlook.prefill_tokens, outlook.left, outlook.answer
        passed = steps * outlook.prefill_tokens / tokens
        running = rows * (passed - passed**2 / (4 * left) if passed < 2 * left else left)
        begun = passed / (2 * answer) if passed < answer else 1 - answer / (2 * passed)
        others = (owed - rows * left) * begun if owed > rows * left else 0.0
        return min(steps, min(running + others, owed) * tokens / outlook.prefill_tokens / rows)


def work_of(outlook: Outlook, later: int, cost: CostModel, routes: Iterable[Route], token_budget: int) -> Work:
    """Return what there is to do, with what it is worth by what steps take; `later` is how many rows there will be."""
    rows, context = outlook.num_decode, outlook.decode_context
    tokens = max(1, min(outlook.prefill_tokens, token_budget))
    ready = max(1, min(outlook.ready_tokens, tokens))
    now_s = cost.seconds("decode", rows, context, 0)
    if not rows:
        return Work(outlook, tokens, ready, now_s, outlook.saved, now_s)
    share, context_later = rows / later, context * later // rows
    steps = outlook.owed / later * token_budget
    worth_s = min(now_s, _price_s(cost, routes, token_budget, later, context_later, steps) * share)
    adds_s = cost.seconds("decode", later, context_later, 0) - cost.seconds("decode", 1, context // rows, 0)
    rest_s = min(worth_s, max(0.0, adds_s) * share)
    return Work(outlook, tokens, ready, worth_s, outlook.saved / share, rest_s)


def _price_s(
    cost: CostModel, routes: Iterable[Route], token_budget: int, rows: int, context: int, steps: float
) -> float:
    """Return what one more decode step costs in the best mix of ways that gives so many for each chunk."""
    alone_s = cost.seconds("decode", rows, context, 0)
    ways = list[tuple[float, float]]()  # decode steps that pass while a chunk is read, and what both take
    for mode, share in routes:
        if mode == "serial":
            ways.append((1.0, cost.seconds("prefill", 0, 0, token_budget) + alone_s))
        elif mode == "mixed":
            room = max(1, token_budget - rows)
            times = token_budget / room
            ways.append((times, times * cost.seconds("mixed", rows, context, room)))
        else:
            beside_s = cost.seconds("prefill beside", rows, context, token_budget, share)
            ways.append((beside_s / cost.seconds("decode beside", rows, context, token_budget, share), beside_s))
    fewer, more = [way for way in ways if way[0] <= steps], [way for way in ways if way[0] > steps]
    if not fewer:
        return 0.0
    mixes = [(seconds + (steps - passed) * alone_s, alone_s) for passed, seconds in fewer]
    for passed, seconds in fewer:
        for others, longer_s in more:
            price_s = (longer_s - seconds) / (others - passed)
            mixes.append((seconds + (steps - passed) * price_s, price_s))
    return min(alone_s, max(0.0, min(mixes)[1]))
