"""Speculation never changes what comes out: same seed, same tokens, whatever drafts and however many count."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from overlap.messages import SamplingParams
from overlap.models.llama import Llama
from overlap.schedule.plan import SampleKind
from overlap.spec.drafter import Drafter, Drafts, Read
from overlap.state.rows import SlotRows

FILTERS: tuple[dict[str, Any], ...] = ({}, {"top_k": 20}, {"top_p": 0.8}, {"top_k": 50, "top_p": 0.9, "min_p": 0.05})
DRAFTERS = ("ngram", "eagle3", "eagle", "model")


def requests(seed: int, *, greedy: bool) -> tuple[list[list[int]], list[SamplingParams]]:
    generator = torch.Generator().manual_seed(seed)
    prompts, params = [], []
    for row in range(4):
        length = int(torch.randint(1, 24, (), generator=generator))
        prompt = torch.randint(3, 512, (length,), generator=generator).tolist()
        prompts.append(prompt * 2 if row % 2 else prompt)  # some repeat themselves, for the n-gram's sake
        filters = FILTERS[row]
        params.append(
            SamplingParams(temperature=0 if greedy else (0.4, 0.7, 1.0, 1.3)[row], seed=seed * 7 + row, **filters)
        )
    return prompts, params


@pytest.mark.parametrize("greedy", [True, False], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", DRAFTERS)
def test_a_drafter_changes_no_token(name: str, greedy: bool, target: Llama, spec: Any, tmp_path: Path) -> None:
    for seed in range(4):
        prompts, params = requests(seed, greedy=greedy)
        plain = [spec.Reference(target).run([one], [how], 20)[0] for one, how in zip(prompts, params, strict=True)]
        drafter = spec.make_drafter(name, target, tmp_path / str(seed), 1 + seed % 5, len(prompts))
        assert spec.Reference(target, drafter).run(prompts, params, 20, chunk=5 + seed) == plain


def test_rows_with_fewer_drafts_and_with_none_live_in_the_same_step(target: Llama, spec: Any, tmp_path: Path) -> None:
    prompts, params = requests(11, greedy=False)
    plain = spec.Reference(target).run(prompts, params, 24)
    drafter = spec.make_drafter("model", target, tmp_path, 4, len(prompts))
    assert spec.Reference(target, drafter, lambda row, step: (row + step) % 5).run(prompts, params, 24) == plain


def test_the_target_as_its_own_drafter_is_always_right(target: Llama, spec: Any, tmp_path: Path) -> None:
    """The coupling: the same logits and the same noise draw the same tokens, so every draft is accepted."""
    for greedy in (True, False):
        prompts, params = requests(5, greedy=greedy)
        reference = spec.Reference(target, spec.make_drafter("model", target, tmp_path, 4, len(prompts)))
        reference.run(prompts, params, 25)
        assert set(reference.accepted) == {4}


class HalfWrong:
    """A drafter whose drafts are those of another, but for every third, so that all lengths of accepted runs occur."""

    def __init__(self, inner: Drafter) -> None:
        self.max_drafts, self.taps, self._inner, self._number = inner.max_drafts, inner.taps, inner, 0

    def draft(self, read: Read, slots: SlotRows, kind: SampleKind) -> Drafts:
        found = self._inner.draft(read, slots, kind)
        self._number += 1
        places = torch.arange(found.tokens_RK.numel()).view_as(found.tokens_RK) + self._number
        return Drafts(tokens_RK=(found.tokens_RK + (places % 3 == 0)) % 512, num_R=found.num_R)


@pytest.mark.parametrize("greedy", [True, False], ids=["greedy", "sampled"])
def test_drafts_that_are_wrong_in_the_middle_change_no_token(
    greedy: bool, target: Llama, spec: Any, tmp_path: Path
) -> None:
    prompts, params = requests(21, greedy=greedy)
    plain = spec.Reference(target).run(prompts, params, 30)
    reference = spec.Reference(target, HalfWrong(spec.make_drafter("model", target, tmp_path, 4, len(prompts))))
    assert reference.run(prompts, params, 30) == plain
    assert {0, 1, 2} <= set(reference.accepted)


def test_sampled_tokens_have_the_distribution_of_the_target(target: Llama, spec: Any, tmp_path: Path) -> None:
    """Chi-square of the second token over 600 seeds against its exact probabilities, drafted by an EAGLE-3 head."""
    rows, prompt, kept = 600, [9, 40, 77], 8
    params = [SamplingParams(temperature=0.9, top_k=kept, seed=seed) for seed in range(rows)]
    firsts: dict[int, list[int]] = {}
    drafter = spec.make_drafter("eagle3", target, tmp_path, 2, 300)
    for start in range(0, rows, 300):
        reference = spec.Reference(target, drafter)
        for first, second in reference.run([prompt] * 300, params[start : start + 300], 2):
            firsts.setdefault(first, []).append(second)
    commonest = max(firsts, key=lambda token: len(firsts[token]))
    counts = torch.bincount(torch.tensor(firsts[commonest]), minlength=target.vocab_size).double()
    reference = spec.Reference(target)
    logits = reference_logits(reference, [*prompt, commonest])
    border = logits.topk(kept).values[-1]
    expected = (logits / 0.9).masked_fill(logits < border, -torch.inf).softmax(-1).double() * len(firsts[commonest])
    assert counts[expected == 0].sum() == 0
    likely = expected >= 5
    rest = expected[~likely].sum()
    square = float(((counts - expected)[likely] ** 2 / expected[likely]).sum())
    square += float((counts[~likely].sum() - rest) ** 2 / rest) if rest > 0 else 0.0
    assert square < 26.1  # chi-square of 8 degrees of freedom passes it once in 1,000


def reference_logits(reference: Any, tokens: list[int]) -> torch.Tensor:
    """Return the target's logits behind `tokens`, float32 [V]."""
    seen: list[torch.Tensor] = []
    logits = reference.target.logits

    class Spy:
        def __getattr__(self, name: str) -> Any:
            return getattr(target, name)

        def logits(self, hidden: torch.Tensor) -> torch.Tensor:
            seen.append(logits(hidden))
            return seen[-1]

    target, reference.target = reference.target, Spy()
    reference.run([tokens], [SamplingParams(temperature=0)], 1, chunk=len(tokens))
    return seen[-1][-1]
