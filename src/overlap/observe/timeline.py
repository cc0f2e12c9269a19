"""What the loop tells about its steps: its verbs plan, launch, tell, land, settle, and when the device ran them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from overlap.schedule.plan import StepPlan
    from overlap.streams.stream import Busy


class Timeline(Protocol):
    """Told of each step as it happens, on the loop's thread. Verbs follow each other; one never holds another."""

    def span(self, verb: str, plan: StepPlan | None = None) -> AbstractContextManager[None]:
        """Return what is entered before the verb and left behind it.

        `plan` is the step's: not yet there for "plan", whose step is that of the next "launch" if one comes.
        A step that is launched block by block has a "launch" for each.
        """

    def ran(self, plan: StepPlan, busy: Busy, bubble: float) -> None:
        """Take in when a landed step ran. `bubble` is the part of `busy.gap` in which work was waiting, in seconds."""


_NOTHING: Final = nullcontext()


class NoTimeline:
    """Keeps nothing and costs about 0.1 µs a verb."""

    def span(self, verb: str, plan: StepPlan | None = None) -> AbstractContextManager[None]:  # noqa: ARG002 - the promise's
        """Return a context that does nothing."""
        return _NOTHING

    def ran(self, plan: StepPlan, busy: Busy, bubble: float) -> None:
        """Forget it."""
