"""What only a GPU can answer about streams: that the device's own clock tells work from waiting."""

from __future__ import annotations

import asyncio
import time
from functools import partial

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
CYCLES = 20_000_000  # some 10 ms


async def test_what_is_queued_in_time_leaves_no_gap_and_a_slow_host_leaves_its_own() -> None:
    from overlap.streams.cuda import CudaStream

    stream = CudaStream(torch.device("cuda:0"), "compute")
    sleep = partial(torch.cuda._sleep, CYCLES)
    try:
        began = time.perf_counter()
        marks = []
        for _ in range(3):
            stream.launch("sleep", sleep)
            marks.append(stream.mark())
        await stream.wait_reached(marks[-1])
        await asyncio.sleep(0.02)
        stream.launch("sleep", sleep)
        marks.append(stream.mark())
        await stream.wait_reached(marks[-1])
        ended = time.perf_counter()
        spans = [stream.busy(mark) for mark in marks]
        assert [span.gap for span in spans[:3]] == [0.0, 0.0, 0.0]
        assert spans[3].gap >= 0.02
        assert began - 1e-3 <= spans[0].start < spans[-1].end <= ended + 1e-3, "the clocks do not agree"
        assert all(span.end - span.start > 1e-3 for span in spans)
    finally:
        stream.close()
