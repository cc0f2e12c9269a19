"""The trace of a known schedule has exactly the known spans and bubbles, and its files can be read."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import pytest

from overlap.errors import ConfigError, EngineClosed
from overlap.loop import Loop
from overlap.observe.perfetto import perfetto
from overlap.observe.picture import picture
from overlap.observe.record import VERBS, DeviceSpan, HostSpan, Record, Step
from overlap.observe.timeline import NoTimeline, Timeline
from overlap.observe.trace import Trace, Tracing
from overlap.schedule.planner import Planner
from overlap.schedule.request import Request
from overlap.schedule.settled import Settled
from overlap.streams.cpu import CpuStream
from overlap.streams.stream import Busy, Stream
from overlap.testing import EchoModel, SimDevice, SimRunner, SimTimeline

COSTS = {"plan": 1.0, "launch": 0.5, "settle": 2.0}


class Silent:
    """An outbox for tests that look at time only."""

    def __init__(self) -> None:
        self.on_settled: Callable[[], None] = lambda: None

    def tell_settled(self, settled: Settled) -> None:
        self.on_settled()

    def tell_failed(self, key: int, front: int, failure: BaseException) -> None:
        raise failure


def request(key: int, prompt: list[int], limit: int) -> Request:
    return Request(key=key, front=0, prompt=np.array(prompt, dtype=np.int32), limit=limit)


def planner() -> Planner:
    return Planner(max_rows=4, num_pages=64, token_budget=64, prefill_chunk=64, context=1024)


class Rig:
    """A loop on a simulated device, and a trace that keeps the device's time."""

    def __init__(self, *, cost: float = 4.0, overlap: bool = True) -> None:
        self.device = SimDevice(cost)
        self.planner = planner()
        self.trace = Trace("sim", queue=self._queue, clock=lambda: self.device.now)
        timeline = SimTimeline(self.device, COSTS, tell=self.trace)
        runner = SimRunner(self.device.stream("compute"), EchoModel(), num_pages=64)
        self.outbox = Silent()
        self.loop = Loop(self.planner, runner, self.outbox, timeline=timeline, overlap=overlap)

    def _queue(self) -> tuple[int, int]:
        figures = self.planner.statistics()
        return figures.waiting, figures.running

    async def serve(self, *requests: Request) -> Record:
        for one in requests:
            self.loop.submit(one)
        self.loop.when_idle(self.loop.close)
        await self.loop.run()
        return self.trace.record()


async def test_the_trace_of_a_known_schedule_has_exactly_the_known_spans_and_no_bubble() -> None:
    record = await Rig().serve(request(0, [1, 2, 3], 5))
    assert [(s.verb, s.number, s.start, s.end) for s in record.host] == [
        ("plan", 1, 0.0, 1.0),
        ("launch", 1, 1.0, 1.5),
        ("plan", 2, 1.5, 2.5),
        ("launch", 2, 2.5, 3.0),
        ("land", 1, 3.0, 5.5),
        ("settle", 1, 5.5, 7.5),
        ("plan", 3, 7.5, 8.5),
        ("launch", 3, 8.5, 9.0),
        ("tell", 1, 9.0, 9.0),
        ("land", 2, 9.0, 9.5),
        ("settle", 2, 9.5, 11.5),
        ("plan", 4, 11.5, 12.5),
        ("launch", 4, 12.5, 13.0),
        ("tell", 2, 13.0, 13.0),
        ("land", 3, 13.0, 13.5),
        ("settle", 3, 13.5, 15.5),
        ("plan", 5, 15.5, 16.5),
        ("launch", 5, 16.5, 17.0),
        ("tell", 3, 17.0, 17.0),
        ("land", 4, 17.0, 17.5),
        ("settle", 4, 17.5, 19.5),
        ("plan", 0, 19.5, 20.5),  # the request is known to end with step 5
        ("tell", 4, 20.5, 20.5),
        ("land", 5, 20.5, 21.5),
        ("settle", 5, 21.5, 23.5),
        ("tell", 5, 23.5, 23.5),
    ]
    assert record.device == tuple(DeviceSpan("compute", 1 + k, 1.5 + 4 * k, 5.5 + 4 * k, 0.0, 0.0) for k in range(5))
    assert record.bubble_share == 0.0
    assert record.steps[1] == Step(1, 1.0, rows=1, tokens=3, prompt_tokens=3, admissions=1, waiting=0, running=1)
    assert record.steps[2] == Step(2, 2.5, rows=1, tokens=1, prompt_tokens=0, admissions=0, waiting=0, running=1)


async def test_a_plan_with_a_prompt_is_its_steps_though_another_is_told_in_front_of_the_launch() -> None:
    record = await Rig().serve(request(0, [1, 2, 3], 12), request(1, [5] * 200, 6))
    verbs = [(span.verb, span.number) for span in record.host]
    with_prompt = sorted(step.number for step in record.steps.values() if step.prompt_tokens)
    assert len(with_prompt) >= 3
    for number in with_prompt[2:]:
        place = verbs.index(("launch", number))
        assert verbs[place - 2 : place] == [("plan", number), ("tell", number - 2)]
    planned = [number for verb, number in verbs if verb == "plan" and number]
    assert planned == sorted(record.steps), "each step has its plan"


def test_a_step_that_is_launched_in_blocks_began_with_the_first_and_a_plan_between_them_is_not_its_own() -> None:
    now = itertools.count(1.0)
    trace = Trace("sim", queue=lambda: (0, 0), clock=lambda: next(now))
    scheduler = planner()
    scheduler.submit(request(0, [1, 2, 3], 5))
    plan = scheduler.plan()
    assert plan is not None
    for verb, told in (("plan", None), ("launch", plan), ("launch", plan), ("plan", None), ("launch", plan)):
        with trace.span(verb, told):
            pass
    trace.ran(plan, Busy("compute", 9.0, 20.0, 0.0), 0.0)
    record = trace.record()
    assert [(span.verb, span.number) for span in record.host] == [
        ("plan", 1), ("launch", 1), ("launch", 1), ("plan", 0), ("launch", 1),
    ]  # fmt: skip
    assert record.steps[1].time == 3.0
    arrow = next(event for event in json.loads(perfetto(record))["traceEvents"] if event["ph"] == "s")
    assert arrow["ts"] == 1e6 * (3.0 - 1.0)


async def test_without_overlap_the_whole_host_time_between_two_steps_is_a_bubble() -> None:
    rig = Rig(overlap=False)
    record = await rig.serve(request(0, [1, 2, 3], 5))
    bubbles = [0.0, 3.5, 3.5, 3.5, 3.5]  # settle, plan, launch
    assert record.device == tuple(
        DeviceSpan("compute", 1 + k, 1.5 + 7.5 * k, 5.5 + 7.5 * k, bubbles[k], bubbles[k]) for k in range(5)
    )
    assert record.bubble_share == 14.0 / (14.0 + 20.0)
    figures = rig.loop.statistics()
    assert (figures.busy_s, figures.bubble_s) == (20.0, 14.0)


async def test_a_host_slower_than_a_step_leaves_bubbles_of_the_difference() -> None:
    rig = Rig(cost=2.0)
    record = await rig.serve(request(0, [1, 2, 3], 20))
    assert [span.bubble for span in record.device[2:-1]] == [1.5] * 17
    assert rig.loop.statistics().bubble_s == sum(s.bubble for s in record.device) == rig.device.bubble("compute")


async def test_time_without_any_work_is_a_gap_but_no_bubble() -> None:
    rig = Rig()

    def come_back() -> None:
        rig.device.spend(100.0)  # nobody asks for anything
        rig.loop.submit(request(1, [4, 5], 3))
        rig.loop.when_idle(rig.loop.close)

    rig.loop.submit(request(0, [1, 2, 3], 2))
    rig.loop.when_idle(come_back)
    await rig.loop.run()
    record = rig.trace.record()
    after_settle_plan_and_launch = 2.0 + 100.0 + 1.5
    assert [span.gap for span in record.device] == [0.0, 0.0, after_settle_plan_and_launch, 0.0, 0.0]
    assert [span.bubble for span in record.device] == [0.0] * 5
    assert rig.loop.statistics().bubble_s == 0.0


async def test_a_trace_begins_and_ends_while_the_loop_runs() -> None:
    rig = Rig()
    trace, before, settled = Trace("live", clock=lambda: rig.device.now), rig.trace, itertools.count(1)

    def swap() -> None:
        step = next(settled)
        if step == 3:
            rig.loop.watch(trace)
            with pytest.raises(ConfigError, match="being recorded"):
                rig.loop.watch(Trace())
        if step == 6:
            rig.loop.unwatch(Trace())
            rig.loop.unwatch(trace)

    rig.outbox.on_settled = swap
    await rig.serve(request(0, [1, 2, 3], 9))
    during, always = trace.record(), before.record()
    assert [span.number for span in during.device] == [4, 5, 6]
    assert {span.number for span in always.device} == {1, 2, 3, 7, 8, 9}
    assert min(span.number for span in during.host) >= 4


@pytest.mark.parametrize("overlap", [True, False])
async def test_the_json_is_what_perfetto_reads(overlap: bool) -> None:
    record = await Rig(overlap=overlap).serve(request(0, [1, 2, 3], 6), request(1, [4] * 70, 4))
    read = json.loads(perfetto(record))
    events: list[dict[str, Any]] = read["traceEvents"]
    assert read["otherData"]["steps"] == len(record.device)
    names = {(e["name"], e["tid"]): e["args"]["name"] for e in events if e["name"].endswith("_name")}
    assert names == {
        ("process_name", 0): "overlap: sim",
        ("thread_name", 1): "engine loop",
        ("thread_name", 2): "stream compute",
    }
    for event in events:
        assert {"ph", "name", "pid", "tid", "ts"} <= event.keys()
        assert event["ph"] in {"X", "M", "C", "s", "f"}
        assert event["ts"] >= 0.0
    for tid in (1, 2):
        slices = [e for e in events if e["ph"] == "X" and e["tid"] == tid]
        assert all(e["dur"] >= 0.0 for e in slices)
        for one, following in itertools.pairwise(slices):  # in order, and none inside another
            assert one["ts"] + one["dur"] <= following["ts"] + 1e-6
    assert {e["name"].split()[0] for e in events if e["ph"] == "X"} - {"bubble"} == {*VERBS, "step"}
    bubbles = [e["dur"] for e in events if e["name"] == "bubble"]
    assert (not bubbles) == overlap
    assert sum(bubbles) == pytest.approx(1e6 * sum(span.bubble for span in record.device))
    first = next(e for e in events if e["name"] == "step 1")
    assert first["args"]["prompt_tokens"] == 64
    assert first["args"]["admissions"] == 2
    starts = {e["id"]: e for e in events if e["ph"] == "s"}
    ends = {e["id"]: e for e in events if e["ph"] == "f"}
    assert starts.keys() == ends.keys() == record.steps.keys()
    assert all(starts[number]["ts"] <= ends[number]["ts"] for number in starts)
    assert any(e["ph"] == "C" and e["args"] == {"running": 2, "waiting": 0} for e in events)


async def test_the_picture_is_xml_with_every_lane_step_and_bubble_that_it_says_it_shows() -> None:
    record = await Rig(overlap=False).serve(request(0, [1, 2, 3], 30))
    root = ET.fromstring(picture(record, steps=10))
    lanes = [e.attrib["data-lane"] for e in root.iter() if "data-lane" in e.attrib]
    assert lanes == ["plan", "launch", "tell", "land (waits)", "settle", "compute"]
    words = ["".join(e.itertext()) for e in root.iter() if e.tag.endswith("text")]
    assert "sim: steps 11 to 20" in words
    assert "10 of 30 steps shown" in words
    assert {f"step {number}" for number in range(11, 21)} <= set(words)
    assert "bubbles 47% of the device’s time, 46% in all 30 steps" in words
    said = ["".join(e.itertext()) for e in root.iter() if e.tag.endswith("title")]
    assert "bubble before step 15: 3.5 s" in said
    for box in root.iter("{http://www.w3.org/2000/svg}rect"):
        assert float(box.attrib["width"]) > 0.0
        assert float(box.attrib.get("x", 0.0)) + float(box.attrib["width"]) <= 1200.0


@pytest.mark.parametrize("num_steps", [0, 1, 2, 5, 40])
async def test_a_picture_of_few_steps_and_of_many_can_be_read(num_steps: int) -> None:
    record = await Rig().serve(*([request(0, [1, 2, 3], num_steps)] if num_steps else []))
    root = ET.fromstring(picture(record, steps=40))
    said = " ".join("".join(e.itertext()) for e in root.iter() if e.tag.endswith("text"))
    assert ("no step ran" in said) == (num_steps == 0)
    assert all(str(number) in said for number in range(1, num_steps + 1))


def test_the_picture_shows_no_steps_on_both_sides_of_an_idle_hour() -> None:
    lone = DeviceSpan("compute", 1, 0.0, 1.0, 0.0, 0.0)
    rest = [DeviceSpan("compute", 2 + k, 3601.0 + k, 3602.0 + k, 0.0 if k else 3600.0, 0.0) for k in range(4)]
    text = picture(Record("idle", (), (lone, *rest), {}))
    assert "idle: steps 2 to 5" in text


def test_a_device_clock_that_has_drifted_is_set_by_what_is_certain() -> None:
    host = (HostSpan("launch", 1, 10.0, 10.1), HostSpan("land", 1, 10.1, 11.2))
    for drift in (-5.0, 5.0):
        trace = Trace()
        trace._host.extend(host)
        trace._device.append((1, Busy("compute", 10.1 + drift, 11.1 + drift, 0.0), 0.0))
        span = trace.record().device[0]
        assert 10.0 <= span.start < span.end <= 11.2
        assert span.end - span.start == pytest.approx(1.0)


async def test_on_a_real_stream_each_step_runs_between_its_launch_and_its_landing() -> None:
    stream: Stream = CpuStream("compute")
    plans, trace = planner(), Trace()
    loop = Loop(plans, SimRunner(stream, EchoModel(), num_pages=64), Silent(), timeline=trace)
    for key in range(3):
        loop.submit(request(key, [key + 1] * 20, 30))
    loop.when_idle(loop.close)
    await loop.run()
    stream.close()
    record = trace.record()
    launched = {span.number: span for span in record.host if span.verb == "launch"}
    landed = {span.number: span for span in record.host if span.verb == "land"}
    assert len(record.device) == loop.statistics().steps == 30
    for span in record.device:
        assert launched[span.number].start <= span.start <= span.end <= landed[span.number].end
    for before, after in itertools.pairwise(record.device):
        assert before.end <= after.start
        assert 0.0 <= after.bubble <= after.gap
    for one, following in itertools.pairwise(record.host):
        assert one.end <= following.start
    figures = loop.statistics()
    assert figures.busy_s == pytest.approx(sum(span.end - span.start for span in record.device))
    assert figures.bubble_s == pytest.approx(sum(span.bubble for span in record.device))


def test_no_timeline_keeps_nothing() -> None:
    off = NoTimeline()
    assert off.span("plan") is off.span("settle")


class Watched:
    """What stands for a loop: remembers who watches."""

    def __init__(self) -> None:
        self.seen: list[Timeline | None] = []
        self.ended = False

    def watch(self, timeline: Timeline) -> Future[None]:
        return self._see(timeline)

    def unwatch(self, timeline: Timeline) -> Future[None]:
        assert timeline is self.seen[-1]
        return self._see(None)

    def _see(self, timeline: Timeline | None) -> Future[None]:
        if self.ended:
            raise EngineClosed("The engine was closed.")
        self.seen.append(timeline)
        future: Future[None] = Future()
        future.set_result(None)
        return future


@pytest.mark.parametrize("name", ["trace.json", "trace.svg"])
async def test_a_file_is_written_at_the_end_by_with_and_by_async_with(tmp_path: Path, name: str) -> None:
    loop = Watched()
    with Tracing(tmp_path / name, Trace(), loop.watch, loop.unwatch) as first:
        assert loop.seen == [first]
    sync = (tmp_path / name).read_text()
    async with Tracing(tmp_path / name, Trace(), loop.watch, loop.unwatch) as second:
        loop.ended = True  # the engine ends first: what was recorded is written all the same
    assert loop.seen == [first, None, second]
    assert (tmp_path / name).read_text() == sync


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("trace.png", r"\.json .*\.svg .*not 'trace.png'"),
        ("trace.jsn", "Did you mean '.json'"),
        ("no/t.svg", "make it"),
    ],
)
def test_a_path_that_cannot_be_written_is_refused_before_anything_is_recorded(
    tmp_path: Path, name: str, message: str
) -> None:
    loop = Watched()
    with pytest.raises(ConfigError, match=message):
        Tracing(tmp_path / name, Trace(), loop.watch, loop.unwatch)
    assert loop.seen == []


def test_a_picture_of_two_lanes_shows_the_second_one_at_work() -> None:
    device = [DeviceSpan("compute", n, 1e-3 * n, 1e-3 * (n + 1), 0.0, 0.0) for n in range(1, 61) if n != 7]
    device.append(DeviceSpan("prompts", 7, 6e-3, 9e-3, 0.0, 0.0))
    record = Record("two lanes", (), tuple(sorted(device, key=lambda span: span.start)), {})
    shown = ET.fromstring(picture(record, steps=6))
    words = " ".join(text for text in shown.itertext())
    assert "step 7" in words
    assert "step 30" not in words


def test_a_picture_of_two_lanes_shows_the_second_one_even_if_it_worked_in_a_shorter_time_without_idling() -> None:
    device = [DeviceSpan("compute", n, 1e-3 * n, 1e-3 * (n + 1), 0.0, 0.0) for n in range(1, 41)]
    device += [
        DeviceSpan("compute", n, 1e-3 * (n + 9), 1e-3 * (n + 10), 9e-3 if n == 41 else 0.0, 0.0) for n in (41, 42)
    ]
    device.append(DeviceSpan("prompts", 43, 51e-3, 53e-3, 0.0, 0.0))
    record = Record("two lanes", (), tuple(sorted(device, key=lambda span: span.start)), {})
    words = " ".join(ET.fromstring(picture(record, steps=6)).itertext())
    assert "step 43" in words
    assert "step 20" not in words
