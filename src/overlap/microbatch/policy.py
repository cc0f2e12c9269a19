"""Which way a step takes: prompts and decode rows mixed, in turn, or in two lanes. Imports no torch.

The ways are compared by what reading a prompt token costs beyond the decode steps that pass meanwhile. With d and p
what a decode step and a chunk of c tokens take alone:

    in turn    (p + d - v min(1, n)) / c    a chunk, and a decode step
    mixed      (m - v min(1, n)) / c        one step of m does the work of a chunk and of a decode step
    lanes      (P - v min(P / D, n)) / c    during the P of a chunk, decode steps of D pass

A chunk is what could be read now, up to the budget; a mixed step has room for one beside its decode rows. What P and D
are is learned from whole spells of two lanes (`microbatch.learn`), and a step counts with what the device waited for
it: that is lost as surely as what the device works.

v is what a decode step's tokens are worth, and n how many steps can be had for a chunk (`microbatch.worth`). All work
takes (decode steps) * d + (prompt tokens) * that, so the least wins.

With a target for the time between two tokens (p + d, m, or D), only ways that keep it are compared, each with the
largest chunk that keeps it; if none does, those that come nearest. Without one that time weighs ITL_WEIGHT: of ways
that are as good as equal the one with the shortest wins.

**Trials.** A way whose cost is badly known is tried if it would win where it is as good as it may be; what is known of
neighbouring sizes counts, so a new size is rarely tried. What was measured long ago is tried again, the more rarely the
worse it was. Trials are a few to begin with, none where each way was measured before or held to be measured, and one
choice in a hundred in the long run. **Hysteresis.** What was chosen for a size stays until another way is better by
more than noise, several looks in a row; those come sooner.

There is no clock and no chance in it: what is chosen depends on what it was told, and on nothing else.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Final, NamedTuple

from overlap.microbatch.cost import FIRM, CostModel, Kind, alike, size_bucket
from overlap.microbatch.learn import Learner
from overlap.microbatch.worth import Work, work_of
from overlap.schedule.split import Choice, Outlook, Ran, Route, name_of

LOOK: Final = 16
"""Choices of a size between two looks at the costs, and..."""
NEXT_LOOK: Final = 4
"""...while another way seems better."""
BETTER: Final = 0.01
"""By how much all work has to take less another way, for as many looks in a row as STEADY says."""
STEADY: Final = 3
SOON: Final = 32
"""The least number of choices of a size before a way that was not chosen is tried again; doubled with each trial."""
WORTH: Final = 0.002
"""How much longer all work may take for trying again what was slower."""
FIRST_TRIALS: Final = 12
"""Choices for each way that may be trials to begin with, and..."""
TRIAL_SHARE: Final = 0.01
"""...the share of all choices that may be in the long run."""
ITL_WEIGHT: Final = 0.01
"""What a second between two tokens weighs against one that all work takes, where no target is set."""
_SAME_ROWS: Final = 1.125
"""So many times as many rows are as good as as many."""
_MANY_STEPS: Final = 64
"""Decode steps for each chunk from which on it does not matter how many there are."""
_TRIAL_CHOICES: Final = 12
"""The longest trial: a lane may have to run empty before the other way shows."""
_SECOND_OPINIONS: Final = 2
_FORGIVEN: Final = 256
"""Choices after which a way that was slow at first gets its second opinion, however slow it was."""
MOST_SIZES: Final = 1024
"""Sizes of work for which it is remembered what was chosen; of more the half that came most often."""
_TARGET_MARGIN: Final = 0.95
_LEAST_CHUNK: Final = 32


@dataclass(frozen=True, slots=True)
class _Way:
    """One way to do the work at hand."""

    route: Route
    tokens: int
    """Prompt tokens of one chunk."""
    total_s: float
    """A decode step, and the prompt tokens of the outlook, as many as one step may have."""
    slack_s: float
    """By how much that may be less."""
    between_s: float
    """Time between two tokens of a running answer."""
    samples: int
    """Of what is particular to it."""

    @property
    def score_s(self) -> float:
        """The least is the best."""
        return self.total_s + ITL_WEIGHT * self.between_s


class _Step(NamedTuple):
    """One chunk, one way."""

    extra_s: float
    """What it takes beyond the decode steps that pass meanwhile."""
    between_s: float
    unsure_s: float
    """By how much it may take less."""
    samples: int


@dataclass(slots=True)
class _Size:
    """What was chosen for one size of work."""

    route: Route | None = None
    choice: Choice | None = None
    left: int = 0
    """Choices until the next look, ..."""
    rows: int = 0
    """... while there are about so many rows, ..."""
    later: int = 0
    """... of which there will be about so many."""
    chosen: int = 0
    steady: int = 0
    trial: Route | None = None
    trial_left: int = 0
    trial_samples: int = 0
    why: str = ""
    """What was chosen and why, trials apart."""
    seen: dict[Route, int] = field(default_factory=dict)
    """When each way was last chosen or tried, in choices."""
    trials: dict[Route, int] = field(default_factory=dict)
    """How often each was tried."""


class SplitPolicy:
    """A splitter that learns."""

    def __init__(
        self,
        cost: CostModel,
        *,
        token_budget: int,
        target_itl_s: float | None = None,
        shares: tuple[int, ...] = (),
        two_lanes: bool = True,
        patience: int = 0,
    ) -> None:
        """`shares` are the numbers of SMs that decode rows can have to themselves; none without such hardware.

        `two_lanes` False leaves mixed and serial to choose from. `patience` is how many steps are planned before two
        lanes are tried at all, if they were never measured: a short job has no time to find out.
        """
        self.cost = cost
        self.shares: Final = shares
        self.trials = 0
        """How many choices were trials."""
        self._budget = token_budget
        self._target_s = target_itl_s
        self._patience = patience
        lanes: tuple[Route, ...] = tuple(("lanes", share) for share in (0, *shares)) if two_lanes else ()
        self.routes: Final[tuple[Route, ...]] = (("mixed", 0), *lanes, ("serial", 0))
        self._held: Choice | None = None
        self._sizes: dict[tuple[int, ...], _Size] = {}
        self._total = 0
        self._last: Route | None = None
        self._calibrated = self._all_measured()
        self._learner = Learner(cost, token_budget)

    def choose(self, outlook: Outlook) -> Choice:
        """Return how to run the next step. A few microseconds, but for every sixteenth time that a size comes."""
        choice = self._held or self._chosen(outlook)
        self._learner.note_choice(choice, outlook)
        return choice

    def _chosen(self, outlook: Outlook) -> Choice:
        rows, later = outlook.num_decode, outlook.num_decode + max(0, outlook.num_prompts - 1)
        if later <= rows * _SAME_ROWS:
            later = rows
        # Not by context: it grows all the time, and each size would begin anew with trials. With a target the chunk
        # that keeps it hangs on rows and on what is ready, and is kept for some choices; else sizes may be coarse.
        like = alike if self._target_s is None else size_bucket
        key = (
            like(rows), alike(min(outlook.prefill_tokens, self._budget)), alike(later),
            like(min(outlook.ready_tokens, self._budget)),
            alike(self._steps(outlook.owed / max(1, rows))), alike(self._steps(outlook.saved)),
        )  # fmt: skip
        size = self._sizes.get(key)
        if size is None:
            if len(self._sizes) >= MOST_SIZES:
                often = sorted(self._sizes.items(), key=lambda item: -item[1].chosen)
                self._sizes = dict(often[: MOST_SIZES // 2])
            size = self._sizes[key] = _Size(route=self._last)
        size.chosen += 1
        self._total += 1
        if size.left and size.choice is not None and _near(rows, size.rows) and _near(later, size.later):
            size.left -= 1
        else:
            size.rows, size.later = rows, later
            size.choice = self._look(size, outlook, later)
        return size.choice

    def _steps(self, each: float) -> int:
        """Return how many decode steps there are for a chunk, with so many for each of its tokens."""
        return math.ceil(min(each * self._budget, _MANY_STEPS))

    @property
    def calibrated(self) -> bool:
        """Whether each way was measured, by a calibration or before: then few trials are left to make."""
        return self._calibrated

    def begin(self) -> bool:
        """Begin a calibration; False if there is one."""
        begun, self._held = self._held is None, self._held or _held(self.routes[0], self._budget)
        return begun

    def hold(self, route: Route) -> None:
        """Choose this way, whatever is known, with the largest chunks."""
        self._held = _held(route, self._budget)

    def end(self) -> None:
        """End a calibration: choose anew, by what is known now."""
        self._held = None
        self._calibrated = self._all_measured()
        for size in self._sizes.values():
            size.left = 0

    def samples(self, route: Route) -> int:
        """Return how often a chunk read this way was measured, of any size."""
        mode, share = route
        if mode == "lanes":
            return min(self.cost.total("prefill beside", share), self.cost.total("decode beside", share))
        if mode == "mixed":
            return self.cost.total("mixed")
        return min(self.cost.total("prefill"), self.cost.total("decode"))

    def _all_measured(self) -> bool:
        return all(self.samples(route) >= FIRM for route in self.routes)

    def spoil(self, *, chunk: bool) -> None:
        """Forget what ran in two lanes since the last chunk, and do not learn from one that is on its way."""
        self._learner.spoil(chunk=chunk)

    def note(self, ran: Ran) -> None:
        """Take in what a step took."""
        self._learner.note(ran)

    # ── one look at the costs ────────────────────────────────────────────────────────────────────────────────────

    def _look(self, size: _Size, outlook: Outlook, later: int) -> Choice:
        work = work_of(outlook, later, self.cost, self.routes, self._budget)
        ways = {route: self._way(route, work) for route in self.routes}
        if self._total <= self._patience and not self._calibrated:
            ways = {route: way for route, way in ways.items() if route[0] != "lanes" or way.samples}
        if size.trial is not None:
            way = ways.get(size.trial)  # with a row more it may be one of those that wait for patience
            if way is not None and size.trial_left and way.samples < size.trial_samples + FIRM:
                size.trial_left -= 1
                self.trials += 1
                return _choice(way, "a trial of " + name_of(way.route))
            size.seen[size.trial], size.trial = size.chosen, None
        chosen = self._pick(size, ways)
        size.seen[chosen.route] = size.chosen
        size.left, self._last = (NEXT_LOOK if size.steady else LOOK) - 1, chosen.route
        size.why = _why(chosen, ways, self._target_s)
        # What was measured already waits until the share has room for a whole trial.
        first = -_TRIAL_CHOICES if self._calibrated else FIRST_TRIALS * len(self.routes)
        if self.trials < first + TRIAL_SHARE * self._total:
            for way in sorted(ways.values(), key=lambda each: each.score_s - each.slack_s):
                if way.route != chosen.route and self._is_worth_a_trial(size, way, chosen):
                    size.trial, size.trial_left, size.trial_samples = way.route, _TRIAL_CHOICES - 1, way.samples
                    size.trials[way.route] = size.trials.get(way.route, 0) + 1
                    size.left = 0
                    self.trials += 1
                    return _choice(way, "a trial of " + name_of(way.route))
        return _choice(chosen, size.why)

    def _pick(self, size: _Size, ways: dict[Route, _Way]) -> _Way:
        """Return the best way, or the one in use while the best is not better by more than noise."""
        allowed_s = self._allowed_s(ways)
        best = min(ways.values(), key=lambda way: (max(0.0, way.between_s - allowed_s), way.score_s))
        current = ways.get(size.route) if size.route is not None else None
        if current is not None and best is not current and current.between_s <= allowed_s:
            better = best.score_s < current.score_s * (1 - BETTER)
            size.steady = size.steady + 1 if better else 0
            if size.steady < STEADY and best.score_s > current.score_s * (1 - 10 * BETTER):
                return current
        size.steady, size.route = 0, best.route
        return best

    def _allowed_s(self, ways: dict[Route, _Way]) -> float:
        """Return the time between tokens that is aimed at: the target, or near what is possible."""
        if self._target_s is None:
            return float("inf")
        return max(self._target_s, 1.05 * min(way.between_s for way in ways.values()))

    def _is_worth_a_trial(self, size: _Size, way: _Way, chosen: _Way) -> bool:
        if way.between_s * (1 - way.slack_s / way.total_s) > self._allowed_s({chosen.route: chosen}):
            return False
        trials = size.trials.get(way.route, 0)
        waited = size.chosen - size.seen.get(way.route, 0)
        if way.slack_s and way.total_s - way.slack_s < chosen.total_s:
            return not trials or waited >= SOON << min(trials, 10)
        loss = way.total_s / chosen.total_s - 1
        enough = loss * _TRIAL_CHOICES / WORTH
        if trials < _SECOND_OPINIONS and way.samples < 3 * FIRM:
            # its first steps may have been slow for what was built meanwhile
            enough = min(enough / 5, _FORGIVEN) if trials or self._calibrated else 0.0
        return waited >= max(SOON << min(trials, 10), enough)

    # ── the ways ─────────────────────────────────────────────────────────────────────────────────────────────────

    def _way(self, route: Route, work: Work) -> _Way:
        """Return what a way costs, with the largest chunk that keeps the target."""
        most = max(1, self._budget - work.rows) if route[0] == "mixed" else self._budget
        way = self._way_with(route, work, min(most, work.ready))
        if self._target_s is None:  # what is said holds for other prompts of about the size, too
            return replace(way, tokens=most)
        chunk = size_bucket(way.tokens)
        while way.between_s > self._target_s * _TARGET_MARGIN and chunk > _LEAST_CHUNK and route[0] != "lanes":
            chunk = size_bucket(chunk * 2 // 3)
            way = self._way_with(route, work, min(chunk, way.tokens))
        return way

    def _way_with(self, route: Route, work: Work, chunk: int) -> _Way:
        step = self._step(route, work, chunk)
        decode_s, times = self.cost.seconds("decode", work.rows, work.context, 0), work.tokens / chunk
        total_s, slack_s = decode_s + step.extra_s * times, step.unsure_s * times
        return _Way(route, chunk, total_s, slack_s, step.between_s, step.samples)

    def _step(self, route: Route, work: Work, chunk: int) -> _Step:
        (mode, share), cost, rows, context = route, self.cost, work.rows, work.context
        decode_s, decode_slack = cost.guess("decode", rows, context, 0)
        if mode == "mixed":
            mixed_s, slack = cost.guess("mixed", rows, context, chunk)
            samples = cost.count("mixed", rows, context, chunk)
            return _Step(
                max(0.0, mixed_s - work.steps_worth_s(1.0, chunk)), mixed_s, max(slack, decode_slack) * mixed_s, samples
            )
        if mode == "serial":
            prompt_s, slack = cost.guess("prefill", 0, 0, chunk)
            between_s = prompt_s + decode_s
            samples = min(cost.count("prefill", 0, 0, chunk), cost.count("decode", rows, context, 0))
            return _Step(
                between_s - work.steps_worth_s(1.0, chunk), between_s, max(slack, decode_slack) * prompt_s, samples
            )
        beside: tuple[tuple[Kind, int], ...] = (("prefill beside", chunk), ("decode beside", work.tokens))
        (prompt_s, slack), (beside_s, other) = (cost.guess(kind, rows, context, n, share) for kind, n in beside)
        samples = min(cost.count(kind, rows, context, n, share) for kind, n in beside)
        extra_s = max(0.0, prompt_s - work.steps_worth_s(prompt_s / beside_s, chunk))
        between_s = min(beside_s, decode_s + prompt_s * max(0.0, 1 - decode_s / beside_s))
        return _Step(extra_s, between_s, max(slack, other, decode_slack) * prompt_s, samples)

    # ── what it says ─────────────────────────────────────────────────────────────────────────────────────────────

    def explain(self) -> tuple[str, ...]:
        """Return what was chosen and why, a sentence each."""
        aim = "most tokens a second" if self._target_s is None else f"{self._target_s * 1e3:g} ms between tokens"
        lines = [f"lanes: chosen for each step, aiming at {aim}; {self.cost.note_on_file}"]
        measured = ", ".join(f"{name_of(route)} {self.samples(route)}" for route in self.routes)
        missing = "" if self._all_measured() else "; `overlap calibrate` measures them"
        lines.append(f"lanes: steps that each way is known by: {measured}{missing}")
        if self._total:
            lines.append(f"lanes: {self._total} choices, {self.trials} of them to try a way")
        often = sorted(self._sizes.items(), key=lambda item: -item[1].chosen)[:6]
        for (rows, tokens, later, ready, *_), size in often:
            if size.why:
                what = f"up to {rows} rows (soon {later}) beside {tokens} prompt tokens, {ready} at once"
                lines.append(f"lanes: {what}: {size.why}")
        return tuple(lines)


def _near(count: int, other: int) -> bool:
    """Whether two numbers are within a quarter of each other."""
    return 4 * abs(count - other) <= other


def _held(route: Route, tokens: int) -> Choice:
    return Choice(route[0], tokens, route[1], "held, to be measured")


def _choice(way: _Way, why: str) -> Choice:
    return Choice(way.route[0], way.tokens, way.route[1], why)


def _why(chosen: _Way, ways: dict[Route, _Way], target_s: float | None) -> str:
    def told(way: _Way) -> str:
        between = "" if target_s is None else f" ({way.tokens} at once, {way.between_s * 1e3:.1f} ms between tokens)"
        guessed = "" if way.samples else "some "  # never measured at such a size
        return f"{name_of(way.route)} {guessed}{way.total_s * 1e3:.2f} ms{between}"

    others = ", ".join(told(way) for way in ways.values() if way is not chosen)
    return f"{told(chosen)} for a decode step and the prompts, against {others}"
