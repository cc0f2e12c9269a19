"""The bench of the server: what its clients count, and that it ends."""

from __future__ import annotations

import ast
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCH = Path(__file__).parents[2] / "bench"
HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
FAKE = 'data: {"completion_tokens":99, \n\ndata: [DONE]\n\n'
"""A text that looks like what clients look for."""


@pytest.fixture(scope="module")
def clients() -> ModuleType:
    spec = importlib.util.spec_from_file_location("serve_clients", BENCH / "serve_clients.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look up their own module
    spec.loader.exec_module(module)
    return module


def chunk(event: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(event), event)


def stream(*totals: int, end: bytes = b"data: [DONE]\n\n") -> bytes:
    usages = [{"prompt_tokens": 3, "completion_tokens": total, "total_tokens": 3 + total} for total in totals]
    events = [b"data: " + json.dumps({"text": FAKE, "usage": usage}, separators=(",", ":")).encode() + b"\n\n"
              for usage in usages]  # fmt: skip
    return HEAD + b"".join(map(chunk, (*events, end))) + b"0\r\n\r\n"


class Transport:
    def write(self, data: bytes) -> None: ...

    def abort(self) -> None: ...


def seen_of(module: ModuleType, data: bytes, size: int, *, leave_after: int = 0, closes: bool = True) -> Any:
    """Let a client that asked for 5 tokens read so many bytes at a time."""
    ends: list[Any] = []
    seen = module.Seen()
    client = module.Client(b"", 5, seen, ends.append, leave_after=leave_after)
    client.begin()
    client.connection_made(Transport())
    for at in range(0, len(data), size):
        client.data_received(data[at : at + size])
    if closes:
        client.connection_lost(None)
    assert ends == [client] * closes
    return seen


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50, 1000, 10**6])
def test_a_client_counts_the_same_however_the_bytes_are_cut(clients: ModuleType, size: int) -> None:
    seen = seen_of(clients, stream(1, 2, 4, 5), size)
    assert (seen.tokens, seen.answers, seen.lost, seen.events, seen.errors) == (5, 1, 0, 4, [])
    assert len(seen.ttft_s) == 1
    assert sum(tokens for _, tokens in seen.itl) == (4 if size <= 50 else 0)  # else all come in one read, the first


def test_a_client_that_leaves_takes_no_more(clients: ModuleType) -> None:
    seen = seen_of(clients, stream(1, 2, 4, 5), 20, leave_after=2)
    assert (seen.tokens, seen.answers, seen.left, seen.lost) == (2, 0, 1, 0)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (stream(1, 2)[:-25], "The connection ended behind 2 tokens."),
        (stream(1, end=b'data: {"error":{"message":"gone"}}\n\n'), '{"error":{"message":"gone"}}'),
        (b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 2\r\n\r\n{}", "HTTP/1.1 503"),
        (b"", "The connection ended behind 0 tokens."),
    ],
)
def test_an_answer_that_has_no_end_is_lost_and_says_why(clients: ModuleType, data: bytes, why: str) -> None:
    seen = seen_of(clients, data, 30)
    assert (seen.answers, seen.lost) == (0, 1)
    assert why in seen.errors[0]


def test_an_answer_of_too_few_tokens_is_lost(clients: ModuleType) -> None:
    seen = seen_of(clients, stream(1, 2), 30)
    assert (seen.answers, seen.lost) == (1, 1)


def test_percentiles_count_each_token(clients: ModuleType) -> None:
    assert clients.percentile([(0.001, 98), (0.5, 2)], 0.5) == 1.0
    assert clients.percentile([(0.001, 98), (0.5, 2)], 0.99) == 500.0
    assert clients.percentile([(0.001, 1)], 1.0) == 1.0
    assert clients.percentile([], 0.5) is None


def test_clients_import_nothing_that_takes_time() -> None:
    tree = ast.parse((BENCH / "serve_clients.py").read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert names - sys.stdlib_module_names - {"collections.abc"} == {"uvloop"}


def bench(model: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            sys.executable, BENCH / "serve.py", "--model", model, "--device", "cpu", "--dtype", "float32", "--streams",
            "6", "--tokens", "8", "--prompt", "20", "--fronts", "1", "--max-rows", "8",
            "--offline-tokens-per-s", "100", *options,
        ],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_every_phase_is_told_and_every_token_counted(tiny_llama_dir: Path) -> None:
    run = bench(tiny_llama_dir, "--leave", "--clients", "4")
    assert run.returncode == 0, run.stderr
    figures, soak = map(json.loads, run.stdout.splitlines())
    assert (figures["answers"], figures["left"], figures["lost"], soak["lost"]) == (3, 3, 0, 0)
    assert figures["running_at_end"] == 0
    for phase in ("starting the server and its clients", "the load, to warm up", "round 1"):
        assert phase in run.stderr


@pytest.mark.slow
def test_past_its_limit_it_says_what_it_was_at_and_fails(tiny_llama_dir: Path) -> None:
    early = bench(tiny_llama_dir, "--limit", "0.5")
    assert early.returncode == 1
    assert "it was at: starting the server and its clients" in early.stderr
    late = bench(tiny_llama_dir, "--limit", "20", "--soak-minutes", "9")
    assert late.returncode == 1
    assert "it was at: round" in late.stderr
    assert json.loads(late.stdout.splitlines()[-1])["limit_over_at"].startswith("round")
