"""PageStore: every page of KV memory, and who has it.

A page is free, owned by one running request, kept by the prefix tree (which any number of requests may read), or
waiting behind a fence. Free pages and those that the tree keeps for nobody are what a request can get: the tree is
asked for the least recently used ones only when no free page is left, so it fills what would lie idle.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from overlap.cache.pages import PAGE, Fence, Fences, Ints, PagePool
from overlap.cache.tree import Node, PrefixTree
from overlap.errors import InternalError

_NO_PAGES: Final = np.empty(0, dtype=np.int32)


@dataclass(frozen=True, slots=True)
class Hit:
    """What the tree has of a prompt: pages to read, held for the reader until `release`."""

    node: Node | None
    pages: Ints


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreStatistics:
    """Where the pages are."""

    num_pages: int
    free_pages: int
    cached_pages: int
    """Pages in the prefix tree."""
    evictable_pages: int
    """Of those, the ones that no request reads now."""
    fenced_pages: int
    evicted_pages: int
    """Pages that the tree gave up for others since the start."""


class PageStore:
    """Hands out pages, keeps prefixes, and takes back what nobody may write to any more."""

    def __init__(self, num_pages: int, *, prefix_cache: bool = True) -> None:
        self.num_pages: Final = num_pages
        self._pool = PagePool(num_pages)
        self._fences = Fences()
        self._tree = PrefixTree()
        self.keeps_prefixes: Final = prefix_cache
        self._evicted = 0

    @property
    def num_available(self) -> int:
        """How many pages `take` can give now."""
        return self._pool.num_free + self._tree.num_evictable

    @property
    def num_fences(self) -> int:
        """How many slots wait behind a fence."""
        return len(self._fences)

    def take(self, count: int) -> Ints:
        """Take pages for one owner. The caller looks at `num_available` first: too few is an InternalError."""
        short = count - self._pool.num_free
        if short > 0:
            evicted = self._tree.evict(short)
            self._evicted += len(evicted)
            self._pool.give(evicted)
        return self._pool.take(count)

    def find(self, tokens: Ints, salt: str, most_tokens: int | None = None) -> Hit:
        """Return the kept pages of the longest prefix of `tokens`, and hold them. At least one token is left to run.

        The prefix has `most_tokens` at most, where some are given.
        """
        most = (len(tokens) - 1 if most_tokens is None else min(most_tokens, len(tokens) - 1)) // PAGE
        if not self.keeps_prefixes or most == 0:
            return Hit(None, _NO_PAGES)
        node, pages = self._tree.match(tokens, salt, most)
        if node is not None:
            self._tree.hold(node)
        return Hit(node, pages)

    def release(self, node: Node | None) -> None:
        """Let go of what `find` or `keep` held."""
        if node is not None:
            self._tree.release(node)

    def keep(
        self, tokens: Ints, pages: Ints, salt: str, node: Node | None
    ) -> tuple[Node | None, npt.NDArray[np.bool_]]:
        """Offer settled full pages to the tree; return what is held now in place of `node`, and which pages it has."""
        if not self.keeps_prefixes or not len(pages):
            return node, np.zeros(len(pages), dtype=np.bool_)
        end, kept = self._tree.insert(tokens, pages, salt)
        self._tree.hold(end)
        self.release(node)
        return end, kept

    def fence(self, fence: Fence) -> None:
        """Let a slot, its own pages and what it reads wait until the fence's step has been settled."""
        self._fences.put(fence)

    def pass_step(self, settled: int, side_settled: int = 0) -> Iterator[int]:
        """Take back what waited for steps up to those of the two lanes; yield each slot that is free now."""
        for fence in self._fences.pass_step(settled, side_settled):
            self._pool.give(fence.pages)
            self.release(fence.node)
            yield fence.slot

    def clear(self) -> int:
        """Forget every prefix that nobody reads; return how many pages came free."""
        pages = self._tree.clear()
        self._pool.give(pages)
        return len(pages)

    def statistics(self) -> StoreStatistics:
        """Return where the pages are."""
        return StoreStatistics(
            num_pages=self.num_pages,
            free_pages=self._pool.num_free,
            cached_pages=self._tree.num_pages,
            evictable_pages=self._tree.num_evictable,
            fenced_pages=self._fences.num_pages,
            evicted_pages=self._evicted,
        )

    def check(self, owned: list[Ints]) -> list[int]:
        """Raise InternalError unless each page is accounted for once, `owned` by requests; return the fenced slots."""
        self._tree.check()
        fenced = [fence.pages for fence in self._fences]
        everything = np.concatenate([self._pool.free_pages(), self._tree.pages(), *fenced, *owned])
        if not np.array_equal(np.sort(everything), np.arange(self.num_pages)):
            raise InternalError("a page is lost, or owned twice")
        return [fence.slot for fence in self._fences]

    def check_idle(self) -> None:
        """Raise InternalError if anything is still held or fenced. For tests, once no request is left."""
        if self._tree.num_evictable != self._tree.num_pages or len(self._fences):
            raise InternalError("a reader of the prefix tree, or a fence, was left behind")
