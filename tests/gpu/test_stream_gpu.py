"""What only a GPU can answer about streams: a clock that tells work from waiting, and shares of the SMs."""

from __future__ import annotations

import asyncio
import ctypes
import subprocess
import sys
import time
from collections import deque
from functools import partial

import pytest
import torch

from overlap.graphs.capture import Recorder
from overlap.streams import green
from overlap.streams.cuda import CudaStream
from overlap.streams.events import Event
from overlap.streams.green import Half, NoShares, default_shares, splits
from overlap.streams.stream import Busy, Mark
from overlap.testing import check_stream

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
CYCLES = 20_000_000  # some 10 ms
CUDA = torch.device("cuda:0")


@pytest.fixture(scope="module")
def shares() -> tuple[int, ...]:
    """The shares of this device; skips where its SMs cannot be shared out."""
    try:
        return default_shares(splits(0).num_sms)
    except NoShares as why:
        pytest.skip(f"no SM shares here: {why}")


async def test_what_is_queued_in_time_leaves_no_gap_and_a_slow_host_leaves_its_own() -> None:
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


# ── waiting ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.alone
@pytest.mark.parametrize("ahead", [0, 1])
async def test_steps_of_one_length_are_napped_through_and_a_longer_one_is_left_to_the_driver(
    monkeypatch: pytest.MonkeyPatch, ahead: int
) -> None:
    in_driver: list[Event] = []
    synchronize = Event.synchronize

    def noted(event: Event) -> None:
        in_driver.append(event)
        synchronize(event)

    monkeypatch.setattr(Event, "synchronize", noted)
    stream = CudaStream(CUDA)

    def launched(cycles: int) -> Mark:
        stream.launch("sleep", partial(torch.cuda._sleep, cycles))
        return stream.mark()

    async def land(mark: Mark) -> None:
        await stream.wait_reached(mark)
        stream.busy(mark)

    try:
        for _ in range(2):
            await land(launched(CYCLES // 10))
        in_driver.clear()
        flights = deque(launched(CYCLES // 10) for _ in range(ahead))
        for _ in range(50):
            flights.append(launched(CYCLES // 10))
            await land(flights.popleft())
        while flights:
            await land(flights.popleft())
        assert len(in_driver) <= 5, "others may use this machine, and hold the thread up"
        in_driver.clear()
        await land(launched(10 * CYCLES))
        assert len(in_driver) == 1
    finally:
        stream.close()


BREAK = """
import asyncio, torch
from overlap.streams.cuda import CudaStream

async def main():
    stream = CudaStream(torch.device("cuda:0"))
    x = torch.zeros(4, device="cuda")
    here, beyond = (torch.tensor([index], device="cuda") for index in (1, 9))
    torch.cuda.synchronize()
    def work(index):
        torch.cuda._sleep(4_000_000)  # some 2 ms
        x[index]
    for _ in range(8):
        stream.launch("work", lambda: work(here))
        mark = stream.mark()
        while not stream.reached(mark):
            pass
        stream.busy(mark)
    stream.launch("work", lambda: work(beyond))  # a device-side assertion
    try:
        await stream.wait_reached(stream.mark())
    except RuntimeError as failure:
        print("told:", failure)

asyncio.run(main())
"""


def test_what_the_device_fails_at_reaches_a_waiter_that_naps() -> None:
    run = subprocess.run([sys.executable, "-c", BREAK], capture_output=True, text=True, timeout=120, check=False)
    assert "told: CUDA error: cuEvent" in run.stdout, run.stdout + run.stderr[-2000:]


# ── streams on some of the SMs ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("half", ["own", "rest"])
def test_a_stream_on_some_of_the_sms_keeps_the_promise(shares: tuple[int, ...], half: Half) -> None:
    made: list[CudaStream] = []

    def make(name: str) -> CudaStream:
        made.append(CudaStream(CUDA, name, half=half))
        return made[-1]

    for share in (0, *shares):
        asyncio.run(check_stream(make, share=share))


def test_the_driver_gives_the_sms_that_were_asked_for(shares: tuple[int, ...]) -> None:
    cuts = splits(0)
    print(
        f"\n{cuts.num_sms} SMs:",
        {share: (cuts.num_sms_of(share, "own"), cuts.num_sms_of(share, "rest")) for share in shares},
    )
    for share in shares:
        assert cuts.num_sms_of(share, "own") == share
        assert share + cuts.num_sms_of(share, "rest") <= cuts.num_sms
        assert cuts.num_sms_of(share, "rest") >= cuts.num_sms - share - 2 * green.STEP


async def timed(stream: CudaStream, x: torch.Tensor) -> float:
    """Return the shortest of a few large products on a stream."""
    spans: list[Busy] = []
    for _ in range(5):
        stream.launch("product", lambda: x @ x)
        mark = stream.mark()
        await stream.wait_reached(mark)
        spans.append(stream.busy(mark))
    return min(span.end - span.start for span in spans)


async def test_fewer_sms_take_longer_and_all_of_them_are_back_afterwards(shares: tuple[int, ...]) -> None:
    stream = CudaStream(CUDA, "own")
    x = torch.randn(8192, 8192, dtype=torch.bfloat16, device=CUDA)
    torch.cuda.synchronize()
    try:
        took = {}
        for share in (0, *shares, 0):
            stream.use(share)
            took[share] = await timed(stream, x)
    finally:
        stream.close()
    print("\nms of a product by share:", {share: round(1e3 * one, 2) for share, one in took.items()})
    for share in shares:
        ideal = splits(0).num_sms / share
        assert 0.6 * ideal < took[share] / took[0] < 1.8 * ideal
    assert [took[share] for share in shares] == sorted((took[share] for share in shares), reverse=True)


def test_a_graph_runs_on_the_sms_of_the_stream_that_it_was_recorded_on_wherever_it_is_launched(
    shares: tuple[int, ...],
) -> None:
    stream = CudaStream(CUDA, "own")
    x = torch.randn(8192, 8192, dtype=torch.bfloat16, device=CUDA)
    out = torch.empty_like(x)
    torch.cuda.synchronize()
    graphs, times = {}, {}
    everywhere = stream.stream
    try:
        for share in (0, shares[0]):
            stream.use(share)
            with torch.cuda.stream(stream.stream):
                torch.mm(x, x, out=out)
                recorder = Recorder(CUDA)
                with recorder.recording():
                    recorder.begin()
                    torch.mm(x, x, out=out)
                    graphs[share] = recorder, recorder.end()
        torch.cuda.synchronize()
        with torch.cuda.stream(everywhere):
            for share, (recorder, graph) in graphs.items():
                recorder._stream = ctypes.c_void_p(everywhere.cuda_stream)
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
                graph.launch()
                begin.record()
                graph.launch()
                end.record()
                end.synchronize()
                times[share] = begin.elapsed_time(end)
                graph.close()
                recorder.close()
    finally:
        stream.close()
    print("\nms of a product by the share that it was recorded with, all launched where there are all SMs:", times)
    assert times[shares[0]] > 0.6 * times[0] * splits(0).num_sms / shares[0]
