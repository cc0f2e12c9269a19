"""Which kernels make a whole decode step fastest?

    python bench/in_step.py --shape smollm2-135m --rows 1 8               steps of one position a row
    python bench/in_step.py --shape smollm2-135m --rows 1 8 --width 5     steps that verify four drafts
    python bench/in_step.py --drafter --rows 1 8                          three drafts of SmolLM2's EAGLE head

`bench/kernels.py` asks that of each product alone, whose calls do not depend on each other. In a step they do: a kernel
waits for the one in front, so what counts at few rows is how soon it ends, not how much it does. This captures a step
of random weights (its layers and its greedy head, no drafter) as one graph, replays it, and tries the cuts of one
product after the other, of decode attention, and of two products with a norm between them together, in place of those
that the engine takes, keeping what was better by half a percent. Rows have between a half and three halves of the
context, in two sizes of it.

A JSON line for each part: µs of a step with each cut, the best first; then lines for `MEASURED` in
src/overlap/ops/linear_choice.py, and the cut of attention for src/overlap/ops/decode_triton.py; the last line is JSON.
A cut that fails, or with which the step's hidden states are another's, is dropped, and said. `--compile` only compiles.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from overlap.cache.pages import PAGE
from overlap.models.config_json import read_config
from overlap.models.dummy import DummyCheckpoint
from overlap.models.llama import Llama
from overlap.models.load import build
from overlap.models.program import Attend, Batch, Forward
from overlap.ops import linear_choice
from overlap.ops.decode_triton import Cut, DecodeKernel
from overlap.ops.linear_choice import Op, Tiles, bucket
from overlap.spec.drafter import Entry
from overlap.spec.eagle import load_head
from overlap.spec.shipped import shipped_head

sys.path.insert(0, str(Path(__file__).parent))
from kernels import Question, candidates, questions  # type: ignore[import-not-found]
from offline import SHAPES  # type: ignore[import-not-found]

Way: TypeAlias = tuple[Op | None, Tiles | None]
"""(the op that a kernel of ours does, its cut); (None, None) for the library's product."""
CONTEXTS = (256, 1024)
PAIRS = (("o", "gate_up"), ("down", "qkv"))
"""Products with a norm between them."""
BETTER = 0.995
WRONG = 0.05
"""Relative error of the final states from which on a cut computes something else, and..."""
CLOSE = 0.2
"""...by how many standard deviations of the logits its tokens may be short of the best: weights are random, and close
calls many."""


class Step:
    """One step of some rows, captured anew for each way to run it."""

    def __init__(self, model: Llama, rows: int, width: int) -> None:
        self.model, self.rows, self.width = model, rows, width
        self.cut: Cut | None = None
        heads, head_dim = self.model.num_kv_heads, self.model.head_dim
        pages = -(-CONTEXTS[-1] * 3 // 2 // PAGE) + 1
        layers = self.model.num_layers
        shape = (self.rows * pages + 1, layers, 2, PAGE, heads, head_dim)
        self.kv = torch.empty(shape, dtype=torch.bfloat16, device="cuda")
        self.kv.normal_()
        table = torch.randperm(self.rows * pages).int().view(self.rows, pages).cuda()
        self.table = torch.zeros(self.rows, 512, dtype=torch.int32, device="cuda")
        self.table[:, :pages] = table
        self.ids = (torch.arange(self.rows * self.width, dtype=torch.int32) * 7919 % 40000).cuda()
        self.lengths = torch.zeros(self.rows, dtype=torch.int32, device="cuda")
        self.positions = torch.zeros(self.rows * self.width, dtype=torch.int32, device="cuda")
        self.places = torch.zeros_like(self.positions)

    def at(self, context: int) -> None:
        """Give the rows their lengths, all of them known to the graph by address."""
        share = torch.linspace(0.5, 1.5, self.rows) if self.rows > 1 else torch.ones(1)
        lengths = (share * context).int().clamp(min=self.width).cuda()
        self.lengths.copy_(lengths)
        within = torch.arange(self.width, dtype=torch.int32, device="cuda")
        positions = lengths[:, None] - self.width + within
        pages = self.table.gather(1, (positions // PAGE).long())
        self.positions.copy_(positions.view(-1))
        self.places.copy_((pages * PAGE + positions % PAGE).view(-1))

    def run(self, kernel: DecodeKernel) -> tuple[Tensor, Tensor]:
        """Enqueue the step; return its final states and its tokens."""
        batch = Batch(token_ids=self.ids, positions=self.positions, kv_index=self.places, kv=self.kv)
        states = self._driven(self.model.forward(batch), kernel)
        return states, self.model.greedy(states)

    def _driven(self, forward: Forward, kernel: DecodeKernel) -> Tensor:
        """Return what a forward returns, its joints answered."""
        try:
            joint = next(forward)
            while True:
                assert isinstance(joint, Attend)
                out = torch.empty_like(joint.q_THD)
                kernel.attend(joint.layer, joint.q_THD, self.table, self.lengths, out, self.width)
                joint = forward.send(out.view(out.shape[0], -1))
        except StopIteration as ended:
            states: Tensor = ended.value
        return states

    def answer(self) -> tuple[Tensor, Tensor]:
        """Return the final states and the tokens, run kernel by kernel."""
        self.at(CONTEXTS[0])
        states, tokens = self.run(self.kernel())
        return states.float(), tokens

    def logits(self, states: Tensor) -> Tensor:
        """Return what the tokens are the best of."""
        return self.model.logits(states.to(self.model.dtype))

    def kernel(self) -> DecodeKernel:
        """Return attention as it is cut now."""
        return DecodeKernel(self.kv, self.model.num_heads, self.rows, self.width, self.cut)

    def time_us(self, groups: int = 4) -> float:
        """Return the microseconds of a replay, the mean over the contexts of the best of some groups of replays."""
        kernel = self.kernel()
        self.run(kernel)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.run(kernel)
        begin: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        total = 0.0
        for context in CONTEXTS:
            self.at(context)
            graph.replay()
            best = float("inf")
            for _ in range(groups):
                begin.record()
                for _ in range(8):
                    graph.replay()
                end.record()
                end.synchronize()
                best = min(best, begin.elapsed_time(end) / 8)
            total += 1e3 * best
        return total / len(CONTEXTS)


class Drafts(Step):
    """Three drafts of the head that comes along, one behind the other."""

    def __init__(self, model: Llama, rows: int) -> None:
        super().__init__(model, rows, 1)
        self._head = load_head(shipped_head("smollm2-135m-instruct", model), model)
        self._hidden = torch.randn(rows, model.config.hidden_size, device="cuda")

    def run(self, kernel: DecodeKernel) -> tuple[Tensor, Tensor]:
        """Enqueue the drafts; return the head's states and tokens at the last."""
        states, tokens = self._hidden, self.ids
        for _ in range(3):
            entry = Entry(token_ids=tokens, positions=self.positions, kv_index=self.places, hidden=states)
            states = self._driven(self._head.forward(entry, self.kv), kernel)
            tokens = self._head.greedy(states)
        return states, tokens

    def logits(self, states: Tensor) -> Tensor:
        """Return what the tokens of the last draft are the best of."""
        return self._head.logits(states)


def drafter_questions() -> list[Question]:
    """The products of the head that comes along, but for one that the target has, too."""
    return [
        Question("qkv", ("rope",), 960, 1152, (9, 3, 64)), Question("gate_up", ("norm_gated", "gated"), 640, 576),
        Question("down", ("add",), 576, 640), Question("head", ("norm", "plain"), 4096, 576),
    ]  # fmt: skip


def put(question: Question, rows: int, way: Way) -> None:
    """Have the step answer this question in this way."""
    op, tiles = way
    for each in question.ops:
        linear_choice.MEASURED[each, question.outputs, question.inputs, bucket(rows)] = tiles if each == op else None
    if op is None:
        linear_choice.MEASURED["plain", question.lines, question.inputs, bucket(rows)] = None


def taken(question: Question, rows: int) -> Way:
    """Return the way that the engine takes."""
    for op in question.ops:
        tiles = linear_choice.choose(op, question.outputs, question.inputs, rows)
        if tiles is not None:
            return op, tiles
    return None, None


def ways(question: Question, rows: int) -> list[Way]:
    """Return what is tried for a product: all that is worth trying of its most fused ops, and the library."""
    found: list[Way] = []
    for op in question.ops if question.head_norm else question.ops[:2]:
        for tiles in candidates(op, question, rows):
            found.append((op, tiles))
            if tiles.kernel == "gemv" and tiles.warps > 2:
                found.append((op, Tiles("gemv", tiles.block_o, tiles.block_i, tiles.warps // 2)))
    return [*dict.fromkeys(found), (None, None)]


def attention_cuts(step: Step) -> list[Cut | None]:
    """Return the cuts of attention that are tried; None for the engine's own."""
    group = step.model.num_heads // step.model.num_kv_heads
    pairs = step.rows * step.model.num_kv_heads
    if pairs > 64:
        return [None, *_many_rows_cuts(step.model.head_dim, step.width * group)]
    found: list[Cut | None] = [None]
    for block_n, warps in ((64, 4), (128, 4), (128, 8), (256, 8), (64, 2), (32, 2)):
        if block_n * step.model.head_dim > 128 * 128:
            continue
        for programs in (132, 264, 528):
            for queries in (4, 8, 32) if step.width * group > 8 else (32,):
                found.append(Cut(programs, block_n, warps, queries=queries))  # noqa: PERF401
    return found


def _many_rows_cuts(head_dim: int, queries: int) -> Iterator[Cut]:
    """Yield cuts for rows that have about a program each, or several if they are long."""
    blocks = ((64, 4), (128, 4), (128, 8), (32, 2)) if head_dim <= 64 else ((64, 4), (64, 8), (128, 8), (32, 4))
    for block_n, warps in blocks:
        for ahead in (False, True) if queries <= 8 and (block_n, warps) == (64, 4) else (False,):
            for programs in (264, 528):
                yield Cut(programs, block_n, warps, ahead)
            for keys in (512, 1024, 4096):
                for splits in (2, 4, 8):
                    yield Cut(1 << 31, block_n, warps, ahead, keys=keys, splits=splits)


def compile_all(step: Step, asked: list[Question], *, attention: bool) -> None:
    """Run each way once, so that nothing is compiled while something is timed."""

    def once() -> None:
        try:
            step.run(step.kernel())
        except Exception as failure:  # said again, with its name, when it is timed
            sys.stderr.write(f"a cut does not compile: {type(failure).__name__}\n")

    tokens = step.rows * step.width
    for question in asked:
        before = taken(question, tokens)
        for way in ways(question, tokens):
            put(question, tokens, way)
            once()
        put(question, tokens, before)
    for both in pairs_of(asked):
        kept = [taken(question, tokens) for question in both]
        in_front = {
            tiles.blocks(both[0].outputs): (op, tiles) for op, tiles in ways(both[0], tokens) if tiles is not None
        }
        for first in in_front.values():  # what is behind is compiled for each number of parts that comes from there
            put(both[0], tokens, first)
            for second in ways(both[1], tokens):
                put(both[1], tokens, second)
                once()
        for question, way in zip(both, kept, strict=True):
            put(question, tokens, way)
    for cut in attention_cuts(step) if attention else ():
        step.cut = cut
        once()


class Tuning:
    """Tries the ways of one part after the other, and keeps what is better."""

    def __init__(self, step: Step, shape: str) -> None:
        self._step, self._shape = step, shape
        self._states, _ = step.answer()
        self._logits = step.logits(self._states)

    def _fault(self) -> str | None:
        """Return what is wrong with what the step computes now; None if nothing is."""
        states, tokens = self._step.answer()
        error = float((states - self._states).norm() / self._states.norm())
        if error > WRONG:
            return f"relative error {error:.3g}"
        short = float((self._logits.amax(-1) - self._logits.gather(-1, tokens.long()[:, None])[:, 0]).max())
        spread = float(self._logits[self._logits.isfinite()].std())
        return None if short < CLOSE * spread else f"a token is {short:.3g} short of the best"

    def fastest(self, tries: Sequence[Callable[[], None]], most: int) -> list[int]:
        """Return the places of some of those that are right, the fastest first. Leaves the last of all put."""
        took = []
        for place, put_it in enumerate(tries):
            put_it()
            with suppress(Exception):  # `attempt` says what fails
                if self._fault() is None:
                    took.append((self._step.time_us(2), place))
        return [place for _, place in sorted(took)[:most]]

    def attempt(self, name: str, tries: list[tuple[str, Callable[[], None]]]) -> int:
        """Time each, print a line, return the place of the one kept: the first, the engine's, unless one is better."""
        took: list[tuple[float, int]] = []
        dropped: list[tuple[str, str]] = []
        for place, (label, put_it) in enumerate(tries):
            put_it()
            try:
                fault = self._fault()
                if fault is None:
                    took.append((self._step.time_us(), place))
                else:
                    dropped.append((label, fault))
            except Exception as failure:
                dropped.append((label, f"{type(failure).__name__}: {str(failure)[:160]}"))
        tries[0][1]()
        before = best = self._step.time_us(8)
        place = min(took, default=(before, 0))[1]
        if place:
            tries[place][1]()
            best = self._step.time_us(8)
        kept = place if best < BETTER * before else 0
        tries[kept][1]()
        line = {
            "part": name, "shape": self._shape, "rows": self._step.rows, "width": self._step.width,
            "engine_us": round(before, 2), "best_us": round(best, 2), "kept": tries[kept][0],
            "all": [(round(us, 2), tries[place][0]) for us, place in sorted(took)[:12]], "dropped": dropped,
        }  # fmt: skip
        print(json.dumps(line), flush=True)
        return kept


def tune(step: Step, shape: str, asked: list[Question], *, attention: bool) -> dict[str, object]:
    """Try everything, print a line for each part and what to paste, and return the last line."""
    tokens, lines = step.rows * step.width, list[str]()
    tuning, start = Tuning(step, shape), step.time_us(8)
    if attention:
        cuts = attention_cuts(step)

        def take(cut: Cut | None) -> None:
            step.cut = cut

        kept = tuning.attempt("attention", [(str(cut), partial(take, cut)) for cut in cuts])
        lines += [f"attention, {step.rows} rows, width {step.width}: {cuts[kept]}"] if kept else []
    for question in asked:
        first = taken(question, tokens)
        tries = [first, *(way for way in ways(question, tokens) if way != first)]
        if tuning.attempt(question.name, [(str(way), partial(put, question, tokens, way)) for way in tries]):
            lines += pasted(question, tokens)
    for both in pairs_of(asked):
        if together(tuning, tokens, both):
            lines += [line for question in both for line in pasted(question, tokens)]
    print("\n".join(lines), flush=True)
    return {
        "bench": "in_step", "shape": shape, "rows": step.rows, "width": step.width, "engine_us": round(start, 2),
        "tuned_us": round(step.time_us(8), 2), "device": torch.cuda.get_device_name(), "torch": torch.__version__,
    }  # fmt: skip


def pairs_of(asked: list[Question]) -> list[list[Question]]:
    """Return the pairs of products with a norm between them, of those that are asked for."""
    found = [[question for name in pair for question in asked if question.name == name] for pair in PAIRS]
    return [both for both in found if len(both) == 2]


def together(tuning: Tuning, rows: int, both: list[Question]) -> bool:
    """Try two products that follow each other together, the fastest few of each; return whether a pair was kept.

    Between two kernels of ours a norm needs none (`ops.fused`), so both may win where neither does alone.
    """
    before = [taken(question, rows) for question in both]
    best: list[list[Way]] = []
    for question, way in zip(both, before, strict=True):
        own = [each for each in ways(question, rows) if each[0] is not None and "norm" not in each[0]]
        found = tuning.fastest([partial(put, question, rows, each) for each in own], 4)
        best.append([own[place] for place in found])
        put(question, rows, way)

    def put_both(first: Way, second: Way) -> None:
        put(both[0], rows, first)
        put(both[1], rows, second)

    pairs = [(before[0], before[1]), *((one, other) for one in best[0] for other in best[1])]
    name = "+".join(question.name for question in both)
    return tuning.attempt(name, [(f"{one}, {other}", partial(put_both, one, other)) for one, other in pairs]) > 0


def pasted(question: Question, rows: int) -> list[str]:
    """Return the table's lines of a question, up to the op that was best."""
    lines = []
    for op in question.ops:
        tiles = linear_choice.MEASURED.get((op, question.outputs, question.inputs, bucket(rows)))
        text = "None"
        if tiles is not None:
            columns = (tiles.kernel, tiles.block_o, tiles.block_i, tiles.warps, tiles.stages, tiles.block_t)
            text = f"Tiles{columns if tiles.kernel in ('split', 'blocks') else columns[:-1]}".replace("'", '"')
        lines.append(f'    ("{op}", {question.outputs}, {question.inputs}, {bucket(rows)}): {text},')
        if tiles is not None:  # of what comes behind nothing was learned
            break
    return lines


def main() -> None:
    """Read the command line, measure, print."""
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("--shape", choices=[name for name in SHAPES if name != "tiny"], default="smollm2-135m")
    arguments.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    arguments.add_argument("--width", type=int, default=1)
    arguments.add_argument("--layers", type=int, default=0, help="layers of the model; 0 for all")
    arguments.add_argument("--part", nargs="+", default=["attention", "gate_up", "qkv", "down", "o", "head"])
    arguments.add_argument("--drafter", action="store_true", help="SmolLM2's EAGLE head in place of the model")
    arguments.add_argument("--compile", action="store_true")
    asked = arguments.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench/in_step.py times CUDA kernels, and there is no CUDA device here.")
    begun = time.perf_counter()
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode(), torch.cuda.stream(stream):
        shape = dict(SHAPES[asked.shape])
        shape["num_hidden_layers"] = asked.layers or shape["num_hidden_layers"]
        (Path(folder) / "config.json").write_text(json.dumps(shape))
        checkpoint = DummyCheckpoint(read_config(Path(folder) / "config.json"))
        model = build(checkpoint, device="cuda", dtype=torch.bfloat16)
        products = drafter_questions() if asked.drafter else questions(asked.shape)
        products = [question for question in products if question.name in asked.part]
        for rows in asked.rows:
            step = Drafts(model, rows) if asked.drafter else Step(model, rows, asked.width)
            attention = "attention" in asked.part
            if asked.compile:
                compile_all(step, products, attention=attention)
            else:
                line = tune(step, asked.shape, products, attention=attention)
                print(json.dumps({**line, "seconds": round(time.perf_counter() - begun, 1)}), flush=True)


if __name__ == "__main__":
    main()
