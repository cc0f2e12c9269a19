"""One driver for each share of the SMs, over drivers that are made up."""

from __future__ import annotations

from typing import Any

import pytest

from overlap.graphs.driver import GraphStatistics
from overlap.graphs.policy import Shape
from overlap.graphs.shares import ShareGraphs


class Driver:
    """Stands in for a GraphDriver, and for its policy."""

    def __init__(self, share: int) -> None:
        self.share = share
        self.policy = self
        self.forgot = 0
        self.closed = False
        self.missed: list[Shape] = []

    def forget_turn(self) -> None:
        self.forgot += 1

    def next_idle(self, *, missed_only: bool) -> Shape | None:
        if self.missed:
            return self.missed[0]
        return None if missed_only else Shape("greedy", 8)

    def statistics(self) -> GraphStatistics:
        return GraphStatistics(captures=1, pool_bytes=10 + self.share)

    def explain(self) -> tuple[str, ...]:
        return (f"driver {self.share}",)

    def close(self) -> None:
        self.closed = True


def graphs(made: list[Driver]) -> ShareGraphs:
    def make(share: int) -> Any:
        made.append(Driver(share))
        return made[-1]

    return ShareGraphs(make)


def test_a_driver_is_made_when_its_share_is_first_used_and_forgets_the_mail_each_time() -> None:
    made: list[Driver] = []
    shares = graphs(made)
    for share in (24, 0, 24, 56):
        shares.turn_to(share)
        assert shares.current is made[[0, 24, 56].index(share)]  # type: ignore[comparison-overlap]
    assert [(driver.share, driver.forgot) for driver in made] == [(0, 1), (24, 2), (56, 1)]


def test_all_are_counted_said_and_closed() -> None:
    made: list[Driver] = []
    shares = graphs(made)
    for share in (56, 24):
        shares.turn_to(share)
    assert (shares.statistics().captures, shares.statistics().pool_bytes) == (3, 110)
    assert shares.explain() == ("driver 0", "sm:24: driver 24", "sm:56: driver 56")
    shares.close()
    assert all(driver.closed for driver in made)


def test_an_idle_moment_serves_all_sms_first_and_of_a_share_only_what_was_missed() -> None:
    made: list[Driver] = []
    shares = graphs(made)
    shares.turn_to(24)
    assert shares.next_idle(missed_only=False) == (0, Shape("greedy", 8))
    assert shares.statistics().incomplete == 1
    assert shares.next_idle(missed_only=True) is None
    assert shares.statistics().incomplete == 0
    made[1].missed = [Shape("pieces", 64)]
    assert shares.next_idle(missed_only=True) == (24, Shape("pieces", 64))
    assert shares.statistics().incomplete == 1


def test_a_driver_that_cannot_be_made_leaves_none_current() -> None:
    def make(share: int) -> Any:
        if share:
            raise MemoryError
        return Driver(share)

    shares = ShareGraphs(make)
    with pytest.raises(MemoryError):
        shares.turn_to(24)
    assert shares.current is None
