"""`/metrics`: the figures of the engine and of every front, in Prometheus' text format.

The engine is asked at scrape time for what it has counted anyway. What a front sees is counted as answers pass it. A
server of several fronts sums them: whichever front is scraped asks the others for theirs, so it does not matter which
one a scrape meets. Nothing of `prometheus_client` is global here; each scrape fills a registry of its
own.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol, TypeVar, cast

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from overlap.errors import EngineClosed, EngineDead
from overlap.observe.metrics import (
    EngineFigures,
    FrontFigures,
    HistogramFigures,
    Meter,
    Timing,
    end_of,
    engine_figures,
    merged,
)

if TYPE_CHECKING:
    from overlap.generation import Generation
    from overlap.messages import Output

LAG_EVERY_SECONDS: Final = 0.25
"""How often a front measures by how much its event loop is late."""
METER: Final = web.AppKey("METER", Meter)
"""Where an application keeps its meter."""


class Figured(Protocol):
    """The part of a Door that has figures."""

    @property
    def model_name(self) -> str:
        """The model as it was asked for."""

    def statistics(self) -> Any:
        """Return the engine's figures: a frozen dataclass, or what `engine_figures` made of one."""


AnyDoor = TypeVar("AnyDoor", bound=Figured)


def add_metrics(
    app: web.Application,
    door: AnyDoor,
    *,
    model_name: str | None = None,
    other_fronts: Callable[[], Awaitable[Sequence[FrontFigures]]] | None = None,
) -> AnyDoor:
    """Add /metrics to `app`; return the door through which its handlers must ask, so that answers are counted.

    Call it before `app` starts. `model_name` is the one that clients use (default: the door's). What the application
    counts is `app[METER].figures()`. `other_fronts` returns that of all other fronts of the same engine, whenever
    /metrics is read. Let whoever outlives the fronts keep the last figures of one that died among them, or the sums
    would fall.
    """
    meter = app[METER] = Meter()
    name = model_name or door.model_name
    app.middlewares.insert(0, counting(meter))  # outermost: it sees the status that the client sees

    async def metrics(_: web.Request) -> web.Response:
        others = [] if other_fronts is None else await other_fronts()
        body = render(figures_of(door), [meter.figures(), *others], model_name=name)
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST, "Cache-Control": "no-store"})

    async def measure_lag(_: web.Application) -> AsyncIterator[None]:
        task = asyncio.create_task(_measure_lag(meter))
        yield
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task

    app.router.add_get("/metrics", metrics, name="metrics")
    app.cleanup_ctx.append(measure_lag)
    return cast(AnyDoor, MeteredDoor(door, meter))


def figures_of(door: Figured) -> EngineFigures | None:
    """Return the engine's figures, or None once it has ended."""
    try:
        return engine_figures(door.statistics())
    except (EngineClosed, EngineDead):
        return None


def counting(meter: Meter) -> Middleware:
    """Return a middleware that counts responses by route and status."""

    @web.middleware
    async def count(request: web.Request, handler: Handler) -> web.StreamResponse:
        resource = request.match_info.route.resource
        route = "none" if resource is None else resource.canonical
        try:
            response = await handler(request)
        except web.HTTPException as error:
            meter.count_response(route, error.status)
            raise
        except asyncio.CancelledError:
            meter.count_response(route, 499)  # the client left (nginx' number for it)
            raise
        meter.count_response(route, response.status)
        return response

    return count


async def _measure_lag(meter: Meter) -> None:
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + LAG_EVERY_SECONDS
        await asyncio.sleep(LAG_EVERY_SECONDS)
        meter.loop_lag.observe(max(0.0, loop.time() - due))


# ── counting what passes ─────────────────────────────────────────────────────────────────────────────────────────────


class MeteredDoor:
    """A door whose answers are timed. All else goes straight through."""

    def __init__(self, door: Any, meter: Meter) -> None:
        self._door = door
        self._meter = meter

    def generate(self, *args: Any, **kwargs: Any) -> MeteredAnswer:
        """Return the door's answer, timed from now on."""
        return MeteredAnswer(self._door.generate(*args, **kwargs), self._meter)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._door, name)


class MeteredAnswer:
    """An answer as the door gives it, timed. What is never iterated is never counted."""

    def __init__(self, answer: Generation, meter: Meter) -> None:
        self._answer = answer
        self._meter = meter
        self._timing: Timing | None = None

    @property
    def request_id(self) -> str:
        """The id of the request."""
        return self._answer.request_id

    def __aiter__(self) -> MeteredAnswer:
        return self

    async def __anext__(self) -> Output:
        if self._timing is None:
            self._timing = self._meter.begin()
        try:
            output = await self._answer.__anext__()
        except StopAsyncIteration:
            self._timing.end("abort")  # counts only for an answer that had no last Output
            raise
        except BaseException as error:
            self._timing.end(end_of(error))
            raise
        self._timing.take(output)
        return output

    async def aclose(self) -> None:
        """Stop the request. Idempotent."""
        await self._answer.aclose()
        self._end()

    async def __aenter__(self) -> MeteredAnswer:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __del__(self) -> None:
        self._end()

    def _end(self) -> None:
        if self._timing is not None:
            self._timing.end("abort")


# ── names ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Figure:
    """One metric of the engine: `read` gives its values by the value of `label` (no label: of "")."""

    name: str
    kind: Literal["gauge", "counter"]
    help: str
    read: Callable[[EngineFigures], Mapping[str, float]]
    label: str = ""


def _one(field: str) -> Callable[[EngineFigures], Mapping[str, float]]:
    return lambda figures: {"": figures[field]} if figures.get(field) is not None else {}


def _each(field: str, *names: str) -> Callable[[EngineFigures], Mapping[str, float]]:
    """All of a dict of figures, or some of them by name."""

    def read(figures: EngineFigures) -> Mapping[str, float]:
        inner = figures.get(field) or {}
        return {name: inner[name] for name in names or inner if name in inner}

    return read


def _inner(field: str, name: str) -> Callable[[EngineFigures], Mapping[str, float]]:
    def read(figures: EngineFigures) -> Mapping[str, float]:
        inner = figures.get(field) or {}
        return {"": inner[name]} if name in inner else {}

    return read


def _by_place(field: str) -> Callable[[EngineFigures], Mapping[str, float]]:
    """Figures that stand in a row, by their place in it from 1 on."""

    def read(figures: EngineFigures) -> Mapping[str, float]:
        return {str(place): value for place, value in enumerate(figures.get(field) or (), 1)}

    return read


def _share(part: str, whole: str) -> Callable[[EngineFigures], Mapping[str, float]]:
    def read(figures: EngineFigures) -> Mapping[str, float]:
        if part not in figures or whole not in figures:
            return {}
        return {"": figures[part] / figures[whole] if figures[whole] else 0.0}

    return read


def _kv_pages(figures: EngineFigures) -> Mapping[str, float]:
    free, evictable, fenced = figures["free_pages"], figures["evictable_pages"], figures["fenced_pages"]
    held = figures["num_pages"] - free - evictable - fenced
    return {"free": free, "evictable": evictable, "fenced": fenced, "held": held}


def kv_usage(figures: EngineFigures) -> float:
    """Return the share of the KV pages that is neither free nor kept for nobody, 0 to 1."""
    pages = figures["num_pages"]
    return (pages - figures["free_pages"] - figures["evictable_pages"]) / pages if pages else 0.0


def _lane_steps(figures: EngineFigures) -> Mapping[str, float]:
    side = figures.get("side_steps", 0)
    return {"main": figures["steps"] - side, "side": side}


def _lane_busy(figures: EngineFigures) -> Mapping[str, float]:
    return {"main": figures["busy_s"], "side": figures.get("side_busy_s", 0.0)}


ENGINE: Final = (
    Figure("num_requests_running", "gauge", "Requests that have a slot.", _one("running")),
    Figure("num_requests_waiting", "gauge", "Requests that wait for a slot and pages.", _one("waiting")),
    Figure("kv_cache_usage_perc", "gauge", "Share of the KV pages in use, 0 to 1.", lambda f: {"": kv_usage(f)}),
    Figure("kv_pages", "gauge", "Pages of KV by who has them.", _kv_pages, "state"),
    Figure("prompt_tokens", "counter", "Tokens of admitted prompts, each time they were.", _one("prompt_tokens")),
    Figure("generation_tokens", "counter", "Tokens that reached a reader.", _one("tokens_out")),
    Figure("step_tokens", "counter", "Tokens that steps ran, prompt and decode.", _one("tokens_in")),
    Figure("num_preemptions", "counter", "Requests that gave up slot and pages.", _one("preemptions")),
    Figure("prefix_cache_queries", "counter", "Prompt tokens looked up.", _one("prompt_tokens")),
    Figure("prefix_cache_hits", "counter", "Prompt tokens spared.", _one("cached_tokens")),
    Figure("prefix_cache_hit_rate", "gauge", "Hits among queries since the start, 0 to 1.",
           _share("cached_tokens", "prompt_tokens")),
    Figure("evicted_pages", "counter", "Pages that the prefix cache gave up.", _one("evicted_pages")),
    Figure("steps", "counter", "Steps that were settled.", _lane_steps, "lane"),
    Figure("failed_steps", "counter", "Steps that failed.", _one("failed_steps")),
    Figure("late_steps", "counter", "Steps that were reported late.", _one("late_steps")),
    Figure("expired_requests", "counter", "Requests that their deadline ended.", _one("expired")),
    Figure("busy_seconds", "counter", "Seconds for which the device ran steps.", _lane_busy, "lane"),
    Figure("bubble_seconds", "counter", "Seconds for which it had nothing queued while work waited.",
           _one("bubble_s")),
    Figure("lane_choices", "counter", "Steps with prompts by how they were run.", _each("lane_choices"), "way"),
    Figure("sm_shares", "gauge", "Shares of SMs that two lanes can choose from.", _one("sm_shares")),
    Figure("fallbacks", "gauge", "What runs in place of something faster since the start, by reason.",
           _each("fallbacks"), "reason"),
    Figure("graph_steps", "counter", "Forwards by how they were run.",
           _each("graphs", "full_replays", "piecewise_replays", "eager_steps"), "path"),
    Figure("graph_fallbacks", "counter", "Eager steps by reason.", _each("graph_fallbacks"), "reason"),
    Figure("graph_captures", "counter", "Graphs captured.", _inner("graphs", "captures")),
    Figure("graph_lanes_incomplete", "gauge", "Lanes with graphs left to capture in idle moments.",
           _inner("graphs", "incomplete")),
    Figure("graph_capture_failures", "counter", "Captures that failed.", _inner("graphs", "capture_failures")),
    Figure("graph_capture_seconds", "counter", "Seconds spent on captures.", _inner("graphs", "capture_seconds")),
    Figure("graph_padding", "counter", "Padding that replays ran.",
           _each("graphs", "padded_rows", "padded_tokens"), "kind"),
    Figure("graph_pool_bytes", "gauge", "Device memory of the graphs.", _inner("graphs", "pool_bytes")),
    Figure("graph_not_whole", "counter", "Decode steps that no graph holds whole, by reason.",
           _each("graph_not_whole"), "reason"),
    Figure("structured_requests", "counter", "Requests whose answer is held to a form.", _one("structured_requests")),
    Figure("structured_steps", "counter", "Steps with a row that is held to a form.", _one("masked_steps")),
    Figure("structured_forms", "counter", "Forms by what became of them.",
           _each("structured", "forms_compiled", "forms_refused", "forms_failed"), "state"),
    Figure("structured_masks", "counter", "Masks of tokens that were made.", _inner("structured", "masks_made")),
    Figure("structured_seconds", "counter", "Seconds on threads beside the loop, by what for.",
           _each("structured", "mask_s", "compile_s"), "work"),
    Figure("spec_drafted_tokens", "counter", "Tokens that were drafted.", _one("drafted_tokens")),
    Figure("spec_accepted_tokens", "counter", "Drafted tokens that were accepted.", _one("accepted_tokens")),
    Figure("spec_tried_drafts", "counter", "Drafts behind confirmed ones only, by their place in a run.",
           _by_place("tried_at"), "place"),
    Figure("spec_confirmed_drafts", "counter", "Of those, the confirmed ones.", _by_place("accepted_at"), "place"),
    Figure("spec_acceptance_rate", "gauge", "Accepted among drafted since the start, 0 to 1.",
           _share("accepted_tokens", "drafted_tokens")),
)  # fmt: skip
"""The engine's metrics. One whose field `statistics()` does not have is left out."""

HISTOGRAMS: Final = {
    "time_to_first_token_seconds": "From the request to the first Output with a token.",
    "inter_token_latency_seconds": "Between two tokens; those of one Output share its time.",
    "e2e_request_latency_seconds": "From the request to the end of its answer.",
    "request_queue_time_seconds": "From the request to its slot.",
    "request_prompt_tokens": "Tokens of a prompt.",
    "request_generation_tokens": "Tokens of an answer.",
    "http_loop_lag_seconds": "By how much a front's event loop is late.",
}


def render(engine: EngineFigures | None, fronts: Sequence[FrontFigures], *, model_name: str = "") -> bytes:
    """Return the text of a scrape: the engine's figures (None: it has ended), and the sum of the fronts'."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Scrape(engine, merged(fronts), model_name))
    return generate_latest(registry)


class _Scrape:
    """A collector of one moment's figures."""

    def __init__(self, engine: EngineFigures | None, front: FrontFigures, model_name: str) -> None:
        self._engine = engine
        self._front = front
        self._model_name = model_name

    def describe(self) -> list[Metric]:
        """Name nothing beforehand: the registry holds nobody else."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Give every metric there is a figure for."""
        yield _metric("engine_up", "gauge", "1 while the engine serves.", "model_name",
                      {self._model_name[:200]: float(self._engine is not None)})  # fmt: skip
        if self._engine is not None:
            for figure in ENGINE:
                values = figure.read(self._engine)
                if values:
                    yield _metric(figure.name, figure.kind, figure.help, figure.label, values)
        yield from self._of_fronts()
        histograms = dict(self._front.histograms)
        queue = (self._engine or {}).get("queue_seconds")
        if queue is not None:
            histograms["request_queue_time_seconds"] = msgspec.convert(queue, HistogramFigures)
        for name, text in HISTOGRAMS.items():
            if name in histograms:
                yield _histogram(name, text, histograms[name])

    def _of_fronts(self) -> Iterator[Metric]:
        front = self._front
        yield _metric("http_fronts", "gauge", "Fronts that these figures are the sum of.", "", {"": front.fronts})
        yield _metric("http_answers_open", "gauge", "Answers that are being made.", "", {"": front.answers_open})
        yield _metric("request_ends", "counter", "Answers by how they ended.", "reason", front.ends)
        family = CounterMetricFamily("overlap_http_responses", "HTTP responses.", labels=["route", "status"])
        for route, by_status in sorted(front.responses.items()):
            for status, count in sorted(by_status.items()):
                family.add_metric([route, status], count)
        yield family


def _metric(name: str, kind: Literal["gauge", "counter"], text: str, label: str, values: Mapping[str, float]) -> Metric:
    make = GaugeMetricFamily if kind == "gauge" else CounterMetricFamily
    family = make(f"overlap_{name}", text, labels=[label] if label else [])
    for key, value in values.items():
        family.add_metric([key] if label else [], value)
    return family


def _histogram(name: str, text: str, figures: HistogramFigures) -> Metric:
    family = HistogramMetricFamily(f"overlap_{name}", text)
    so_far, buckets = 0, []
    for bound, count in zip((*figures.bounds, float("inf")), figures.counts, strict=True):
        so_far += count
        buckets.append(("+Inf" if bound == float("inf") else str(bound), float(so_far)))
    family.add_metric([], buckets, figures.total)
    return family
