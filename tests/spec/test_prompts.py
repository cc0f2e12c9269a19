"""Built-in prompts: many kinds of them, as many of each, none twice, and none that the bench asks."""

from __future__ import annotations

import importlib.util
import itertools
import re
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

from overlap.spec.data import prompts_from
from overlap.spec.forms import KINDS, QUESTIONS
from overlap.spec.prompts import FILLINGS, built_in
from overlap.spec.topics import TOPICS

SLOT = re.compile(r"\{(\w*|\d+\.\.\d+)\}")


@pytest.fixture(scope="module")
def many() -> list[tuple[str, str]]:
    return list(itertools.islice(built_in(0), 600 * len(KINDS)))


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_spec", Path(__file__).parents[2] / "bench" / "spec.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_topics_and_kinds_are_many_and_no_form_stands_twice() -> None:
    assert len(TOPICS) == len(set(TOPICS)) >= 350
    assert len(KINDS) >= 45
    assert len(QUESTIONS) == len(set(QUESTIONS)) == sum(map(len, KINDS.values()))


def test_tens_of_thousands_of_prompts_are_all_different_and_of_each_kind_as_many(many: list[tuple[str, str]]) -> None:
    assert len({prompt for _, prompt in many}) == len(many) > 30_000
    assert Counter(kind for kind, _ in many) == dict.fromkeys(KINDS, 600)


def test_a_seed_says_which_prompts_come_and_fewer_are_the_first_of_more(many: list[tuple[str, str]]) -> None:
    assert prompts_from(None, 500, 0) == [prompt for _, prompt in many[:500]]
    assert len(set(prompts_from(None, 500, 1)) & set(prompts_from(None, 500, 0))) < 25


def test_each_slot_is_known_and_filled(many: list[tuple[str, str]]) -> None:
    for text in itertools.chain(QUESTIONS, *FILLINGS.values()):
        for slot in SLOT.findall(text):
            low, to, high = slot.partition("..")
            assert int(low) < int(high) if to else slot in FILLINGS, text
    assert not [prompt for _, prompt in many if SLOT.search(prompt) or not prompt.strip()]


def test_an_exhausted_kind_rests_until_all_are_exhausted() -> None:
    kinds = {"small": ("Now?",), "large": ("Is {1..30} odd?",)}
    drawn = list(itertools.islice(built_in(0, kinds), 2000))
    first = next(n for n in range(1, len(drawn)) if drawn[n][1] in {prompt for _, prompt in drawn[:n]})
    assert first > 200  # 30 numbers, each in many words
    assert {kind for kind, _ in drawn[100:first]} == {"large"}
    assert {kind for kind, _ in drawn[first:]} == {"small", "large"}


def test_nothing_that_the_bench_asks_is_trained_on(bench: ModuleType, many: list[tuple[str, str]]) -> None:
    assert not set(bench.SUBJECTS) & set(TOPICS)
    assert not set(bench.ASKED) & set(QUESTIONS)
    words = [rf"\b{subject.removeprefix('the ').removesuffix('s')}(s|es)?\b" for subject in bench.SUBJECTS]
    asked = ["(.+)".join(map(re.escape, form.rstrip(".?").split("{}"))) for form in bench.ASKED]
    subject, form = re.compile("|".join(words), re.IGNORECASE), re.compile("|".join(asked), re.IGNORECASE)
    for text in itertools.chain(QUESTIONS, *FILLINGS.values(), (prompt for _, prompt in many)):
        assert not subject.search(text), text
        assert not form.search(text), text
