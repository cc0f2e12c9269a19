"""One engine on several ranks, each a process, with gloo between: the same tokens, and nothing left behind."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor
from torch._C._distributed_c10d import HashStore

from overlap import AsyncEngine, ConfigError, EngineDead, Output, RequestAborted, SamplingParams, StructuredOutput
from overlap.environment import TorchRun
from overlap.parallel.group import Group
from overlap.parallel.leading import LeadingRunner
from overlap.parallel.rank import serve
from overlap.parallel.wire import REPORTS, Failed, Hello, Setup, Stop, receive, send
from overlap.schedule.plan import StepPlan

OPTIONS: dict[str, Any] = {"device": "cpu", "dtype": "float32", "max_rows": 4, "load_format": "dummy"}
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 331, "hidden_size": 96,
    "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 12, "num_key_value_heads": 6,
    "head_dim": 8, "max_position_embeddings": 512, "tie_word_embeddings": False, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
CORES = torch.get_num_threads()
PROMPTS = [[3 + (i * k) % 300 for i in range(20 + 9 * k)] for k in range(1, 7)]
SHARED = list(range(40, 90))
PARAMS = [
    SamplingParams(max_tokens=40, ignore_eos=True, temperature=t, top_p=p, top_k=k, seed=s)
    for t, p, k, s in [
        (0, 1.0, 0, 0),
        (1.0, 1.0, 0, 5),
        (0.8, 0.9, 0, 6),
        (1.2, 1.0, 30, 7),
        (0, 1.0, 0, 1),
        (2, 1, 0, 9),
    ]
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    (path / "config.json").write_text(json.dumps(CONFIG))
    return path


@pytest.fixture(scope="module")
def engines(model: Path) -> Iterator[dict[int, AsyncEngine]]:
    """The model on 1, 2 and 3 ranks, with little KV."""
    found = {size: AsyncEngine(model, **OPTIONS, kv_cache=320, tensor_parallel=size) for size in (1, 2, 3)}

    async def start() -> None:
        await asyncio.gather(*(engine.start() for engine in found.values()))

    async def close() -> None:
        await asyncio.gather(*(engine.aclose() for engine in found.values()))

    asyncio.run(start())
    followers = [process for engine in found.values() for process in processes_of(engine)]
    assert len(followers) == 3
    yield found
    asyncio.run(close())
    assert not any(process.is_running() for process in followers)


def processes_of(engine: AsyncEngine) -> list[psutil.Process]:
    runner = engine._core._runner
    if not isinstance(runner, LeadingRunner):
        return []
    return [psutil.Process(follower._pid) for follower in runner._team._followers]


async def answer(engine: AsyncEngine, prompt: list[int], params: SamplingParams) -> list[int]:
    tokens: list[int] = []
    async for output in engine.generate(prompt, params):
        tokens = output.token_ids
    return tokens


async def test_any_number_of_ranks_gives_the_same_tokens_with_shared_prefixes_and_preemption(
    engines: dict[int, AsyncEngine],
) -> None:
    async def tokens(engine: AsyncEngine) -> list[list[int]]:
        plain = zip(PROMPTS, PARAMS, strict=True)
        shared = ((SHARED + prompt[:7], params) for prompt, params in zip(PROMPTS, PARAMS, strict=True))
        return await asyncio.gather(*(answer(engine, *one) for one in [*plain, *shared]))

    one, two, three = [await tokens(engines[size]) for size in (1, 2, 3)]
    assert one == two == three
    assert len({tuple(found) for found in one}) > 6
    for engine in engines.values():
        figures = engine.statistics()
        assert figures.preemptions > 0
        assert figures.failed_steps == 0
    assert "tensor parallel: 3 ranks" in engines[3].explain()


async def test_two_halves_of_a_step_give_the_tokens_of_one_whatever_is_aborted_beside_them(model: Path) -> None:
    more = {"token_budget": 256, "kv_cache": 560, "max_rows": 8}
    prompts = [[3 + (i * k) % 300 for i in range(30 + 31 * (k % 6))] for k in range(1, 19)]
    prompts += [SHARED + prompt[:60] for prompt in prompts[:6]]
    jobs = [(prompt, replace(PARAMS[index % 6], max_tokens=40)) for index, prompt in enumerate(prompts)]
    async with AsyncEngine(model, **OPTIONS | more) as engine:
        whole = await asyncio.gather(*(answer(engine, *job) for job in jobs))
    async with AsyncEngine(model, **OPTIONS | more, tensor_parallel=2, lanes="halves") as engine:

        async def one(index: int, limit: int, after_s: float, salt: str) -> bool:
            """Ask, leave after `limit` tokens or so many seconds, check what came; return whether it was left."""
            prompt, params = jobs[index]
            tokens: list[int] = []
            with suppress(TimeoutError):
                async with asyncio.timeout(after_s):
                    async for output in engine.generate(prompt, params, cache_salt=salt):
                        tokens = output.token_ids
                        if len(tokens) >= limit:
                            break
            assert tokens == whole[index][: len(tokens)]
            return len(tokens) < 40

        for seed in range(4):
            draw = random.Random(seed)
            ends = [draw.choice([(40, 60), (40, 60), (40, draw.uniform(0, 0.5)), (1, 60), (2, 60)]) for _ in jobs]
            order = draw.sample(range(len(jobs)), len(jobs))
            left = await asyncio.gather(*(one(index, *ends[index], str(seed)) for index in order))
            assert 6 < sum(left) < 20, seed
            await asyncio.wrap_future(engine._core.idle())
            await asyncio.wrap_future(engine._core.call(engine._core.parts[0].check_idle))
        figures = engine.statistics()
        assert figures.failed_steps == 0
        assert figures.preemptions > 0
        assert cut_steps(engine) > 6


def cut_steps(engine: AsyncEngine) -> int:
    """Return how many steps were run as two halves."""
    halves = next(line for line in engine.explain().splitlines() if line.startswith("halves: "))
    return int(halves.split()[-3])


async def test_halves_say_so_when_no_step_can_be_cut(model: Path) -> None:
    async with AsyncEngine(model, **OPTIONS, token_budget=64, tensor_parallel=2, lanes="halves") as engine:
        assert (
            "halves: no step is cut: that takes 128 prompt tokens or more, and token_budget is 64" in engine.explain()
        )


FORMS = (
    StructuredOutput.regex(r"[A-C]{2}-\d{1,4}(é|ü)?"),
    StructuredOutput.json_object(),
    StructuredOutput.choice(["red", "reddish", "green"]),
)
ASKED: tuple[dict[str, Any], ...] = (
    {"temperature": 1.0, "seed": 4, "frequency_penalty": 1.0, "presence_penalty": 0.5, "repetition_penalty": 1.2},
    {"temperature": 0.0, "logit_bias": {40: 5.0, 7: -3.0}, "logprobs": 3},
    {"temperature": 0.0, "prompt_logprobs": 2},
    {"temperature": 0.0, "min_tokens": 9},
)


@pytest.mark.parametrize("options", [{"tensor_parallel": 2}, {"tensor_parallel": 3, "lanes": "halves"}], ids=str)
async def test_forms_penalties_bias_and_log_probabilities_are_over_ranks_what_they_are_on_one(
    cut_llama_dir: Path, options: dict[str, Any]
) -> None:
    prompts, params = [], []
    for index, asked in enumerate(ASKED):
        for turn in range(4):
            prompts.append([3 + (place * (turn + 2) + index) % 500 for place in range(18 + 41 * turn)])
            form = FORMS[(index + turn) % 3] if turn % 2 and "min_tokens" not in asked else None
            params.append(SamplingParams(max_tokens=20, structured=form, **asked))

    async def answers(**more: Any) -> list[Output]:
        common = {"device": "cpu", "dtype": "float32", "kv_cache": 4096, "max_rows": 8, "token_budget": 256}
        async with AsyncEngine(cut_llama_dir, **common, **more) as engine:
            outputs = {out.index: out async for out in engine.generate_batch(prompts, params, progress=False)}
            assert engine.statistics().failed_steps == 0
            assert "lanes" not in more or cut_steps(engine) > 0
        return [outputs[index] for index in range(len(prompts))]

    for one, several in zip(await answers(), await answers(**options), strict=True):
        assert several.token_ids == one.token_ids
        assert several.finish_reason == one.finish_reason
        assert scores(several) == pytest.approx(scores(one), abs=1e-3)


def scores(output: Output) -> list[float]:
    """Return all log-probabilities of an answer and its prompt."""
    told = [*(output.logprobs or ()), *(output.prompt_logprobs or ())]
    return [one.logprob for one in told if one is not None]


async def test_halves_want_several_ranks(model: Path) -> None:
    with pytest.raises(ConfigError, match="give tensor_parallel"):
        await AsyncEngine(model, **OPTIONS, lanes="halves").start()


@pytest.mark.parametrize("seed", range(3))
async def test_aborts_leave_the_ranks_in_step(engines: dict[int, AsyncEngine], seed: int) -> None:
    draw = random.Random(seed)
    engine = engines[2 + seed % 2]

    async def one(index: int) -> None:
        prompt, params = PROMPTS[index % 6], PARAMS[index % 6]
        limit, name = draw.randrange(1, 50), f"{seed}-{index}"
        try:
            async for output in engine.generate(prompt, params, request_id=name):
                if len(output.token_ids) >= limit:
                    await engine.abort(name)
        except RequestAborted:
            return

    await asyncio.gather(*(one(index) for index in range(12)))
    await asyncio.wrap_future(engine._core.idle())
    await asyncio.wrap_future(engine._core.call(engine._core.parts[0].check_idle))
    assert await answer(engine, PROMPTS[2], PARAMS[2]) == await answer(engines[1], PROMPTS[2], PARAMS[2])


def left_behind() -> set[str]:
    """Return what an engine of several ranks could leave: processes, shared memory, and the file in which they meet."""
    names = [("/dev/shm", "nccl*"), ("/dev/shm", "torch*"), ("/dev/shm", "gloo*"), (tempfile.gettempdir(), "overlap-*")]
    files = {str(path) for folder, pattern in names for path in Path(folder).glob(pattern)}
    return files | {f"process {child.pid}" for child in psutil.Process().children(recursive=True)}


async def test_an_engine_of_several_ranks_that_closes_leaves_nothing(model: Path) -> None:
    before = left_behind()
    async with AsyncEngine(model, **OPTIONS, tensor_parallel=2) as engine:
        assert len(await answer(engine, [5, 6, 7], PARAMS[0])) == 40
        assert left_behind() > before
    assert left_behind() <= before


async def ended(engine: AsyncEngine) -> str:
    """Wait until an engine is dead; return why."""
    for _ in range(1000):
        if not engine.health().ok:
            return engine.health().reason
        await asyncio.sleep(0.02)
    raise AssertionError("the engine still serves")


@pytest.mark.parametrize("busy", [True, False], ids=["busy", "idle"])
async def test_a_killed_rank_ends_the_engine_with_the_reason_and_no_process_stays(model: Path, busy: bool) -> None:
    before = left_behind()
    engine = AsyncEngine(model, **OPTIONS, tensor_parallel=3)
    await engine.start()
    followers = processes_of(engine)
    generation = engine.generate([5, 6, 7], SamplingParams(max_tokens=480, ignore_eos=True))
    if busy:
        await anext(generation)
    followers[0].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    if busy:
        with pytest.raises(EngineDead, match=r"rank 1 .* was ended by signal 9 \(SIGKILL\)"):
            async for _ in generation:
                pass
    assert "rank 1" in await ended(engine)
    assert time.monotonic() - killed < 30, "the others wait for a rank that is gone"
    await engine.aclose()
    assert not any(process.is_running() for process in followers)
    assert left_behind() <= before


async def test_a_leader_that_never_comes_back_from_a_sum_is_left_behind_with_the_reason(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, released = left_behind(), threading.Event()
    monkeypatch.setattr("overlap.core.LOST_S", 1.0)
    engine = AsyncEngine(model, **OPTIONS, tensor_parallel=2)
    await engine.start()
    followers = processes_of(engine)

    def stuck(group: Group, x: Tensor) -> Tensor:
        released.wait()
        return x

    monkeypatch.setattr(Group, "sum", stuck)
    try:
        generation = asyncio.create_task(answer(engine, [5, 6, 7], PARAMS[0]))
        await asyncio.sleep(0.3)
        assert not generation.done()
        followers[0].send_signal(signal.SIGKILL)
        async with asyncio.timeout(20):
            with pytest.raises(EngineDead, match=r"rank 1 .*SIGKILL.* does not come back from a sum"):
                await generation
            await engine.aclose()
        assert not any(process.is_running() for process in followers)
        assert left_behind() <= before
    finally:
        released.set()
        engine._core._thread.join(20)
    assert not engine._core._thread.is_alive()


async def test_a_rank_that_is_held_up_for_longer_than_step_limit_is_reported_and_ends_nothing(model: Path) -> None:
    async with AsyncEngine(model, **OPTIONS, tensor_parallel=2, step_limit=0.3) as engine:
        (follower,) = processes_of(engine)
        follower.suspend()
        asyncio.get_running_loop().call_later(1.0, follower.resume)
        assert len(await answer(engine, [5, 6, 7], PARAMS[0])) == 40
        assert engine.statistics().late_steps > 0
        assert engine.health().ok


@pytest.mark.parametrize("comes_back", [True, False], ids=["too late", "never"])
async def test_a_rank_that_hangs_ends_the_engine_with_who_waited_for_how_long_and_what_to_do(
    model: Path, monkeypatch: pytest.MonkeyPatch, comes_back: bool
) -> None:
    monkeypatch.setattr("overlap.parallel.team.SUM_S", 1.0)
    before = left_behind()
    async with AsyncEngine(model, **OPTIONS, tensor_parallel=2) as engine:
        (follower,) = processes_of(engine)
        follower.suspend()
        if comes_back:
            asyncio.get_running_loop().call_later(1.2, follower.resume)
        with pytest.raises(EngineDead) as died:
            await answer(engine, [5, 6, 7], PARAMS[0])
    assert re.fullmatch(
        rf"The engine can not go on: rank 0 \(process {os.getpid()}\) failed: it waited 1 s for another rank in a sum, "
        r"as long as it may: that rank hangs. See what its process does, end it, and open a new engine "
        r"\(gloo: Timed out waiting 1000ms for recv operation to complete\). All ranks are needed for every step.",
        str(died.value),
    )
    assert left_behind() <= before


async def test_on_a_cpu_each_rank_uses_its_share_of_the_cores_and_the_program_all(
    engines: dict[int, AsyncEngine],
) -> None:
    share, found = max(1, CORES // 2), Future[int]()
    runner = engines[2]._core._runner
    assert isinstance(runner, LeadingRunner)
    runner._runner._main._stream.launch("ask", lambda: found.set_result(torch.get_num_threads()))
    assert found.result(10) == share
    (follower,) = processes_of(engines[2])
    assert follower.environ()["OMP_NUM_THREADS"] == str(share)
    assert torch.get_num_threads() == CORES


async def test_an_exception_in_one_rank_ends_the_engine_with_its_message(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = left_behind()
    async with AsyncEngine(model, **OPTIONS, tensor_parallel=2) as engine:
        followers = processes_of(engine)
        runner = engine._core._runner
        assert isinstance(runner, LeadingRunner)
        launch = runner._team.launch

        def spoilt(plan: StepPlan) -> None:
            launch(replace(plan, prompt=plan.prompt + 10**6))

        monkeypatch.setattr(runner._team, "launch", spoilt)
        with pytest.raises(EngineDead, match=r"rank 1 .* failed: IndexError"):
            await answer(engine, [5, 6, 7], PARAMS[0])
    assert not any(process.is_running() for process in followers)
    assert left_behind() <= before


async def test_a_model_that_cannot_be_cut_starts_no_process(model: Path) -> None:
    before = len(psutil.Process().children(recursive=True))
    with pytest.raises(ConfigError, match="tensor_parallel is 4; the model has 6 key/value heads"):
        await AsyncEngine(model, **OPTIONS, tensor_parallel=4).start()
    with pytest.raises(ConfigError, match="tensor_parallel must be an integer of 1 or more, not 0"):
        AsyncEngine(model, tensor_parallel=0)
    assert len(psutil.Process().children(recursive=True)) == before


def test_nothing_is_left_of_a_start_that_fails(model: Path) -> None:
    before = set(Path(tempfile.gettempdir()).glob("overlap-ranks-*"))
    children = {child.pid for child in psutil.Process().children()}
    with pytest.raises(ConfigError, match="KV budget"):
        asyncio.run(AsyncEngine(model, **OPTIONS, tensor_parallel=2, kv_cache="1B").start())
    assert {child.pid for child in psutil.Process().children()} <= children
    assert set(Path(tempfile.gettempdir()).glob("overlap-ranks-*")) <= before


LEADER = """
import asyncio, os, signal, sys
from overlap import AsyncEngine, SamplingParams

async def main():
    engine = AsyncEngine(sys.argv[1], device="cpu", dtype="float32", load_format="dummy", tensor_parallel=2)
    await engine.start()
    print(*(follower._pid for follower in engine._core._runner._team._followers), flush=True)
    async for _ in engine.generate([5, 6, 7], SamplingParams(max_tokens=5, ignore_eos=True)):
        pass
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""
EVERY_RANK = """
import asyncio, os, sys
from overlap import AsyncEngine, SamplingParams

async def main():
    options = {"device": "cpu", "dtype": "float32", "load_format": "dummy", "tensor_parallel": 2}
    async with AsyncEngine(sys.argv[1], **options) as engine:
        async for output in engine.generate([5, 6, 7], SamplingParams(max_tokens=9, ignore_eos=True, temperature=0)):
            pass
        print("tokens", *output.token_ids)

if os.environ["RANK"] == "0":
    asyncio.run(main())
else:
    from overlap.parallel.rank import follow
    sys.exit(follow())
"""


def test_a_follower_whose_leader_is_killed_ends_by_itself(model: Path) -> None:
    done = subprocess.run([sys.executable, "-c", LEADER, str(model)], capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr
    (pid,) = map(int, done.stdout.split())
    end = time.monotonic() + 20
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE and time.monotonic() < end:
        time.sleep(0.05)
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
    return port


@pytest.mark.slow
@pytest.mark.parametrize("machines", [1, 2])
async def test_torchrun_starts_the_ranks_just_as_well_on_one_machine_or_two(
    model: Path, tmp_path: Path, engines: dict[int, AsyncEngine], machines: int
) -> None:
    script = tmp_path / "serve.py"
    script.write_text(EVERY_RANK)
    start = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={2 // machines}"]
    meet = [f"--nnodes={machines}", "--master-addr=127.0.0.1", f"--master-port={free_port()}"]

    def agent(number: int) -> subprocess.CompletedProcess[str]:
        command = [*start, *meet, f"--node-rank={number}", str(script), str(model)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)

    agents = await asyncio.gather(*(asyncio.to_thread(agent, number) for number in range(machines)))
    assert not any(done.returncode for done in agents), [done.stderr for done in agents]
    line = next(line for line in agents[0].stdout.splitlines() if line.startswith("tokens"))
    params = SamplingParams(max_tokens=9, ignore_eos=True, temperature=0)
    assert list(map(int, line.split()[1:])) == await answer(engines[1], [5, 6, 7], params)


def test_a_rank_of_torchrun_that_lacks_its_device_says_so_before_anybody_waits_for_it() -> None:
    leader, follower = socket.socketpair()
    place = TorchRun(rank=1, size=2, local_rank=99, local_size=100, address="here", port=1, agent_store=False)
    setup = Setup(
        model="m", load_format="dummy", revision=None, cache_dir=None, rank=1, size=2, store="", device="cuda:1",
        dtype="float32", max_rows=1, token_budget=2, graphs=False, halves=False, timeout_s=60.0,
    )  # fmt: skip
    with leader, follower:
        send(leader, setup)
        send(leader, Stop())  # else the follower takes the end of the connection for that of its leader
        with pytest.raises(ConfigError, match="LOCAL_RANK 99 of torchrun has cuda:100"):
            serve(follower, Hello(pid=1), place, HashStore())
        hello, failed = (REPORTS.decode(receive(leader) or b"") for _ in range(2))
    assert hello == Hello(pid=1)
    assert isinstance(failed, Failed)
    assert failed.why.startswith("LOCAL_RANK 99 of torchrun has cuda:100, since LOCAL_RANK 0 has cuda:1; torch sees")


def test_ranks_of_torchrun_that_never_follow_are_told_of(model: Path) -> None:
    program = "\n".join((
        "import overlap.parallel.team as team", "team.START_S = 0.5", "import asyncio, sys",
        "from overlap import AsyncEngine, ConfigError",
        "async def main():",
        "    engine = AsyncEngine(sys.argv[1], device='cpu', load_format='dummy', tensor_parallel=2)",
        "    try: await engine.start()",
        "    except ConfigError as error: print(error)",
        "asyncio.run(main())",
    ))  # fmt: skip
    place = {
        "TORCHELASTIC_RUN_ID": "x", "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", program, str(model)], capture_output=True, text=True, timeout=60, env=os.environ | place
    )
    assert "Of 1 other ranks 0 came within" in done.stdout, done.stderr
    assert "overlap.parallel.rank.follow()" in done.stdout


@pytest.mark.slow
async def test_smollm2_on_three_ranks_says_what_it_says_on_one(smollm2_path: Path) -> None:
    said = []
    for size in (1, 3):
        options = {"device": "cpu", "dtype": "float32", "kv_cache": 2048, "max_rows": 4, "tensor_parallel": size}
        async with AsyncEngine(smollm2_path, **options) as engine:
            prompts = [[{"role": "user", "content": text}] for text in ("Name three colours.", "What is a page?")]
            params = [SamplingParams(max_tokens=24, temperature=0), SamplingParams(max_tokens=24, seed=3)]
            outputs = {out.index: out.text async for out in engine.generate_batch(prompts, params)}
            said.append([outputs[index] for index in range(2)])
    assert said[0] == said[1]
