"""AsyncEngine as its users know it, on a small model of the real kind."""

from __future__ import annotations

import asyncio
import gc
import math
import random
import sys
import time
import warnings
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from overlap import (
    AsyncEngine,
    ConfigError,
    EngineClosed,
    EngineDead,
    ModelError,
    Output,
    RequestAborted,
    RequestError,
    RequestFailed,
    SamplingParams,
)

OPTIONS: dict[str, Any] = {"device": "cpu", "dtype": "float32", "kv_cache": 4096, "max_rows": 8}


@pytest.fixture
async def engine(tiny_llama_dir: Path) -> AsyncIterator[AsyncEngine]:
    async with AsyncEngine(tiny_llama_dir, **OPTIONS) as engine:
        yield engine
        await settled(engine)


async def settled(engine: AsyncEngine) -> None:
    """Wait until nothing runs, and hold the engine to its accounts."""
    await asyncio.wrap_future(engine._core.idle())
    figures = engine.statistics()
    assert (figures.running, figures.waiting, figures.draining, figures.fenced_pages) == (0, 0, 0, 0)
    assert figures.free_pages + figures.evictable_pages == figures.num_pages
    await asyncio.wrap_future(engine._core.call(engine._core.parts[0].check_idle))


async def last(engine: AsyncEngine, prompt: Any, **params: Any) -> Output:
    output = None
    async for output in engine.generate(prompt, SamplingParams(**params)):
        pass
    assert output is not None
    return output


async def test_an_answer_streams_and_its_parts_make_the_whole(engine: AsyncEngine) -> None:
    text, outputs = "", []
    tokens: list[int] = []
    params = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
    async for output in engine.generate("The quick brown", params):
        text += output.text_delta
        assert output.text == text
        assert output.token_ids[: len(tokens)] == tokens
        tokens = output.token_ids
        outputs.append(output)
    assert len(tokens) == 24
    assert [output.finish_reason for output in outputs] == [None] * (len(outputs) - 1) + ["length"]
    assert text == engine.tokenizer.decode(tokens)
    assert outputs[-1].usage.prompt_tokens == len(engine.tokenizer.encode("The quick brown"))
    assert outputs[-1].usage.total_tokens == outputs[-1].usage.prompt_tokens + 24
    assert outputs[0].token_ids == tokens[: len(outputs[0].token_ids)], "an Output stays true when more has come"


async def test_a_whole_answer_is_one_output_that_knows_when_its_first_token_came(engine: AsyncEngine) -> None:
    params = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
    streamed = [output async for output in engine.generate("The quick brown", params)]
    began = time.perf_counter()
    outputs = [output async for output in engine.generate("The quick brown", params, whole=True)]
    assert len(outputs) == 1
    assert outputs[0].token_ids == streamed[-1].token_ids
    assert outputs[0].text == outputs[0].text_delta == streamed[-1].text
    assert outputs[0].finish_reason == "length"
    for output, start in ((streamed[-1], 0.0), (outputs[0], began)):
        assert output.first_token_at is not None
        assert start < output.first_token_at < time.perf_counter()
    generation = engine.generate("The quick brown", SamplingParams(max_tokens=400, ignore_eos=True), whole=True)
    waiting = asyncio.create_task(anext(generation))
    while not engine.statistics().running:
        await asyncio.sleep(0.001)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await settled(engine)


async def test_text_ids_and_messages_are_prompts(engine: AsyncEngine) -> None:
    ids = engine.tokenizer.encode("How many tokens")
    by_text = await last(engine, "How many tokens", max_tokens=5, temperature=0)
    by_ids = await last(engine, ids, max_tokens=5, temperature=0)
    assert by_text.token_ids == by_ids.token_ids
    messages = [{"role": "user", "content": "How many?"}]
    rendered = "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n"
    by_chat = await last(engine, messages, max_tokens=5, temperature=0)
    by_hand = await last(engine, engine.tokenizer.encode(rendered, special=False), max_tokens=5, temperature=0)
    assert by_chat.token_ids == by_hand.token_ids
    assert by_chat.usage.prompt_tokens == len(engine.tokenizer.encode(rendered, special=False))


async def test_a_stop_token_ends_the_answer_and_is_no_part_of_its_text(engine: AsyncEngine) -> None:
    free = await last(engine, "Paris is", max_tokens=30, temperature=0, ignore_eos=True)
    stop = free.token_ids[10]
    first = free.token_ids.index(stop)
    output = await last(engine, "Paris is", max_tokens=30, temperature=0, ignore_eos=True, stop_token_ids=[stop])
    assert output.token_ids == free.token_ids[: first + 1]
    assert (output.finish_reason, output.stop_reason) == ("stop", stop)
    assert output.text == engine.tokenizer.decode(free.token_ids[:first])


@pytest.mark.parametrize("seed", range(12))
async def test_a_stop_string_is_never_emitted_in_part_across_token_borders_too(engine: AsyncEngine, seed: int) -> None:
    draw = random.Random(seed)
    prompt = [draw.randrange(3, 300) for _ in range(9)]
    free = await last(engine, prompt, max_tokens=40, temperature=0, ignore_eos=True)
    start = draw.randrange(len(free.text) // 2, len(free.text) - 3)
    stop = free.text[start : start + draw.choice([1, 3, 7])]
    seen = ""
    async for output in engine.generate(
        prompt, SamplingParams(max_tokens=40, temperature=0, ignore_eos=True, stop=[stop, "\0never\0"])
    ):
        seen += output.text_delta
        assert stop not in seen
    assert seen == free.text[: free.text.index(stop)]
    assert (output.finish_reason, output.stop_reason) == ("stop", stop)


async def test_a_seeded_request_gives_the_same_tokens_alone_and_in_any_batch(engine: AsyncEngine) -> None:
    params = [
        SamplingParams(max_tokens=20, temperature=t, top_k=k, top_p=p, min_p=m, seed=s, ignore_eos=True)
        for t, k, p, m, s in [
            (1.0, 0, 1.0, 0.0, 1), (0.7, 20, 1.0, 0.0, -5), (1.3, 0, 0.9, 0.0, 2**63), (1.0, 0, 1.0, 0.05, 4),
            (0.9, 50, 0.95, 0.01, 5), (0.0, 0, 1.0, 0.0, 6), (1e-6, 0, 1.0, 0.0, 7), (2.0, 0, 0.5, 0.0, 8),
        ]
    ]  # fmt: skip
    prompts = [[i + 3] * (3 + 5 * i) for i in range(len(params))]
    alone = []
    for prompt, param in zip(prompts, params, strict=True):
        async for output in engine.generate(prompt, param):
            pass
        alone.append(output.token_ids)
    together = {output.index: output.token_ids async for output in engine.generate_batch(prompts, params)}
    assert [together[i] for i in range(len(params))] == alone
    assert alone[6] == (await last(engine, prompts[6], max_tokens=20, temperature=0, ignore_eos=True)).token_ids


async def test_requests_without_a_seed_differ(engine: AsyncEngine) -> None:
    outputs = [await last(engine, "Rome", max_tokens=12, temperature=2.0, ignore_eos=True) for _ in range(3)]
    assert len({tuple(output.token_ids) for output in outputs}) == 3


@pytest.mark.parametrize("chunk", [1, 7, 16, "auto"])
@pytest.mark.parametrize("overlap", [True, False])
async def test_greedy_answers_are_the_same_in_any_company_chunk_size_and_with_preemption(
    tiny_llama_dir: Path, chunk: int | str, overlap: bool
) -> None:
    draw = random.Random(5)
    prompts = [[draw.randrange(3, 500) for _ in range(draw.randint(1, 90))] for _ in range(12)]
    params = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True)
    async with AsyncEngine(tiny_llama_dir, **OPTIONS) as engine:
        alone = [(await last(engine, p, max_tokens=40, temperature=0, ignore_eos=True)).token_ids for p in prompts]
    tight = {**OPTIONS, "kv_cache": 256, "prefill_chunk": chunk, "overlap": overlap}
    async with AsyncEngine(tiny_llama_dir, **tight) as engine:
        got = {output.index: output.token_ids async for output in engine.generate_batch(prompts, params)}
        assert engine.statistics().preemptions > 0
        await settled(engine)
    assert [got[i] for i in range(len(prompts))] == alone


async def test_leaving_the_loop_stops_the_request_at_once(engine: AsyncEngine) -> None:
    async for output in engine.generate("The lazy dog", SamplingParams(max_tokens=400, ignore_eos=True)):
        if len(output.token_ids) >= 3:
            break
    await settled(engine)
    assert engine.statistics().tokens_out < 100


async def test_cancelling_the_task_and_a_timeout_stop_the_request(engine: AsyncEngine) -> None:
    task = asyncio.create_task(last(engine, "The lazy dog", max_tokens=400, ignore_eos=True))
    while not engine.statistics().tokens_out:
        await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await settled(engine)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            while True:
                await last(engine, "The lazy dog", max_tokens=400, ignore_eos=True)
    await settled(engine)


async def test_aclose_of_an_answer_and_async_with_stop_it(engine: AsyncEngine) -> None:
    answer = engine.generate("five dozen", SamplingParams(max_tokens=400, ignore_eos=True))
    await anext(answer)
    await answer.aclose()
    await answer.aclose()
    with pytest.raises(StopAsyncIteration):
        await anext(answer)
    async with engine.generate("five dozen", SamplingParams(max_tokens=400, ignore_eos=True)) as answer:
        await anext(answer)
    await settled(engine)


async def test_abort_ends_a_request_and_nothing_more_of_it_is_seen(engine: AsyncEngine) -> None:
    seen: list[Output] = []

    async def read() -> None:
        params = SamplingParams(max_tokens=480, ignore_eos=True)
        async for output in engine.generate("Berlin", params, request_id="mine"):
            seen.append(output)  # noqa: PERF401 - read as it comes

    reader = asyncio.create_task(read())
    while not seen:
        await asyncio.sleep(0.001)
    assert await engine.abort("mine")
    count = len(seen)
    with pytest.raises(RequestAborted, match="mine"):
        await reader
    await settled(engine)
    assert len(seen) == count
    assert not await engine.abort("mine")
    assert not await engine.abort("never there")


async def test_aborts_at_every_phase_leave_nothing_behind(engine: AsyncEngine) -> None:
    draw = random.Random(3)

    async def one(number: int) -> str:
        prompt = [draw.randrange(3, 500) for _ in range(draw.randint(1, 200))]
        try:
            async with asyncio.timeout(draw.choice([0.0005, 0.003, 0.01, 0.03, 10])):
                async for output in engine.generate(prompt, SamplingParams(max_tokens=25), request_id=f"r{number}"):
                    if draw.random() < 0.02:
                        return "left"
                    if draw.random() < 0.02:
                        await engine.abort(f"r{draw.randrange(60)}")
                return "ended" if output.finished else "cut"
        except TimeoutError:
            return "late"
        except RequestAborted:
            return "aborted"

    ends = await asyncio.gather(*(one(number) for number in range(60)))
    assert set(ends) <= {"left", "ended", "late", "aborted"}
    assert len(set(ends)) > 2
    await settled(engine)
    assert (await last(engine, "Paris", max_tokens=3, ignore_eos=True)).usage.completion_tokens == 3


async def test_two_readers_of_one_answer_are_told_so(engine: AsyncEngine) -> None:
    answer = engine.generate("The", SamplingParams(max_tokens=50, ignore_eos=True))
    first = asyncio.ensure_future(anext(answer))
    await asyncio.sleep(0)
    with pytest.raises(RuntimeError, match="read by another task"):
        await anext(answer)
    await first
    await answer.aclose()


async def test_a_request_id_in_use_is_refused_and_free_again_afterwards(engine: AsyncEngine) -> None:
    params = SamplingParams(max_tokens=50, ignore_eos=True)
    async with engine.generate("The", params, request_id="twice") as first:
        await anext(first)
        with pytest.raises(RequestError, match="'twice' is in use"):
            await anext(engine.generate("The", params, request_id="twice"))
        await anext(first)  # the first one is not harmed
    await anext(engine.generate("The", params, request_id="twice"))


BAD_PROMPTS: list[tuple[Any, str]] = [
    ("", "prompt is empty"),
    ([], "prompt is empty"),
    ([3] * 512, "512 tokens"),
    ([512], "from 0 to 511, not 512"),
    ([-1], "from 0 to 511, not -1"),
    ([1.5], "not 1.5"),
    ([True], "not True"),
    (b"bytes", "not bytes"),
    (None, "not NoneType"),
    ({"role": "user"}, "not dict"),
    ([{"role": "user"}, 3], "token id"),
    ([{"content": "no role"}], "role"),
    ([{"role": "user", "content": [{"type": "image_url"}]}], "image_url"),
    ("\ud800", "surrogate"),
]


@pytest.mark.parametrize(("prompt", "message"), BAD_PROMPTS)
async def test_a_bad_prompt_is_refused_and_other_requests_go_on(engine: AsyncEngine, prompt: Any, message: str) -> None:
    async with engine.generate("Moscow", SamplingParams(max_tokens=100, ignore_eos=True)) as other:
        await anext(other)
        with pytest.raises(RequestError, match=message):
            await last(engine, prompt, max_tokens=5)
        await anext(other)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"temperature": math.nan}, "temperature must be a finite number, not nan"),
        ({"temperature": -1}, "temperature must be 0 .greedy. or more, not -1"),
        ({"top_p": 0}, r"top_p must be in \(0, 1\], not 0"),
        ({"top_p": math.inf}, "top_p must be a finite number"),
        ({"top_k": -2}, "top_k must be 1 or more"),
        ({"top_k": 1.0}, "top_k must be an integer"),
        ({"min_p": 2}, r"min_p must be in \[0, 1\]"),
        ({"seed": 2**64}, "seed must be an integer of 64 bits"),
        ({"max_tokens": 0}, "max_tokens must be 1 or more"),
        ({"stop": ""}, "stop must be a non-empty string"),
        ({"stop": ["x"] * 65}, "stop has 65 strings"),
        ({"stop_token_ids": [-1]}, "stop_token_ids must be"),
        ({"temprature": 1}, "Unknown sampling parameter 'temprature'. Did you mean 'temperature'"),
        ({"bad_words": []}, "There is no sampling parameter 'bad_words' here. Give `logit_bias`"),
    ],
)
def test_a_bad_sampling_parameter_is_refused_by_name_and_value(given: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        SamplingParams(**given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"devise": "cpu"}, "Unknown engine option 'devise'. Did you mean 'device'"),
        ({"device": "tpu"}, 'device must be "auto", "cpu"'),
        ({"device": "cuda:99"}, "torch sees 0 CUDA devices|torch sees 1 CUDA devices"),
        ({"dtype": "int4"}, "dtype must be one of auto, bfloat16"),
        ({"kv_cache": "2 parsecs"}, "kv_cache must be a number of tokens"),
        ({"kv_cache": "1KiB"}, "2 are the least"),
        ({"kv_cache": "900TiB", "max_rows": 2**20, "token_budget": 2**21}, "are free on cpu"),
        ({"max_rows": 0}, "max_rows must be an integer of 1 or more"),
        ({"max_rows": 8, "token_budget": 8}, "prompts would never get a turn"),
        ({"context": 100_000}, "made for 512 positions"),
        ({"load_format": "pickle"}, "load_format must be one of"),
    ],
)
async def test_a_bad_option_is_refused_by_name_and_value(
    tiny_llama_dir: Path, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        async with AsyncEngine(tiny_llama_dir, **{"device": "cpu", **given}):
            pass


async def test_a_wrong_model_says_what_is_known_and_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="smollm2-135m-instruct"):
        await AsyncEngine("smollm2-135m-instuct").start()
    with pytest.raises(ModelError, match=r"nowhere\.gguf"):
        await AsyncEngine(tmp_path / "nowhere.gguf").start()


async def test_an_engine_that_was_not_started_or_was_closed_says_so(tiny_llama_dir: Path) -> None:
    engine = AsyncEngine(tiny_llama_dir, **OPTIONS)
    with pytest.raises(EngineClosed, match="not started"):
        await last(engine, "x")
    assert not engine.health().ok
    await engine.start()
    await engine.start()
    assert engine.health().ok
    await engine.aclose()
    await engine.aclose()
    with pytest.raises(EngineClosed, match="was closed"):
        await last(engine, "x")
    assert engine.health().reason == "The engine was closed."
    unused = AsyncEngine(tiny_llama_dir)
    await unused.aclose()
    with pytest.raises(EngineClosed):
        await unused.start()


async def test_whoever_stops_waiting_for_the_engine_to_be_idle_leaves_it_as_it_was(engine: AsyncEngine) -> None:
    for wait in (engine._core.idle, lambda: engine._core.call(engine._core.parts[0].check_idle)):
        waiting = asyncio.ensure_future(asyncio.wrap_future(wait()))
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
    assert len((await last(engine, [5, 6, 7], max_tokens=4, ignore_eos=True)).token_ids) == 4


async def test_closing_ends_what_runs_and_draining_lets_it_end(tiny_llama_dir: Path) -> None:
    engine = AsyncEngine(tiny_llama_dir, **OPTIONS)
    await engine.start()
    answer = engine.generate("The", SamplingParams(max_tokens=480, ignore_eos=True))
    await anext(answer)
    waiting = asyncio.ensure_future(last(engine, "The quick", max_tokens=480, ignore_eos=True))
    await asyncio.sleep(0)
    await engine.aclose()
    with pytest.raises(EngineClosed):
        await waiting
    with pytest.raises(EngineClosed):
        while True:
            await anext(answer)

    engine = AsyncEngine(tiny_llama_dir, **OPTIONS)
    await engine.start()
    reader = asyncio.ensure_future(last(engine, "The quick", max_tokens=30, ignore_eos=True))
    while not engine.statistics().running:
        await asyncio.sleep(0.001)
    await engine.aclose(drain=True)
    assert (await reader).usage.completion_tokens == 30


@pytest.mark.parametrize("missing", ["overlap.assemble", "torch"])
async def test_an_engine_whose_parts_cannot_be_imported_says_so(
    tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    for name in {missing, "overlap.assemble"}:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, missing, None)
    engine = AsyncEngine(tiny_llama_dir, device="cpu")
    async with asyncio.timeout(20):
        with pytest.raises(ImportError, match=missing):
            await engine.start()
        await engine.aclose()


async def test_starting_can_be_cancelled(tiny_llama_dir: Path) -> None:
    engine = AsyncEngine(tiny_llama_dir, **OPTIONS)
    starting = asyncio.create_task(engine.start())
    await asyncio.sleep(0.001)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    await engine.aclose()


async def test_an_engine_left_open_warns_and_its_thread_ends(tiny_llama_dir: Path) -> None:
    engine: AsyncEngine | None = AsyncEngine(tiny_llama_dir, **OPTIONS)
    assert engine is not None
    await engine.start()
    thread = engine._core._thread
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        engine = None
        gc.collect()
    assert [w.category for w in caught] == [ResourceWarning]
    await asyncio.to_thread(thread.join, 30)
    assert not thread.is_alive()


async def test_a_step_that_fails_ends_its_requests_with_the_cause_and_the_engine_goes_on(engine: AsyncEngine) -> None:
    runner: Any = engine._core._loop._runner  # type: ignore[union-attr]
    sound = runner._main._attention

    class Broken:
        def plan(self, rows: object) -> None:
            raise MemoryError("no memory for this step")

        def attend(self, *args: object) -> None:  # the step in the air may have been planned with the sound one
            raise MemoryError("no memory for this step")

    async with engine.generate("The", SamplingParams(max_tokens=400, ignore_eos=True)) as answer:
        await anext(answer)
        runner._main._attention = Broken()
        with pytest.raises(RequestFailed, match="no memory for this step") as failure:
            while True:
                await anext(answer)
        assert isinstance(failure.value.__cause__, MemoryError)
    runner._main._attention = sound
    assert (await last(engine, "Paris", max_tokens=3, ignore_eos=True)).usage.completion_tokens == 3
    assert engine.statistics().failed_steps >= 1


async def test_when_the_loop_dies_every_waiter_hears_the_cause_at_once(tiny_llama_dir: Path) -> None:
    async with AsyncEngine(tiny_llama_dir, **OPTIONS) as engine:
        answers = [engine.generate("The", SamplingParams(max_tokens=400, ignore_eos=True)) for _ in range(3)]
        for answer in answers:
            await anext(answer)

        def die(*_: object) -> None:
            raise ZeroDivisionError("a bug")

        engine._core._planner.plan = die  # type: ignore[union-attr, method-assign]
        for answer in answers:
            with pytest.raises(EngineDead, match="a bug") as death:
                while True:
                    await anext(answer)
            assert isinstance(death.value.__cause__, ZeroDivisionError)
        assert "a bug" in engine.health().reason
        with pytest.raises(EngineDead):
            await last(engine, "x")


async def test_a_batch_yields_as_completed_and_says_which_prompt_failed(engine: AsyncEngine) -> None:
    lengths = [30, 2, 15]
    params = [SamplingParams(max_tokens=n, temperature=0, ignore_eos=True) for n in lengths]
    order = [out.index async for out in engine.generate_batch(["a", "b", "c"], params, progress=False)]
    assert order == [1, 2, 0]
    with pytest.raises(RequestError) as failure:
        async for _ in engine.generate_batch(["a", "", "c"], progress=False):
            pass
    assert failure.value.__notes__ == ["This was prompt 1 of the batch."]
    with pytest.raises(RequestError, match="3 prompts came with 2 params"):
        async for _ in engine.generate_batch(["a", "b", "c"], params[:2]):
            pass
    async for _ in engine.generate_batch(["x"] * 20, SamplingParams(max_tokens=100, ignore_eos=True), progress=False):
        break
    await asyncio.sleep(0)


async def test_a_batch_shows_a_progress_bar_when_asked(engine: AsyncEngine, capsys: pytest.CaptureFixture[str]) -> None:
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    async for _ in engine.generate_batch(["a", "b"], params, progress=True):
        pass
    shown = capsys.readouterr()
    assert "2/2" in shown.err
    assert "8 tokens" in shown.err
    assert not shown.out


async def test_dummy_weights_answer_token_ids_without_a_tokenizer(tiny_llama_dir: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text((tiny_llama_dir / "config.json").read_text())
    async with AsyncEngine(config, load_format="dummy", **OPTIONS) as engine:
        output = await last(engine, [5, 6, 7], max_tokens=9, ignore_eos=True)
        assert (len(output.token_ids), output.text) == (9, "")
        with pytest.raises(RequestError, match="no tokenizer"):
            await last(engine, "text")
        with pytest.raises(RequestError, match="no tokenizer"):
            await last(engine, [{"role": "user", "content": "hello"}])


async def test_explain_says_what_was_chosen_and_why(engine: AsyncEngine) -> None:
    text = engine.explain()
    for part in (
        "token_budget = ",
        "kv cache: ",
        "attention: ",
        "linear: ",
        "prefix cache: on",
        "graphs: none on a CPU",
    ):
        assert part in text
    assert engine.config.dtype == "float32"
    assert engine.context == 512
