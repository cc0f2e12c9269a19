"""TorchFlight: a plan on its way over a stream, until its tokens are there."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Final

import numpy as np
import torch

from overlap.cache.pages import Ints
from overlap.errors import InternalError
from overlap.schedule.plan import MAIN, StepPlan
from overlap.streams.stream import Busy, Mark, Stream

LONG_LAUNCH_S: Final = 0.03
"""A launch that keeps the host for longer has built or loaded a kernel."""


class TorchFlight:
    """A plan that is running, or queued to, or of which some blocks are not queued yet."""

    __slots__ = ("_blocks", "_landings", "_mark", "_scores", "_stream", "_typical", "_usual", "blocks_left", "plan")

    def __init__(
        self,
        plan: StepPlan,
        stream: Stream,
        landings: list[Ints],
        scores: Ints | None,
        blocks: Iterator[None],
        num_blocks: int,
        usual: Callable[[], bool],
    ) -> None:
        """`usual` says, once a block has been launched, whether such steps will always run as this one does.

        No blocks are a plan that was launched a moment ago.
        """
        self.plan = plan
        self.blocks_left = num_blocks
        self._stream = stream
        self._landings = landings
        self._scores = scores
        self._blocks = blocks
        self._usual = usual
        self._typical = num_blocks > 0 or usual()
        self._mark: Mark | None = None if num_blocks else stream.mark()

    def launch_block(self) -> None:
        """Enqueue the next block; behind the last one stands the mark."""
        self.blocks_left -= 1
        name = "step" if self.plan.lane == MAIN else "prompts"
        began = time.perf_counter()
        self._stream.launch(name, self._run_block, tokens=self.plan.num_tokens)
        self._typical &= self._usual() and time.perf_counter() - began < LONG_LAUNCH_S
        if not self.blocks_left:
            self._mark = self._stream.mark()

    def _run_block(self) -> None:
        with torch.inference_mode():
            next(self._blocks, None)

    @property
    def mark(self) -> Mark:
        """The place behind its last block. Only once that is queued."""
        if self._mark is None:
            raise InternalError(f"step {self.plan.number} is asked for its end, and {self.blocks_left} blocks are left")
        return self._mark

    @property
    def landed(self) -> bool:
        """Whether the device is done. Never waits."""
        return self._mark is not None and self._stream.reached(self._mark)

    async def wait_landed(self) -> Ints:
        """Return the tokens [E] once the device is done; raise what the step raised.

        Of a plan with `logprobs` they are [E, 1 + TOLD_WORDS]: each token, then what is told with it.
        """
        await self._stream.wait_reached(self.mark)
        return self._landings[0].copy() if len(self._landings) == 1 else np.column_stack(self._landings)

    def scored(self) -> Ints | None:
        """Return the scores [S, TOLD_WORDS] of a plan that asks for some. Only once it has landed, and at once then."""
        return None if self._scores is None else self._scores.copy()

    def busy(self) -> Busy:
        """Return when the device ran it. Only once it has landed."""
        return self._stream.busy(self.mark)._replace(typical=self._typical)
