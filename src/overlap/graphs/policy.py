"""Which graph a step takes, and which one is captured next. Imports no torch.

The engine answers before anything is captured. A size that is needed runs without a graph of its own the first time,
and is captured the second time: so that what is needed once costs nothing. While a larger graph serves it within twice
its size, its own waits longer. In idle gaps everything else is captured, what was missed most and then the largest
first (a pool that holds the largest holds all).
"""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, TypeAlias

from overlap.errors import InternalError
from overlap.graphs.buckets import bucket_for
from overlap.schedule.plan import STRIP, SampleKind, StepPlan, is_short, strips_of

Kind: TypeAlias = Literal[
    "greedy", "sampled", "truncated", "shaped", "pieces",
    "wide greedy", "wide sampled", "wide truncated", "wide shaped",
    "short greedy", "short sampled", "short truncated", "short shaped",
    "short drafting greedy", "short drafting sampled", "short drafting truncated", "short drafting shaped",
]  # fmt: skip
"""A whole step, by what its rows ask of the sampler (see `sample_all`): a decode step, wide if it verifies drafts; or a
short one with prompts, in strips (see `state.strips`), drafting if tokens are drafted behind them. Or a forward in
pieces."""
Family: TypeAlias = tuple[Kind, int]
"""A kind, and the positions of each row."""
_PLAIN: Final[dict[SampleKind, Kind]] = {
    "greedy": "greedy",
    "sampled": "sampled",
    "truncated": "truncated",
    "shaped": "shaped",
}
_WIDE: Final[dict[SampleKind, Kind]] = {
    "greedy": "wide greedy",
    "sampled": "wide sampled",
    "truncated": "wide truncated",
    "shaped": "wide shaped",
}
_SHORT: Final[dict[SampleKind, Kind]] = {
    "greedy": "short greedy",
    "sampled": "short sampled",
    "truncated": "short truncated",
    "shaped": "short shaped",
}
_SHORT_DRAFTING: Final[dict[SampleKind, Kind]] = {
    "greedy": "short drafting greedy",
    "sampled": "short drafting sampled",
    "truncated": "short drafting truncated",
    "shaped": "short drafting shaped",
}
_SHORTS: Final = frozenset((*_SHORT.values(), *_SHORT_DRAFTING.values()))
SECOND_USE: Final = 2
PATIENCE: Final = 16
"""Uses of a size before it gets its own graph although a larger one serves it."""
GIVE_UP: Final = 3
"""Failed captures of a kind after which no more of it are tried."""
_FIRST_USE: Final = "first use of its size"
_NO_GRAPHS: Final = "no graphs of this kind here"
_OTHER_WIDTH: Final = "its rows verify another number of drafts than captured steps of so many rows"
_SERVES: Final[dict[Kind, tuple[Kind, ...]]] = {
    kind: (kind, form["sampled"]) if asked == "greedy" else (kind,)
    for form in (_PLAIN, _WIDE, _SHORT, _SHORT_DRAFTING)
    for asked, kind in form.items()
}
"""Whose graphs may run a step, the best first; by rows that are greedy a graph that samples gives the same tokens."""


@dataclass(frozen=True, slots=True)
class Shape:
    """One graph: its kind, and how many rows it runs; of pieces how many tokens, of short steps how many strips."""

    kind: Kind
    size: int
    width: int = 1
    """Positions of each row that verifies drafts; 1 for all other kinds."""

    def __str__(self) -> str:
        if self.kind == "pieces":
            return f"{self.size} tokens in pieces"
        each = f" of {self.width} positions" if self.width > 1 else ""
        return f"{self.size} {self.kind} {'strips' if self.is_short else 'rows'}{each}"

    @property
    def family(self) -> Family:
        """What it has in common with graphs of other sizes."""
        return self.kind, self.width

    @property
    def is_short(self) -> bool:
        """Whether it is of a short step, with prompts."""
        return self.kind in _SHORTS


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do for a step: capture this first, then run that; None for nothing, and for eager."""

    capture: Shape | None
    run: Shape | None
    own: bool = field(default=False, compare=False)
    """Whether what runs it is the graph of its own kind and size: the next such step needs no other decision."""
    first: bool = field(default=False, compare=False)
    """Whether it runs without a graph because it is the first of its size: the next ones will take less."""


def decode_kind(plan: StepPlan) -> Kind | None:
    """Return the kind of decode graph that runs a plan; None for prompt chunks, admissions, and what `_apart` names."""
    if plan.num_decode != plan.num_rows or plan.admissions or _apart(plan) is not None:
        return None
    asked = _asked(plan)
    return _WIDE[asked] if plan.width > 1 else asked


def short_kind(plan: StepPlan) -> Kind | None:
    """Return the kind of graph that runs a plan with prompts whole, if it is short; None if it is none of those."""
    if plan.num_decode == plan.num_rows or len(plan.emits) < plan.num_rows or plan.width > 1:
        return None
    fits = is_short(strips_of(plan.counts), int((plan.starts + plan.counts).max()))
    if not fits or plan.scores is not None or _apart(plan) is not None:
        return None
    return (_SHORT_DRAFTING if plan.drafts else _SHORT)[_asked(plan)]


def _asked(plan: StepPlan) -> SampleKind:
    if plan.shaped:
        return "shaped"
    if plan.truncated:
        return "truncated"
    return "sampled" if len(plan.sampled) else "greedy"


def short_of(kind: Kind) -> tuple[SampleKind, bool]:
    """Return what the rows of a short step ask of the sampler, and whether tokens are drafted behind it."""
    for asked in _SHORT:
        if kind in (_SHORT[asked], _SHORT_DRAFTING[asked]):
            return asked, kind == _SHORT_DRAFTING[asked]
    raise InternalError(f"{kind} are no short step")


def asked_of(kind: Kind) -> SampleKind:
    """Return what the rows of a decode kind ask of the sampler."""
    for narrow, wide in _WIDE.items():
        if kind in (narrow, wide):
            return narrow
    raise InternalError(f"{kind} are no decode step")


def _apart(plan: StepPlan) -> str | None:
    """Return what a plan asks for that no graph of a whole step has; None for nothing."""
    if plan.masked:
        return "rows are held to a form (structured output)"
    return "log-probabilities are told" if plan.logprobs else None


class Policy:
    """Keeps what is captured, what was missed, and what failed. One a lane."""

    def __init__(
        self,
        rows: Sequence[int],
        tokens: Sequence[int],
        wide: Mapping[int, Sequence[int]] | None = None,
        strips: Sequence[int] = (),
    ) -> None:
        """`rows`, `tokens` and `strips` are the buckets of whole decode steps, of pieces, and of short steps; empty for
        none of the kind. `wide` has those of steps that verify drafts, by the positions of each row; without any
        nothing drafts.
        """
        self._wide = dict(wide or {})
        self._fewest = tokens[0] if tokens else 0
        drafting = strips if self._wide else ()
        usual: tuple[SampleKind, ...] = ("sampled", "greedy")
        rare: tuple[SampleKind, ...] = ("truncated", "shaped")
        self._buckets: dict[Family, Sequence[int]] = {}
        for asked_for in (usual, rare):  # in the order in which they are captured
            for width, wide_rows in self._wide.items():
                self._buckets |= {(_WIDE[asked], width): wide_rows for asked in asked_for}
            self._buckets |= {(asked, 1): rows for asked in asked_for}
            self._buckets |= {(_SHORT[asked], 1): strips for asked in asked_for}
            self._buckets |= {(_SHORT_DRAFTING[asked], 1): drafting for asked in asked_for}
            self._buckets["pieces", 1] = tokens
        self._captured: dict[Family, list[int]] = {family: [] for family in self._buckets}
        self._missed: Counter[Shape] = Counter()
        self._failed: dict[Shape, str] = {}
        self._reasons: Counter[str] = Counter()
        self._not_whole: Counter[str] = Counter()

    def decide(self, plan: StepPlan) -> Decision:
        """Return what to capture for a plan, if now is the time, and what to run it with."""
        kind = decode_kind(plan)
        reason = _NO_GRAPHS
        if kind in _WIDE.values() and self._wide and plan.width not in self._wide:
            kind = None  # its graph would read other positions, and bring other tokens
            self._not_whole[_OTHER_WIDTH] += 1
        if plan.num_decode == plan.num_rows and (apart := _apart(plan)) is not None and self._buckets["greedy", 1]:
            self._not_whole[apart] += 1
        tokens = max(plan.num_tokens, self._fewest)  # fewer than the smallest pieces have take as long as those
        count = plan.num_rows
        if kind is None and (kind := short_kind(plan)) is not None:
            count = strips_of(plan.counts)
        if kind is not None and self._buckets.get((kind, plan.width)):
            decision, reason = self._decide((kind, plan.width), count)
            if decision is None and reason == _FIRST_USE:  # its own comes soon: pieces only if they are there
                ready = self._ready(("pieces", 1), tokens)
                decision = None if ready is None else Decision(None, ready)
            if decision is not None:
                return decision
        if self._buckets["pieces", 1] and reason != _FIRST_USE:
            decision, reason = self._decide(("pieces", 1), tokens)
            if decision is not None:
                return decision
        self._reasons[reason] += 1
        return Decision(None, None, first=reason == _FIRST_USE)

    def _decide(self, family: Family, count: int) -> tuple[Decision | None, str]:
        size = bucket_for(count, self._buckets[family])
        if size is None:
            largest = self._buckets[family][-1]
            return None, "larger than any graph" if count > largest else "padding would be more than twice the size"
        wanted = Shape(family[0], size, family[1])
        ready = self._ready(family, count)
        if ready == wanted:
            return Decision(None, ready, own=True), ""
        self._missed[wanted] += 1
        patience = SECOND_USE if ready is None else PATIENCE
        if self._missed[wanted] >= patience and self._may_capture(wanted):
            return Decision(wanted, wanted), ""
        if ready is not None:
            return Decision(None, ready), ""
        return None, _FIRST_USE if self._may_capture(wanted) else "its capture failed"

    def _ready(self, family: Family, count: int) -> Shape | None:
        kind, width = family
        sizes = [(bucket_for(count, self._captured[own, width]), own) for own in _SERVES.get(kind, (kind,))]
        fitting = [Shape(own, size, width) for size, own in sizes if size is not None]
        return min(fitting, key=lambda shape: shape.size, default=None)

    def _may_capture(self, shape: Shape) -> bool:
        return shape not in self._failed and sum(failed.kind == shape.kind for failed in self._failed) < GIVE_UP

    def next_idle(self, *, missed_only: bool = False) -> Shape | None:
        """Return what to capture in an idle moment, or None if all that is of use (or was missed) is there."""
        missed = [shape for shape, _ in self._missed.most_common() if shape.size not in self._captured[shape.family]]
        wanted = next((shape for shape in missed if self._may_capture(shape)), None)
        if wanted is not None or missed_only:
            return wanted
        asked = {shape.kind for shape in self._missed}
        for (kind, width), sizes in self._buckets.items():
            if kind.endswith(("truncated", "shaped")) and kind not in asked:
                continue  # sorting is dear to capture, and few ask for it; nobody has asked for the memory of shaping
            for size in reversed(sizes):
                if size not in self._captured[kind, width] and self._may_capture(Shape(kind, size, width)):
                    return Shape(kind, size, width)
        return None

    @property
    def not_whole(self) -> Counter[str]:
        """Decode steps that could not be one graph, by why. Their forward runs in pieces, where those are captured."""
        return Counter(self._not_whole)

    @property
    def fallbacks(self) -> Counter[str]:
        """Steps without a graph, by why."""
        return Counter(self._reasons)

    def captured(self, shape: Shape) -> None:
        """Take in that a graph is there now."""
        insort(self._captured[shape.family], shape.size)

    def lost(self, shape: Shape, reason: str) -> None:
        """Take in that a graph could not be captured, or could not be launched and is gone."""
        self._failed[shape] = reason
        if shape.size in self._captured[shape.family]:
            self._captured[shape.family].remove(shape.size)

    def explain(self) -> tuple[str, ...]:
        """Return what there is, what failed and why, and how often a step had no graph and why."""
        lines = []
        for family, sizes in self._captured.items():
            kind, width = family
            if self._buckets[family]:
                what = f"whole {kind} decode steps{f' of {width} positions' if width > 1 else ''}, by rows"
                if kind == "pieces":
                    what = "pieces between joints, by tokens"
                elif kind in _SHORTS:
                    what = f"whole {kind} steps with prompts, by strips of {STRIP} positions"
                listed = ", ".join(map(str, sizes)) or "none yet"
                lines.append(f"graphs of {what}: {len(sizes)} of {len(self._buckets[family])} captured: {listed}")
        lines += [f"no graph of {shape}: {reason}" for shape, reason in list(self._failed.items())]
        lines += [f"decode steps not as one graph: {count}: {why}" for why, count in self._not_whole.most_common()]
        lines += [f"steps without a graph: {count}: {reason}" for reason, count in self._reasons.most_common()]
        return tuple(lines)
