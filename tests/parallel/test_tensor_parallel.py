"""One engine on several ranks, each a process, with gloo between: the same tokens, and nothing left behind."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from torch import Tensor

from overlap import AsyncEngine, ConfigError, EngineDead, RequestAborted, SamplingParams
from overlap.parallel.group import Group
from overlap.parallel.leading import LeadingRunner
from overlap.schedule.plan import StepPlan

OPTIONS: dict[str, Any] = {"device": "cpu", "dtype": "float32", "max_rows": 4, "load_format": "dummy"}
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 331, "hidden_size": 96,
    "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 12, "num_key_value_heads": 6,
    "head_dim": 8, "max_position_embeddings": 512, "tie_word_embeddings": False, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
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


async def test_two_halves_of_a_step_give_the_tokens_of_one_with_aborts_preemption_and_shared_prefixes(
    model: Path,
) -> None:
    more = {"token_budget": 256, "kv_cache": 640, "max_rows": 6}
    prompts = [[3 + (i * k) % 300 for i in range(30 + 31 * (k % 6))] for k in range(1, 19)]
    prompts += [SHARED + prompt[:60] for prompt in prompts[:6]]

    async def tokens(engine: AsyncEngine) -> list[list[int]]:
        asked = zip(prompts, PARAMS * 4, strict=True)
        return await asyncio.gather(*(answer(engine, *one) for one in asked))

    async with AsyncEngine(model, **OPTIONS | more) as engine:
        whole = await tokens(engine)
    async with AsyncEngine(model, **OPTIONS | more, tensor_parallel=3, lanes="halves") as engine:
        left = [asyncio.create_task(answer(engine, prompt, PARAMS[0])) for prompt in prompts[:4]]
        await asyncio.sleep(0.05)
        for task in left[1:]:
            task.cancel()
        assert await tokens(engine) == whole
        await asyncio.gather(*left, return_exceptions=True)
        figures = engine.statistics()
        assert (figures.failed_steps, figures.running) == (0, 0)
        halves = next(line for line in engine.explain().splitlines() if line.startswith("halves: "))
        assert int(halves.split()[-3]) > 3, halves


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


@pytest.mark.slow
async def test_torchrun_starts_the_ranks_just_as_well(
    model: Path, tmp_path: Path, engines: dict[int, AsyncEngine]
) -> None:
    script = tmp_path / "serve.py"
    script.write_text(EVERY_RANK)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        str(script),
        str(model),
    ]
    done = await asyncio.to_thread(
        subprocess.run, command, capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("tokens"))
    params = SamplingParams(max_tokens=9, ignore_eos=True, temperature=0)
    assert list(map(int, line.split()[1:])) == await answer(engines[1], [5, 6, 7], params)


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
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    place = {
        "TORCHELASTIC_RUN_ID": "x", "RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
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
