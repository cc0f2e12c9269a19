"""Every stream keeps one promise, and the simulated one keeps time."""

from __future__ import annotations

import asyncio
import threading

import pytest

from overlap.errors import InternalError
from overlap.streams.cpu import CpuStream
from overlap.testing import SimDevice, check_stream


async def test_a_simulated_stream_keeps_the_promise() -> None:
    await check_stream(SimDevice().stream)
    await check_stream(SimDevice().stream, share=24)


async def test_a_cpu_stream_keeps_the_promise() -> None:
    await check_stream(CpuStream)


async def test_a_share_has_a_cost_of_its_own_and_changes_no_order() -> None:
    device = SimDevice(cost=lambda work, tokens: 5.0 if work.endswith("sm:24") else 1.0)
    stream = device.stream("compute")
    for number, share in enumerate((0, 24, 24, 0)):
        stream.use(share)
        stream.launch(f"step {number}", lambda: None)
    assert [(span.work, span.end) for span in stream.spans] == [
        ("step 0", 1.0), ("step 1 sm:24", 6.0), ("step 2 sm:24", 11.0), ("step 3", 12.0),
    ]  # fmt: skip


def test_a_cpu_stream_has_no_shares() -> None:
    stream = CpuStream()
    stream.use(0)
    with pytest.raises(InternalError, match="no share 24"):
        stream.use(24)
    stream.close()


async def test_two_cpu_streams_run_at_the_same_time() -> None:
    first, second = CpuStream("first"), CpuStream("second")
    meet = threading.Barrier(2, timeout=10)
    first.launch("meet", meet.wait)
    second.launch("meet", meet.wait)  # each waits for the other: in turn, both would fail
    await asyncio.gather(first.wait_reached(first.mark()), second.wait_reached(second.mark()))
    assert not meet.broken
    first.close()
    second.close()


async def test_the_event_loop_runs_other_tasks_while_a_cpu_stream_is_busy() -> None:
    stream, go = CpuStream(), threading.Event()
    stream.launch("wait", lambda: go.wait(10))
    waiting = asyncio.create_task(stream.wait_reached(stream.mark()))
    await asyncio.sleep(0)
    assert not waiting.done()
    go.set()
    await waiting
    stream.close()


async def test_a_closed_stream_refuses_work() -> None:
    for stream in (CpuStream(), SimDevice().stream("sim")):
        stream.close()
        with pytest.raises(InternalError, match="closed"):
            stream.launch("late", lambda: None)


async def test_simulated_work_takes_its_time_and_the_gap_between_is_a_bubble() -> None:
    device = SimDevice(cost=lambda work, tokens: 2.0 * tokens)
    stream = device.stream("compute")
    stream.launch("a", lambda: None, tokens=2)
    await stream.wait_reached(stream.mark())
    device.spend(3.0)  # the host is slow: the device has nothing queued
    stream.launch("b", lambda: None)
    await stream.wait_reached(stream.mark())
    assert (device.now, device.busy("compute"), device.bubble("compute")) == (9.0, 6.0, 3.0)


async def test_hidden_is_the_share_of_one_stream_behind_another() -> None:
    device = SimDevice(cost=4.0)
    compute, comm = device.stream("compute"), device.stream("comm")
    compute.launch("first half", lambda: None)
    comm.follow(compute.mark())
    comm.launch("reduce first half", lambda: None)
    compute.launch("second half", lambda: None)
    comm.follow(compute.mark())
    comm.launch("reduce second half", lambda: None)
    assert device.hidden("comm", behind="compute") == 0.5
