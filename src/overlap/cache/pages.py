"""Pages of KV memory: which are free, which are owned, and which wait behind a fence.

A page that a request gives up while a launched step may still write to it is not free yet. It waits in `Fences` until
that step has been settled; then it goes back to the `PagePool`, once. Slots wait the same way: a slot is a row of
device state, and a launched step may still write there too. Stream order alone would do for one lane, but not for a
second lane or a transfer, so the fence is universal (vllm#45357, mini-sglang#111).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from overlap.errors import InternalError

if TYPE_CHECKING:
    from overlap.cache.tree import Node

PAGE: Final = 16
"""Tokens in a page, which FlashInfer's paged prefill takes; a page of SmolLM2-135M in bf16 is 360 KiB."""

Ints: TypeAlias = npt.NDArray[np.int32]
"""An int32 column."""


def pages_for(tokens: int) -> int:
    """Return how many pages hold `tokens` tokens."""
    return -(-tokens // PAGE)


class PagePool:
    """The free pages, as a stack: what came back last goes out first."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages: Final = num_pages
        self._stack: Ints = np.arange(num_pages - 1, -1, -1, dtype=np.int32)
        self._top = num_pages

    @property
    def num_free(self) -> int:
        """How many pages can be taken now."""
        return self._top

    def take(self, count: int) -> Ints:
        """Take `count` pages. The caller looks at `num_free` first: too few is an InternalError."""
        if count > self._top:
            raise InternalError(f"{count} pages were asked for and {self._top} are free")
        self._top -= count
        return self._stack[self._top : self._top + count].copy()

    def give(self, pages: Ints) -> None:
        """Give pages back. Each was taken, and comes back once."""
        if self._top + len(pages) > self.num_pages:
            raise InternalError(f"{len(pages)} pages came back to a pool of {self.num_pages} with {self._top} free")
        self._stack[self._top : self._top + len(pages)] = pages
        self._top += len(pages)

    def free_pages(self) -> Ints:
        """Return the free pages, for checks: O(pages)."""
        return self._stack[: self._top].copy()


@dataclass(frozen=True, slots=True)
class Fence:
    """`slot` and `pages` may be used again once `step` has been settled, and `node` of the prefix tree let go.

    `side` is a step of the other lane that has to be settled too; 0 for none.
    """

    step: int
    slot: int
    pages: Ints
    node: Node | None = None
    side: int = 0


class Fences:
    """What waits for a step to be settled, in the order of those steps.

    Steps of one lane are settled in order, steps of two lanes are not: a fence that waits for both waits for the main
    lane's first, then for the side lane's.
    """

    def __init__(self) -> None:
        self._fifo: deque[Fence] = deque()
        self._side_fifo: deque[Fence] = deque()
        self._num_pages = 0

    @property
    def num_pages(self) -> int:
        """How many pages wait."""
        return self._num_pages

    def __len__(self) -> int:
        return len(self._fifo) + len(self._side_fifo)

    def __iter__(self) -> Iterator[Fence]:
        return chain(self._fifo, self._side_fifo)

    def put(self, fence: Fence) -> None:
        """Let slot and pages wait until `fence.step`, and `fence.side` if there is one, have been settled."""
        if self._fifo and fence.step < self._fifo[-1].step:
            raise InternalError(f"a fence at step {fence.step} was put behind one at step {self._fifo[-1].step}")
        self._fifo.append(fence)
        self._num_pages += len(fence.pages)

    def pass_step(self, settled: int, side_settled: int = 0) -> Iterator[Fence]:
        """Hand out, once each, the fences whose steps are no later than what is settled in the two lanes."""
        while self._fifo and self._fifo[0].step <= settled:
            fence = self._fifo.popleft()
            if fence.side > side_settled:
                self._side_fifo.append(fence)
                continue
            self._num_pages -= len(fence.pages)
            yield fence
        while self._side_fifo and self._side_fifo[0].side <= side_settled:
            fence = self._side_fifo.popleft()
            self._num_pages -= len(fence.pages)
            yield fence
