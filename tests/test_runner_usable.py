"""The look at the device behind a failed step leaves the other lane's step its own failure."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from overlap.flight import TorchFlight
from overlap.lane_runner import LaneRunner
from overlap.runner import Runner
from overlap.schedule.plan import SIDE
from overlap.streams.sim import SimDevice


def lane_on(stream: Any) -> LaneRunner:
    lane = object.__new__(LaneRunner)
    lane._stream, lane._kv = stream, SimpleNamespace(is_cuda=True, device=None)  # type: ignore[assignment]
    return lane


async def test_a_block_that_failed_is_told_by_its_own_step_after_the_device_was_looked_at(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: SimpleNamespace(synchronize=lambda: None))
    device = SimDevice(1e-3)
    runner, side = object.__new__(Runner), device.stream("prompts")
    runner._main, runner._lanes = lane_on(device.stream("compute")), []
    runner._lanes += [runner._main, lane_on(side)]

    def blocks() -> Iterator[None]:
        for number in range(3):
            if number == 0:
                raise MemoryError("the first block")
            yield

    plan: Any = SimpleNamespace(lane=SIDE, num_tokens=3)
    flight = TorchFlight(plan, side, [], None, blocks(), 3, lambda: True)
    flight.launch_block()
    assert runner.usable()
    flight.launch_block()
    flight.launch_block()
    with pytest.raises(MemoryError, match="the first block"):
        await flight.wait_landed()
