"""The policy on devices whose true costs are known: what it loses against the best fixed choice, and when it wavers."""

from __future__ import annotations

import itertools
import random
import statistics
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from overlap.microbatch.cost import CostModel, Nominal
from overlap.microbatch.policy import FIRST_TRIALS, TRIAL_SHARE, SplitPolicy
from overlap.schedule.split import Always, Choice, Outlook, Ran, Splitter, name_of

BUDGET = 2048
NOMINAL = Nominal(weights_s=1e-4, kv_token_s=1e-8, token_s=1e-6, step_s=1e-4)
Noise = Callable[[int], float]
"""What a measurement is multiplied by, given how many of its kind were before it."""


@dataclass(frozen=True)
class Truth:
    """What steps of a made-up device take."""

    step_s: float
    row_s: float
    kv_s: float
    token_s: float
    mixed: float
    """A mixed step, as a share of its two parts."""
    slower: tuple[float, float]
    """How many times as long a prompt step and a decode step take beside each other."""
    share: tuple[float, float] = (2.0, 2.0)
    """The same, with SMs of the decode rows' own."""
    shares: Mapping[int, tuple[float, float]] = field(default_factory=dict)
    """The same for each number of them, where that makes a difference."""

    def decode(self, rows: int, context: int) -> float:
        return self.step_s + rows * self.row_s + context * self.kv_s

    def prefill(self, tokens: int) -> float:
        return self.step_s + tokens * self.token_s

    def step(self, rows: int, context: int, tokens: int) -> float:
        return self.mixed * (self.decode(rows, context) + self.prefill(tokens))

    def beside(self, choice: Choice, decode_s: float, tokens: int) -> tuple[float, float]:
        """Return what a prompt step and a decode step take; a decode step is slower only while prompts are read."""
        prompt, decode = self.shares.get(choice.share, self.share) if choice.share else self.slower
        took_s = self.prefill(tokens) * prompt
        return took_s, min(decode_s * decode, decode_s + took_s * (1 - 1 / decode))


def small_gpu(draw: random.Random) -> Truth:
    """Two lanes with SMs shared out win by about 1.2."""
    return Truth(
        9e-4,
        draw.uniform(2, 6) * 1e-6,
        1e-8,
        1.4e-6,
        draw.uniform(0.88, 0.94),
        (1.3, 1.9),
        (1.25, draw.uniform(1.6, 2)),
    )


def large_gpu(draw: random.Random) -> Truth:
    """Mixed and two lanes take about as long."""
    return Truth(6e-3, 2e-5, 5e-8, 3.6e-6, draw.uniform(0.95, 1.05), (2.0, draw.uniform(1.8, 2.1)), (1.9, 2.1))


def cpu(draw: random.Random) -> Truth:
    """Lanes share the cores, and read the weights twice."""
    return Truth(2e-2, 1e-3, 1e-7, 1e-4, draw.uniform(0.8, 0.95), (2.1, draw.uniform(2.2, 2.6)), (2.4, 2.4))


def any_device(draw: random.Random) -> Truth:
    return Truth(
        draw.uniform(1, 10) * 1e-3, draw.uniform(1, 40) * 1e-6, draw.uniform(0, 5) * 1e-8, draw.uniform(1, 50) * 1e-6,
        draw.uniform(0.7, 1.1), (draw.uniform(1, 2.2), draw.uniform(1, 3)), (draw.uniform(1, 2.2), draw.uniform(1, 3)),
    )  # fmt: skip


def hiccups(seed: int) -> Noise:
    chance = random.Random(seed)
    return lambda _: chance.lognormvariate(0, 0.04) * (6.0 if chance.random() < 0.02 else 1.0)


def slow_starts(seed: int) -> Noise:
    """The first steps of every kind take four times as long, as they do while something is built."""
    chance = random.Random(seed)
    return lambda before: chance.lognormvariate(0, 0.03) * (4.0 if before < 4 else 1.0)


def none(_: int) -> float:
    return 1.0


class Counting(SplitPolicy):
    """Counts what it chose."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.choices: Counter[str] = Counter()

    def choose(self, outlook: Outlook) -> Choice:
        choice = super().choose(outlook)
        self.choices[name_of((choice.mode, choice.share))] += 1
        return choice


@dataclass
class Device:
    """Runs episodes: a prompt arrives beside rows that decode so many steps, then end.

    What is left of the prompt by then is read alone; what is left of the steps runs alone.
    """

    truth: Truth
    splitter: Splitter
    noise: Noise
    seconds: float = 0.0
    longest_s: float = 0.0
    """The longest decode step beside the prompts of the last episode."""

    def __post_init__(self) -> None:
        self._counts: dict[tuple[bool, bool, bool], int] = {}
        self._passed = 0.0
        """Decode steps beside prompts, and the part of the one that goes on."""

    def note(self, rows: int, context: int, tokens: int, seconds: float, choice: Choice | None = None) -> None:
        kind = bool(rows), bool(tokens), choice is not None
        before = self._counts[kind] = self._counts.get(kind, -1) + 1
        share = 0 if choice is None else choice.share
        self.splitter.note(Ran(rows, context, tokens, choice is not None, seconds * self.noise(before), share))

    def episode(self, rows: int, context: int, prompt: int, steps: int) -> None:
        truth, decode_s = self.truth, self.truth.decode(rows, context)
        left, passed, self.longest_s = prompt, 0.0, 0.0
        while left and passed < steps:
            choice = self.splitter.choose(Outlook(rows, context, left, side_busy=False))
            chunk = min(left, choice.prefill_tokens, BUDGET - rows)
            left -= chunk
            if choice.mode == "mixed":
                took_s = between_s = truth.step(rows, context, chunk)
                self.note(rows, context, chunk, took_s)
            elif choice.mode == "serial":
                took_s = between_s = truth.prefill(chunk) + decode_s
                self.note(0, 0, chunk, truth.prefill(chunk))
                self.note(rows, context, 0, decode_s)
            else:
                prompt_s, between_s = truth.beside(choice, decode_s, chunk)
                took_s = max(prompt_s, between_s)
                self.note(0, 0, chunk, prompt_s, choice)
                self._passed = self._passed % 1 + took_s / between_s
                for _ in range(int(self._passed)):
                    self.note(rows, context, 0, between_s, choice)
            passed += took_s / between_s
            self.seconds += took_s
            self.longest_s = max(self.longest_s, between_s)
        while left:
            chunk = min(left, BUDGET)
            left -= chunk
            self.note(0, 0, chunk, truth.prefill(chunk))
            self.seconds += truth.prefill(chunk)
        for _ in range(2):
            self.note(rows, context, 0, decode_s)
        self.seconds += max(0.0, steps - passed) * decode_s


def run(device: Device, episodes: int, seed: int, *, rows: tuple[int, ...] = (16, 100), steps: int = 60) -> float:
    """Return the seconds of the second half."""
    chance, at_half = random.Random(seed), 0.0
    for number in range(episodes):
        if number == episodes // 2:
            at_half = device.seconds
        many = chance.choice(rows)
        device.episode(many, many * chance.randint(400, 600), chance.choice((500, 1900, 7000)), steps)
    return device.seconds - at_half


def share_of(mode: str, device: Device, chosen: Counting, episodes: int) -> float:
    """Run on, and return the share of the choices whose name begins with `mode`."""
    before = chosen.choices.copy()
    run(device, episodes, 1)
    since = chosen.choices - before
    return sum(count for name, count in since.items() if name.startswith(mode)) / since.total()


def policy(target_s: float | None = None) -> Counting:
    return Counting(CostModel(NOMINAL), token_budget=BUDGET, target_itl_s=target_s, shares=(56,))


FIXED = (Always("mixed"), Always("serial"), Always("lanes"), Always("lanes", share=56))


@pytest.mark.parametrize("noise", [hiccups, slow_starts], ids=["hiccups", "slow starts"])
@pytest.mark.parametrize("kind", [small_gpu, large_gpu, cpu, any_device], ids=lambda kind: str(kind.__name__))
def test_it_is_within_two_percent_of_the_best_fixed_choice(
    kind: Callable[[random.Random], Truth], noise: Callable[[int], Noise]
) -> None:
    for seed in range(6):
        truth = kind(random.Random(seed))
        fixed = [run(Device(truth, each, none), 600, seed) for each in FIXED]
        chosen = policy()
        took = run(Device(truth, chosen, noise(seed)), 600, seed)
        assert took < 1.02 * min(fixed), (seed, truth, took, fixed, chosen.explain())


@pytest.mark.parametrize("noise", [hiccups, slow_starts], ids=["hiccups", "slow starts"])
@pytest.mark.parametrize("seed", [0, 9, 21])
def test_with_three_shares_to_learn_it_is_still_within_two_percent(seed: int, noise: Callable[[int], Noise]) -> None:
    """Of 192 draws the worst lost 1.04%. In 9 and 21 it once lost 3.1% and 2.3%, by first steps that were slow."""
    draw, shares = random.Random(seed), (24, 40, 56)
    truth = any_device(draw)
    slower = {
        share: ((132 / (132 - share)) ** draw.uniform(0.7, 1.05), (132 / share) ** draw.uniform(0.3, 0.8))
        for share in shares
    }
    truth = replace(truth, shares=slower)
    ways = [*FIXED[:3], *(Always("lanes", share=share) for share in shares)]
    fixed = [run(Device(truth, each, none), 600, seed) for each in ways]
    chosen = Counting(CostModel(NOMINAL), token_budget=BUDGET, shares=shares)
    took = run(Device(truth, chosen, noise(seed)), 600, seed)
    assert took < 1.02 * min(fixed), (took, fixed, chosen.explain())


@pytest.mark.parametrize("seed", range(3))
def test_where_two_lanes_win_it_takes_them_and_where_they_lose_it_does_not(seed: int) -> None:
    for kind, mode in ((small_gpu, "lanes"), (cpu, "mixed")):
        chosen = policy()
        device = Device(kind(random.Random(seed)), chosen, hiccups(seed))
        run(device, 200, seed)
        assert share_of(mode, device, chosen, 300) > 0.9, chosen.explain()


@pytest.mark.parametrize("kind", [small_gpu, large_gpu, any_device], ids=lambda kind: str(kind.__name__))
def test_a_target_between_tokens_is_kept_wherever_some_choice_keeps_it(kind: Callable[[random.Random], Truth]) -> None:
    rows, context = 64, 64 * 500
    for seed in range(5):
        truth = kind(random.Random(seed))
        possible = min(truth.decode(rows, context) * truth.slower[1], truth.step(rows, context, 64))
        for target_s in (1.3 * possible, 2.5 * possible):
            chosen = policy(target_s)
            device = Device(truth, chosen, hiccups(seed))
            kept = []
            for number in range(250):
                device.episode(rows, context, 7000, 60)
                if number >= 100:
                    kept.append(device.longest_s <= target_s)
            assert statistics.mean(kept) > 0.97, (seed, truth, target_s, chosen.explain())


def test_a_looser_target_reads_prompts_no_slower() -> None:
    truth = small_gpu(random.Random(1))
    tight, loose, free = (
        run(Device(truth, policy(target_s), hiccups(0)), 300, 0, rows=(64,)) for target_s in (3e-3, 6e-3, None)
    )
    assert tight > 0.99 * loose
    assert loose > 0.99 * free


def test_a_target_that_nothing_keeps_brings_what_comes_near_to_the_least() -> None:
    truth = Truth(2e-3, 1e-6, 1e-9, 2e-6, 0.9, (1.2, 3.0), (1.2, 3.0))
    chosen = policy(1e-4)
    device = Device(truth, chosen, hiccups(0))
    for _ in range(100):
        device.episode(32, 3200, 2000, 60)
    assert device.longest_s < 1.3 * truth.step(32, 3200, 32)


@pytest.mark.parametrize("seed", range(4))
def test_ways_that_are_equal_but_for_noise_do_not_take_turns(seed: int) -> None:
    truth = Truth(2e-3, 1e-6, 1e-9, 4e-6, 1.0, (2.0, 2.0), (2.0, 2.0))
    chosen = policy()
    device = Device(truth, chosen, hiccups(seed))
    for _ in range(50):
        device.episode(32, 3200, 2000, 20)
    changes, last = 0, ""
    for _ in range(2000):
        choice = chosen.choose(Outlook(32, 3200, 2000, side_busy=False))
        device.episode(32, 3200, 2000, 20)
        if "trial" not in choice.why:
            changes += last not in ("", choice.mode)
            last = choice.mode
    assert changes <= 12, chosen.explain()


def test_one_hiccup_changes_nothing() -> None:
    chosen = policy()
    device = Device(cpu(random.Random(0)), chosen, none)
    for _ in range(300):
        device.episode(32, 3200, 2000, 20)
    for _ in range(5):
        for _ in range(2):
            chosen.note(Ran(32, 3200, 2000, beside=False, seconds=100.0))
        before = chosen.choices["mixed"] + chosen.trials
        for _ in range(30):
            device.episode(32, 3200, 2000, 20)
        assert chosen.choices["mixed"] + chosen.trials - before >= 30


def test_what_ran_while_the_host_was_held_up_teaches_nothing() -> None:
    chosen = policy()

    def spell(factor: float, *, held_up: bool) -> None:
        for _ in range(3):
            chosen.note(Ran(16, 8000, 0, False, 1e-3))
        chosen.choose(Outlook(16, 8000, 1000, side_busy=False))
        chosen.note(Ran(16, 8000, 0, True, 1.5e-3))
        if held_up:
            chosen.spoil(chunk=False)
        for _ in range(8):
            chosen.note(Ran(16, 8000, 0, True, 1.5e-3 * factor))
        chosen.note(Ran(0, 0, 1000, True, 12e-3 * factor))
        chosen.note(Ran(16, 8000, 0, False, 1e-3))

    for _ in range(4):
        spell(1.0, held_up=False)
    known = chosen.cost.guess("prefill beside", 16, 8000, 1000)
    counted = chosen.cost.count("prefill beside", 16, 8000, 1000)
    assert counted == 4
    for _ in range(8):
        spell(9.0, held_up=True)
    assert chosen.cost.guess("prefill beside", 16, 8000, 1000) == known
    spell(1.0, held_up=False)
    assert chosen.cost.count("prefill beside", 16, 8000, 1000) == counted + 1
    chosen.spoil(chunk=True)  # it has landed itself: the next one is whole
    spell(1.0, held_up=False)
    assert chosen.cost.count("prefill beside", 16, 8000, 1000) == counted + 2


def test_a_chunk_that_is_read_while_the_shares_change_teaches_nothing() -> None:
    chosen = Counting(CostModel(NOMINAL), token_budget=BUDGET, shares=(56,))
    for _ in range(3):
        chosen.note(Ran(16, 8000, 0, False, 1e-3))

    def chunk(share: int, ran_with: int, seconds: float, *, busy: bool) -> None:
        chosen.hold(("lanes", share))
        chosen.choose(Outlook(16, 8000, 1000, side_busy=busy))
        for _ in range(8):
            chosen.note(Ran(16, 8000, 0, True, 1.5e-3, share))
        chosen.note(Ran(0, 0, 1000, True, seconds, ran_with))

    for _ in range(4):
        chunk(0, 0, 12e-3, busy=True)
    chunk(56, 0, 30e-3, busy=True)  # the last of the old share lands: the new one's were its SMs for most of the time
    for _ in range(4):
        chunk(56, 56, 30e-3, busy=True)
    chunk(0, 56, 12e-3, busy=True)
    chunk(0, 0, 12e-3, busy=True)
    chunk(56, 0, 12e-3, busy=True)
    chosen.hold(("mixed", 0))  # decode rows have all SMs again, beside the last chunk
    chosen.choose(Outlook(16, 8000, 1000, side_busy=True))
    chosen.note(Ran(0, 0, 1000, True, 20e-3, 56))
    chosen.note(Ran(16, 8000, 0, False, 1e-3))
    for share, seconds in ((0, 12e-3), (56, 30e-3)):
        assert chosen.cost.seconds("prefill beside", 16, 8000, 1000, share) == pytest.approx(seconds, rel=0.02)
    assert [chosen.samples(("lanes", share)) for share in (0, 56)] == [5, 4]


def test_decode_steps_beyond_what_the_answers_need_count_for_nothing() -> None:
    """With SMs of their own decode steps are quick and prompts slow: good for long answers, and bad for short ones."""
    truth = Truth(4e-4, 4e-6, 4e-9, 3e-6, 1.0, (1.3, 2.4), shares={56: (1.8, 1.2)})
    chosen = Counting(CostModel(NOMINAL), token_budget=BUDGET, shares=(56,))
    device = Device(truth, chosen, none)
    for _ in range(60):
        device.episode(64, 64 * 500, 4 * BUDGET, 30)
    steps_s = truth.decode(64, 64 * 500)
    for steps, share in ((1000.0, 56), (2.0, 0)):
        outlook = Outlook(64, 64 * 500, 4 * BUDGET, False, 8, owed=steps * 64 / BUDGET)
        chosen._sizes.clear()
        route = max(Counter(chosen.choose(outlook).share for _ in range(40)).items(), key=lambda each: each[1])[0]
        assert route == share, (steps, steps_s, chosen.explain())


def test_with_a_target_a_chunk_that_was_fit_to_few_rows_is_not_kept_for_many() -> None:
    chosen = Counting(CostModel(NOMINAL), token_budget=BUDGET, target_itl_s=20e-3, two_lanes=False)
    for rows in (17, 64):
        for tokens in (256, 512, 1024, 2048):
            for _ in range(20):
                chosen.note(Ran(rows, rows * 100, 0, False, 6e-4 + 2e-4 * rows))
                chosen.note(Ran(0, 0, tokens, False, 6e-6 * tokens))
                chosen.note(Ran(rows, rows * 100, tokens, False, 6e-4 + 2e-4 * rows + 6e-6 * tokens))
    few = chosen.choose(Outlook(17, 1700, 4000, side_busy=False))
    many = [chosen.choose(Outlook(64, 6400, 4000, side_busy=False)) for _ in range(20)]
    assert few.prefill_tokens > 1500
    assert {each.prefill_tokens for each in many} == {many[0].prefill_tokens}
    assert many[0].prefill_tokens < 1200


def test_trials_are_few() -> None:
    for seed in range(3):
        chosen = policy()
        run(Device(any_device(random.Random(seed)), chosen, hiccups(seed)), 1500, seed)
        assert 0 < chosen.trials <= FIRST_TRIALS * len(FIXED) + TRIAL_SHARE * chosen.choices.total() + 12


def test_when_the_device_changes_the_choice_follows() -> None:
    chosen = policy()
    before = small_gpu(random.Random(0))
    device = Device(before, chosen, hiccups(0))
    run(device, 500, 0)
    device.truth = replace(before, slower=(2.4, 2.6), share=(2.4, 2.6))
    run(device, 300, 0)
    assert share_of("mixed", device, chosen, 200) > 0.9, chosen.explain()
    device.truth = before  # what was slow is tried again only rarely, so most but not all sizes have turned back
    run(device, 8000, 0)
    assert share_of("lanes", device, chosen, 200) > 0.7, chosen.explain()


def test_what_is_chosen_depends_on_what_it_was_told_and_on_nothing_else() -> None:
    def told() -> list[str]:
        chosen, whys = policy(), []
        device = Device(small_gpu(random.Random(3)), chosen, hiccups(3))
        for number in range(60):
            device.episode(20 + number, 9000, 3000, 30)
            whys.append(chosen.choose(Outlook(20, 9000, 3000, side_busy=False)).why)
        return whys

    assert told() == told()


def test_it_says_what_it_chose_and_by_which_numbers() -> None:
    chosen = policy(5e-3)
    run(Device(small_gpu(random.Random(0)), chosen, hiccups(0)), 100, 0)
    text = "\n".join(chosen.explain())
    assert "5 ms between tokens" in text
    assert " prompt tokens, " in text
    assert " for a decode step and the prompts, against" in text
    assert "at once, " in text
    assert sum(chosen.choices.values()) > 100


def test_without_a_second_lane_it_chooses_between_mixed_and_serial() -> None:
    chosen = Counting(CostModel(NOMINAL), token_budget=BUDGET, two_lanes=False)
    run(Device(small_gpu(random.Random(0)), chosen, hiccups(0)), 50, 0)
    assert set(chosen.choices) <= {"mixed", "serial"}


def test_with_patience_two_lanes_are_not_tried_before_many_steps_were_planned() -> None:
    tried = {}
    for patience in (0, 400):
        chosen = Counting(CostModel(NOMINAL, "test"), token_budget=BUDGET, patience=patience)
        device = Device(small_gpu(random.Random(0)), chosen, none)
        for _ in range(12):
            device.episode(96, 96 * 512, 8 * BUDGET, 30)
        tried[patience] = chosen.choices["lanes"]
        if patience:
            for _ in range(80):
                device.episode(96, 96 * 512, 8 * BUDGET, 30)
            assert chosen.choices["lanes"] > 0, "it finds out in the end"
    assert tried[0] > 0
    assert tried[400] == 0


@pytest.mark.parametrize("rows", [5, 12, 24, 64])
@pytest.mark.parametrize("context", [100, 300, 1000])
@pytest.mark.parametrize("tokens", [300, 1024, 4096])
def test_a_way_that_is_not_known_of_a_row_more_may_leave_in_the_middle_of_its_trial(
    rows: int, context: int, tokens: int
) -> None:
    """As after a calibration that was interrupted: two lanes are known of some sizes, not of all their shares."""
    trials = 0
    for slower, owed in itertools.product((1.0, 1.5, 3.0), (0.003, 0.03, 0.3)):
        cost = CostModel(NOMINAL)
        for _ in range(6):
            cost.note("decode", rows, rows * context, 0, 1.5e-3)
            cost.note("prefill", 0, 0, tokens, 1e-3 + tokens * 7e-6)
            cost.note("mixed", rows, rows * context, tokens, 2e-3 + tokens * 7.2e-6)
        for kind, seconds in (("prefill beside", slower * (1e-3 + tokens * 7e-6)), ("decode beside", 2e-3)):
            cost.note(kind, rows, rows * context, tokens, seconds, 0)  # type: ignore[arg-type]
        chosen = SplitPolicy(cost, token_budget=8192, shares=(24, 40), patience=256)
        now = rows
        for _ in range(200):
            choice = chosen.choose(
                Outlook(
                    num_decode=now, decode_context=now * context, prefill_tokens=tokens, side_busy=False,
                    num_prompts=1, owed=owed, left=100, answer=100, ready_tokens=tokens,
                )
            )  # fmt: skip
            if choice.mode == "lanes" and "trial" in choice.why:
                now, trials = rows + 1, trials + 1  # a prompt is through, and decodes now
    assert trials, "the moment came"


def test_where_each_way_was_measured_few_trials_are_made() -> None:
    trials = {}
    for measured in (False, True):
        chosen = policy()
        device = Device(small_gpu(random.Random(1)), chosen, none)
        if measured:
            for route in chosen.routes:
                chosen.hold(route)
                for _ in range(3):
                    device.episode(32, 3200, 2000, 30)
            chosen.end()
        for _ in range(60):
            device.episode(32, 3200, 2000, 30)
        trials[measured] = chosen.trials
        again = Counting(chosen.cost, token_budget=BUDGET, shares=chosen.shares)
        assert again._calibrated == all(again.samples(route) >= 3 for route in again.routes)
    assert trials[True] < trials[False], trials
