"""An engine behind a socket, in one process here: what a front says and hears is the same."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

import pytest

from overlap import AsyncEngine, SamplingParams, StructuredOutput
from overlap.config import EngineConfig
from overlap.core import Core
from overlap.errors import EngineClosed, EngineDead, OverlapError, RequestAborted, RequestError
from overlap.generation import Generation
from overlap.messages import Output, Prompt, TokenLogprob
from overlap.schedule.request import Request
from overlap.schedule.shaping import Shaping
from overlap.serve.engine_process import HELD_BYTES, Hub, welcome_of
from overlap.serve.remote import RemoteEngine

OPTIONS = {"device": "cpu", "dtype": "float32", "max_rows": 4}
PROMPTS: list[Prompt] = ["How many tokens are there?", [5, 9, 12, 5, 9], [{"role": "user", "content": "Hello"}]]


LONG = SamplingParams(max_tokens=480, temperature=0, ignore_eos=True)


@dataclass
class Behind:
    """An engine behind a socket."""

    core: Core
    hub: Hub
    seen: list[str] = field(default_factory=list)
    """A word for each front that came and each that went."""


@asynccontextmanager
async def listening(model: Path, socket: Path) -> AsyncIterator[Behind]:
    """An engine behind `socket`."""
    asked = EngineConfig.from_options(model, OPTIONS)
    core = Core(asked)
    opened = await asyncio.wrap_future(core.start())
    hub = Hub(core, opened, welcome_of(asked, opened))
    behind = Behind(core, hub)
    seen = behind.seen

    async def attend(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append("came")
        await hub.attend(reader, writer)
        seen.append("went")

    server = await asyncio.start_unix_server(attend, socket)
    beating = asyncio.create_task(hub.beat())
    try:
        yield behind
    finally:
        beating.cancel()
        server.close()
        await asyncio.wrap_future(core.close())
        await asyncio.sleep(0)
        for _ in range(100):
            if seen.count("came") == seen.count("went"):
                break
            await asyncio.sleep(0.01)


@asynccontextmanager
async def remote(model: Path, scratch: Path) -> AsyncIterator[tuple[RemoteEngine, Behind]]:
    """A front's engine, and the one that it speaks to."""
    far = RemoteEngine("tiny", str(scratch / "s"))
    async with listening(model, scratch / "s") as behind, far:
        yield far, behind


@contextmanager
def deaf(far: RemoteEngine) -> Iterator[None]:
    """Let it read nothing of what comes meanwhile."""
    writer = far.core._writer
    assert writer is not None
    transport: Any = writer.transport
    transport.pause_reading()
    try:
        yield
    finally:
        transport.resume_reading()


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not true():
            await asyncio.sleep(0.001)


def flat(scores: Sequence[TokenLogprob | None] | None) -> list[float]:
    """The numbers in them, one behind the other."""
    given = [score for score in scores or () if score is not None]
    return [
        number for score in given for pair in ((score.token, score.logprob), *score.alternatives) for number in pair
    ]


async def test_an_engine_behind_a_socket_answers_as_one_in_this_process(tiny_llama_dir: Path, tmp_path: Path) -> None:
    asks = [
        SamplingParams(max_tokens=24, temperature=0, logprobs=2),
        SamplingParams(max_tokens=24, temperature=1, seed=7, stop_token_ids=[3], repetition_penalty=1.2),
        SamplingParams(max_tokens=24, temperature=0, ignore_eos=True, prompt_logprobs=1),
        SamplingParams(max_tokens=24, temperature=0, structured=StructuredOutput.choice(["yes", "no"])),
    ]
    async with AsyncEngine(tiny_llama_dir, **OPTIONS) as near:
        wanted = [await near.generate(prompt, params) for prompt in PROMPTS for params in asks]
    async with remote(tiny_llama_dir, tmp_path) as (far, _):
        found = await asyncio.gather(*(far.generate(prompt, params) for prompt in PROMPTS for params in asks))
    for one, other in zip(wanted, found, strict=True):
        assert (one.text, one.token_ids, one.finish_reason) == (other.text, other.token_ids, other.finish_reason)
        for mine, theirs in ((one.logprobs, other.logprobs), (one.prompt_logprobs, other.prompt_logprobs)):
            assert flat(theirs) == pytest.approx(flat(mine), abs=1e-4), "a batch of another size rounds otherwise"


async def test_tasks_that_start_one_engine_connect_once(tiny_llama_dir: Path, tmp_path: Path) -> None:
    async with listening(tiny_llama_dir, tmp_path / "s") as behind:
        far = RemoteEngine("tiny", str(tmp_path / "s"))
        await asyncio.gather(*(far.start() for _ in range(5)))
        assert behind.seen == ["came"]
        await far.aclose()
    assert behind.seen == ["came", "went"]


@pytest.mark.parametrize("turns", range(6))
async def test_who_starts_an_engine_that_is_closed_meanwhile_hears_so(
    tiny_llama_dir: Path, tmp_path: Path, turns: int
) -> None:
    async with listening(tiny_llama_dir, tmp_path / "s") as behind:
        far = RemoteEngine("tiny", str(tmp_path / "s"))
        starting = asyncio.create_task(far.start())
        for _ in range(turns):
            await asyncio.sleep(0)
        await far.aclose()
        with suppress(EngineClosed):
            await asyncio.wait_for(starting, 10)
        with pytest.raises(EngineClosed):
            await far.start()
    assert behind.seen.count("came") == behind.seen.count("went"), "no connection is left open"


async def test_an_engine_that_is_not_there_is_said_to_be_out_of_reach(tmp_path: Path) -> None:
    far = RemoteEngine("tiny", str(tmp_path / "nobody"))
    with pytest.raises(EngineDead, match="cannot be reached"):
        await far.start()
    await far.aclose()


async def read(answer: Generation) -> None:
    async for _ in answer:
        pass


@pytest.mark.parametrize(
    "way", ["its task is cancelled", "it closes the answer", "the answer is lost", "it is aborted"]
)
async def test_a_reader_that_leaves_ends_its_request_in_the_engine(
    tiny_llama_dir: Path, tmp_path: Path, way: str
) -> None:
    async with remote(tiny_llama_dir, tmp_path) as (far, behind):
        answer = far.generate([5, 6, 7], LONG, request_id="mine")
        await anext(answer)
        match way:
            case "its task is cancelled":
                reading = asyncio.create_task(read(answer))
                await asyncio.sleep(0)
                reading.cancel()
                await asyncio.wait([reading])
            case "it closes the answer":
                await answer.aclose()
            case "the answer is lost":
                del answer
            case _:
                assert await far.abort("mine")
        await until(lambda: not behind.core.statistics().running)
        assert behind.core.statistics().tokens_out < 480, "it did not run to its end"


async def test_who_stops_waiting_for_an_abort_harms_nobody(tiny_llama_dir: Path, tmp_path: Path) -> None:
    async with remote(tiny_llama_dir, tmp_path) as (far, behind):
        mine, other = far.generate([5, 6, 7], LONG, request_id="mine"), far.generate([5, 6, 8], LONG)
        await anext(mine)
        await anext(other)
        with deaf(far):
            aborting = asyncio.create_task(far.abort("mine"))
            await asyncio.sleep(0)
            aborting.cancel()
            await asyncio.wait([aborting])
        with pytest.raises(RequestAborted):
            await read(mine)
        await until(lambda: behind.core.statistics().running == 1)
        await read(other)
        assert far.health().ok


async def test_an_engine_is_closed_with_an_abort_on_its_way(tiny_llama_dir: Path, tmp_path: Path) -> None:
    async with remote(tiny_llama_dir, tmp_path) as (far, _):
        names = ("waited for", "left")
        answers = [far.generate([5, 6, 7], LONG, request_id=name) for name in names]
        for answer in answers:
            await anext(answer)
        with deaf(far):
            waited, left = [asyncio.create_task(far.abort(name)) for name in names]
            await asyncio.sleep(0)
            left.cancel()
            await asyncio.wait([left])
            await far.aclose()
        assert await waited


BEYOND: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"max_tokens": 2**70}, {}),
    ({"min_tokens": 2**70}, {}),
    ({"max_tokens": 510}, {}),
    ({}, {"priority": 2**70}),
    ({}, {"priority": -(2**70)}),
    ({}, {"cache_salt": "\ud800"}),
    ({}, {"fairness_key": "\ud800"}),
]


async def test_what_no_engine_could_do_is_refused_behind_a_socket_in_the_same_words(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    async def refusal(engine: AsyncEngine, given: dict[str, Any], terms: dict[str, Any]) -> str:
        with pytest.raises(RequestError) as error:
            await engine.generate([5, 6, 7], SamplingParams(**given), **terms)
        assert type(error.value) is RequestError
        return str(error.value)

    async with AsyncEngine(tiny_llama_dir, **OPTIONS) as near, remote(tiny_llama_dir, tmp_path) as (far, behind):
        for given, terms in BEYOND:
            assert await refusal(near, given, terms) == await refusal(far, given, terms)
        assert behind.core.statistics().tokens_in == 0


async def test_least_tokens_that_no_answer_could_have_are_refused_by_the_engine_too(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    async with remote(tiny_llama_dir, tmp_path) as (far, _):
        send = far.core.submit
        shaping = Shaping(min_tokens=9, banned=(2,))
        far.core.submit = lambda request: send(replace(request, shaping=shaping))  # type: ignore[method-assign]
        with pytest.raises(RequestError, match="min_tokens is 9, and the answer may have 8 tokens"):
            await far.generate([5, 6, 7], SamplingParams(max_tokens=8))
        assert len((await far.generate([5, 6, 7], SamplingParams(max_tokens=9))).token_ids) == 9


@pytest.mark.parametrize("where", ["the check in the front", "the engine's compiler", "the engine's process"])
async def test_a_form_that_fails_in_no_known_way_is_told_to_who_waits_for_it(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    class PanicError(BaseException): ...

    def panic(*_: object) -> NoReturn:
        raise PanicError("index out of bounds")

    async def fail(form: StructuredOutput) -> NoReturn:
        raise ZeroDivisionError("a bug")

    ask = SamplingParams(max_tokens=8, structured=StructuredOutput.regex("a+"))
    async with remote(tiny_llama_dir, tmp_path) as (far, behind):
        masks: Any = behind.core._masks
        await asyncio.to_thread(masks._making.join)
        match where:
            case "the check in the front":
                monkeypatch.setattr("overlap.grammar.compile.limits", panic)
            case "the engine's compiler":
                masks._grammars.compile = panic
            case _:
                behind.core.matcher = fail  # type: ignore[method-assign]
        async with asyncio.timeout(20):
            with pytest.raises(RequestError, match=r"index out of bounds|a bug"):
                await far.generate([5], ask)
            assert len((await far.generate([5], SamplingParams(max_tokens=8, ignore_eos=True))).token_ids) == 8


async def test_draining_lets_what_this_process_asked_for_end(tiny_llama_dir: Path, tmp_path: Path) -> None:
    async with remote(tiny_llama_dir, tmp_path) as (far, _):
        reading = asyncio.ensure_future(read_whole(far))
        await until(lambda: far.health().ok and bool(far._requests.entries))
        await asyncio.sleep(0.05)
        draining = asyncio.create_task(far.aclose(drain=True))
        await asyncio.sleep(0)
        with pytest.raises(EngineClosed, match="begins nothing new"):
            await far.generate([5])
        await draining
        assert len((await reading).token_ids) == 480


async def test_who_drains_an_engine_that_goes_meanwhile_waits_no_more(tiny_llama_dir: Path, tmp_path: Path) -> None:
    async with remote(tiny_llama_dir, tmp_path) as (far, behind):
        answer = far.generate([5, 6, 7], LONG)
        await anext(answer)
        draining = asyncio.create_task(far.aclose(drain=True))
        await asyncio.sleep(0)
        behind.core.close()
        async with asyncio.timeout(20):
            await draining
            with pytest.raises(EngineClosed):
                await read(answer)


async def read_whole(engine: AsyncEngine) -> Output:
    return await engine.generate([5, 6, 7], LONG)


@pytest.mark.parametrize("kind", [EngineClosed, EngineDead])
async def test_an_engine_that_takes_nothing_more_says_so_across_the_socket(
    tiny_llama_dir: Path, tmp_path: Path, kind: type[OverlapError]
) -> None:
    def refuse(request: Request) -> NoReturn:
        raise kind("It takes nothing more.")

    async with remote(tiny_llama_dir, tmp_path) as (far, behind):
        behind.core.submit = refuse  # type: ignore[method-assign]
        with pytest.raises(kind, match="takes nothing more"):
            await far.generate([5, 6, 7])


async def test_a_front_that_leaves_while_a_form_is_compiled_leaves_no_request(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    submitted: list[int] = []
    compiling, compiled = asyncio.Event(), asyncio.Event()

    async def matcher(form: StructuredOutput) -> None:
        compiling.set()
        await compiled.wait()

    async with listening(tiny_llama_dir, tmp_path / "s") as behind:
        behind.core.matcher = matcher  # type: ignore[method-assign]
        behind.core.submit = lambda request: submitted.append(request.key)  # type: ignore[method-assign]
        far = RemoteEngine("tiny", str(tmp_path / "s"))
        await far.start()
        answer = far.generate([5], SamplingParams(max_tokens=8, structured=StructuredOutput.regex("a+")))
        reading = asyncio.create_task(read(answer))
        await compiling.wait()
        await far.aclose()
        await until(lambda: behind.seen == ["came", "went"])
        compiled.set()
        await until(lambda: not behind.hub._compiling)
        with pytest.raises(EngineClosed):
            await reading
    assert not submitted


async def test_a_front_that_does_not_read_gets_no_more_figures(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with remote(tiny_llama_dir, tmp_path) as (far, behind):
        (line,) = behind.hub._lines
        monkeypatch.setattr("overlap.serve.engine_process.PULSE_SECONDS", 0)
        with deaf(far):
            await until(lambda: line.full)
            await asyncio.sleep(0.2)
            held = line._writer.transport.get_write_buffer_size()
            assert held < HELD_BYTES + 4096, "one more at most"
        await until(lambda: not line.full)
        assert (await far.generate([5], SamplingParams(max_tokens=1))).finished
