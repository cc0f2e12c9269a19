"""StopStrings against the slow way: search the whole text after each character."""

from __future__ import annotations

import random

import pytest

from overlap.errors import RequestError
from overlap.text import StopStrings


def search_slowly(stops: tuple[str, ...], text: str) -> tuple[str, str | None]:
    """Return the text before the first stop string (by completion, then by start), and the stop string."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            longest = max(complete, key=len)
            return text[: end - len(longest)], longest
    return text, None


def held_back_slowly(stops: tuple[str, ...], text: str) -> int:
    return max(n for n in range(len(text) + 1) if n == 0 or any(s.startswith(text[len(text) - n :]) for s in stops))


def pieces_of(rng: random.Random, text: str) -> list[str]:
    cuts = sorted(rng.randrange(len(text) + 1) for _ in range(rng.randrange(len(text) + 2)))
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


@pytest.mark.parametrize("block", range(4))
def test_stop_strings_do_what_a_search_of_the_whole_text_does(block: int) -> None:
    for seed in range(block * 1000, block * 1000 + 1000):
        rng = random.Random(seed)
        letters = "ab" if rng.random() < 0.5 else "abc"
        stops = tuple(
            "".join(rng.choices(letters, k=rng.randrange(1, 7))) for _ in range(rng.choice([0, 1, 1, 2, 3, 5]))
        )
        text = "".join(rng.choices(letters, k=rng.randrange(0, 40)))
        expected_text, expected_stop = search_slowly(stops, text)
        finder, emitted, read, found = StopStrings(stops), "", "", None
        for piece in pieces_of(rng, text):
            emit, matched = finder.push(piece)
            assert found is None or (emit, matched) == ("", None), "nothing comes after a match"
            emitted += emit
            read += piece
            found = found or matched
            if found is None:
                assert len(read) - len(emitted) == held_back_slowly(stops, read), (seed, stops, read)
            assert expected_text.startswith(emitted)
        emitted += finder.flush()
        assert (emitted, found) == (expected_text, expected_stop), (seed, stops, text)
        assert finder.flush() == ""


def test_the_stop_string_that_is_complete_first_wins_however_the_text_is_cut() -> None:
    for pieces in (["abc"], ["ab", "c"], ["a", "b", "c"]):
        finder = StopStrings(("abc", "b"))
        results = [finder.push(piece) for piece in pieces]
        assert "".join(emit for emit, _ in results) == "a"
        assert [stop for _, stop in results if stop] == ["b"]


def test_of_two_that_are_complete_at_once_the_one_that_starts_earlier_wins() -> None:
    assert StopStrings(("bc", "abc")).push("xabc") == ("x", "abc")


def test_text_that_only_looked_like_a_stop_string_is_given_back() -> None:
    finder = StopStrings(("User:",))
    assert finder.push("The Us") == ("The ", None)
    assert finder.push("e") == ("", None)
    assert finder.push(" of") == ("Use of", None)
    assert finder.push(" U") == (" ", None)
    assert finder.flush() == "U"


def test_empty_and_endless_stop_strings_are_refused() -> None:
    with pytest.raises(RequestError, match="empty"):
        StopStrings(("a", ""))
    with pytest.raises(RequestError, match="70000 characters"):
        StopStrings(("a" * 70_000,))
