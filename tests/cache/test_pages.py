"""Pages and fences against a slow oracle that keeps a set of pages for each place where a page can be."""

from __future__ import annotations

from collections.abc import Iterable

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

from overlap.cache.pages import PAGE, Fence, Fences, Ints, PagePool, pages_for
from overlap.errors import InternalError


class PagesMachine(RuleBasedStateMachine):
    """Owners take pages, leave them behind fences, or give them back at once; steps are settled in order."""

    @initialize(num_pages=st.integers(1, 24))
    def start(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.pool = PagePool(num_pages)
        self.fences = Fences()
        self.free = set(range(num_pages))
        self.owned: list[set[int]] = []
        self.fenced: list[tuple[int, int, set[int]]] = []
        self.settled = 0
        self.num_fences = 0

    def end_owner(self, pick: int) -> set[int]:
        return self.owned.pop(pick % len(self.owned))

    @precondition(lambda self: self.free)
    @rule(data=st.data())
    def take(self, data: st.DataObject) -> None:
        count = data.draw(st.integers(1, len(self.free)))
        pages = self.pool.take(count)
        mine = set(pages.tolist())
        assert len(mine) == count, "no page twice"
        assert mine <= self.free, "no page that is not free"
        self.free -= mine
        self.owned.append(mine)

    @rule(more=st.integers(1, 5))
    def take_too_many(self, more: int) -> None:
        with pytest.raises(InternalError, match=f"pages were asked for and {len(self.free)} are free"):
            self.pool.take(len(self.free) + more)

    @precondition(lambda self: self.owned)
    @rule(pick=st.integers(0, 99))
    def give_back_at_once(self, pick: int) -> None:
        pages = self.end_owner(pick)
        self.pool.give(column(pages))
        self.free |= pages

    @rule(more=st.integers(1, 5))
    def give_too_many(self, more: int) -> None:
        too_many = column(range(self.num_pages - len(self.free) + more))
        with pytest.raises(InternalError, match=f"came back to a pool of {self.num_pages} with {len(self.free)} free"):
            self.pool.give(too_many)

    @precondition(lambda self: self.owned)
    @rule(pick=st.integers(0, 99), ahead=st.integers(0, 3))
    def leave_behind_a_fence(self, pick: int, ahead: int) -> None:
        pages = self.end_owner(pick)
        step = max([self.settled, *(step for step, _, _ in self.fenced)]) + ahead
        self.fences.put(Fence(step, self.num_fences, column(pages)))
        self.fenced.append((step, self.num_fences, pages))
        self.num_fences += 1

    @precondition(lambda self: self.fenced)
    @rule(early=st.integers(1, 3))
    def put_a_fence_out_of_order(self, early: int) -> None:
        last = self.fenced[-1][0]
        with pytest.raises(InternalError, match=f"step {last - early} was put behind one at step {last}"):
            self.fences.put(Fence(last - early, 0, column(())))

    @rule(steps=st.integers(0, 3))
    def settle(self, steps: int) -> None:
        self.settled += steps
        due = [(step, slot, pages) for step, slot, pages in self.fenced if step <= self.settled]
        self.fenced = [fence for fence in self.fenced if fence not in due]
        passed = list(self.fences.pass_step(self.settled))
        assert [(fence.step, fence.slot, set(fence.pages.tolist())) for fence in passed] == due
        for fence in passed:
            self.pool.give(fence.pages)
            self.free |= set(fence.pages.tolist())

    @invariant()
    def every_page_is_in_one_place(self) -> None:
        free = self.pool.free_pages().tolist()
        assert len(free) == len(set(free)) == self.pool.num_free
        assert set(free) == self.free
        waiting = [page for fence in self.fences for page in fence.pages.tolist()]
        assert [(fence.step, fence.slot) for fence in self.fences] == [(step, slot) for step, slot, _ in self.fenced]
        assert len(waiting) == self.fences.num_pages
        assert len(self.fences) == len(self.fenced)
        owned = [page for pages in self.owned for page in pages]
        assert sorted([*free, *waiting, *owned]) == list(range(self.num_pages))


def column(pages: Iterable[int]) -> Ints:
    return np.array(sorted(pages), dtype=np.int32)


def test_no_page_is_lost_or_owned_twice_or_given_out_early() -> None:
    run_state_machine_as_test(PagesMachine, settings=settings(max_examples=150, stateful_step_count=40, deadline=None))


def test_what_came_back_last_goes_out_first() -> None:
    pool = PagePool(4)
    first, second = pool.take(1), pool.take(1)
    pool.give(second)
    pool.give(first)
    assert pool.take(1).tolist() == first.tolist()


def test_pages_handed_out_do_not_change_when_others_come_back() -> None:
    pool = PagePool(4)
    mine, other = pool.take(2), pool.take(2)
    kept, free = mine.tolist(), pool.free_pages()
    pool.give(other)
    assert mine.tolist() == kept
    assert len(free) == 0


@pytest.mark.parametrize(
    ("tokens", "pages"), [(0, 0), (1, 1), (PAGE - 1, 1), (PAGE, 1), (PAGE + 1, 2), (2 * PAGE, 2), (2 * PAGE + 1, 3)]
)
def test_a_page_holds_sixteen_tokens(tokens: int, pages: int) -> None:
    assert PAGE == 16
    assert pages_for(tokens) == pages


def test_a_fence_opens_with_its_step_and_not_before() -> None:
    fences = Fences()
    fences.put(Fence(3, 0, column({1, 2})))
    fences.put(Fence(3, 1, column({4})))
    fences.put(Fence(5, 2, column({7})))
    assert list(fences.pass_step(2)) == []
    assert [fence.slot for fence in fences.pass_step(4)] == [0, 1]
    assert list(fences.pass_step(4)) == []
    assert fences.num_pages == 1
