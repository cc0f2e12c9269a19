"""The engine runs in any host, and changes nothing of it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import uvloop
from blockbuster import blockbuster_ctx

from overlap import AsyncEngine, SamplingParams

OPTIONS: dict[str, Any] = {"device": "cpu", "dtype": "float32", "kv_cache": 2048, "max_rows": 4}
GREEDY = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)


async def answer(model: Path, prompt: str = "Paris is the") -> list[int]:
    async with AsyncEngine(model, **OPTIONS) as engine:
        return await ask(engine, prompt)


async def ask(engine: AsyncEngine, prompt: str = "Paris is the") -> list[int]:
    tokens: list[int] = []
    async for output in engine.generate(prompt, GREEDY):
        tokens = output.token_ids
    return tokens


def test_plain_asyncio_and_uvloop_give_the_same_answer(tiny_llama_dir: Path) -> None:
    plain = asyncio.run(answer(tiny_llama_dir))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(answer(tiny_llama_dir)) == plain
    assert len(plain) == 8


def test_a_thread_that_is_not_the_main_one_can_host_it(tiny_llama_dir: Path) -> None:
    got: list[list[int]] = []
    thread = threading.Thread(target=lambda: got.append(asyncio.run(answer(tiny_llama_dir))))
    thread.start()
    thread.join(60)
    assert got == [asyncio.run(answer(tiny_llama_dir))]


async def test_event_loops_of_two_threads_share_one_engine(tiny_llama_dir: Path) -> None:
    async with AsyncEngine(tiny_llama_dir, **OPTIONS) as engine:
        mine = await ask(engine)
        others = await asyncio.gather(*(asyncio.to_thread(lambda: asyncio.run(ask(engine))) for _ in range(3)))
        assert others == [mine] * 3

        async def leave_open() -> None:
            await anext(engine.generate("x", SamplingParams(max_tokens=400, ignore_eos=True)))

        await asyncio.to_thread(lambda: asyncio.run(leave_open()))  # its loop is closed with the answer unread
        await asyncio.wrap_future(engine._core.idle())
        assert await ask(engine) == mine


async def test_an_abort_may_come_from_another_thread(tiny_llama_dir: Path) -> None:
    async with AsyncEngine(tiny_llama_dir, **OPTIONS) as engine:
        generation = engine.generate("x", SamplingParams(max_tokens=500, ignore_eos=True), request_id="far")
        await anext(generation)
        assert await asyncio.to_thread(lambda: asyncio.run(engine.abort("far")))
        with pytest.raises(Exception, match="was aborted"):
            while True:
                await anext(generation)


async def test_two_engines_in_one_process_do_not_know_each_other(tiny_llama_dir: Path) -> None:
    async with AsyncEngine(tiny_llama_dir, **OPTIONS) as first, AsyncEngine(tiny_llama_dir, **OPTIONS) as second:
        a, b = await asyncio.gather(ask(first), ask(second))
        assert a == b
        await first.aclose()
        assert await ask(second) == b


async def test_an_engine_after_an_engine(tiny_llama_dir: Path) -> None:
    assert await answer(tiny_llama_dir) == await answer(tiny_llama_dir)


async def test_nothing_of_the_engine_blocks_the_hosts_event_loop(tiny_llama_dir: Path) -> None:
    with blockbuster_ctx("overlap"):
        async with AsyncEngine(tiny_llama_dir, **OPTIONS) as engine:
            await ask(engine)
            await ask(engine, "words " * 60)


async def test_a_busy_host_does_not_starve_the_engine(tiny_llama_dir: Path) -> None:
    async with AsyncEngine(tiny_llama_dir, **OPTIONS) as engine:
        generation = engine.generate("x", SamplingParams(max_tokens=60, ignore_eos=True))
        await anext(generation)
        for _ in range(2000):  # a cell that never awaits, until the engine is through
            if engine.statistics().tokens_out == 60:
                break
            threading.Event().wait(0.005)
        output = await anext(generation)  # all that came meanwhile is one Output
        assert len(output.token_ids) == 60
        assert output.finished


PROBE = """
import asyncio, json, os, random, signal, sys, threading, warnings
before_modules = set(sys.modules)
import overlap
assert "torch" not in sys.modules, "importing overlap must not import torch"
assert "numpy" in sys.modules
import torch, numpy

def world():
    return dict(
        policy=type(asyncio.get_event_loop_policy()).__name__,
        signals={int(s): str(signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM)},
        dtype=str(torch.get_default_dtype()),
        device=str(torch.get_default_device()),
        threads=torch.get_num_threads(),
        grad=torch.is_grad_enabled(),
        inference=torch.is_inference_mode_enabled(),
        deterministic=torch.are_deterministic_algorithms_enabled(),
        torch_seed=torch.random.get_rng_state().sum().item(),
        numpy_seed=int(numpy.random.get_state()[1].sum()),
        python_seed=hash(random.getstate()),
        environment=hash(tuple(sorted(os.environ.items()))),
        directory=os.getcwd(),
        hooks=[str(sys.excepthook), str(threading.excepthook)],
        filters=len(warnings.filters),
        names=sorted(t.name for t in threading.enumerate()),
    )

async def main():
    async with overlap.AsyncEngine(sys.argv[1], device="cpu", kv_cache=2048, max_rows=4) as engine:
        async for out in engine.generate("Paris", overlap.SamplingParams(max_tokens=5, ignore_eos=True)):
            during = {k: v for k, v in world().items() if k not in ("names",)}
    return during

before = world()
with asyncio.Runner() as runner:
    during = runner.run(main())
after = world()
changed = {k: (before[k], v) for k, v in during.items() if before[k] != v and k != "signals"}
changed |= {k: (before[k], v) for k, v in after.items() if before[k] != v}
print(json.dumps([before == after, changed]))
"""


def test_importing_and_running_it_changes_nothing_global_and_needs_no_main_guard(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    script = tmp_path / "probe.py"
    script.write_text(PROBE)
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script), str(tiny_llama_dir)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [True, {}]


def test_ctrl_c_ends_a_program_that_embeds_it(tiny_llama_dir: Path, tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text(
        textwrap.dedent(
            """
            import asyncio, sys, overlap
            async def main():
                async with overlap.AsyncEngine(sys.argv[1], device="cpu", kv_cache=2048) as engine:
                    while True:
                        params = overlap.SamplingParams(max_tokens=100, ignore_eos=True)
                        async for out in engine.generate("Paris", params):
                            print("token", flush=True)
            asyncio.run(main())
            """
        )
    )
    program = subprocess.Popen(
        [sys.executable, str(script), str(tiny_llama_dir)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert program.stdout is not None
    assert program.stdout.readline() == "token\n"
    program.send_signal(signal.SIGINT)
    _, errors = program.communicate(timeout=60)
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert program.returncode in (-signal.SIGINT, 130, 1)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of jupyter's own
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_running_loop_in_jupyter_is_a_host(tiny_llama_dir: Path) -> None:
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    cells = [
        f"import overlap\nengine = overlap.AsyncEngine({str(tiny_llama_dir)!r}, device='cpu', kv_cache=2048)\n"
        "await engine.start()",
        "params = overlap.SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)\n"
        "async for out in engine.generate('Paris is the', params):\n    pass\nout.token_ids",
        "outs = [out async for out in engine.generate_batch(['a', 'b', 'c'], params)]\nlen(outs)",
        "await engine.aclose()",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3").execute(env=environment)
    tokens = json.loads(notebook.cells[1].outputs[-1]["data"]["text/plain"])
    assert tokens == asyncio.run(answer(tiny_llama_dir))
    assert notebook.cells[2].outputs[-1]["data"]["text/plain"] == "3"
    kinds = [kind for output in notebook.cells[2].outputs for kind in output.get("data", {})]
    assert "application/vnd.jupyter.widget-view+json" in kinds, "a batch shows its progress as a widget in a notebook"


def test_the_parameters_of_a_host_in_inference_mode_do_not_leak(tiny_llama_dir: Path) -> None:
    with torch.inference_mode(), torch.device("meta"):
        tokens = asyncio.run(answer(tiny_llama_dir))
    assert tokens == asyncio.run(answer(tiny_llama_dir))
