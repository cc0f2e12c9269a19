from __future__ import annotations

import threading

import pytest

from overlap.bars import Bar
from overlap.observe.progress import bar


@pytest.mark.parametrize("shown", [False, True])
def test_a_bar_leaves_no_thread_shown_or_not_and_shows_how_far_it_is(
    shown: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    before = set(threading.enumerate())
    with Bar(total=10, desc="reading", disable=not shown, mininterval=0) as own:
        own.update(4)
        own.update(6)
    with bar(3, "answering", "answer", asked=shown) as other:
        other.update(3)
    assert set(threading.enumerate()) == before
    said = capsys.readouterr().err
    assert ("reading" in said and "10/10" in said and "answering" in said and "3/3" in said) == shown
    assert ("4/10" in said) == shown
