"""What a trace has found out, as values: who did what, from when to when."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, NamedTuple

VERBS: Final = ("plan", "launch", "tell", "land", "settle")


class HostSpan(NamedTuple):
    """A verb of the loop. Times are the host's, in seconds; `number` is the step's, 0 if nothing could be planned."""

    verb: str
    number: int
    start: float
    end: float


class DeviceSpan(NamedTuple):
    """A step on a stream, in seconds of the host's clock. `bubble` in front of it the stream waited for the host."""

    stream: str
    number: int
    start: float
    end: float
    gap: float
    bubble: float


class Step(NamedTuple):
    """What a step was, and how many requests there were when it was launched, at `time`."""

    number: int
    time: float
    rows: int
    tokens: int
    prompt_tokens: int
    admissions: int
    waiting: int
    running: int
    way: str = ""
    """Of a step with prompts while rows decode, how the two share the device: see `StepPlan.way`."""


@dataclass(frozen=True, slots=True)
class Record:
    """A finished trace: all in order of time, and the device's spans on the host's clock."""

    engine: str
    host: tuple[HostSpan, ...]
    device: tuple[DeviceSpan, ...]
    steps: dict[int, Step]

    @property
    def streams(self) -> tuple[str, ...]:
        """The names of the streams, in the order in which they came."""
        return tuple(dict.fromkeys(span.stream for span in self.device))

    @property
    def bubble_share(self) -> float:
        """Bubbles as a share of the device's time: bubbles / (bubbles + work). 0 if nothing ran."""
        return bubble_share(self.device)


def bubble_share(spans: Iterable[DeviceSpan]) -> float:
    """Return bubbles / (bubbles + work) of some spans."""
    bubbles = busy = 0.0
    for span in spans:
        bubbles += span.bubble
        busy += span.end - span.start
    return bubbles / (bubbles + busy) if bubbles else 0.0
