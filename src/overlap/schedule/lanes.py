"""The two lanes as the planner sees them: what is in the air in each, and how prompts and decode rows share them."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from typing import Final

from overlap.cache.pages import Ints
from overlap.errors import InternalError
from overlap.schedule.plan import MAIN, SIDE, StepPlan
from overlap.schedule.slots import Slots
from overlap.schedule.split import Outlook, Prompts, Ran, Splitter, name_of

_FADES: Final = 31 / 32
"""What is left of what an answer counts for with each that ends behind it."""


class Lane:
    """The steps of one lane that are in the air."""

    __slots__ = ("flying", "planned", "settled")

    def __init__(self) -> None:
        self.flying: deque[int] = deque()
        self.planned = 0
        """Its last step."""
        self.settled = 0
        """The last one that has landed."""

    def note(self, number: int) -> None:
        """A step was planned."""
        self.planned = number
        self.flying.append(number)

    def pass_step(self, number: int) -> None:
        """Its first step has landed."""
        if not self.flying or self.flying[0] != number:
            raise InternalError(f"step {number} was settled after step {self.settled}")
        self.settled = self.flying.popleft()


class Lanes:
    """Asks the splitter, and keeps what it said until the side lane is planned."""

    def __init__(self, slots: Slots, splitter: Splitter | None, token_budget: int) -> None:
        """`splitter` None runs everything in the main lane, prompts and decode rows in one step."""
        self.main: Final = Lane()
        self.side: Final = Lane()
        self.splitter: Final = splitter
        self.side_tokens = 0
        """How many prompt tokens the side lane's next step may have; 0 while it has nothing to plan."""
        self.choices: Final[Counter[str]] = Counter()
        """How many steps with prompts were planned each way, while rows decode: see `StepPlan.way`."""
        self._slots = slots
        self._token_budget = token_budget
        self._share = 0
        self._met = 0, 0
        """The newest step that found the side lane empty, and its share."""
        self._prompts_turn = False
        self._drains = False
        self._came = self._none_ran = 0
        """The number of the main lane's last step when the newest request came, and when nothing was to decode."""
        self._answered = 0.0, 0.0
        """Tokens that answers had at their ends, and might have had: sums in which older ones count less."""

    def __getitem__(self, lane: int) -> Lane:
        return self.side if lane == SIDE else self.main

    def split(self, decoding: Ints, num_decode: int, prompts: Callable[[], Prompts]) -> tuple[bool, int]:
        """Say what the main lane's next step holds: whether prompts go without the decode rows, and their budget.

        Without decode rows the whole budget is theirs: a prompt of just so many tokens needs no second step.

        `decoding` are the slots that decode, which run `num_decode` tokens now: none while masks are made for all of
        them. `prompts` tells of what is to be read, if anyone asks.
        """
        room = self._token_budget - num_decode
        if not len(decoding):
            self._none_ran = self.main.planned
        if self.side.flying:
            return False, 0
        if self.splitter is None or not len(decoding):
            return False, room
        self._drains = False
        mode, tokens = self._choose(decoding, prompts())
        if mode == "lanes":
            return False, 0
        if mode == "mixed":
            return False, min(room, tokens)
        self._prompts_turn = not self._prompts_turn or not num_decode
        return self._prompts_turn, tokens if self._prompts_turn else 0

    def split_again(self, decoding: Ints, prompts: Callable[[], Prompts]) -> None:
        """Ask whether more is read beside what the side lane is reading.

        Once the answer was no, nobody asks before that lane is empty and the way that was chosen can be gone.
        """
        if not self._drains:
            self._drains = self._choose(decoding, prompts())[0] != "lanes"

    def _choose(self, decoding: Ints, prompts: Prompts) -> tuple[str, int]:
        """Ask the splitter; return its mode, and how many prompt tokens to run at once."""
        self.side_tokens = 0
        if self.splitter is None or not prompts.tokens:
            return "mixed", self._token_budget
        context, busy = int(self._slots.next[decoding].sum()), bool(self.side.flying)
        had, most = self._answered
        scale, lefts = had / most if most else 1.0, self._slots.left[decoding]
        left, saved = int(lefts.sum()), float("inf")
        if self.main.planned - self._came > self._came - self._none_ran:  # as long as they came, none has
            saved = (prompts.slot_steps + max(0.0, int(lefts.max(initial=0)) - prompts.longest)) * scale
        choice = self.splitter.choose(
            Outlook(
                len(decoding), context, prompts.all_tokens, busy, prompts.number,
                owed=(left + prompts.answers) * scale / prompts.all_tokens, left=left * scale / max(1, len(decoding)),
                answer=prompts.answers * scale / prompts.num_answers,
                saved=saved / prompts.all_tokens, ready_tokens=prompts.tokens,
            )
        )  # fmt: skip
        tokens = max(1, min(choice.prefill_tokens, self._token_budget))
        self._share = choice.share
        if choice.mode == "lanes":
            self.side_tokens = tokens
        return choice.mode, tokens

    def note_way(self, lane: int, num_decode: int) -> str:
        """Count a step with prompts that is planned while rows decode, by its way; return that."""
        share = self._share if lane == SIDE else 0
        way = name_of(("lanes" if lane == SIDE else "mixed" if num_decode else "serial", share))
        if self.splitter is not None:
            self.choices[way] += 1
        return way

    def explain(self) -> tuple[str, ...]:
        """Return how prompts and decode rows share the device, and why; nothing if they always share a step."""
        if self.splitter is None:
            return ()
        counts = ", ".join(f"{number} {way}" for way, number in self.choices.most_common())
        return (
            *self.splitter.explain(),
            *((f"lanes: while rows decoded, steps with prompts were {counts}",) if counts else ()),
        )

    @property
    def two(self) -> bool:
        """Whether both lanes have something in the air, or are about to."""
        return bool(self.side_tokens or self.side.flying)

    def share(self, lane: int) -> int:
        """Return how many SMs are the decode rows' own during the step that is planned now for `lane`."""
        return self._share if lane == SIDE or self.two else 0

    def note_chunks(self, slots: Ints, number: int, lane: int) -> int:
        """Note that step `number` runs chunks of these slots; return the step of the other lane it has to follow."""
        if lane == SIDE and len(self.side.flying) == 1:
            self._met = number, self._share
        at = self._slots
        steps, others = (at.main_step, at.side_step) if lane == MAIN else (at.side_step, at.main_step)
        steps[slots] = number
        before = int(others[slots].max())
        return before if before > self[1 - lane].settled else 0

    def beside(self, plan: StepPlan) -> tuple[bool, int]:
        """Say of a step that landed just now whether it ran beside another, and how many SMs were the decode rows' own.

        Also of one that was in the air when the side lane's first step came, and knew nothing of it when planned.
        """
        number, share = self._met
        return (True, share) if plan.lane == MAIN and plan.number < number else (plan.beside, plan.share)

    def note_request(self) -> None:
        """A request has come."""
        self._came = self.main.planned

    def note_answer(self, tokens: int, limit: int) -> None:
        """An answer has ended with so many tokens, where it might have had `limit`; 1 says nothing of others."""
        if limit > 1:
            had, most = self._answered
            self._answered = _FADES * had + tokens, _FADES * most + limit

    def note_odd(self, plan: StepPlan) -> None:
        """Tell the splitter that a landed step's launch held up the host, so that what ran meanwhile says nothing."""
        if self.splitter is not None and (self.beside(plan)[0] or self.side.flying):
            self.splitter.spoil(chunk=plan.lane == SIDE)

    def note_time(self, plan: StepPlan, seconds: float) -> None:
        """Tell the splitter what a landed step took, with what the device waited for it."""
        beside, share = self.beside(plan)
        if self.splitter is None or (beside and plan.lane == MAIN and len(plan.prompt)):
            return  # prompts in both lanes at once are an accident, not a way
        context = int(plan.starts[: plan.num_decode].sum())
        attended = 0.0
        if len(plan.prompt):
            starts, counts = (column[plan.num_decode :].astype(float) for column in (plan.starts, plan.counts))
            attended = float((counts * (starts + (counts + 1) / 2)).sum())
        self.splitter.note(Ran(plan.num_decode, context, len(plan.prompt), beside, seconds, share, attended))
