"""The prefix tree against a dictionary that has an entry for each page and knows nothing of edges."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from overlap.cache.pages import PAGE, Ints
from overlap.cache.tree import Node, PrefixTree, TreeStatistics
from overlap.errors import InternalError

Prefix = tuple[str, str]
"""A salt, and a letter for each page."""


def tokens_of(letters: str) -> Ints:
    """A page of tokens for each letter: 'a' and 'b' differ in their last token only, 'c' from both in its first."""
    pages = {"a": [7] * PAGE, "b": [7] * (PAGE - 1) + [8], "c": [9] + [7] * (PAGE - 1)}
    return np.array([token for letter in letters for token in pages[letter]], np.int32)


def ids(*pages: int) -> Ints:
    return np.array(pages, np.int32)


def found(tree: PrefixTree, letters: str, salt: str = "", most: int = 1_000_000) -> list[int]:
    """The pages of the longest match."""
    return [int(page) for page in tree.match(tokens_of(letters), salt, most)[1]]


def hold(tree: PrefixTree, letters: str) -> Node:
    """Hold the longest match."""
    node, _ = tree.match(tokens_of(letters), "", 1_000_000)
    assert node is not None
    tree.hold(node)
    return node


def insert(tree: PrefixTree, letters: str, pages: Sequence[int], salt: str = "") -> list[bool]:
    """Insert, and return the mask."""
    _, taken = tree.insert(tokens_of(letters), ids(*pages), salt)
    tree.check()
    return [bool(is_taken) for is_taken in taken]


@dataclass(slots=True)
class Entry:
    """One page of the oracle."""

    page: int
    used: int
    readers: int = 0


class Oracle:
    """What the tree promises, page by page and without thought for cost."""

    def __init__(self) -> None:
        self.entries: dict[Prefix, Entry] = {}
        self.clock = 0

    def match(self, letters: str, salt: str, most: int) -> list[int]:
        pages: list[int] = []
        for length in range(1, min(len(letters), most) + 1):
            entry = self.entries.get((salt, letters[:length]))
            if entry is None:
                break
            pages.append(entry.page)
        return pages

    def path(self, letters: str, salt: str) -> list[Entry]:
        return [self.entries[salt, letters[:length]] for length in range(1, len(letters) + 1)]

    def read(self, letters: str, salt: str, change: int) -> None:
        for entry in self.path(letters, salt):
            entry.readers += change
            assert entry.readers >= 0

    def use(self, letters: str, salt: str) -> None:
        self.clock += 1
        for entry in self.path(letters, salt):
            entry.used = self.clock

    def insert(self, letters: str, pages: Sequence[int], salt: str) -> list[bool]:
        taken = []
        for length, page in enumerate(pages, 1):
            entry = self.entries.setdefault((salt, letters[:length]), Entry(page, 0))
            taken.append(entry.page == page)
        self.use(letters, salt)
        return taken

    def evict(self, count: int) -> list[int]:
        gone: list[int] = []
        while len(gone) < count:
            ends = [
                (entry.used, prefix)
                for prefix, entry in self.entries.items()
                if not entry.readers and not any((prefix[0], prefix[1] + letter) in self.entries for letter in "abc")
            ]
            if not ends:
                break
            oldest = min(ends)
            assert [used for used, _ in ends].count(oldest[0]) == 1, "the order is always determined"
            gone.append(self.entries.pop(oldest[1]).page)
        return gone

    def num_evictable(self) -> int:
        return sum(not entry.readers for entry in self.entries.values())


LETTERS = st.text("abc", min_size=1, max_size=7) | st.sampled_from(["aaaaaaaa", "aaaabaaa", "aaaabaab", "aaaac"])
SALTS = st.sampled_from(["", "", "a", "\ud800"])
COUNTS = st.integers(-1, 9)


class TreeMachine(RuleBasedStateMachine):
    """Requests match, hold, insert and release in any order, while pages are evicted."""

    @initialize()
    def start(self) -> None:
        self.tree = PrefixTree()
        self.oracle = Oracle()
        self.next_page = 0
        self.held: list[tuple[Node, str, str]] = []
        self.gone: list[int] = []

    def new_page(self) -> int:
        """A page that has come back may be inserted again."""
        if self.gone:
            return self.gone.pop()
        self.next_page += 1
        return self.next_page

    @rule(letters=LETTERS, salt=SALTS, most=st.integers(-1, 8), spare=st.integers(0, PAGE - 1))
    def match(self, letters: str, salt: str, most: int, spare: int) -> None:
        tokens = np.concatenate([tokens_of(letters), tokens_of("a")[:spare]])  # a page that is not full matches nothing
        node, pages = self.tree.match(tokens, salt, most)
        assert pages.dtype == np.int32
        assert pages.tolist() == self.oracle.match(letters, salt, most)
        assert (node is None) == (len(pages) == 0)

    @rule(letters=LETTERS, salt=SALTS, most=st.integers(1, 8))
    def match_and_hold(self, letters: str, salt: str, most: int) -> None:
        node, pages = self.tree.match(tokens_of(letters), salt, most)
        if node is not None:
            self.tree.hold(node)
            self.oracle.read(letters[: len(pages)], salt, +1)
            self.held.append((node, letters[: len(pages)], salt))

    @precondition(lambda self: self.held)
    @rule(pick=st.integers(0))
    def hold_once_more(self, pick: int) -> None:
        node, letters, salt = self.held[pick % len(self.held)]
        self.tree.hold(node)
        self.oracle.read(letters, salt, +1)
        self.held.append((node, letters, salt))

    @precondition(lambda self: self.held)
    @rule(pick=st.integers(0))
    def release(self, pick: int) -> None:
        node, letters, salt = self.held.pop(pick % len(self.held))
        self.tree.release(node)
        self.oracle.read(letters, salt, -1)
        self.oracle.use(letters, salt)

    @rule(letters=LETTERS, salt=SALTS, matched=st.booleans(), holds=st.booleans())
    def insert(self, letters: str, salt: str, matched: bool, holds: bool) -> None:
        """A request that had matched brings the tree's own pages first; one that had not brings duplicates."""
        known = self.oracle.match(letters, salt, len(letters)) if matched else []
        pages = known + [self.new_page() for _ in letters[len(known) :]]
        tokens, column = tokens_of(letters), ids(*pages)
        node, taken = self.tree.insert(tokens, column, salt)
        tokens[:], column[:] = -1, -1  # the tree keeps nothing of the caller's memory
        assert taken.dtype == np.bool_
        assert taken.tolist() == self.oracle.insert(letters, pages, salt)
        self.gone += [page for page, is_taken in zip(pages, taken, strict=True) if not is_taken]
        if holds:
            self.tree.hold(node)
            self.oracle.read(letters, salt, +1)
            self.held.append((node, letters, salt))

    @rule(count=COUNTS)
    def evict(self, count: int) -> None:
        amount = max(0, min(count, self.tree.num_evictable))
        gone = self.tree.evict(count).tolist()
        assert len(gone) == amount
        assert gone == self.oracle.evict(count)
        self.gone += gone

    @rule()
    def clear(self) -> None:
        gone = self.tree.clear().tolist()
        assert gone == self.oracle.evict(1_000_000)
        self.gone += gone

    @invariant()
    def every_prefix_is_where_the_dictionary_has_it(self) -> None:
        self.tree.check()
        entries = self.oracle.entries
        assert sorted(self.tree.pages().tolist()) == sorted(entry.page for entry in entries.values())
        statistics = self.tree.statistics()
        assert self.tree.num_pages == statistics.pages == len(entries)
        assert self.tree.num_evictable == statistics.evictable_pages == self.oracle.num_evictable()
        assert statistics.readers == len(self.held)
        assert statistics.salts == len({salt for salt, _ in entries})

    def teardown(self) -> None:
        """At the end nobody reads: everything comes back, and nothing is left behind."""
        for node, letters, salt in self.held:
            self.tree.release(node)
            self.oracle.read(letters, salt, -1)
            self.oracle.use(letters, salt)
        assert self.tree.clear().tolist() == self.oracle.evict(1_000_000)
        self.tree.check()
        assert self.tree.statistics() == TreeStatistics(pages=0, evictable_pages=0, nodes=0, readers=0, salts=0)


def test_the_tree_says_what_a_dictionary_of_prefixes_says() -> None:
    profile = settings(max_examples=150, stateful_step_count=40, deadline=None, derandomize=True, database=None)
    run_state_machine_as_test(TreeMachine, settings=profile)


@pytest.mark.parametrize("seed", range(3))
def test_a_busy_tree_agrees_with_the_dictionary_over_a_thousand_operations(seed: int) -> None:
    """Longer than hypothesis goes, so that edges are split, and the heap of leaves is cleaned, many times."""
    random = np.random.default_rng(seed)
    machine = TreeMachine()
    machine.start()
    for step in range(1_000):
        letters = "".join(random.choice(list("aab"), size=random.integers(1, 8)))
        most, salt, pick = (
            int(random.integers(1, 9)),
            str(random.choice(["", "", "", "x"])),
            int(random.integers(1 << 30)),
        )
        match int(random.integers(7)):
            case 0 | 1:
                machine.match_and_hold(letters, salt, most)
            case 2 | 3 if machine.held:
                machine.release(pick)
            case 4 | 5:
                machine.insert(letters, salt, bool(pick & 1), bool(pick & 2))
            case 6:
                machine.evict(int(random.integers(1, 6)))
        machine.tree.check()
        if step % 20 == 0:
            machine.every_prefix_is_where_the_dictionary_has_it()
    machine.teardown()


def test_a_prompt_finds_the_whole_pages_that_it_shares() -> None:
    tree = PrefixTree()
    insert(tree, "aab", [10, 11, 12])
    assert found(tree, "aab") == [10, 11, 12]
    assert found(tree, "aabc") == [10, 11, 12]
    assert found(tree, "aac") == [10, 11]
    assert found(tree, "b") == []
    node, pages = tree.match(tokens_of("aab")[:-1], "", 9)
    assert node is not None
    assert pages.tolist() == [10, 11], "a page that is not full is not shared"


def test_a_full_hit_can_keep_its_last_page_to_run() -> None:
    tree = PrefixTree()
    insert(tree, "aab", [10, 11, 12])
    assert found(tree, "aab", most=2) == [10, 11]
    assert found(tree, "aab", most=0) == []


def test_a_prompt_that_branches_nowhere_is_one_node() -> None:
    tree = PrefixTree()
    insert(tree, "a" * 100, range(100))
    assert found(tree, "a" * 100) == list(range(100))
    assert tree.statistics() == TreeStatistics(pages=100, evictable_pages=100, nodes=1, readers=0, salts=1)
    assert found(tree, "a" * 60 + "b") == list(range(60))
    assert tree.statistics().nodes == 2


def test_what_a_match_returns_can_be_written_to() -> None:
    tree = PrefixTree()
    insert(tree, "aa", [1, 2])
    tree.match(tokens_of("aa"), "", 9)[1][:] = 99
    tree.match(tokens_of("c"), "", 9)[1][:] = 99  # nothing, but not read-only
    assert found(tree, "aa") == [1, 2]


def test_salts_share_nothing() -> None:
    tree = PrefixTree()
    insert(tree, "aa", [1, 2], salt="ours")
    assert found(tree, "aa", salt="theirs") == []
    assert insert(tree, "aa", [3, 4], salt="theirs") == [True, True]
    assert found(tree, "aa", salt="ours") == [1, 2]
    assert found(tree, "aa", salt="theirs") == [3, 4]
    assert tree.evict(2).tolist() == [2, 1]
    assert tree.statistics().salts == 1


def test_a_duplicate_stays_with_the_caller_and_the_rest_is_taken_over() -> None:
    tree = PrefixTree()
    insert(tree, "aab", [1, 2, 3])
    assert insert(tree, "aacc", [7, 2, 8, 9]) == [False, True, True, True]
    assert found(tree, "aacc") == [1, 2, 8, 9]
    assert insert(tree, "aacc", [1, 2, 8, 9]) == [True] * 4, "its own pages, inserted again"
    assert tree.num_pages == 5


def test_inserting_a_prefix_of_what_is_there_returns_its_end() -> None:
    tree = PrefixTree()
    insert(tree, "aaaa", [1, 2, 3, 4])
    node, taken = tree.insert(tokens_of("aa"), ids(5, 6), "")
    assert taken.tolist() == [False, False]
    tree.hold(node)
    assert tree.num_evictable == 2
    assert tree.clear().tolist() == [4, 3]


def test_a_reader_keeps_its_pages_when_its_edge_is_split() -> None:
    tree = PrefixTree()
    insert(tree, "aaab", [1, 2, 3, 4])
    reader = hold(tree, "aaab")
    insert(tree, "aac", [1, 2, 5])  # splits the edge that is read
    tree.check()
    assert tree.clear().tolist() == [5]
    tree.release(reader)
    assert tree.clear().tolist() == [4, 3, 2, 1]


def test_a_page_is_evictable_when_its_last_reader_has_gone() -> None:
    tree = PrefixTree()
    insert(tree, "aab", [1, 2, 3])
    readers = [hold(tree, "aab"), hold(tree, "aa"), hold(tree, "aab")]
    assert tree.num_evictable == 0
    counts = []
    for reader in readers:
        tree.release(reader)
        tree.check()
        counts.append(tree.num_evictable)
    assert counts == [0, 0, 3]
    assert tree.statistics().readers == 0


def test_the_last_pages_of_the_leaf_used_longest_ago_go_first() -> None:
    tree = PrefixTree()
    insert(tree, "aab", [1, 2, 3])
    insert(tree, "aac", [1, 2, 4])
    insert(tree, "ccc", [5, 6, 7])
    tree.release(hold(tree, "aab"))  # now aac is the oldest, then ccc, then aab with what it stands on
    assert tree.evict(1).tolist() == [4]
    assert tree.evict(2).tolist() == [7, 6]
    assert found(tree, "ccc") == [5], "a leaf may be cut"
    assert tree.evict(99).tolist() == [5, 3, 2, 1]
    assert tree.num_pages == 0
    assert tree.evict(1).tolist() == []


def test_looking_does_not_count_as_use() -> None:
    tree = PrefixTree()
    insert(tree, "a", [1])
    insert(tree, "b", [2])
    assert found(tree, "a") == [1]
    assert tree.evict(1).tolist() == [1]


def test_what_was_evicted_can_be_inserted_again() -> None:
    tree = PrefixTree()
    insert(tree, "aab", [1, 2, 3])
    reader = hold(tree, "a")
    assert tree.clear().tolist() == [3, 2]
    assert insert(tree, "aab", [1, 3, 2]) == [True, True, True]
    assert found(tree, "aab") == [1, 3, 2]
    tree.release(reader)
    assert tree.clear().tolist() == [2, 3, 1]


def test_a_cut_leaf_does_not_keep_the_memory_of_what_was_cut() -> None:
    tree = PrefixTree()
    node, _ = tree.insert(tokens_of("a" * 1000), np.arange(1000, dtype=np.int32), "")
    assert node.tokens.nbytes == 64_000
    tree.evict(990)
    kept, _ = tree.match(tokens_of("a" * 1000), "", 1000)
    assert kept is not None
    assert kept.tokens.base is None
    assert kept.tokens.nbytes == 640


def test_a_thousand_reads_of_one_prompt_leave_a_small_heap() -> None:
    tree = PrefixTree()
    insert(tree, "a", [1])
    insert(tree, "b", [2])
    for _ in range(1_000):
        tree.release(hold(tree, "a"))
        tree.check()
    assert tree.evict(2).tolist() == [2, 1]


def test_evicting_what_is_old_leaves_a_small_heap_too() -> None:
    tree = PrefixTree()
    for page in range(100):
        insert(tree, "a", [page], salt=str(page))
    insert(tree, "b", [100])
    for _ in range(150):
        tree.release(hold(tree, "b"))
    reader = hold(tree, "b")
    assert tree.clear().tolist() == list(range(100))
    tree.check()
    tree.release(reader)
    assert tree.clear().tolist() == [100]


@pytest.mark.parametrize(("tokens", "pages"), [(0, 0), (16, 0), (15, 1), (17, 1), (16, 2)])
def test_tokens_that_do_not_fill_their_pages_are_refused(tokens: int, pages: int) -> None:
    tree = PrefixTree()
    with pytest.raises(InternalError, match=rf"{tokens} tokens were inserted with {pages} pages of 16"):
        tree.insert(np.zeros(tokens, np.int32), np.zeros(pages, np.int32), "")
    tree.check()
    assert tree.statistics().salts == 0


def test_releasing_what_nobody_holds_is_an_error() -> None:
    tree = PrefixTree()
    insert(tree, "aa", [1, 2])
    reader = hold(tree, "aa")
    upper, _ = tree.match(tokens_of("a"), "", 9)
    assert upper is not None
    with pytest.raises(InternalError, match="released that nobody holds"):
        tree.release(upper)  # it is read, but from below
    tree.release(reader)
    with pytest.raises(InternalError, match="released that nobody holds"):
        tree.release(reader)
    tree.check()


def test_holding_what_was_evicted_is_an_error() -> None:
    tree = PrefixTree()
    node, _ = tree.insert(tokens_of("aaa"), ids(1, 2, 3), "")
    tree.evict(1)  # the path that this node names is no longer there as a whole
    with pytest.raises(InternalError, match="held after its pages had been evicted"):
        tree.hold(node)
    tree.check()


def lose_a_page(tree: PrefixTree, node: Node) -> None:
    node.pages = node.pages[:-1]


def lose_a_parent(tree: PrefixTree, node: Node) -> None:
    node.parent = Node("", node.tokens, node.pages, None)


def change_a_token(tree: PrefixTree, node: Node) -> None:
    node.tokens[0] += 1


def gain_a_reader(tree: PrefixTree, node: Node) -> None:
    node.readers += 1


def age_a_parent(tree: PrefixTree, node: Node) -> None:
    assert node.parent is not None
    node.parent.used -= 1


def repeat_a_page(tree: PrefixTree, node: Node) -> None:
    node.pages[0] = node.pages[1]


def forget_a_leaf(tree: PrefixTree, node: Node) -> None:
    tree._leaves.clear()


def grow_the_heap(tree: PrefixTree, node: Node) -> None:
    tree._leaves *= 100


def miscount_pages(tree: PrefixTree, node: Node) -> None:
    tree._num_pages += 1


def miscount_evictable(tree: PrefixTree, node: Node) -> None:
    tree._num_evictable -= 1


def miscount_nodes(tree: PrefixTree, node: Node) -> None:
    tree._num_nodes += 1


def miscount_readers(tree: PrefixTree, node: Node) -> None:
    tree._num_readers += 1


def turn_back_the_clock(tree: PrefixTree, node: Node) -> None:
    tree._clock = 0


def leave_a_root(tree: PrefixTree, node: Node) -> None:
    tree._plant("empty")


@pytest.mark.parametrize(
    ("damage", "broken"),
    [
        (lose_a_page, "a page has 16 tokens"),
        (lose_a_parent, "a child knows its parent"),
        (change_a_token, "a child is found by its first page"),
        (gain_a_reader, "readers are those here and below"),
        (age_a_parent, "a parent is used no earlier than its child"),
        (repeat_a_page, "every page is on one node"),
        (forget_a_leaf, "a leaf that nobody reads is in the heap"),
        (grow_the_heap, "most of a large heap is not stale"),
        (miscount_pages, "num_pages is the sum over the nodes"),
        (miscount_evictable, "num_evictable is their sum"),
        (miscount_nodes, "the nodes are counted"),
        (miscount_readers, "the readers are counted"),
        (turn_back_the_clock, "no stamp is later than now"),
        (leave_a_root, "a salt has pages"),
    ],
)
def test_check_finds_what_is_broken(damage: Callable[[PrefixTree, Node], None], broken: str) -> None:
    tree = PrefixTree()
    insert(tree, "aa", [1, 2])
    node, _ = tree.insert(tokens_of("aabb"), ids(1, 2, 3, 4), "")
    insert(tree, "aac", [1, 2, 5])
    tree.check()
    damage(tree, node)
    with pytest.raises(InternalError, match=broken):
        tree.check()


def test_pages_without_a_leaf_are_an_error_and_no_endless_loop() -> None:
    tree = PrefixTree()
    insert(tree, "aa", [1, 2])
    forget_a_leaf(tree, Node("", ids(), ids(), None))
    with pytest.raises(InternalError, match="2 pages can be evicted, and no leaf is known"):
        tree.evict(1)
