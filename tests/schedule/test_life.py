from __future__ import annotations

import itertools

import numpy as np
import pytest

from overlap.errors import InternalError
from overlap.schedule.life import LIFE, Change, Life, after
from overlap.schedule.request import Request

ALLOWED = {
    Life.WAITING: {Change.ADMIT: Life.RUNNING, Change.END: Life.GONE},
    Life.RUNNING: {Change.PREEMPT: Life.WAITING, Change.END: Life.DRAINING},
    Life.DRAINING: {Change.LAND: Life.GONE},
    Life.GONE: {},
}
VERBS = {
    Change.ADMIT: "be admitted",
    Change.PREEMPT: "be preempted",
    Change.END: "end",
    Change.LAND: "land",
}


@pytest.mark.parametrize(("life", "change"), [*itertools.product(Life, Change)], ids=lambda value: value.name)
def test_each_change_of_each_life_moves_on_or_is_refused_with_its_sentence(life: Life, change: Change) -> None:
    request = Request(key=0, front=0, prompt=np.array([1], dtype=np.int32), limit=1, life=life)
    if change in ALLOWED[life]:
        assert after(life, change) is ALLOWED[life][change]
        request.change(change)
        assert request.life is ALLOWED[life][change]
    else:
        with pytest.raises(InternalError, match=f"^a {life.name} request cannot {VERBS[change]}$"):
            request.change(change)
        assert request.life is life


def test_the_table_has_nothing_else() -> None:
    assert {(life, change): to for life, changes in ALLOWED.items() for change, to in changes.items()} == LIFE


@pytest.mark.parametrize("life", [*Life], ids=lambda life: life.name)
def test_every_life_can_be_reached_and_can_end(life: Life) -> None:
    def reachable(start: Life) -> set[Life]:
        seen, todo = {start}, [start]
        while todo:
            here = todo.pop()
            for (at, _), to in LIFE.items():
                if at is here and to not in seen:
                    seen.add(to)
                    todo.append(to)
        return seen

    assert life in reachable(Life.WAITING)
    assert Life.GONE in reachable(life)


def test_only_a_request_that_runs_can_come_to_drain() -> None:
    assert {at for (at, _), to in LIFE.items() if to is Life.DRAINING} == {Life.RUNNING}
