"""What only a GPU can answer about the engine: bf16 logits against fp32, no host wait, memory that comes back."""

from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from overlap import AsyncEngine, SamplingParams
from overlap.assemble import Parts, assemble
from overlap.cache.pages import PAGE, pages_for
from overlap.config import EngineConfig
from overlap.graphs.eager import drive
from overlap.models.program import Batch
from overlap.ops.attention import AttentionRows, TorchAttention
from overlap.schedule.request import Request
from overlap.streams.stream import Stream
from overlap.testing import check_stream

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:Synchronization debug mode"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda:0")
LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "vocab_size": 128256, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
    "hidden_act": "silu", "tie_word_embeddings": False, "torch_dtype": "bfloat16", "eos_token_id": 128001,
}  # fmt: skip
PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a land far away, there lived",
    "def fibonacci(n):\n",
    "Photosynthesis is the process by which plants turn light, water and carbon dioxide into sugar. " * 6,
]


@contextmanager
def opened(model: str | Path, **options: Any) -> Iterator[Parts]:
    parts = assemble(EngineConfig(model=str(model), graphs=False, **options))  # a graph's logits cannot be heard
    try:
        yield parts
    finally:
        parts.own.close()


class Listening:
    """A program that keeps the logits that it gave."""

    def __init__(self, program: Any) -> None:
        self._program = program
        self.heard: list[Tensor] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._program, name)

    def logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self._program.logits(hidden)
        self.heard.append(logits.clone())
        return logits


def step_through(parts: Parts, prompt: list[int], new: int) -> tuple[list[int], Tensor]:
    """Answer greedily, one step after the other; return the tokens and the logits behind each, [new, V]."""
    runner, planner = parts.own, parts.planner
    listening = Listening(runner._main._program)
    runner._main._program = listening
    planner.submit(Request(key=0, front=0, prompt=np.array(prompt, dtype=np.int32), limit=new))
    tokens: list[int] = []

    async def run() -> None:
        while planner.has_work:
            plan = planner.plan()
            assert plan is not None
            settled = planner.settle(plan, await runner.launch(plan).wait_landed())
            tokens.extend(settled.tokens.tolist())

    asyncio.run(run())
    runner._main._program = listening._program
    return tokens, torch.cat(listening.heard).cpu()


@torch.inference_mode()
def reference(parts: Parts, tokens: list[int]) -> Tensor:
    """Return the logits behind every token of a text, by one forward in plain torch, [len, V]."""
    program: Any = parts.own._main._program
    count = len(tokens)
    pages = pages_for(count)
    kv = torch.zeros((pages, program.num_layers, 2, PAGE, program.num_kv_heads, program.head_dim), dtype=program.dtype)
    positions = torch.arange(count, dtype=torch.int32)
    attention = TorchAttention(kv, program.num_heads)
    attention.plan(
        AttentionRows(
            num_decode=0,
            seq_lens=torch.tensor([count], dtype=torch.int32),
            page_table=torch.arange(pages, dtype=torch.int32)[None],
            starts=np.array([0], dtype=np.int32),
            counts=np.array([count], dtype=np.int32),
            chunk_pages=np.arange(pages, dtype=np.int32),
        )
    )
    batch = Batch(token_ids=torch.tensor(tokens, dtype=torch.int32), positions=positions, kv_index=positions, kv=kv)
    logits: Tensor = program.logits(drive(program.forward(batch), attention))
    return logits


def test_smollm2_in_bf16_agrees_with_fp32_on_the_cpu(smollm2_path: Path, record_property: Any) -> None:
    new, worst, disagreements = 48, 0.0, 0
    with (
        opened(smollm2_path, device="cpu", dtype="float32", kv_cache=2048, max_rows=4) as cpu,
        opened(smollm2_path, device="cuda", dtype="bfloat16", kv_cache=4096, max_rows=4) as gpu,
    ):
        assert gpu.text.tokenizer is not None
        for text in PROMPTS:
            prompt = gpu.text.tokenizer.encode(text)
            tokens, mine = step_through(gpu, prompt, new)
            want = reference(cpu, [*prompt, *tokens])[len(prompt) - 1 : -1]
            error = float((mine - want).norm() / want.norm())
            worst = max(worst, error)
            assert error < 2e-2, text
            top = want.topk(2).values
            clear = (top[:, 0] - top[:, 1]) > 2 * (mine - want).abs().amax(dim=1)
            assert bool((mine.argmax(1) == want.argmax(1))[clear].all())
            assert int(clear.sum()) > new // 3
            disagreements += int((mine.argmax(1) != want.argmax(1)).sum())
    print(f"\nworst relative error {worst:.2e}; top token differs at {disagreements} of {len(PROMPTS) * new}")


def test_smollm2_in_fp32_gives_the_cpus_tokens(smollm2_path: Path) -> None:
    with (
        opened(smollm2_path, device="cpu", dtype="float32", kv_cache=2048, max_rows=4) as cpu,
        opened(smollm2_path, device="cuda", dtype="float32", kv_cache=4096, max_rows=4) as gpu,
    ):
        assert gpu.text.tokenizer is not None
        for text in PROMPTS:
            prompt = gpu.text.tokenizer.encode(text)
            assert step_through(gpu, prompt, 32)[0] == step_through(cpu, prompt, 32)[0]


async def test_no_launch_makes_the_host_wait(smollm2_path: Path) -> None:
    async with AsyncEngine(smollm2_path, device="cuda", kv_cache=65536, prefill_chunk=100) as engine:
        assert "kernel of our own" in engine.explain(), engine.explain()
        runner: Any = engine._core._loop._runner  # type: ignore[union-attr]
        launch, launched = runner.launch, []

        def watched(plan: Any) -> Any:
            torch.cuda.set_sync_debug_mode("error")
            try:
                launched.append(plan)
                return launch(plan)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        runner.launch = watched
        params = [
            SamplingParams(max_tokens=40, temperature=t, top_k=k, top_p=p, min_p=m, seed=i, ignore_eos=True)
            for i, (t, k, p, m) in enumerate(
                [(0, 0, 1, 0), (1, 0, 1, 0), (0.8, 40, 1, 0), (1, 0, 0.9, 0), (1, 0, 1, 0.05), (0.7, 50, 0.95, 0.01)]
                * 4
            )
        ]
        prompts = [[5 + i] * (3 + 17 * i) for i in range(len(params))]
        outputs = [out async for out in engine.generate_batch(prompts, params, progress=False)]
        assert {len(out.token_ids) for out in outputs} == {40}
        assert engine.statistics().failed_steps == 0
        assert any(plan.num_decode and len(plan.prompt) for plan in launched), "decode and prompt chunks were mixed"


async def test_greedy_answers_alone_and_in_a_batch_differ_only_where_bf16_rounds(smollm2_path: Path) -> None:
    params = SamplingParams(max_tokens=48, temperature=0, ignore_eos=True)
    async with AsyncEngine(smollm2_path, device="cuda", kv_cache=65536) as engine:
        alone = []
        for prompt in PROMPTS * 4:
            async for out in engine.generate(prompt, params):
                pass
            alone.append(out.token_ids)
        assert alone[:4] == alone[4:8] == alone[8:12] == alone[12:], "the same request alone gives the same tokens"
        batch = {o.index: o.token_ids async for o in engine.generate_batch(PROMPTS * 4, params, progress=False)}
        same = sum(batch[i] == alone[i] for i in range(16))
        assert all(batch[i] == batch[i % 4] for i in range(16)), "equal rows of one batch give equal tokens"
    print(f"\nbf16: {same} of 16 greedy answers are the same alone and in a batch of 16")


def test_a_cuda_stream_keeps_the_promise() -> None:
    from overlap.streams.cuda import CudaStream

    def make(name: str) -> Stream:
        return CudaStream(CUDA, name)

    asyncio.run(check_stream(make))


async def test_a_dummy_llama_8b_runs_64_requests(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    async with AsyncEngine(tmp_path, device="cuda", load_format="dummy", kv_cache="16GiB") as engine:
        print("\n" + engine.explain())
        weights = 2 * 8.03e9
        assert torch.cuda.max_memory_allocated() - before < 1.3 * weights + 17.2e9
        params = SamplingParams(max_tokens=64, ignore_eos=True, temperature=0.8, seed=3)
        prompts = [[(7 * i + j) % 128000 for j in range(128)] for i in range(64)]
        outputs = [out async for out in engine.generate_batch(prompts, params, progress=False)]
        assert sorted(out.index for out in outputs) == list(range(64))
        assert {len(out.token_ids) for out in outputs} == {64}
        assert engine.statistics().failed_steps == 0


@pytest.mark.alone
async def test_a_host_that_uses_cuda_itself_is_not_disturbed_and_gets_the_memory_back(smollm2_path: Path) -> None:
    mine = torch.randn(1000, 1000, device=CUDA)
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    state = torch.cuda.get_rng_state()
    levels = []
    with torch.cuda.stream(side):
        for _ in range(4):
            async with AsyncEngine(smollm2_path, device="cuda", kv_cache="1GiB") as engine:
                async for _out in engine.generate("Hello", SamplingParams(max_tokens=8)):
                    mine = (mine @ mine).tanh()
            assert torch.cuda.current_stream() == side
            gc.collect()
            torch.cuda.empty_cache()
            free, total = torch.cuda.mem_get_info()
            levels.append((total - free) / 2**20)
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert max(levels[1:]) - levels[0] < 100, f"MiB in use after each engine: {levels}"


async def test_two_engines_share_a_gpu(smollm2_path: Path) -> None:
    params = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)

    async def answer(engine: AsyncEngine) -> list[int]:
        async for out in engine.generate("The capital of France is", params):
            pass
        return out.token_ids

    async with (
        AsyncEngine(smollm2_path, device="cuda", kv_cache="512MiB") as first,
        AsyncEngine(smollm2_path, device="cuda", kv_cache="512MiB") as second,
    ):
        a, b = await asyncio.gather(answer(first), answer(second))
        assert a == b
