"""What a step brought, taken apart by who reads it."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from overlap.schedule.scores import Scored
from overlap.schedule.settled import End, Settled
from overlap.schedule.shaping import TOLD_WORDS

Entries = list[tuple[int, int]]


def seen(settled: Settled) -> tuple[object, ...]:
    told = None if settled.told is None else settled.told.tolist()
    scored = [(one.key, one.start) for one in settled.scored]
    columns = (settled.keys.tolist(), settled.fronts.tolist(), settled.tokens.tolist())
    return (*columns, settled.ends, dict(settled.cached), told, scored)


@given(
    entries=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 500)), max_size=30),
    ends=st.booleans(),
    told=st.booleans(),
    scored=st.lists(st.integers(0, 4), max_size=2),
)
def test_all_fronts_at_once_get_what_each_gets_by_itself(
    entries: Entries, ends: bool, told: bool, scored: list[int]
) -> None:
    keys, tokens = [key for key, _ in entries], [token for _, token in entries]
    fronts = [key % 4 for key in keys]  # a request has one front, and may have several tokens
    settled = Settled(
        np.array(keys, np.int64), np.array(fronts, np.int32), np.array(tokens, np.int32),
        tuple(End(key, key % 4, "length", None) for key in set(keys)) if ends else (), dict.fromkeys(keys, 16),
        np.arange(len(keys) * TOLD_WORDS, dtype=np.int32).reshape(-1, TOLD_WORDS) if told else None,
        tuple(Scored(100 + front, front, 1, np.zeros((2, TOLD_WORDS), np.int32)) for front in scored),
    )  # fmt: skip
    parts = dict(settled.by_front())
    assert parts.keys() == settled.all_fronts
    assert {front: seen(part) for front, part in parts.items()} == {
        front: seen(settled.of_front(front)) for front in settled.all_fronts
    }


def test_entries_known_to_be_of_one_front_are_not_looked_through() -> None:
    settled = Settled(np.array([1, 2]), np.array([3, 3], np.int32), np.array([4, 5], np.int32), (), only_front=3)
    assert settled.by_front() == [(3, settled)]
