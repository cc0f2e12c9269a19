"""StepPlan: what one step will do, in integers.

A plan holds no tensors, so it can be made, compared, printed and replayed with no device. It never needs a token
that the device still has: a decode row says in which slot its input token will be, not which one it is. That is what
lets the host plan step N+1 while step N runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

import numpy as np

from overlap.cache.pages import Ints
from overlap.schedule.shaping import Shaped

SampleKind: TypeAlias = Literal["greedy", "sampled", "truncated", "shaped"]
"""What the rows of a step ask for at most: nothing, a temperature, a filter (top-k, top-p, min-p), other logits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Admission:
    """A request takes a slot: what the device must know of it before its first step.

    `start` is the number of its tokens whose KV is there already (0 without a prefix hit). `temperature` 0 means
    greedy; `top_k` 0, `top_p` 1.0 and `min_p` 0.0 mean off. `seed` is any 64-bit pattern, given as an unsigned int.
    """

    slot: int
    start: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    shaped: Shaped | None = None
    """Penalties and the like, if the request has any."""
    spared: Ints | None = None
    """The `start` tokens whose KV is there, where a drafter may want them; None for none of them."""


MAIN: Final = 0
"""The lane of decode steps, and of steps that run prompt chunks and decode rows together."""
SIDE: Final = 1
"""The lane in which prompts are read beside decode steps."""
Ladder: TypeAlias = tuple[tuple[int, int], ...]
"""(Decode rows, drafts), rows ascending and drafts descending: with up to so many rows, one of
`graphs.buckets.row_buckets`, a wide step may verify so many drafts of each. The last is for any number of rows."""
STRIP: Final = 16
"""Positions of a strip (see `state.strips`): as many as the tensor cores take at once, so fewer would cost as much."""
STRIPS: Final = (1, 2, 4, 8, 16)
"""The strips of short steps that are captured: 256 positions at most, for which the device takes about as long as the
host takes to launch pieces."""
_SHORT_READS: Final = 1 << 18
"""Positions of a short step times tokens of its longest row, at most: its attention reads a row's keys anew for each
few positions, where that of pieces reads them once."""
REFUSED: Final = -1
"""What lands in place of a token for a draft that was refused."""
UNUSED: Final = -2
"""What lands for a position of a wide row that had no draft."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """The rows of one step, in the order in which the device sees them: decode rows first, then prompt chunks.

    Legend: R rows, D of them decode rows, T tokens, E rows that emit a token, N page table updates.
    """

    number: int
    """Counts up from 1, over both lanes."""
    lane: int = MAIN
    """MAIN or SIDE."""
    follows: int = 0
    """The step of the other lane that has to be over before this one starts; 0 for none."""
    beside: bool = False
    """Whether the other lane has something to run at the same time."""
    share: int = 0
    """How many SMs of the device are the decode rows' own while both lanes run; 0 lets the lanes compete."""
    way: str = ""
    """Of a step with prompts while rows decode, how the two share the device: "mixed", "serial", "lanes", "lanes sm:N"
    with so many SMs of the decode rows' own; empty for other steps."""
    slots: Ints
    """[R] the slot of each row."""
    counts: Ints
    """[R] how many tokens each row runs: `width` for a decode row, the chunk's length for a prompt chunk."""
    starts: Ints
    """[R] the position of each row's first token. Exact without speculation, an upper bound with it."""
    num_decode: int
    """D: the first D rows take their one token from their slot on the device."""
    width: int = 1
    """How many positions a decode row runs: 1, or with speculation one more than the drafts that it can verify. A row
    of a wide step lands as `width` numbers: its tokens, REFUSED for each refused draft, UNUSED for the rest."""
    drafts: bool = False
    """Whether tokens are drafted for the rows' next step; with a drafter they are read by it in any case."""
    behind: Ints | None = None
    """With a drafter: for each prompt chunk the token of the prompt behind it, -1 where the prompt ends."""
    prompt: Ints
    """[T - D] the tokens of the prompt chunks, row after row."""
    emits: Ints
    """[E] the rows that sample a token, ascending. First the D decode rows, then the chunks that end a prompt."""
    sampled: Ints
    """Indices into `emits` of the rows that are not greedy, ascending."""
    truncated: bool
    """Whether any sampled row uses top-k, top-p or min-p."""
    shaped: bool = False
    """Whether the logits of any emitting row are changed before a token is drawn (see `Shaping`)."""
    logprobs: bool = False
    """Whether log-probabilities of any emitting row's token are asked for."""
    masked: tuple[int, ...] = ()
    """Indices into `emits` of the rows that may choose only some tokens (structured output), ascending ..."""
    masks: tuple[Ints, ...] = ()
    """... and which, one for each: int32 [P, B], first for the row's next token, then behind each of its drafts; bit
    `v % 32` of word `v // 32` for token v."""
    again: bool = False
    """Whether these are the rows of the lane's step before, `slots` being the same object, all of them decode rows of
    the same width, and nothing but positions and pages has changed: what was found out about them then still holds."""
    tells_drafts: int = 0
    """With a drafter: behind all else land so many numbers and one for each masked row: how many drafts its slot holds
    now, and these."""
    scores: Ints | None = None
    """[S] indices into `prompt`, ascending: the tokens behind which a score is asked for; None for none ..."""
    score_tokens: Ints | None = None
    """[S] ... of these tokens. MOST_SCORED at most."""
    admissions: tuple[Admission, ...]
    """Requests that take their slot with this step, applied before anything else."""
    page_slots: Ints
    """[N] page table updates, applied right after the admissions: in the table row of this slot ..."""
    page_indices: Ints
    """[N] ... at this index ..."""
    page_ids: Ints
    """[N] ... stands this page from now on."""
    chunk_pages: Ints
    """The page ids of the prompt chunks' rows, row after row, each row ceil((start + count) / PAGE) of them."""

    @property
    def num_rows(self) -> int:
        """R."""
        return len(self.slots)

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.num_decode * self.width + len(self.prompt)

    def landing(self, emit: int) -> int:
        """Return where among what lands the (first) token of an emit is."""
        return emit * self.width if emit < self.num_decode else emit + (self.width - 1) * self.num_decode

    @property
    def num_landing(self) -> int:
        """How many numbers land for tokens: one for each emitting chunk, `width` for each decode row."""
        return len(self.emits) + (self.width - 1) * self.num_decode

    @property
    def num_draft_words(self) -> int:
        """How many land behind them: see `tells_drafts`."""
        return len(self.masked) * (1 + self.tells_drafts) if self.tells_drafts else 0


def _num(column: Ints | None) -> int:
    return 0 if column is None else len(column)


PLAN_RULES: Final[tuple[tuple[str, Callable[[StepPlan], bool]], ...]] = (
    ("a step has rows", lambda plan: plan.num_rows > 0),
    ("a slot has one row in a step", lambda plan: len(np.unique(plan.slots)) == plan.num_rows),
    ("a row runs at least one token", lambda plan: bool((plan.counts > 0).all() and (plan.starts >= 0).all())),
    ("a decode row runs `width` tokens", lambda plan: bool((plan.counts[: plan.num_decode] == plan.width).all())),
    ("the chunks' tokens are all there", lambda plan: int(plan.counts[plan.num_decode :].sum()) == len(plan.prompt)),
    ("a decode row emits", lambda plan: bool((plan.emits[: plan.num_decode] == np.arange(plan.num_decode)).all())),
    ("each masked row has its mask", lambda plan: len(plan.masked) == len(plan.masks)),
    ("as many tokens are scored as places are named", lambda plan: _num(plan.scores) == _num(plan.score_tokens)),
    ("page updates are of its rows", lambda plan: bool(np.isin(plan.page_slots, plan.slots).all())),
    ("who is admitted has a row", lambda plan: {each.slot for each in plan.admissions} <= set(plan.slots.tolist())),
    ("emitting rows ascend", lambda plan: bool((np.diff(plan.emits) > 0).all())),
)
"""What is true of every plan, as sentences that are also the error messages. Checked in tests.

Page updates and admissions are of the step's own rows, since a step that fails ends its own rows only: others would go
on without them.
"""


def strips_of(counts: Ints) -> int:
    """Return how many strips rows of so many tokens take."""
    return int((-(-counts // STRIP)).sum())


def is_short(num_strips: int, longest: int) -> bool:
    """Whether a step of so many strips, whose longest row ends at `longest` tokens, is short: one launch of a graph."""
    return num_strips <= STRIPS[-1] and num_strips * STRIP * longest <= _SHORT_READS


def widths_for(num_rows: int, ladder: Ladder) -> tuple[int, ...]:
    """Return how many positions each decode row of a wide step of so many may have, the most first: drafts and one."""
    return tuple(1 + drafts for rows, drafts in ladder if num_rows <= rows) or (1 + ladder[-1][1],)


def broken_rules(plan: StepPlan) -> list[str]:
    """Return the sentences of `PLAN_RULES` that are not true of `plan`."""
    return [sentence for sentence, holds in PLAN_RULES if not holds(plan)]
