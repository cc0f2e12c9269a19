"""A model with no weights whose answer depends on every byte of KV, and a runner that runs it in virtual time.

The next token is a hash of all tokens before it, read through the page table from a simulated KV memory. So one wrong
page, one stale token, one row of state mixed up with another changes the answer: `EchoModel.answer` says what it
should have been.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from overlap.cache.pages import PAGE, Ints
from overlap.schedule.plan import StepPlan, broken_rules
from overlap.streams.stream import Mark, Stream

_PRIME = 1_000_003


class EchoModel:
    """Next token = hash(tokens so far, seed when sampled) mod `vocab_size`."""

    def __init__(self, vocab_size: int = 97, longest: int = 4096) -> None:
        self.vocab_size = vocab_size
        powers = np.ones(longest, dtype=np.int64)
        for i in range(1, longest):
            powers[i] = powers[i - 1] * 31 % _PRIME
        self._powers = powers

    def next_token(self, tokens: Ints | Sequence[int], *, seed: int = 0) -> int:
        """Return the token that follows `tokens`."""
        array = np.asarray(tokens, dtype=np.int64)
        return int((int(((array + 1) * self._powers[: len(array)]).sum()) + seed) % _PRIME % self.vocab_size)

    def answer(self, prompt: Sequence[int], limit: int, *, stop_ids: Sequence[int] = (), seed: int = 0) -> list[int]:
        """Return the answer to a prompt that runs alone: what any engine must give in any company."""
        tokens = list(prompt)
        while len(tokens) < len(prompt) + limit:
            tokens.append(self.next_token(tokens, seed=seed))
            if tokens[-1] in stop_ids:
                break
        return tokens[len(prompt) :]


@dataclass(slots=True)
class SimFlight:
    """A plan in the simulated air."""

    plan: StepPlan
    stream: Stream
    mark: Mark
    tokens: list[int]

    async def wait_landed(self) -> Ints:
        """Return the tokens once the simulated device is done."""
        await self.stream.wait_reached(self.mark)
        return np.array(self.tokens, dtype=np.int32)


class SimRunner:
    """Runs plans with an EchoModel on any stream, over state kept as a device would keep it.

    `fault(plan)` may raise, to fail a step.
    """

    def __init__(
        self,
        stream: Stream,
        model: EchoModel,
        *,
        num_pages: int,
        fault: Callable[[StepPlan], None] | None = None,
    ) -> None:
        self._stream = stream
        self._model = model
        self._fault = fault
        self._kv: Ints = np.full((num_pages, PAGE), -1, dtype=np.int32)
        self._table: dict[int, dict[int, int]] = {}
        self._length: dict[int, int] = {}
        self._last: dict[int, int] = {}
        self._seed: dict[int, int] = {}
        self.plans: list[StepPlan] = []

    def launch(self, plan: StepPlan) -> SimFlight:
        """Queue a plan."""
        broken = broken_rules(plan)
        assert not broken, f"step {plan.number}: not true that {'; '.join(broken)}"
        self.plans.append(plan)
        tokens: list[int] = []
        self._stream.launch("step", lambda: self._run(plan, tokens), tokens=plan.num_tokens)
        return SimFlight(plan, self._stream, self._stream.mark(), tokens)

    def usable(self) -> bool:
        """Return True: a simulated device does not break."""
        return True

    def _run(self, plan: StepPlan, out: list[int]) -> None:
        for admission in plan.admissions:
            self._table[admission.slot] = {}
            self._length[admission.slot] = admission.start
            self._seed[admission.slot] = admission.seed if admission.temperature > 0 else 0
        for slot, index, page in zip(plan.page_slots, plan.page_indices, plan.page_ids, strict=True):
            self._table[int(slot)][int(index)] = int(page)
        if self._fault is not None:
            self._fault(plan)
        at, emits = 0, set(plan.emits.tolist())
        for row, slot in enumerate(plan.slots.tolist()):
            if row < plan.num_decode:
                tokens = [self._last[slot]]
            else:
                tokens = plan.prompt[at : at + int(plan.counts[row])].tolist()
                at += len(tokens)
            table, length = self._table[slot], self._length[slot]
            assert length == plan.starts[row], f"slot {slot} is at {length}, the plan says {plan.starts[row]}"
            for i, token in enumerate(tokens):
                self._kv[table[(length + i) // PAGE], (length + i) % PAGE] = token
            length = self._length[slot] = length + len(tokens)
            if row in emits:
                pages = [table[i] for i in range(-(-length // PAGE))]
                seen = self._kv[pages].reshape(-1)[:length]
                self._last[slot] = self._model.next_token(seen, seed=self._seed[slot])
                out.append(self._last[slot])
