"""One rank of bench/tensor_parallel.py, which starts it: one part of a model, and what measures it.

python bench/tensor_parallel_rank.py '{"rank": 0, "size": 1, ...}'
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._C._distributed_c10d import FileStore

from overlap.cache.pages import PAGE
from overlap.graphs.capture import CaptureError, Graph, Recorder
from overlap.graphs.eager import drive
from overlap.microbatch.halves import Half, cut, drive_together
from overlap.models.config import ModelConfig
from overlap.models.dummy import DummyCheckpoint
from overlap.models.llama import Llama
from overlap.models.load import build
from overlap.models.program import Batch, Pending, Ranks
from overlap.models.shard import shard_config
from overlap.observe.progress import bar
from overlap.ops.attention import Attention, AttentionRows, choose_attention
from overlap.parallel.group import Group
from overlap.parallel.watched import Span, Watched, picture

SHAPES = {  # hidden, between gate and down, layers, heads, kv heads, head size, vocabulary
    "llama-8b": (4096, 14336, 32, 32, 8, 128, 128256),
    "llama-1b": (2048, 8192, 16, 32, 8, 64, 128256),
    "small": (512, 1536, 8, 8, 4, 64, 16000),
    "tiny": (64, 128, 2, 4, 2, 16, 500),
}
GIVE_UP_S = 120.0
"""After so long without the other ranks a sum fails."""


def shape_of(name: str, layers: int) -> ModelConfig:
    """Return the configuration of a shape, of so many layers (0: all)."""
    hidden, inner, own_layers, heads, kv_heads, head_dim, vocabulary = SHAPES[name]
    return ModelConfig(
        architecture="LlamaForCausalLM", vocab_size=vocabulary, hidden_size=hidden, num_layers=layers or own_layers,
        num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, intermediate_size=inner, rms_norm_eps=1e-5,
        rope_theta=500000.0, rope_scaling=None, context=8192, tied_embeddings=False, attention_bias=False,
        mlp_bias=False, eos_token_ids=(2,), bos_token_id=1, dtype="bfloat16",
    )  # fmt: skip


@dataclass(frozen=True)
class Load:
    """A step: `rows` rows that run `count` tokens each, behind `start` that they have."""

    name: str
    rows: int
    count: int
    start: int

    @property
    def tokens(self) -> int:
        """Tokens that it runs."""
        return self.rows * self.count

    @property
    def pages(self) -> int:
        """Pages of each row."""
        return -(-(self.start + self.count) // PAGE)


@dataclass(frozen=True)
class Part:
    """Some rows of a load, ready to be run."""

    batch: Batch
    rows: AttentionRows
    emits: Tensor
    """int64 [rows]: the last token of each."""


def part_of(load: Load, first: int, stop: int, kv: Tensor, vocabulary: int) -> Part:
    """Return the rows `first` to `stop` of a load."""
    rows = np.arange(first, stop, dtype=np.int32)
    pages = (rows[:, None] * load.pages + np.arange(load.pages)).astype(np.int32)
    at = np.arange(load.start, load.start + load.count, dtype=np.int32)
    place = pages[:, at // PAGE] * PAGE + at % PAGE
    ids = (rows[:, None] * 7919 + at * 31) % (vocabulary - 3) + 3

    def put(column: Any) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(column)).to(kv.device)

    batch = Batch(
        token_ids=put(ids.ravel().astype(np.int32)), positions=put(np.tile(at, len(rows))),
        kv_index=put(place.ravel().astype(np.int32)), kv=kv,
    )  # fmt: skip
    decode = load.count == 1
    return Part(
        batch,
        AttentionRows(
            num_decode=len(rows) if decode else 0,
            seq_lens=put(np.full(len(rows), load.start + load.count, dtype=np.int32)),
            page_table=put(pages),
            starts=np.full(len(rows), load.start, dtype=np.int32),
            counts=np.full(len(rows), load.count, dtype=np.int32),
            chunk_pages=np.empty(0, np.int32) if decode else pages.ravel(),
        ),
        torch.arange(1, len(rows) + 1, device=kv.device) * load.count - 1,
    )


class _Nothing:
    """A sum that does nothing."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def wait(self) -> Tensor:
        return self.x


class Switch:
    """Ranks whose sums can be turned off, or be somebody else's."""

    def __init__(self, ranks: Ranks) -> None:
        self.rank, self.size, self.to, self.sums = ranks.rank, ranks.size, ranks, True

    def sum(self, x: Tensor) -> Tensor:
        """Sum, or not."""
        return self.to.sum(x) if self.sums else x

    def start_sum(self, x: Tensor) -> Pending:
        """Begin to."""
        return self.to.start_sum(x) if self.sums else _Nothing(x)

    def gather(self, x: Tensor) -> Tensor:
        """Gather."""
        return self.to.gather(x)


def _launch(graph: Graph, recorded: Callable[[], None]) -> None:  # noqa: ARG001
    """Launch a graph. It keeps addresses only, so `recorded` keeps the tensors that it was recorded with."""
    graph.launch()


class Rank:
    """One rank's part of the model, and what measures it."""

    def __init__(self, asked: argparse.Namespace) -> None:
        self.asked = asked
        cuda = asked.device == "cuda"
        self.device = torch.device(f"cuda:{asked.rank}" if cuda else "cpu")
        if cuda:
            torch.cuda.set_device(self.device)
        self.switch: Switch | None = None
        self.group: Group | None = None
        if asked.size > 1:
            store = FileStore(asked.meet, asked.size)
            self.group = Group(store, asked.rank, asked.size, self.device, timeout_s=GIVE_UP_S)
            self.switch = Switch(self.group)
        self.config = shape_of(asked.shape, asked.layers)
        self.dtype: torch.dtype = getattr(torch, asked.dtype)
        self.loads = loads_of(asked)
        self.program: Llama = build(
            DummyCheckpoint(self.config), device=self.device, dtype=self.dtype, ranks=self.switch,
            progress=asked.rank == 0 and sys.stderr.isatty(),
        )  # fmt: skip
        own = shard_config(self.config, asked.size)
        pages = max(load.rows * load.pages for load in self.loads)
        self.kv = torch.zeros(
            (pages, own.num_layers, 2, PAGE, own.num_kv_heads, own.head_dim), dtype=self.dtype, device=self.device
        )
        most = max(load.pages for load in self.loads)
        chosen = [choose_attention(self.kv, own.num_heads, max_pages_per_row=most)[0] for _ in range(2)]
        self.attentions: list[Attention] = chosen
        self.recorder = Recorder(self.device) if cuda and not asked.eager else None
        self.graphs: list[Graph] = []

    # ── what is run ──────────────────────────────────────────────────────────────────────────────────────────────

    def parts(self, load: Load, way: str) -> list[Part]:
        """Return the load as one part, or two."""
        counts = np.full(load.rows, load.count, dtype=np.int32)
        middle = cut(counts) if way == "halves" else None
        bounds = [0, load.rows] if middle is None else [0, middle, load.rows]
        pairs = pairwise(bounds)
        return [part_of(load, first, stop, self.kv, self.config.vocab_size) for first, stop in pairs]

    def step(self, parts: list[Part], out: Tensor) -> None:
        """Enqueue a step; `out` [rows] gets the tokens."""
        pairs = list(zip(parts, self.attentions, strict=False))
        for part, attention in pairs:
            attention.plan(part.rows)
        if len(parts) == 1:
            hidden = [drive(self.program.forward(parts[0].batch), self.attentions[0])]
        else:
            halves = [Half(self.program.forward(part.batch), attention) for part, attention in pairs]
            hidden = drive_together(halves)
        last = [h.index_select(0, part.emits) for h, part in zip(hidden, parts, strict=True)]
        out.copy_(self.program.greedy(torch.cat(last)))

    def sums(self, xs: list[Tensor]) -> None:
        """Enqueue all sums of a forward over such hidden states, one behind the other."""
        assert self.switch is not None
        for _ in range(2 * self.config.num_layers):
            for x in xs:
                self.switch.to.sum(x)

    def captured(self, load: Load, run: Callable[[], None]) -> tuple[Callable[[], None], bool]:
        """Return what runs it, and whether that is a graph."""
        run()
        if self.recorder is None or load.count > 1:
            return run, False
        try:
            with self.recorder.recording():
                self.recorder.begin()
                run()
                self.graphs.append(self.recorder.end())
                return partial(_launch, self.graphs[-1], run), True
        except CaptureError as failure:
            print(f"{load.name} could not be captured: {failure}", file=sys.stderr)
            return run, False

    def seconds(self, run: Callable[[], None]) -> float:
        """Return how long it takes here, from a moment at which all ranks begin."""
        if self.switch is not None:
            self.switch.to.sum(torch.ones(1, device=self.device))
        if self.device.type == "cpu":
            began = time.perf_counter()
            run()
            return time.perf_counter() - began
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        run()
        end.record()
        torch.cuda.synchronize(self.device)
        return float(start.elapsed_time(end)) / 1e3

    # ── what is told ─────────────────────────────────────────────────────────────────────────────────────────────

    def measure(self, load: Load) -> Iterator[dict[str, Any]]:
        """Yield the lines of a load."""
        rounds, runs, graph = self.asked.rounds, dict[str, Callable[[], None]](), False
        tokens = {way: torch.zeros(load.rows, dtype=torch.int32, device=self.device) for way in ("serial", "halves")}
        for way, out in tokens.items():
            parts = self.parts(load, way)
            for sums in (True, False)[: 1 if self.switch is None else 2]:
                if self.switch is not None:
                    self.switch.sums = sums
                name = way if sums else f"{way} without"
                run, graph = self.captured(load, partial(self.step, parts, out if sums else out.clone()))
                runs[name] = run if graph or sums else partial(self._without, run)
            if self.switch is not None:
                self.switch.sums = True
                shape = (len(part.batch.token_ids) for part in parts)
                xs = [torch.zeros(n, self.config.hidden_size, dtype=self.dtype, device=self.device) for n in shape]
                runs[f"{way} sums"], _ = self.captured(load, partial(self.sums, xs))
        took: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(rounds):
            for name, run in runs.items():
                took[name].append(self.seconds(run))
        about = {
            "bench": "tensor_parallel", "load": load.name, "ranks": self.asked.size, "shape": self.asked.shape,
            "layers": self.config.num_layers, "rows": load.rows, "tokens": load.tokens,
        }  # fmt: skip
        about_run = {
            "graph": graph, "rounds": rounds, "dtype": self.asked.dtype, "device": name_of(self.device),
            "attention": self.attentions[0].name, "torch": torch.__version__,
        }  # fmt: skip
        ms = {name: 1e3 * statistics.median(each) for name, each in took.items()}
        same = float((tokens["serial"] == tokens["halves"]).float().mean())
        for way in tokens:
            spread = [round(1e3 * edge(took[way]), 3) for edge in (min, max)]
            figures = {"way": way, "step_ms": round(ms[way], 3), "spread_ms": spread}
            yield {**about, **figures, "tokens_per_s": round(1e3 * load.tokens / ms[way], 1), **about_run}
        if self.switch is None:
            return
        hidden = (ms["serial"] - ms["halves"]) / ms["serial sums"]
        own = 1 - (ms["halves"] - ms["halves without"]) / ms["halves sums"]
        yield {
            **about, "figure": "sums hidden", "hidden": round(hidden, 3), "hidden_in_halves": round(own, 3),
            "ms": {name: round(each, 3) for name, each in ms.items()}, "same_tokens": round(same, 4), **about_run,
        }  # fmt: skip

    def _without(self, run: Callable[[], None]) -> None:
        assert self.switch is not None
        self.switch.sums = False
        try:
            run()
        finally:
            self.switch.sums = True

    def watch(self, load: Load) -> dict[str, list[Span]]:
        """Return what ran when, of a step each way."""
        assert self.switch is not None
        watched, found = Watched(self.switch.to, self.device), dict[str, list[Span]]()
        for way in ("serial", "halves"):
            parts, out = self.parts(load, way), torch.zeros(load.rows, dtype=torch.int32, device=self.device)
            self.step(parts, out)
            group, self.switch.to = self.switch.to, watched
            try:
                group.sum(torch.ones(1, device=self.device))
                watched.begin()
                self.step(parts, out)
                found[way] = watched.end()
            finally:
                self.switch.to = group
        return found


def name_of(device: torch.device) -> str:
    """Return the GPU's name, or how many cores a rank has."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.get_num_threads()} core(s) a rank"


def loads_of(asked: argparse.Namespace) -> list[Load]:
    """Return what is asked for, by name."""
    rows, length = asked.prefill
    found = [Load("prefill", rows, length, 0)]
    found += [Load(f"decode {rows}", rows, 1, asked.context - 1) for rows in asked.decode]
    return [load for load in found if load.rows]


def be_rank(asked: argparse.Namespace) -> None:
    """Be one rank: measure all loads; rank 0 prints."""
    cuda = asked.device == "cuda"
    with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream(asked.rank)) if cuda else nullcontext():  # type: ignore[no-untyped-call]
        rank = Rank(asked)
        show = None if asked.rank == 0 else False
        with bar(len(rank.loads), f"{asked.size} ranks", "load", asked=show) as progress:
            for load in rank.loads:
                for line in rank.measure(load):
                    if asked.rank == 0:
                        print(json.dumps(line), flush=True)
                progress.update()
        if asked.picture and rank.switch is not None:
            found = rank.watch(rank.loads[0])
            if asked.rank == 0:
                load = rank.loads[0]
                title = (
                    f"{asked.shape} on {asked.size} ranks ({name_of(rank.device)}): {load.name}, {load.tokens} tokens"
                )
                Path(asked.picture).write_text(picture(found, title), encoding="utf-8")
        for graph in rank.graphs:  # NCCL does not end while a graph has a sum of it
            graph.close()
        if rank.group is not None:
            rank.group.sum(torch.ones(1, device=rank.device))  # nobody leaves while another still sums
            rank.group.close()


if __name__ == "__main__":
    try:
        be_rank(argparse.Namespace(**json.loads(sys.argv[1])))
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # at once: a group that others have not left yet may end the process by a signal on its way out
