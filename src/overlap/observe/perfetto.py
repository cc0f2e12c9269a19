"""A trace as Chrome's trace event format in JSON, which ui.perfetto.dev and chrome://tracing open.

One process is the engine, one thread of it the loop, one more each stream. Bubbles are slices of their own between the
steps of a stream, an arrow goes from each launch to its step, and a counter shows how many requests run and wait.
"""

from __future__ import annotations

import json
from typing import Any, Final

from overlap.observe.record import DeviceSpan, HostSpan, Record

_PID: Final = 1
_HOST: Final = 1  # tid of the loop; the streams follow

Event = dict[str, Any]


def perfetto(record: Record) -> str:
    """Return the JSON text. Times are µs from the first event, to the nanosecond."""
    begins = [span.start for span in record.host] + [span.start - span.bubble for span in record.device]
    origin = min(begins, default=0.0)
    tids = {stream: _HOST + 1 + i for i, stream in enumerate(record.streams)}
    events = [_name("process_name", 0, f"overlap: {record.engine}"), _name("thread_name", _HOST, "engine loop")]
    events += [_name("thread_name", tid, f"stream {stream}") for stream, tid in tids.items()]
    events += [
        {"ph": "M", "name": "thread_sort_index", "pid": _PID, "tid": tid, "ts": 0, "args": {"sort_index": tid}}
        for tid in (_HOST, *tids.values())
    ]
    timed = [event for span in record.host for event in _host_events(span, record, origin)]
    timed += [event for span in record.device for event in _device_events(span, tids[span.stream], record, origin)]
    timed += _arrows(record, tids, origin)
    timed += [
        {
            "ph": "C", "name": "requests", "pid": _PID, "tid": 0, "ts": _us(step.time - origin),
            "args": {"running": step.running, "waiting": step.waiting},
        }
        for step in record.steps.values()
    ]  # fmt: skip
    timed.sort(key=lambda event: event["ts"])  # stable: a flow's end stays behind the slice that it binds to
    figures = {"steps": len(record.steps), "bubble_share": round(record.bubble_share, 6)}
    return json.dumps({"traceEvents": events + timed, "displayTimeUnit": "ms", "otherData": figures}) + "\n"


def _name(kind: str, tid: int, name: str) -> Event:
    return {"ph": "M", "name": kind, "pid": _PID, "tid": tid, "ts": 0, "args": {"name": name}}


def _host_events(span: HostSpan, record: Record, origin: float) -> list[Event]:
    name = f"{span.verb} {span.number}" if span.number else f"{span.verb} (nothing to run)"
    return [_slice(name, "host", _HOST, span.start - origin, span.end - origin, _numbers(record, span.number))]


def _device_events(span: DeviceSpan, tid: int, record: Record, origin: float) -> list[Event]:
    start, end = span.start - origin, span.end - origin
    events = []
    if span.bubble > 0.0:
        events.append(_slice("bubble", "bubble", tid, start - span.bubble, start, {"before_step": span.number}))
    numbers = _numbers(record, span.number) | {"gap_us": _us(span.gap), "bubble_us": _us(span.bubble)}
    events.append(_slice(f"step {span.number}", "device", tid, start, end, numbers))
    return events


def _arrows(record: Record, tids: dict[str, int], origin: float) -> list[Event]:
    launched = {span.number: span.start for span in reversed(record.host) if span.verb == "launch"}
    events = []
    for span in record.device:
        if span.number in launched:
            flow = {"name": "launch", "cat": "flow", "id": span.number, "pid": _PID}
            events.append(flow | {"ph": "s", "tid": _HOST, "ts": _us(launched[span.number] - origin)})
            events.append(flow | {"ph": "f", "bp": "e", "tid": tids[span.stream], "ts": _us(span.start - origin)})
    return events


def _numbers(record: Record, number: int) -> Event:
    step = record.steps.get(number)
    if step is None:
        return {"step": number} if number else {}
    numbers: Event = {
        "step": number,
        "rows": step.rows,
        "tokens": step.tokens,
        "prompt_tokens": step.prompt_tokens,
        "admissions": step.admissions,
    }
    return numbers | {"way": step.way} if step.way else numbers


def _slice(name: str, category: str, tid: int, start: float, end: float, numbers: Event) -> Event:
    at, until = _us(start), _us(end)
    return {
        "ph": "X", "name": name, "cat": category, "pid": _PID, "tid": tid,
        "ts": at, "dur": round(max(0.0, until - at), 3), "args": numbers,
    }  # fmt: skip


def _us(seconds: float) -> float:
    return round(seconds * 1e6, 3)
