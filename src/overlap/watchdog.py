"""The watchdog: says so when a step does not land."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Final

from overlap.schedule.plan import StepPlan

_log: Final = logging.getLogger("overlap")


class Watchdog:
    """Watches the step that the loop launches or waits for. One timer serves any number of steps.

    It reports and ends nothing: a step may only be slow, and a device that hangs cannot be made to stop. Deadlines go
    on meanwhile, and `AsyncEngine.health` tells what it sees.
    """

    def __init__(self, limit_s: float) -> None:
        """`limit_s` is how many seconds a step may take."""
        self.num_late = 0
        """Steps that were reported."""
        self._limit_s = limit_s
        self._pending: tuple[StepPlan, float] | None = None
        self._armed = False
        self._reported = 0

    def watch(self, plan: StepPlan) -> None:
        """The loop waits for this step from now on. On the loop's thread."""
        self._pending = (plan, time.monotonic())
        if not self._armed:
            self._arm(self._limit_s)

    def rest(self) -> None:
        """The step has landed."""
        self._pending = None

    def late(self) -> str | None:
        """Return what is wrong if the step has taken too long, else None. From any thread."""
        pending = self._pending
        if pending is None:
            return None
        plan, since = pending
        waited_s = time.monotonic() - since
        if waited_s < self._limit_s:
            return None
        return (
            f"Step {plan.number} ({plan.num_rows} rows, {plan.num_tokens} tokens) has not landed for {waited_s:.1f} s, "
            f"and step_limit is {self._limit_s:g} s. The device may hang."
        )

    def _arm(self, delay_s: float) -> None:
        self._armed = True
        asyncio.get_running_loop().call_later(delay_s, self._look)

    def _look(self) -> None:
        pending, self._armed = self._pending, False
        if pending is None:
            return
        plan, since = pending
        late = self.late()
        if late is not None and plan.number != self._reported:
            self._reported = plan.number
            self.num_late += 1
            _log.warning(late)
        rest_s = since + self._limit_s - time.monotonic()
        self._arm(rest_s if rest_s > 0 else self._limit_s)
