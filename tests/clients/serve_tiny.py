"""Serve a tiny random model, run the command that is given with its address in OPENAI_BASE_URL, and end with its code.

    python tests/clients/serve_tiny.py schemathesis run http://127.0.0.1:PORT/openapi.json ...

`{address}` in the command becomes the server's address.
"""

from __future__ import annotations

import asyncio
import importlib.util
import sys
import tempfile
from pathlib import Path
from typing import Any

from overlap import AsyncEngine
from overlap.environment import child_environment
from overlap.serve import serving


def tiny_model(path: Path) -> None:
    """Write the tests' tiny Llama and its tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=512, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=2, pad_token_id=0, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(path)
    spec = importlib.util.spec_from_file_location("conftest", Path(__file__).parent.parent / "conftest.py")
    assert spec is not None
    assert spec.loader is not None
    conftest: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conftest)
    conftest.write_tokenizer(path)


def is_idle(engine: AsyncEngine) -> bool:
    """Whether no request is there, and every page is accounted for."""
    figures = engine.statistics()
    pages = figures.free_pages + figures.evictable_pages
    return not (figures.running or figures.waiting or figures.draining) and pages == figures.num_pages


async def run(command: list[str]) -> int:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory)
        tiny_model(path)
        async with (
            AsyncEngine(path, device="cpu", dtype="float32") as engine,
            serving(engine, port=0, model_name="tiny") as address,
        ):
            client = await asyncio.create_subprocess_exec(
                *[part.replace("{address}", address) for part in command],
                env=child_environment(OPENAI_BASE_URL=f"{address}/v1", OPENAI_API_KEY="none"),
            )
            code = await client.wait()
            async with asyncio.timeout(10):  # a load generator ends by hanging up
                while not is_idle(engine):
                    await asyncio.sleep(0.05)
    return code


if __name__ == "__main__":
    sys.exit(asyncio.run(run(sys.argv[1:])))
