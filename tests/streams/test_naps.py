"""How long the waiter's thread sleeps, and how late it then hears of the device, on a simulated clock."""

from __future__ import annotations

import ctypes
import random
import statistics
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from overlap.streams.naps import Due, Expectation, sleep_finely, sleep_until_passed

US = 1e-6
SEEDS = range(5)
SLEEP_US, QUERY_US, DRIVER_US = 6, 2, 130
"""What a nap takes longer than asked for, what asking takes, and how late the driver's blocking wait comes back."""
HOST_US = 150
"""From hearing of one step until the next one is waited for: settle, plan, launch."""
NAP_US = 5 + SLEEP_US + QUERY_US
"""How late the shortest naps hear, at most."""


BEGAN = 1000.0


@dataclass
class Machine:
    """A device that runs steps one behind the other, a host that waits for each of them, and their clocks."""

    now: float = BEGAN
    rate: float = 1.0
    """Seconds on the device's clock in one of the host's."""
    held: Sequence[float] = (0.0,)
    """For how long, after each step in turn, others keep the interpreter from the waiter that has slept."""
    end: float = 0.0
    """When the last step ended."""
    naps: int = 0
    blocked: int = 0
    late: list[float] = field(default_factory=list)
    """For each step that was waited for, in µs."""

    def __post_init__(self) -> None:
        self.expectation = Expectation(BEGAN)

    def device(self, now: float) -> float:
        """What the device's clock says then."""
        return BEGAN + (now - BEGAN) * self.rate

    def query(self) -> bool:
        self.now += QUERY_US * US
        return self.now >= self.end

    def synchronize(self) -> None:
        self.blocked += 1
        self.now = max(self.now, self.end) + DRIVER_US * US

    def sleep(self, seconds: float) -> None:
        self.naps += 1
        self.now += seconds + SLEEP_US * US
        if self.now >= self.end:
            self.now += self.held[len(self.late) % len(self.held)]

    def wait(self, due: Due | None) -> None:
        sleep_until_passed(self, due, lambda: self.now, self.sleep)
        self.late.append((self.now - self.end) / US)

    def run(self, length: float, *, idle: float | None = None, host: float = HOST_US * US) -> None:
        """Run a step, behind the last one or after having been `idle`, and hear of it."""
        launched = None
        if idle is not None:
            launched = self.now = self.now + idle
        start = launched if launched is not None else self.end or self.now
        self.end, heard = start + length, float("inf")
        self.now += host
        if not self.query():  # else it is found reached, and nobody listens
            self.wait(self.expectation.due(launched))
            heard = self.now
        self.expectation.note(self.device(start), self.device(self.end), heard)

    def median_late(self, last: int) -> float:
        return statistics.median(self.late[-last:])


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("length_us", [300, 1000, 3000, 15_000])
def test_steps_of_about_one_length_are_heard_of_a_few_microseconds_after_their_end(length_us: int, seed: int) -> None:
    random.seed(seed)
    machine = Machine()
    for _ in range(100):
        machine.run(length_us * US * random.uniform(0.997, 1.003))
    assert machine.blocked == 1, "for the first, of which nothing was known"
    assert max(machine.late[1:]) < 25
    assert machine.median_late(99) < NAP_US
    assert machine.naps < 25 * 100


def test_a_step_of_which_nothing_is_known_is_waited_for_in_the_driver() -> None:
    machine = Machine()
    assert machine.expectation.due(None) is None
    machine.run(1000 * US)
    assert (machine.naps, machine.blocked) == (0, 1)


def test_marks_behind_no_work_teach_nothing() -> None:
    expectation = Expectation(0.0)
    expectation.note(1.0, 1.0, 1.0)
    assert expectation.due(None) is None


@pytest.mark.parametrize("seed", SEEDS)
def test_steps_that_become_ten_times_shorter_are_heard_of_within_half_of_what_they_take(seed: int) -> None:
    random.seed(seed)
    machine = Machine()
    for length in (15e-3, 1.5e-3):
        for _ in range(10):
            machine.run(length * random.uniform(0.997, 1.003))
    assert machine.late[10] < 1500 / 2 + NAP_US
    assert max(machine.late[11:]) < 25, "and the next ones at once"


@pytest.mark.parametrize("seed", SEEDS)
def test_steps_that_become_ten_times_longer_are_heard_of_no_later_than_from_the_driver(seed: int) -> None:
    random.seed(seed)
    machine = Machine()
    for length in (1.5e-3, 15e-3):
        for _ in range(10):
            machine.run(length * random.uniform(0.997, 1.003))
    assert max(machine.late) < DRIVER_US + NAP_US
    assert max(machine.late[14:]) < 40, "four later they are known"


@pytest.mark.parametrize("seed", SEEDS)
def test_a_step_that_is_a_little_late_is_heard_of_in_proportion(seed: int) -> None:
    random.seed(seed)
    for _ in range(50):
        machine = Machine()
        for _ in range(4):
            machine.run(1e-3)
        lateness = random.uniform(0.0, 7e-4)
        machine.run(1e-3 + lateness)
        assert machine.late[-1] < lateness / US / 8 + NAP_US


@pytest.mark.parametrize("seed", SEEDS)
def test_naps_are_bounded_however_long_a_step_takes_and_whatever_was_expected(seed: int) -> None:
    random.seed(seed)
    for _ in range(300):
        expected, length = (10 ** random.uniform(-4.5, 1.0) for _ in range(2))
        machine = Machine()
        machine.end = machine.now + length
        machine.expectation.note(machine.now - expected, machine.now, machine.now)
        machine.wait(machine.expectation.due(None))
        assert machine.naps < 60, (expected, length)
        assert machine.late[-1] < max(50, length / US / 2, DRIVER_US) + NAP_US, (expected, length)


def test_long_steps_are_left_to_the_driver() -> None:
    machine = Machine()
    for _ in range(10):
        machine.run(0.05)
    assert (machine.naps, machine.blocked) == (0, 10)


@pytest.mark.parametrize("rate", [1 - 2e-6, 1 + 2e-6])
def test_after_idle_minutes_steps_are_heard_of_as_before_though_the_clocks_went_apart(rate: float) -> None:
    machine = Machine(rate=rate)
    for _ in range(5):
        for number in range(10):
            machine.run(1e-3, idle=300.0 if number == 0 else None)  # in which they go apart by 600 µs
    assert machine.blocked == 1
    assert max(machine.late[2:]) < 25, "the second step knew no more than when the driver had told of the first"


@pytest.mark.parametrize("rate", [1 - 2e-5, 1 + 2e-5])
def test_the_expectation_follows_a_clock_that_is_slower_or_faster(rate: float) -> None:
    machine = Machine(rate=rate)
    for _ in range(20_000):  # in which the clocks go apart by 400 µs
        machine.run(1e-3)
    assert machine.blocked == 1
    assert max(machine.late[1:]) < 25


@pytest.mark.parametrize("seed", SEEDS)
def test_steps_that_ended_before_they_were_waited_for_mislead_nobody(seed: int) -> None:
    random.seed(seed)
    machine = Machine()
    for _ in range(100):
        machine.run(1e-3, host=random.choice((150, 150, 1500)) * US)
    assert 30 < len(machine.late) < 90
    assert machine.blocked == 1
    assert max(machine.late[1:]) < 25


def test_steps_that_were_heard_of_late_since_others_held_the_interpreter_mislead_nobody() -> None:
    machine = Machine(held=(0.0, 3e-3, 1e-3, 0.0, 5e-3))
    for _ in range(100):
        machine.run(10e-3)
    undisturbed = [late for number, late in enumerate(machine.late) if machine.held[number % 5] == 0.0]
    assert max(undisturbed[1:]) < 25
    assert machine.blocked == 1


def test_what_the_device_fails_at_is_raised_where_it_is_asked_and_where_it_is_waited_for() -> None:
    class Broken(Machine):
        def query(self) -> bool:
            if super().query():
                raise RuntimeError("broken")
            return False

        def synchronize(self) -> None:
            super().synchronize()
            raise RuntimeError("broken")

    for due in (Due(BEGAN, BEGAN + 1e-3), None):
        machine = Broken()
        machine.end = machine.now + 1e-3
        with pytest.raises(RuntimeError, match="broken"):
            machine.wait(due)
        assert (machine.naps > 0, machine.blocked) == ((True, 0) if due else (False, 1))


@pytest.mark.skipif(sys.platform != "linux", reason="timer slack is Linux's")
def test_the_timer_slack_is_changed_for_the_thread_that_asks_and_no_other() -> None:
    get_timerslack, inside = 30, list[int]()

    def slack_ns() -> int:
        return int(ctypes.CDLL(None).prctl(get_timerslack, 0, 0, 0, 0))

    def ask() -> None:
        sleep_finely()
        inside.append(slack_ns())

    before, thread = slack_ns(), threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert inside == [1]
    assert slack_ns() == before != 1
