from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from pathlib import Path

import aiohttp
import nbclient
import nbformat
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("smollm2_path")]  # the fixture fetches the model, once


def test_quickstart_prints_an_answer_and_a_batch() -> None:
    run = subprocess.run(
        [sys.executable, "-W", "error", EXAMPLES / "quickstart.py"], capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    assert all(f"{country}: " in run.stdout for country in ("Italy", "Japan", "Kenya", "Peru"))
    assert "Tokyo" in run.stdout


@pytest.mark.parametrize("by_torchrun", [False, True], ids=["by itself", "torchrun"])
def test_a_model_on_several_ranks_answers_however_they_were_started(by_torchrun: bool) -> None:
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3"] if by_torchrun else []
    program = [str(EXAMPLES / "several_devices.py"), "smollm2-135m-instruct", "3", "--device", "cpu"]
    run = subprocess.run(
        [sys.executable, *start, *program], capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "Paris" in run.stdout
    assert "tensor parallel: 3 ranks" in run.stdout


async def test_the_web_app_streams_and_lets_a_client_leave() -> None:
    program = await asyncio.create_subprocess_exec(
        sys.executable, "-u", EXAMPLES / "aiohttp_app.py", "0", stdout=asyncio.subprocess.PIPE
    )
    assert program.stdout is not None
    try:
        line = (await program.stdout.readuntil(b"\n")).decode()
        found = re.search(r"http://[\d.:]+", line)
        assert found, line
        async with aiohttp.ClientSession(found[0]) as http:
            async with http.post("/ask", data="Tell me about the sea.") as left:
                assert await left.content.readany()
            async with http.post("/ask", data="What is the capital of Japan?") as answer:
                assert answer.status == 200
                assert "Tokyo" in await answer.text()
            async with http.post("/ask", data="far too long " * 9000) as refused:
                assert refused.status == 400
    finally:
        program.terminate()
        await program.communicate()
    assert program.returncode == 0


def test_the_notebook_runs_in_a_jupyter_kernel_and_keeps_no_outputs() -> None:
    notebook = nbformat.read(EXAMPLES / "first_steps.ipynb", as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    assert "Paris" in code[1].outputs[0]["data"]["text/plain"]
    assert "".join(output.get("text", "") for output in code[2].outputs if output.get("name") == "stdout")
