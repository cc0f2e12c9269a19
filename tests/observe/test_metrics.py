"""What is counted, how fronts add up, and what a scrape of a real server says."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from overlap import AsyncEngine, Output
from overlap.errors import DeadlineExceeded, InternalError, QueueFull, RequestAborted, RequestFailed
from overlap.messages import Usage
from overlap.observe.metrics import (
    EngineFigures,
    FrontFigures,
    Histogram,
    Meter,
    end_of,
    engine_figures,
    merged,
)
from overlap.serve import serving
from overlap.serve.metrics import render

ROOT = Path(__file__).parents[2]
HELLO = [{"role": "user", "content": "How many tokens are there?"}]
Samples = dict[str, float]
ENGINE: EngineFigures = {
    "waiting": 3, "running": 2, "draining": 0, "free_pages": 50, "fenced_pages": 5, "cached_pages": 30,
    "evictable_pages": 25, "num_pages": 100, "preemptions": 4, "evicted_pages": 6, "prompt_tokens": 200,
    "cached_tokens": 50, "steps": 30, "side_steps": 10, "failed_steps": 1, "late_steps": 2, "expired": 1,
    "tokens_in": 300, "tokens_out": 90, "busy_s": 2.0, "side_busy_s": 0.5, "bubble_s": 0.25,
    "graphs": {"full_replays": 7, "piecewise_replays": 5, "eager_steps": 3, "captures": 2, "capture_failures": 1,
               "padded_rows": 11, "padded_tokens": 13, "capture_seconds": 0.5, "pool_bytes": 4096},
    "fallbacks": {"attention: torch, since FlashInfer is not there": 1},
    "graph_fallbacks": {"first use of its size": 3}, "lane_choices": {"mixed": 4, "serial": 1, "lanes": 9},
    "drafted_tokens": 40, "accepted_tokens": 30, "tried_at": (20, 18), "accepted_at": (18, 12),
}  # fmt: skip
"""Every figure that a metric is made of."""


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def output(tokens: int, *, finish: Any = None, prompt: int = 10) -> Output:
    usage = Usage(prompt_tokens=prompt, completion_tokens=tokens, cached_tokens=0)
    return Output(
        request_id="r", index=0, tokens=list(range(tokens)), text="", text_delta="", finish_reason=finish,
        stop_reason=None, usage=usage,
    )  # fmt: skip


def samples(text: str | bytes) -> Samples:
    """Every sample of a scrape, as `name{label="value"}`."""
    found: Samples = {}
    for family in text_string_to_metric_families(text if isinstance(text, str) else text.decode()):
        for sample in family.samples:
            labels = ",".join(f'{key}="{value}"' for key, value in sorted(sample.labels.items()))
            name = f"{sample.name}{{{labels}}}" if labels else sample.name
            assert name not in found, f"{name} is there twice"
            found[name] = sample.value
    return found


def meter_of_one_answer() -> Meter:
    """0.2 s to the first token, then 4 tokens in one Output 0.4 s later."""
    clock = Clock()
    meter = Meter(clock)
    timing = meter.begin()
    clock.now = 0.2
    timing.take(output(1))
    clock.now = 0.6
    timing.take(output(5, finish="length"))
    return meter


def test_a_histogram_counts_a_value_on_a_bound_below_it() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 2.0, 9.0):
        histogram.observe(value)
    histogram.observe(2.5, count=3)
    assert histogram.figures().counts == (2, 2, 4)
    assert histogram.figures().total == 21.5


def test_the_tokens_of_one_output_share_its_time() -> None:
    found = samples(render(None, [meter_of_one_answer().figures()]))
    assert found["overlap_time_to_first_token_seconds_count"] == 1
    assert found["overlap_time_to_first_token_seconds_sum"] == pytest.approx(0.2)
    assert found["overlap_inter_token_latency_seconds_count"] == 4
    assert found["overlap_inter_token_latency_seconds_sum"] == pytest.approx(0.4)
    assert found['overlap_inter_token_latency_seconds_bucket{le="0.1"}'] == 4
    assert found['overlap_inter_token_latency_seconds_bucket{le="0.075"}'] == 0
    assert found["overlap_e2e_request_latency_seconds_sum"] == pytest.approx(0.6)
    assert found["overlap_request_generation_tokens_sum"] == 5
    assert found['overlap_request_ends_total{reason="length"}'] == 1


def test_a_whole_answer_in_one_output_counts_as_its_tokens_came() -> None:
    clock = Clock()
    meter = Meter(clock)
    timing = meter.begin()
    whole = output(5, finish="length")
    whole._grows.first_at = 0.2
    clock.now = 0.6
    timing.take(whole)
    assert samples(render(None, [meter.figures()])) == samples(render(None, [meter_of_one_answer().figures()]))


def test_an_answer_ends_once() -> None:
    meter = Meter(Clock())
    timing = meter.begin()
    assert meter.figures().answers_open == 1
    timing.take(output(1, finish="stop"))
    timing.end("abort")
    assert meter.figures().answers_open == 0
    assert {how: count for how, count in meter.figures().ends.items() if count} == {"stop": 1}


@pytest.mark.parametrize(
    ("error", "how"),
    [
        (RequestAborted("x"), "abort"), (asyncio.CancelledError(), "abort"), (GeneratorExit(), "abort"),
        (DeadlineExceeded("x"), "deadline"), (QueueFull("x"), "refused"), (RequestFailed("x"), "error"),
        (ValueError("x"), "error"),
    ],
)  # fmt: skip
def test_an_error_says_how_an_answer_ended(error: BaseException, how: str) -> None:
    assert end_of(error) == how


def test_an_unknown_ending_adds_no_label() -> None:
    meter = Meter(Clock())
    meter.begin().end("a reason nobody heard of")
    assert meter.figures().ends["error"] == 1
    assert "a reason nobody heard of" not in meter.figures().ends


def test_fronts_add_up_to_what_one_front_would_have_seen() -> None:
    parts = [meter_of_one_answer() for _ in range(3)]
    parts[1].count_response("/v1/models", 200)
    parts[2].count_response("/v1/models", 200)
    parts[2].count_response("/v1/models", 401)
    sent = [msgspec.msgpack.decode(msgspec.msgpack.encode(part.figures()), type=FrontFigures) for part in parts]
    found = samples(render(ENGINE, sent))
    assert found["overlap_http_fronts"] == 3
    assert found["overlap_inter_token_latency_seconds_count"] == 12
    assert found['overlap_http_responses_total{route="/v1/models",status="200"}'] == 2
    assert found['overlap_http_responses_total{route="/v1/models",status="401"}'] == 1
    assert found['overlap_request_ends_total{reason="length"}'] == 3
    assert found["overlap_generation_tokens_total"] == 90, "the engine's figures are not one for each front"


def test_histograms_of_other_bounds_are_not_added() -> None:
    with pytest.raises(InternalError, match="different bounds"):
        Histogram((1.0,)).figures() + Histogram((2.0,)).figures()


def test_no_fronts_and_no_engine_still_make_a_scrape() -> None:
    found = samples(render(None, [], model_name="tiny"))
    assert found['overlap_engine_up{model_name="tiny"}'] == 0
    assert merged([]).fronts == 0
    assert "overlap_num_requests_running" not in found


def test_each_figure_has_its_name() -> None:
    queue = Histogram((0.1, 1.0))
    queue.observe(0.5)
    sent = msgspec.msgpack.decode(msgspec.msgpack.encode({**ENGINE, "queue_seconds": queue.figures()}))
    found = samples(render(sent, [Meter(Clock()).figures()], model_name="tiny"))
    names = {
        "overlap_num_requests_running": 2, "overlap_num_requests_waiting": 3, "overlap_kv_cache_usage_perc": 0.25,
        "overlap_prompt_tokens_total": 200, "overlap_generation_tokens_total": 90, "overlap_step_tokens_total": 300,
        "overlap_num_preemptions_total": 4, "overlap_prefix_cache_queries_total": 200,
        "overlap_prefix_cache_hits_total": 50, "overlap_prefix_cache_hit_rate": 0.25, "overlap_evicted_pages_total": 6,
        'overlap_steps_total{lane="main"}': 20, 'overlap_steps_total{lane="side"}': 10,
        "overlap_failed_steps_total": 1, "overlap_late_steps_total": 2, "overlap_expired_requests_total": 1,
        'overlap_busy_seconds_total{lane="main"}': 2.0, 'overlap_busy_seconds_total{lane="side"}': 0.5,
        "overlap_bubble_seconds_total": 0.25, 'overlap_lane_choices_total{way="lanes"}': 9,
        'overlap_graph_steps_total{path="full_replays"}': 7, 'overlap_graph_steps_total{path="eager_steps"}': 3,
        'overlap_fallbacks{reason="attention: torch, since FlashInfer is not there"}': 1,
        'overlap_graph_fallbacks_total{reason="first use of its size"}': 3, "overlap_graph_captures_total": 2,
        "overlap_graph_capture_failures_total": 1, "overlap_graph_capture_seconds_total": 0.5,
        'overlap_graph_padding_total{kind="padded_rows"}': 11, "overlap_graph_pool_bytes": 4096,
        "overlap_spec_drafted_tokens_total": 40, "overlap_spec_accepted_tokens_total": 30,
        'overlap_spec_tried_drafts_total{place="2"}': 18, 'overlap_spec_confirmed_drafts_total{place="1"}': 18,
        "overlap_spec_acceptance_rate": 0.75, "overlap_request_queue_time_seconds_count": 1,
        'overlap_kv_pages{state="held"}': 20, 'overlap_engine_up{model_name="tiny"}': 1,
    }  # fmt: skip
    assert {name: found.get(name) for name in names} == names


def test_figures_that_the_engine_does_not_have_are_left_out() -> None:
    optional = (
        "graphs", "graph_fallbacks", "lane_choices", "drafted_tokens", "accepted_tokens", "tried_at", "accepted_at",
        "side_steps", "fallbacks",
    )  # fmt: skip
    lean = {name: value for name, value in ENGINE.items() if name not in optional}
    text = render(lean, [Meter(Clock()).figures()]).decode()
    assert not [word for word in ("graph", "spec_", "lane_choices", "queue_time") if f"overlap_{word}" in text]


def test_every_expression_of_the_dashboard_names_a_metric() -> None:
    import re

    queue = Histogram((0.1,)).figures()
    known = samples(render({**ENGINE, "queue_seconds": queue}, [full_meter().figures()]))
    names = {name.split("{")[0] for name in known}
    labels = {pair.split("=")[0] for name in known if "{" in name for pair in name.split("{")[1].rstrip("}").split(",")}
    dashboard = json.loads((ROOT / "examples" / "grafana" / "overlap.json").read_text(encoding="utf-8"))
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    assert len(expressions) > 12
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    for expression in expressions:
        used = set(re.findall(r"overlap_\w+", expression))
        assert used, expression
        assert used <= names, f"{expression} names {used - names}"
        by = {label for found in re.findall(r"by \(([^)]*)\)", expression) for label in re.split(r",\s*", found)}
        assert by <= labels, f"{expression} groups by {by - labels}"


def full_meter() -> Meter:
    meter = meter_of_one_answer()
    meter.count_response("/", 200)
    return meter


# ── a real server ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
async def engine(tiny_llama_dir: Path) -> AsyncIterator[AsyncEngine]:
    async with AsyncEngine(tiny_llama_dir, device="cpu", dtype="float32", max_rows=4) as engine:
        yield engine


@pytest.fixture
async def http(engine: AsyncEngine) -> AsyncIterator[aiohttp.ClientSession]:
    async with (
        serving(engine, port=0, model_name="tiny", api_key="secret") as address,
        aiohttp.ClientSession(address, headers={"Authorization": "Bearer secret"}) as session,
    ):
        yield session


async def scrape(http: aiohttp.ClientSession) -> Samples:
    async with http.get("/metrics") as response:
        assert response.status == 200
        assert response.content_type == "text/plain"
        return samples(await response.text())


async def ask(http: aiohttp.ClientSession, **fields: Any) -> int:
    body = {"messages": HELLO, "max_tokens": 5, "temperature": 0, "ignore_eos": True, **fields}
    async with http.post("/v1/chat/completions", json=body) as response:
        await response.read()
        return response.status


def test_figures_of_a_dataclass_are_plain_values() -> None:
    with pytest.raises(InternalError, match="dataclass"):
        engine_figures(3)
    assert engine_figures(ENGINE) is ENGINE


async def test_counters_move_with_what_is_served(http: aiohttp.ClientSession) -> None:
    before = await scrape(http)
    assert await ask(http) == 200
    assert await ask(http, stream=True) == 200
    assert await ask(http, max_tokens=100_000) == 400
    after = await scrape(http)

    def moved(name: str) -> float:
        return after.get(name, 0.0) - before.get(name, 0.0)

    chat = 'route="/v1/chat/completions"'
    assert moved("overlap_generation_tokens_total") == 10
    assert moved("overlap_request_generation_tokens_sum") == 10
    assert moved("overlap_time_to_first_token_seconds_count") == 2
    assert moved("overlap_inter_token_latency_seconds_count") == 8, "streamed or not"
    assert moved("overlap_e2e_request_latency_seconds_count") == 2
    assert moved('overlap_request_ends_total{reason="length"}') == 2
    assert moved('overlap_request_ends_total{reason="refused"}') <= 1, "a request may be refused before it is begun"
    assert moved(f'overlap_http_responses_total{{{chat},status="200"}}') == 2
    assert moved(f'overlap_http_responses_total{{{chat},status="400"}}') == 1
    assert moved('overlap_steps_total{lane="main"}') >= 5
    assert moved('overlap_busy_seconds_total{lane="main"}') > 0
    assert after["overlap_http_answers_open"] == 0
    assert set(before) <= set(after), "what was there once stays"


async def test_whatever_is_asked_for_the_text_of_a_scrape_stays_bounded(http: aiohttp.ClientSession) -> None:
    await ask(http)
    async with http.get("/metrics") as response:
        before = await response.text()
    for number in range(30):
        async with http.get(f"/no/such/{number}") as response:
            assert response.status == 404
        async with http.get(f"/v1/models/no-such-{number}") as response:
            assert response.status == 404
        assert await ask(http, model=f"no-such-{number}") == 404
    async with http.get("/metrics") as response:
        after = await response.text()
    assert len(after.splitlines()) <= len(before.splitlines()) + 4
    assert "no-such" not in after
    assert len(after) < 32_000


async def test_metrics_and_figures_ask_for_the_key_and_the_page_does_not(http: aiohttp.ClientSession) -> None:
    async with aiohttp.ClientSession(http._base_url) as stranger:
        for path, status in (("/metrics", 401), ("/live", 401), ("/", 200), ("/app.js", 200), ("/health", 200)):
            async with stranger.get(path) as response:
                assert response.status == status, path
