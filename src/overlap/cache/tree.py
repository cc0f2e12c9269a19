"""The prefix tree: which settled full pages hold the KV of which token prefix.

Theory of operation
-------------------
The KV of a token depends on all tokens before it and on nothing after it. So a page that is full holds the KV of one
prefix, the tokens up to its end, and any request that begins with the same tokens can read it. The tree finds it: a
path from a root spells tokens, and each 16 of them have their page.

- **Whole pages only.** An edge (a `Node`) has as many pages as fit between two branches, so a prompt of 8,192 pages
  that branches nowhere is one node, one dictionary look-up and one vectorised comparison. Children are found by the
  bytes of their first page of tokens, hence no two children of a node begin with the same page, and no hash stands for
  tokens: a collision could not hand one request the KV of another.
- **Copy-on-write is never needed.** What is shared is settled (the step that wrote it has landed) and full. The next
  token of any reader goes to position 16 * n or later, so to a page of its own. A page in the tree is written to again
  only after `evict` has given it back.
- **A handle names the end of a path.** When an edge is split, the lower half stays the same object and the upper half
  is a new one, so whoever holds a node still holds the same pages. Edges are not joined again, for the same reason.
- **Readers** are counted on each node of their path. A node's count is at least that of each child, so what nobody
  reads is always whole branches down to their leaves, and `num_evictable` can be kept as a sum.
- **Eviction is least recently used, from the ends.** Inserting and releasing stamp the whole path, so a parent is
  never older than its child. The victim is the leaf nobody reads with the oldest stamp, its last pages first; it is cut
  where enough has been given back. All nodes with the same stamp lie on one path, so no two leaves tie. Candidates wait
  in a heap. An entry is not taken out when its leaf is read or grows, but found stale when it is popped: the leaf has
  readers, or another stamp.
- **Salts** (one for each tenant, say) have a root each and share nothing: not pages, and not the time to first token,
  from which a neighbour's prompt could be guessed.

Costs: `hold` and `release` take O(nodes on the path), `match` and `insert` the same beside one comparison of the
tokens, `evict` O(log leaves) for each leaf. Nothing takes O(tree) except `pages`, `check`, and dropping stale entries
of the heap, once they are more than half of it.

The tree is RadixAttention's (Zheng et al., "SGLang: Efficient Execution of Structured Language Model Programs", 2024,
section 3), at the granularity of a page as in vLLM's automatic prefix caching.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from overlap.cache.pages import PAGE, Ints
from overlap.errors import InternalError

_FEW_ENTRIES: Final = 64
"""A heap of this many entries is not worth cleaning."""

_NOTHING: Final[Ints] = np.empty(0, np.int32)
_NOTHING.flags.writeable = False


class Node:
    """An edge of the tree, and a handle for the path from its root to its lower end. Only the tree looks inside."""

    __slots__ = ("children", "holds", "pages", "parent", "readers", "salt", "tokens", "used")

    def __init__(self, salt: str, tokens: Ints, pages: Ints, parent: Node | None) -> None:
        self.salt: Final = salt
        self.tokens = tokens
        """[len(pages) * PAGE]."""
        self.pages = pages
        self.parent = parent
        """None for a root, and for a node that is no longer in the tree."""
        self.children: dict[bytes, Node] = {}
        self.holds = 0
        """Readers whose path ends here."""
        self.readers = 0
        """Readers whose path ends here or below."""
        self.used = 0
        """When an insert or a release last went over this node, as a count of those."""

    def key(self) -> bytes:
        """Return what the parent finds this node by."""
        return self.tokens[:PAGE].tobytes()

    def count_shared(self, tokens: Ints) -> int:
        """Return with how many of this node's pages `tokens` begins."""
        length = min(len(self.tokens), len(tokens))
        differs = self.tokens[:length] != tokens[:length]
        first = int(differs.argmax())
        return (first if differs[first] else length) // PAGE


@dataclass(frozen=True, slots=True)
class TreeStatistics:
    """What a prefix tree holds."""

    pages: int
    """Pages that the tree owns."""
    evictable_pages: int
    """Those that nobody reads."""
    nodes: int
    """Edges, roots not counted."""
    readers: int
    """Holds that have not been released."""
    salts: int
    """Salts that have pages."""


class PrefixTree:
    """A radix tree over pages: which settled full pages hold the KV of which token prefix.

    A node that `match` or `insert` returns, and that nobody holds, is good until the next `evict` or `clear`.
    """

    def __init__(self) -> None:
        self._roots: dict[str, Node] = {}
        self._leaves: list[tuple[int, int, Node]] = []
        """A heap of (used, a number that no other entry has, leaf). Some entries are stale."""
        self._num_entries = 0
        self._clock = 0
        self._num_pages = 0
        self._num_evictable = 0
        self._num_nodes = 0
        self._num_readers = 0

    @property
    def num_pages(self) -> int:
        """How many pages the tree owns."""
        return self._num_pages

    @property
    def num_evictable(self) -> int:
        """How many of them are on no path that a reader holds: what `evict` could give back right now."""
        return self._num_evictable

    def match(self, tokens: Ints, salt: str, most: int) -> tuple[Node | None, Ints]:
        """Find the longest prefix of `tokens` that the tree has, in whole pages, `most` of them at most.

        Returns the node at which it ends, and its page ids in order; None and no pages when nothing matches. An edge
        is split when the prefix ends inside it. Nothing is held and nothing counts as used.
        """
        node = self._roots.get(salt)
        end = min(len(tokens) // PAGE, most)
        parts: list[Ints] = []
        at = 0
        while node is not None and at < end:
            child = node.children.get(tokens[at * PAGE : (at + 1) * PAGE].tobytes())
            if child is None:
                break
            shared = child.count_shared(tokens[at * PAGE : end * PAGE])
            node = child if shared == len(child.pages) else self._split(child, shared)
            parts.append(node.pages)
            at += shared
        return (node, np.concatenate(parts)) if parts else (None, _NOTHING.copy())

    def hold(self, node: Node) -> None:
        """Let a reader read the pages on the path to `node`: none of them is evicted until `release`. Counted.

        A node that is no longer in the tree is an InternalError.
        """
        if node.parent is None:
            raise InternalError("a node was held after its pages had been evicted")
        node.holds += 1
        self._num_readers += 1
        above: Node | None = node
        while above is not None:
            if above.readers == 0:
                self._num_evictable -= len(above.pages)
            above.readers += 1
            above = above.parent

    def release(self, node: Node) -> None:
        """Let one reader of `node` go, and count its path as just used. InternalError if nobody holds `node`."""
        if node.holds == 0:
            raise InternalError("a node was released that nobody holds")
        node.holds -= 1
        self._num_readers -= 1
        above: Node | None = node
        while above is not None:
            above.readers -= 1
            if above.readers == 0:
                self._num_evictable += len(above.pages)
            above = above.parent
        self._use(node)

    def insert(self, tokens: Ints, pages: Ints, salt: str) -> tuple[Node, npt.NDArray[np.bool_]]:
        """Put the pages that hold the KV of `tokens` into the tree, and count their path as just used.

        `tokens` is [len(pages) * PAGE], of one page at least; both are copied. Where the tree has a page for these
        tokens it keeps its own, and it takes over the rest. Returns the node at the end of the whole path, and a mask
        [len(pages)]: True where the tree now owns that very page (taken over now, or before), False where the caller
        keeps it (a duplicate).
        """
        if len(pages) == 0 or len(tokens) != len(pages) * PAGE:
            raise InternalError(f"{len(tokens)} tokens were inserted with {len(pages)} pages of {PAGE}")
        node, known = self.match(tokens, salt, len(pages))
        taken = np.ones(len(pages), np.bool_)
        np.equal(known, pages[: len(known)], out=taken[: len(known)])
        if len(known) < len(pages):
            parent = node or self._roots.get(salt) or self._plant(salt)
            node = Node(salt, tokens[len(known) * PAGE :].copy(), pages[len(known) :].copy(), parent)
            parent.children[node.key()] = node
            self._num_nodes += 1
            self._num_pages += len(node.pages)
            self._num_evictable += len(node.pages)
        assert node is not None  # one page at least was known, or is new
        self._use(node)
        return node, taken

    def evict(self, count: int) -> Ints:
        """Give back min(count, num_evictable) pages (none for a negative count), in the order in which they went.

        Least recently used first and always from the ends of branches: the leaf with the oldest stamp, its last pages
        first. A leaf may be cut; what is left of it is a new node.
        """
        gone = np.empty(max(0, min(count, self._num_evictable)), np.int32)
        at = 0
        while at < len(gone):
            leaf = self._pop_oldest()
            stay = len(leaf.pages) - (len(gone) - at)
            if stay > 0:
                self._split(leaf, stay)
            gone[at : at + len(leaf.pages)] = leaf.pages[::-1]
            at += len(leaf.pages)
            self._drop(leaf)
        self._clean_heap()
        return gone

    def clear(self) -> Ints:
        """Give back every page that nobody reads."""
        return self.evict(self._num_evictable)

    def pages(self) -> Ints:
        """Return all page ids that the tree owns, in any order, for checks: O(nodes)."""
        return np.concatenate([_NOTHING, *(node.pages for node in self._nodes())])

    def statistics(self) -> TreeStatistics:
        """Return the counts of this moment."""
        return TreeStatistics(
            pages=self._num_pages,
            evictable_pages=self._num_evictable,
            nodes=self._num_nodes,
            readers=self._num_readers,
            salts=len(self._roots),
        )

    def check(self) -> None:
        """Raise InternalError unless every count and every link agree. O(pages), for tests."""
        candidates = {id(leaf) for used, _, leaf in self._leaves if _is_candidate(leaf, used)}
        for node in self._nodes(roots=True):
            _check(_node_rules(node, is_root=self._roots.get(node.salt) is node))
            if node.pages.size and not node.children and node.readers == 0:
                _check((("a leaf that nobody reads is in the heap", id(node) in candidates),))
        nodes = list(self._nodes())
        pages = self.pages()
        _check(
            (
                ("every page is on one node", len(np.unique(pages)) == len(pages)),
                ("num_pages is the sum over the nodes", self._num_pages == len(pages)),
                (
                    "num_evictable is their sum",
                    self._num_evictable == sum(n.pages.size for n in nodes if not n.readers),
                ),
                ("the nodes are counted", self._num_nodes == len(nodes)),
                ("the readers are counted", self._num_readers == sum(node.holds for node in nodes)),
                ("no stamp is later than now", all(node.used <= self._clock for node in nodes)),
                ("a salt has pages", all(root.children for root in self._roots.values())),
                ("most of a large heap is not stale", len(self._leaves) <= 2 * self._num_nodes + _FEW_ENTRIES),
            )
        )

    def _plant(self, salt: str) -> Node:
        """Add the root of a salt that is new."""
        root = self._roots[salt] = Node(salt, _NOTHING, _NOTHING, None)
        return root

    def _split(self, node: Node, count: int) -> Node:
        """Move the first `count` pages of `node`, not all, into a new node above it, and return that."""
        parent = node.parent
        assert parent is not None  # roots have no pages to split
        upper = Node(node.salt, _keep(node.tokens[: count * PAGE]), _keep(node.pages[:count]), parent)
        upper.readers = node.readers
        upper.used = node.used
        parent.children[upper.key()] = upper
        node.tokens = _keep(node.tokens[count * PAGE :])
        node.pages = _keep(node.pages[count:])
        node.parent = upper
        upper.children[node.key()] = node
        self._num_nodes += 1
        return upper

    def _drop(self, leaf: Node) -> None:
        """Take a leaf that nobody reads out of the tree."""
        parent = leaf.parent
        assert parent is not None  # a root is never a leaf: it goes with its last child
        del parent.children[leaf.key()]
        leaf.parent = None
        self._num_nodes -= 1
        self._num_pages -= len(leaf.pages)
        self._num_evictable -= len(leaf.pages)
        if parent.parent is not None:
            self._push_candidate(parent)
        elif not parent.children:
            del self._roots[parent.salt]

    def _use(self, node: Node) -> None:
        """Stamp the path to `node`, after its readers and children are what they will be."""
        self._clock += 1
        above: Node | None = node
        while above is not None:
            above.used = self._clock
            above = above.parent
        self._push_candidate(node)

    def _push_candidate(self, node: Node) -> None:
        """Remember `node` for eviction if it is a leaf that nobody reads."""
        if node.children or node.readers:
            return
        self._num_entries += 1
        heapq.heappush(self._leaves, (node.used, self._num_entries, node))
        self._clean_heap()

    def _clean_heap(self) -> None:
        """Drop the stale entries once they are more than half; then as many are pushed before this is done again."""
        if len(self._leaves) > 2 * self._num_nodes + _FEW_ENTRIES:
            self._leaves = [entry for entry in self._leaves if _is_candidate(entry[2], entry[0])]
            heapq.heapify(self._leaves)

    def _pop_oldest(self) -> Node:
        """Return the leaf to evict next."""
        while self._leaves:
            used, _, leaf = heapq.heappop(self._leaves)
            if _is_candidate(leaf, used):
                return leaf
        raise InternalError(f"{self._num_evictable} pages can be evicted, and no leaf is known that has them")

    def _nodes(self, roots: bool = False) -> Iterator[Node]:
        """Every node, parents first; roots only if asked for."""
        stack = list(self._roots.values())
        while stack:
            node = stack.pop()
            if roots or node.parent is not None:
                yield node
            stack.extend(node.children.values())


def _is_candidate(leaf: Node, used: int) -> bool:
    """Whether a heap entry still holds.

    It was made when `leaf` was a leaf that nobody read, and once for each stamp. Whoever reads it since is counted;
    whoever has read it or grown it has stamped it; and it leaves the tree with its entry.
    """
    return leaf.used == used and leaf.readers == 0


def _keep(view: Ints) -> Ints:
    """Return `view`, or a copy if most of the memory behind it would be kept for nothing."""
    return view.copy() if view.base is not None and view.base.size > 2 * view.size else view


def _node_rules(node: Node, is_root: bool) -> tuple[tuple[str, bool], ...]:
    """What is true of every node, as sentences."""
    below = node.children.values()
    return (
        ("a node has pages, and only a root has none", (node.pages.size == 0) == is_root),
        ("a node has a parent, and only a root has none", (node.parent is None) == is_root),
        ("a page has 16 tokens", len(node.tokens) == len(node.pages) * PAGE),
        ("a child knows its parent", all(child.parent is node for child in below)),
        ("a child is found by its first page", all(child.key() == key for key, child in node.children.items())),
        ("a child has its parent's salt", all(child.salt == node.salt for child in below)),
        ("readers are those here and below", node.readers == node.holds + sum(child.readers for child in below)),
        ("no count is negative", node.holds >= 0 and node.readers >= 0),
        ("nobody holds a root", node.holds == 0 or not is_root),
        ("a parent is used no earlier than its child", all(child.used <= node.used for child in below)),
    )


def _check(rules: tuple[tuple[str, bool], ...]) -> None:
    for rule, holds in rules:
        if not holds:
            raise InternalError(f"the prefix tree broke a rule: {rule}")
