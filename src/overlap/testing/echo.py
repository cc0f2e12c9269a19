"""A model with no weights whose answer depends on every byte of KV, and a runner that runs it in virtual time.

The next token is a hash of all tokens before it, read through the page table from a simulated KV memory. So one wrong
page, one stale token, one row of state mixed up with another changes the answer: `EchoModel.answer` says what it
should have been.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from overlap.cache.pages import PAGE, Ints, pages_for
from overlap.schedule.plan import SIDE, StepPlan, broken_rules
from overlap.schedule.shaping import TOLD_WORDS
from overlap.streams.stream import Busy, Mark, Stream

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

    def scores(self, prompt: Sequence[int]) -> list[int]:
        """Return what is told of the tokens of a prompt behind the first, which a device has in place of a score."""
        return [self.next_token(prompt[:end]) for end in range(2, len(prompt) + 1)]

    def answer(self, prompt: Sequence[int], limit: int, *, stop_ids: Sequence[int] = (), seed: int = 0) -> list[int]:
        """Return the answer to a prompt that runs alone: what any engine must give in any company."""
        tokens = list(prompt)
        while len(tokens) < len(prompt) + limit:
            tokens.append(self.next_token(tokens, seed=seed))
            if tokens[-1] in stop_ids:
                break
        return tokens[len(prompt) :]


@dataclass(frozen=True, slots=True)
class _Touched:
    """What a step read and wrote, and when."""

    plan: StepPlan
    busy: Busy
    slots: set[int]
    pages: set[int]
    written: set[int]


@dataclass(slots=True)
class SimFlight:
    """A plan in the simulated air, or one of which some blocks are not queued yet."""

    plan: StepPlan
    stream: Stream
    tokens: list[int]
    scores: list[int]
    blocks: Iterator[Mark | None]
    """Each enqueues one; with the last one comes the mark."""
    blocks_left: int
    marked: Mark | None = None

    def launch_block(self) -> None:
        """Enqueue the next block."""
        self.blocks_left -= 1
        self.marked = next(self.blocks)

    @property
    def mark(self) -> Mark:
        """The place behind its last block."""
        assert self.marked is not None, f"step {self.plan.number} has {self.blocks_left} blocks left"
        return self.marked

    @property
    def landed(self) -> bool:
        """Whether the simulated device is done."""
        return self.marked is not None and self.stream.reached(self.marked)

    async def wait_landed(self) -> Ints:
        """Return the tokens once the simulated device is done."""
        await self.stream.wait_reached(self.mark)
        return np.array(self.tokens, dtype=np.int32)

    def scored(self) -> Ints | None:
        """Return the scores of a plan that asks for some."""
        if self.plan.scores is None:
            return None
        words = np.zeros((len(self.scores), TOLD_WORDS), dtype=np.int32)
        words[:, 0] = self.scores
        return words

    def busy(self) -> Busy:
        """Return when the stream ran it."""
        return self.stream.busy(self.mark)


class SimRunner:
    """Runs plans with an EchoModel on any stream, over state kept as a device would keep it.

    It holds the planner to its word: a row begins where the row before it ended, writes to no page that another row of
    the step reads, to none behind its prefix hit, and to none of `shared()`. Steps of two lanes that run at the same
    time share no slot, and neither writes to a page of the other's.

    `fault(plan)` may raise, to fail a step before its rows run but after its admissions and page updates have been
    applied; `row_fault(plan, row)` may raise before a row runs. As on a device, what was launched behind a failed step
    still runs, over what the failed one left.
    """

    def __init__(
        self,
        stream: Stream,
        model: EchoModel,
        *,
        num_pages: int,
        fault: Callable[[StepPlan], None] | None = None,
        row_fault: Callable[[StepPlan, int], None] | None = None,
        shared: Callable[[], Ints] | None = None,
        side: Stream | None = None,
        side_blocks: int = 1,
        spend: Callable[[], None] | None = None,
    ) -> None:
        """`shared` returns the ids of the pages that must not be written to now: those of the prefix tree.

        `side` is the side lane's stream, of the same device. Its steps are launched in `side_blocks` blocks, each of
        which costs what a launch on the device does; `spend` is called for each, to let the host spend time.
        """
        self._side_blocks, self._spend = side_blocks, spend
        self._streams = (stream, side)
        self._marks: dict[int, Mark] = {}
        self._touched: list[_Touched] = []
        self._model = model
        self._fault = fault
        self._row_fault = row_fault
        self._shared = shared
        self._kv: Ints = np.full((num_pages, PAGE), -1, dtype=np.int32)
        self._table: dict[int, dict[int, int]] = {}
        self._hit: dict[int, int] = {}
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
        scores: list[int] = []
        stream = self._streams[plan.lane]
        assert stream is not None, f"step {plan.number} is for the side lane, and there is none"
        stream.use(plan.share)
        if plan.follows:
            stream.follow(self._marks[plan.follows])
        num_blocks = self._side_blocks if plan.lane == SIDE else 1
        flight = SimFlight(
            plan, stream, tokens, scores, self._blocks(plan, stream, num_blocks, tokens, scores), num_blocks
        )
        if plan.lane != SIDE or num_blocks == 1:
            flight.launch_block()
        return flight

    def _blocks(
        self, plan: StepPlan, stream: Stream, num_blocks: int, tokens: list[int], scores: list[int]
    ) -> Iterator[Mark | None]:
        """Enqueue a plan block by block: the first one runs all of it, since nothing can be seen before the last."""
        work = "step" if self._streams[SIDE] is None else "prompts" if plan.lane == SIDE else "rows"
        for block in range(num_blocks):
            if plan.lane == SIDE and self._spend is not None:
                self._spend()
            run: Callable[[], object] = (lambda: None) if block else (lambda: self._run(plan, tokens, scores))
            stream.launch(work, run, tokens=plan.num_tokens)
            if block < num_blocks - 1:
                yield None
        mark = self._marks[plan.number] = stream.mark()
        if self._streams[SIDE] is not None:
            self._check_beside(plan, stream.busy(mark))
        yield mark

    def _check_beside(self, plan: StepPlan, busy: Busy) -> None:
        """Hold the step against those of the other lane that run at the same time."""
        slots = plan.slots.tolist()
        pages = {slot: [self._table[slot][i] for i in range(pages_for(self._length[slot]))] for slot in slots}
        first = dict(zip(slots, (plan.starts // PAGE).tolist(), strict=True))
        written = {page for slot, own in pages.items() for page in own[first[slot] :]}
        mine = _Touched(plan, busy, set(slots), {page for own in pages.values() for page in own}, written)
        self._touched = [one for one in self._touched if one.busy.end > busy.start - 1000][-64:]
        for other in self._touched:
            if other.plan.lane == plan.lane or other.busy.end <= busy.start or busy.end <= other.busy.start:
                continue
            both = f"steps {other.plan.number} and {plan.number} run at the same time"
            assert not mine.slots & other.slots, f"{both} on slots {mine.slots & other.slots}"
            torn = (mine.written & other.pages) | (mine.pages & other.written)
            assert not torn, f"{both}, and one writes to pages {torn} of the other"
        self._touched.append(mine)

    def usable(self) -> bool:
        """Return True: a simulated device does not break."""
        return True

    def _run(self, plan: StepPlan, out: list[int], scores: list[int]) -> None:
        self._apply_changes(plan)
        starts = self._advance(plan)
        self._check_writes(plan, starts)
        if self._fault is not None:
            self._fault(plan)
        at, emits = 0, set(plan.emits.tolist())
        for row, slot in enumerate(plan.slots.tolist()):
            if self._row_fault is not None:
                self._row_fault(plan, row)
            if row < plan.num_decode:
                tokens = [self._last[slot]]
            else:
                tokens = plan.prompt[at : at + int(plan.counts[row])].tolist()
                at += len(tokens)
            table, start = self._table[slot], starts[row]
            for i, token in enumerate(tokens, start):
                self._kv[table[i // PAGE], i % PAGE] = token
            if row in emits:
                length = start + len(tokens)
                pages = [table[i] for i in range(pages_for(length))]
                seen = self._kv[pages].reshape(-1)[:length]
                self._last[slot] = self._model.next_token(seen, seed=self._seed[slot])
                out.append(self._last[slot])
        if plan.scores is not None:
            scores += self._scores(plan)

    def _scores(self, plan: StepPlan) -> list[int]:
        """Return of each token that is to be scored what the model would have said in its place."""
        assert plan.scores is not None
        assert plan.score_tokens is not None
        chunks = slice(plan.num_decode, None)
        row_P = np.repeat(np.arange(plan.num_decode, plan.num_rows), plan.counts[chunks])
        first_P = np.repeat(np.cumsum(plan.counts[chunks]) - plan.counts[chunks], plan.counts[chunks])
        found = []
        for place, token in zip(plan.scores.tolist(), plan.score_tokens.tolist(), strict=True):
            row = int(row_P[place])
            length = int(plan.starts[row] + place - first_P[place]) + 1
            pages = [self._table[int(plan.slots[row])][i] for i in range(pages_for(length))]
            seen = self._kv[pages].reshape(-1)[:length]
            found.append(self._model.next_token(np.append(seen, token)))
        return found

    def _apply_changes(self, plan: StepPlan) -> None:
        for admission in plan.admissions:
            self._table[admission.slot] = {}
            self._hit[admission.slot] = self._length[admission.slot] = admission.start
            self._last[admission.slot] = -1
            self._seed[admission.slot] = admission.seed if admission.temperature > 0 else 0
        for slot, index, page in zip(plan.page_slots, plan.page_indices, plan.page_ids, strict=True):
            self._table[int(slot)][int(index)] = int(page)

    def _advance(self, plan: StepPlan) -> list[int]:
        """Return where each row starts, and let it end behind its tokens."""
        starts = [self._length[slot] for slot in plan.slots.tolist()]
        assert starts == plan.starts.tolist(), f"rows are at {starts}, the plan says {plan.starts.tolist()}"
        self._length.update(zip(plan.slots.tolist(), (plan.starts + plan.counts).tolist(), strict=True))
        return starts

    def _check_writes(self, plan: StepPlan, starts: list[int]) -> None:
        read: list[int] = []
        written: list[int] = []
        for slot, start in zip(plan.slots.tolist(), starts, strict=True):
            assert start >= self._hit[slot], f"slot {slot} writes at {start}, and {self._hit[slot]} tokens are shared"
            pages = [self._table[slot][index] for index in range(pages_for(self._length[slot]))]
            read += pages
            written += pages[start // PAGE :]
        readers = Counter(read)
        torn = [page for page in written if readers[page] > 1]
        assert not torn, f"step {plan.number} writes to pages {torn}, which other rows read"
        if self._shared is not None:
            torn = sorted(set(written) & set(self._shared().tolist()))
            assert not torn, f"step {plan.number} writes to pages {torn}, which are shared"
