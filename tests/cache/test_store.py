"""The page store: a page is free, owned, kept by the prefix tree or behind a fence, and in one of them at a time."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np
import pytest

from overlap.cache.pages import PAGE, Fence, Ints
from overlap.cache.store import PageStore
from overlap.cache.tree import Node
from overlap.errors import InternalError


def tokens_of(letters: str) -> Ints:
    """A page of tokens for each letter."""
    return np.array([ord(letter) for letter in letters for _ in range(PAGE)], dtype=np.int32)


def keep(store: PageStore, letters: str, salt: str = "") -> tuple[Node | None, Ints, list[bool]]:
    """Take pages, fill and keep them."""
    pages = store.take(len(letters))
    node, kept = store.keep(tokens_of(letters), pages, salt, None)
    return node, pages, kept.tolist()


def leave(store: PageStore, letters: str, salt: str = "") -> Ints:
    """Keep pages for nobody; return those that the tree took."""
    node, pages, kept = keep(store, letters, salt)
    store.fence(Fence(0, 0, pages[~np.array(kept)], node))
    assert list(store.pass_step(0)) == [0]
    taken: Ints = pages[np.array(kept)]
    return taken


def test_a_hit_leaves_the_last_token_to_run() -> None:
    store = PageStore(4)
    pages = leave(store, "ab")
    for length, hit in [(1, 0), (PAGE, 0), (PAGE + 1, 1), (2 * PAGE, 1), (2 * PAGE + 1, 2)]:
        prompt = np.append(tokens_of("ab"), 1).astype(np.int32)[:length]
        found = store.find(prompt, "")
        assert found.pages.tolist() == pages[:hit].tolist()
        store.release(found.node)
    store.check_idle()


def test_what_is_found_is_not_evicted_before_it_is_released() -> None:
    store = PageStore(4)
    leave(store, "abc")
    hit = store.find(tokens_of("abx"), "")
    assert len(hit.pages) == 2
    assert store.num_available == 2
    taken = store.take(2)
    assert not set(taken.tolist()) & set(hit.pages.tolist())
    with pytest.raises(InternalError):
        store.take(1)
    store.release(hit.node)
    assert sorted([*store.take(2).tolist(), *taken.tolist()]) == [0, 1, 2, 3]
    assert store.statistics().evicted_pages == 3


def test_free_pages_go_before_kept_ones() -> None:
    store = PageStore(4)
    leave(store, "ab")
    store.take(2)
    assert store.statistics().evicted_pages == 0
    store.take(1)
    assert store.statistics().evicted_pages == 1


def test_a_duplicate_stays_with_who_computed_it() -> None:
    store = PageStore(6)
    first = leave(store, "ab")
    node, pages, kept = keep(store, "abc")
    assert kept == [False, False, True]
    assert store.check([pages[:2]]) == []
    assert store.find(tokens_of("abcx"), "").pages.tolist() == [*first.tolist(), int(pages[2])]
    assert node is not None


def test_salts_share_nothing() -> None:
    store = PageStore(4)
    leave(store, "ab", "one")
    assert len(store.find(tokens_of("abx"), "two").pages) == 0
    assert len(store.find(tokens_of("abx"), "").pages) == 0
    assert len(store.find(tokens_of("abx"), "one").pages) == 2


def test_without_a_prefix_cache_nothing_is_kept_or_found() -> None:
    store = PageStore(4, prefix_cache=False)
    node, pages, kept = keep(store, "ab")
    assert (node, kept) == (None, [False, False])
    assert store.find(tokens_of("abx"), "").node is None
    assert store.check([pages]) == []


def test_what_waits_behind_a_fence_is_neither_free_nor_let_go_before_its_step() -> None:
    store = PageStore(4)
    node, pages, _ = keep(store, "ab")
    own = store.take(1)
    store.fence(Fence(3, 5, own, node))
    assert list(store.pass_step(2)) == []
    assert store.num_available == 1
    assert store.check([]) == [5]
    with pytest.raises(InternalError, match="left behind"):
        store.check_idle()
    assert list(store.pass_step(3)) == [5]
    assert store.num_available == 4
    assert store.clear() == len(pages)
    store.check_idle()


def test_a_page_that_nobody_accounts_for_is_found() -> None:
    store = PageStore(4)
    pages = store.take(2)
    with pytest.raises(InternalError, match="lost, or owned twice"):
        store.check([])
    with pytest.raises(InternalError, match="lost, or owned twice"):
        store.check([pages, pages[:1]])
    store.check([pages])


@dataclass(eq=False)
class Reader:
    """One who reads the pages of a prefix and writes to some of its own."""

    letters: str
    node: Node | None
    read: Ints
    own: Ints = field(default_factory=lambda: np.empty(0, dtype=np.int32))


@pytest.mark.parametrize("seed", range(60))
def test_no_page_is_lost_or_changed_under_a_reader(seed: int) -> None:
    """`holds` is what the pages hold by the order of writes: whoever reads must find its own letters there."""
    draw = random.Random(seed)
    num_pages = draw.randint(4, 20)
    store, holds, readers, step = PageStore(num_pages), [""] * num_pages, list[Reader](), 0
    fenced: list[tuple[int, Ints]] = []
    for _ in range(200):
        letters = "".join(draw.choice("ab") for _ in range(draw.randint(1, 5)))
        match draw.choice(["come", "come", "leave", "pass", "clear"]):
            case "come":
                hit = store.find(np.append(tokens_of(letters), 1).astype(np.int32), "")
                need = len(letters) - len(hit.pages)
                if need > store.num_available:
                    store.release(hit.node)
                    continue
                own = store.take(need)
                for page, at in zip(own.tolist(), range(len(hit.pages), len(letters)), strict=True):
                    holds[page] = letters[: at + 1]
                readers.append(Reader(letters, hit.node, hit.pages, own))
            case "leave" if readers:
                one = readers.pop(draw.randrange(len(readers)))
                pages = np.concatenate([one.read, one.own])
                full = draw.randint(len(one.read), len(pages))  # how much of it was settled
                node, kept = store.keep(tokens_of(one.letters[:full]), pages[:full], "", one.node)
                mine = np.ones(len(pages), dtype=np.bool_)
                mine[:full] = ~kept
                mine[: len(one.read)] = False
                store.fence(Fence(step + 1, 0, pages[mine], node))
                fenced.append((step + 1, pages[mine]))
            case "pass":
                step += 1
                list(store.pass_step(step))
                fenced = [(at, pages) for at, pages in fenced if at > step]
            case "clear":
                store.clear()
        store.check([one.own for one in readers])
        assert store.statistics().fenced_pages == sum(len(pages) for _, pages in fenced)
        for one in readers:
            prefixes = [one.letters[: i + 1] for i in range(len(one.letters))]
            assert [holds[page] for page in [*one.read.tolist(), *one.own.tolist()]] == prefixes
    for one in readers:
        store.fence(Fence(step + 1, 0, one.own, one.node))
    list(store.pass_step(step + 1))
    store.check_idle()
    assert store.num_available == num_pages
