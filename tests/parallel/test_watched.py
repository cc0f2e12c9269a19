"""What is kept of sums and pieces, over two true ranks of gloo in one process."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._C._distributed_c10d import FileStore

from overlap.graphs.eager import drive
from overlap.microbatch.halves import Half, drive_together
from overlap.models.program import Joint, Reduce
from overlap.ops.attention import TorchAttention
from overlap.parallel.group import Group
from overlap.parallel.watched import Span, Watched, picture

CPU = torch.device("cpu")


class NoAttention(TorchAttention):
    def __init__(self) -> None:
        """Nothing to bind: these forwards have no such joint."""


def forward(ranks: Watched, x: Tensor, sums: int) -> Generator[Joint, Tensor, Tensor]:
    for _ in range(sums):
        x = (yield Reduce(x * 0.5, ranks)) + 1
    return x


def one_rank(path: Path, rank: int, halves: int) -> tuple[list[Span], list[Tensor]]:
    watched = Watched(Group(FileStore(str(path), 2), rank, 2, CPU, timeout_s=30), CPU)
    xs = [torch.full((3,), float(half)) for half in range(halves)]
    watched.begin()
    if halves == 1:
        out = [drive(forward(watched, xs[0], 5), NoAttention())]
    else:
        out = drive_together([Half(forward(watched, x, 5), NoAttention()) for x in xs])
    return watched.end(), out


def both(path: Path, halves: int) -> tuple[list[Span], list[Tensor]]:
    with ThreadPoolExecutor(2) as pool:
        found = [pool.submit(one_rank, path, rank, halves) for rank in range(2)]
        (spans, first), (_, second) = (one.result(60) for one in found)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    return spans, first


@pytest.mark.parametrize("halves", [1, 2, 3])
def test_each_half_has_its_sums_and_the_pieces_around_them(tmp_path: Path, halves: int) -> None:
    spans, out = both(tmp_path / "store", halves)
    assert [float(x[0]) for x in out] == [half + 5.0 for half in range(halves)]
    for half in range(halves):
        sums = [span for span in spans if span.is_sum and span.half == half]
        pieces = [span for span in spans if not span.is_sum and span.half == half]
        assert (len(sums), len(pieces)) == (5, 6)
        for before, one, after in zip(pieces, sums, pieces[1:], strict=False):
            assert before.end <= one.start <= one.end <= after.start
    ordered = [span for span in spans if span.is_sum]
    assert all(a.end <= b.start for a, b in pairwise(ordered))
    assert all(0.0 <= span.start <= span.end for span in spans)


def test_the_picture_says_how_much_of_the_sums_had_compute_beside_them() -> None:
    serial = [Span(False, 0, 0.0, 1.0), Span(True, 0, 1.0, 2.0), Span(False, 0, 2.0, 3.0), Span(True, 0, 3.0, 4.0)]
    halves = [
        Span(False, 0, 0.0, 0.5), Span(False, 1, 0.5, 1.0), Span(True, 0, 0.5, 1.0), Span(True, 1, 1.0, 1.5),
        Span(False, 0, 1.0, 1.25),
    ]  # fmt: skip
    drawn = picture({"serial": serial, "halves": halves}, "a <title> & more")
    ET.fromstring(drawn)
    assert "serial: 3e+03 ms shown of 4e+03; 0% of the sums beside compute" in drawn
    assert "halves: 1e+03 ms shown of 1.5e+03; 75% of the sums beside compute" in drawn
