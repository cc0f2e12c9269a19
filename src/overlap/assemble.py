"""From an EngineConfig to the parts of an engine: model, planner, runner, text. Runs on the engine's thread."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

import psutil
import torch

from overlap.cache.pages import PAGE, pages_for
from overlap.config import (
    EngineConfig,
    Machine,
    Resolved,
    cache_directory,
    num_kv_pages,
    package_index,
    page_bytes,
    resolve,
)
from overlap.models import Checkpoint, build, open_checkpoint
from overlap.models.config import ModelConfig
from overlap.observe.progress import wanted
from overlap.ops.attention import choose_attention
from overlap.runner import Runner
from overlap.schedule.planner import Planner
from overlap.streams.stream import Stream
from overlap.text import ChatTemplate, Tokenizer

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """What turns prompts into tokens and back; both None for random weights made from a configuration alone."""

    tokenizer: Tokenizer | None
    template: ChatTemplate | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """A whole engine, standing still."""

    resolved: Resolved
    model: ModelConfig
    text: Text
    planner: Planner
    runner: Runner
    notes: tuple[str, ...]
    """What runs how, and why: a sentence each."""


def machine() -> Machine:
    """Look at this machine."""
    cuda_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return Machine(
        cuda_devices=cuda_devices,
        cuda_name=torch.cuda.get_device_name(0) if cuda_devices else "",
        fast_cpu_bfloat16=_fast_cpu_bfloat16(),
        cores=torch.get_num_threads(),
    )


def _fast_cpu_bfloat16() -> bool:
    capabilities = torch.cpu.get_capabilities()
    return any(bool(capabilities.get(name)) for name in ("avx512_bf16", "amx_bf16", "arm_bf16", "bf16"))


def assemble(asked: EngineConfig) -> Parts:
    """Open the model, choose, load, and set up memory. Raises ConfigError (ModelError) and leaves nothing behind."""
    show = wanted(asked.progress)
    checkpoint = open_checkpoint(
        asked.model,
        load_format=asked.load_format,
        revision=asked.revision,
        cache_dir=cache_directory(asked.cache_dir),
        index_url=package_index(),
        progress=show,
    )
    try:
        resolved = resolve(asked, checkpoint.config, machine())
        text = _text(checkpoint)
        device = torch.device(resolved.device)
        if device.type == "cuda":
            torch.cuda.set_device(device)  # of the engine's thread, which nobody else sees
        stream = _stream(device)
        try:
            return _on(stream, lambda: _parts(resolved, checkpoint, text, stream, device, show=show))
        except BaseException:
            stream.close()
            raise
    finally:
        checkpoint.close()


def _parts(
    resolved: Resolved, checkpoint: Checkpoint, text: Text, stream: Stream, device: torch.device, *, show: bool
) -> Parts:
    model, dtype = checkpoint.config, getattr(torch, resolved.dtype)
    program = build(checkpoint, device=device, dtype=dtype, progress=show)
    num_pages = num_kv_pages(resolved, model, _free_bytes(device))
    context = min(resolved.context, num_pages * PAGE)
    kv = torch.zeros(  # zeros: a masked key's weight is 0, and 0 times a stray NaN would be NaN
        (num_pages, model.num_layers, 2, PAGE, model.num_kv_heads, model.head_dim),
        dtype=getattr(torch, resolved.dtype),
        device=device,
    )
    attention, why = choose_attention(kv, model.num_heads, max_pages_per_row=pages_for(context))
    runner = Runner(
        program,
        attention,
        stream,
        kv=kv,
        max_rows=resolved.max_rows,
        token_budget=resolved.token_budget,
        context=context,
        graphs=resolved.graphs,
    )
    planner = Planner(
        max_rows=resolved.max_rows,
        num_pages=num_pages,
        token_budget=resolved.token_budget,
        prefill_chunk=resolved.prefill_chunk,
        context=context,
        prefix_cache=resolved.prefix_cache,
        max_waiting=resolved.max_waiting,
    )
    size = num_pages * page_bytes(model, resolved.dtype)
    notes = (
        f"weights: {program.weight_bytes() / 2**20:.0f} MiB as {resolved.dtype}",
        f"kv cache: {num_pages} pages of {PAGE} tokens, {size / 2**20:.0f} MiB",
        "prefix cache: " + ("on: pages that nobody needs keep prefixes" if resolved.prefix_cache else "off, as asked"),
        f"context: {context} tokens a request at most",
        f"attention: {attention.name}: {why}",
        "linear: " + ", ".join(program.kinds()),
    )
    return Parts(resolved=resolved, model=model, text=text, planner=planner, runner=runner, notes=notes)


def _text(checkpoint: Checkpoint) -> Text:
    source = checkpoint.tokenizer_source
    if source is None:
        return Text(tokenizer=None, template=None)
    if source.kind == "gguf":
        tokenizer = Tokenizer.from_gguf(source.fields)
    else:
        tokenizer = Tokenizer.from_json_file(source.path, config=source.fields)
    template = ChatTemplate(
        checkpoint.chat_template,
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        unk_token=tokenizer.unk_token,
        pad_token=tokenizer.pad_token,
    )
    return Text(tokenizer=tokenizer, template=template)


def _on(stream: Stream, work: Callable[[], T]) -> T:
    """Run `work` on the stream's thread and wait for it.

    On a CPU this matters: OpenMP keeps a team of threads for each thread that uses torch, and spins far less between
    two operations once there are more of them than cores. Loading on one thread and computing on another made a step of
    SmolLM2 41 ms instead of 28 to 30 (two cores; docs/log.md).
    """
    done: Future[T] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as failure:
            done.set_exception(failure)

    stream.launch("load", run)
    stream.mark()  # so that loading is no part of the first step's time
    return done.result()


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + cached)
    return int(psutil.virtual_memory().available)


def _stream(device: torch.device) -> Stream:
    if device.type == "cuda":
        from overlap.streams.cuda import CudaStream

        return CudaStream(device, "compute")
    from overlap.streams.cpu import CpuStream

    return CpuStream("compute")
