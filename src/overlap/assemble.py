"""From an EngineConfig to the parts of an engine: model, planner, runner, text. Runs on the engine's thread."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import psutil
import torch

from overlap.cache.pages import PAGE, pages_for
from overlap.config import EngineConfig
from overlap.environment import cache_directory, package_index, torchrun
from overlap.errors import ConfigError
from overlap.grammar.masks import Masks
from overlap.lane_runner import host_bound_tokens
from overlap.microbatch.cost import CostModel, Nominal, cost_path
from overlap.microbatch.policy import SplitPolicy
from overlap.models import Checkpoint, build, open_checkpoint
from overlap.models.config import ModelConfig
from overlap.models.dummy import DummyCheckpoint
from overlap.models.llama import Llama
from overlap.models.shard import shard_config
from overlap.observe.progress import wanted
from overlap.observe.stages import Stages
from overlap.ops.attention import choose_attention, fallbacks_of
from overlap.resolve import Machine, Resolved, num_kv_pages, page_bytes, resolve
from overlap.runner import Runner
from overlap.schedule.pace import Pace
from overlap.schedule.planner import Planner
from overlap.schedule.split import Always, Splitter
from overlap.spec.open import drafter_notes, head_page_bytes, open_head, speculation
from overlap.streams.stream import Stream
from overlap.text import Text

if TYPE_CHECKING:
    from overlap.parallel.leading import LeadingRunner
    from overlap.parallel.team import Team

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Costs:
    """What steps have taken, and where that is kept."""

    model: CostModel
    path: Path

    def keep(self) -> None:
        """Write it; a cache directory that cannot be written to is no reason to fail."""
        with suppress(OSError):
            self.model.save(self.path)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """A whole engine, standing still."""

    resolved: Resolved
    model: ModelConfig
    text: Text
    planner: Planner
    runner: Runner | LeadingRunner
    """What the loop launches with."""
    own: Runner
    """This rank's; the same without other ranks."""
    notes: tuple[str, ...]
    """What runs how, and why: a sentence each."""
    team: Team | None = None
    """The other ranks."""
    masks: Masks | None = None
    """What holds answers to a form; None without a tokenizer or an end token."""
    costs: Costs | None = None
    """What steps have taken, to be kept for the next engine of this kind."""
    fallbacks: Mapping[str, int] = field(default_factory=dict)
    """Why attention, or the drafter's, is slower than it could be on this device: 1 each."""


def machine(device: str = "auto", local_ranks: int = 0) -> Machine:
    """Look at this machine, and of its CUDA devices at the one that `device` (as `EngineConfig.device`) names.

    `local_ranks` is how many ranks torchrun has started on it.
    """
    cuda_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = int(device.partition(":")[2] or 0)
    there = index < cuda_devices  # else `resolve` refuses it
    return Machine(
        cuda_devices=cuda_devices,
        cuda_name=torch.cuda.get_device_name(index) if there else "",
        fast_cpu_bfloat16=_fast_cpu_bfloat16(),
        cores=torch.get_num_threads(),
        cuda_bytes=torch.cuda.get_device_properties(index).total_memory if there else 0,
        local_ranks=local_ranks,
    )


def _fast_cpu_bfloat16() -> bool:
    capabilities = torch.cpu.get_capabilities()
    return any(bool(capabilities.get(name)) for name in ("avx512_bf16", "amx_bf16", "arm_bf16", "bf16"))


def assemble(asked: EngineConfig, stages: Stages | None = None) -> Parts:
    """Open the model, choose, load, and set up memory. Raises ConfigError (ModelError) and leaves nothing behind.

    `stages` is the clock of opening, if that began before.
    """
    show, stages = wanted(asked.progress), stages or Stages()
    checkpoint = open_checkpoint(
        asked.model,
        load_format=asked.load_format,
        revision=asked.revision,
        cache_dir=cache_directory(asked.cache_dir),
        index_url=package_index(),
        progress=show,
    )
    try:
        stages.end("files")
        place = torchrun() if asked.tensor_parallel > 1 else None
        here = machine(asked.device, 0 if place is None else place.local_size)
        resolved = resolve(asked, checkpoint.config, here)
        device = torch.device(resolved.device)
        if device.type == "cuda":
            torch.cuda.set_device(device)  # of the engine's thread, which nobody else sees
            torch.zeros(1, device=device)  # starts the driver
        stages.end("device")
        text = Text.of(checkpoint.tokenizer_source, checkpoint.chat_template)
        stages.end("tokenizer")
        team = _team(asked, resolved, checkpoint.config)
        stream = _stream(device)
        masks = _masks(text, checkpoint.config)
        try:
            cache = cache_directory(asked.cache_dir)
            parts = _on(
                stream, lambda: _parts(resolved, checkpoint, text, stream, device, team, cache, stages, show=show)
            )
            return replace(parts, masks=masks, notes=(*parts.notes, str(stages)))
        except BaseException:
            if team is not None:
                team.give_up()  # before the stream is waited for, which may wait for the other ranks
            stream.close()
            if team is not None:
                team.close()
            if masks is not None:
                masks.close()
            raise
    finally:
        checkpoint.close()


def _masks(text: Text, model: ModelConfig) -> Masks | None:
    """Begin to make what holds answers to a form, beside the loading of the model."""
    if text.tokenizer is None:
        return None
    ends = tuple(sorted(text.end_ids(model)))
    threads = max(1, min(8, (psutil.cpu_count() or 1) // 4))
    return Masks(text.tokenizer, model.vocab_size, ends, threads=threads) if ends else None


def _team(asked: EngineConfig, resolved: Resolved, model: ModelConfig) -> Team | None:
    """Start the other ranks; None for an engine of one."""
    shard_config(model, resolved.tensor_parallel)  # refuses what cannot be cut before anything is started
    if resolved.tensor_parallel == 1:
        return None
    from overlap.parallel.team import Team

    return Team.start(asked, resolved)


def _parts(
    resolved: Resolved,
    checkpoint: Checkpoint,
    text: Text,
    stream: Stream,
    device: torch.device,
    team: Team | None,
    cache: Path,
    stages: Stages,
    *,
    show: bool,
) -> Parts:
    """Load and set up memory; with a `team`, this rank's part."""
    if team is not None:
        team.use_cores()  # of the stream's thread, on which this runs
    model, dtype = shard_config(checkpoint.config, resolved.tensor_parallel), getattr(torch, resolved.dtype)
    program = build(checkpoint, device=device, dtype=dtype, progress=show, ranks=None if team is None else team.group)
    stages.end("weights")
    head = open_head(resolved, program, device=device, dtype=dtype, cache=cache, progress=show)
    if head is not None:
        stages.end("drafter")
    free = _free_bytes(device)
    least = free if team is None else team.least_free_bytes(free)
    num_pages = num_kv_pages(resolved, model, least, 0 if head is None else head_page_bytes(head, dtype))
    context = min(resolved.context, num_pages * PAGE)
    if team is not None:
        team.share_memory(num_pages, context)
    kv = torch.zeros(  # zeros: a masked key's weight is 0, and 0 times a stray NaN would be NaN
        (num_pages, model.num_layers, 2, PAGE, model.num_kv_heads, model.head_dim),
        dtype=getattr(torch, resolved.dtype),
        device=device,
    )
    stages.end("memory")
    attention, why = choose_attention(
        kv,
        model.num_heads,
        max_pages_per_row=pages_for(context),
        width=resolved.num_drafts + 1,
        max_rows=resolved.max_rows,
    )
    stages.end("attention")
    side, shares, share_notes = None, tuple[int, ...](), tuple[str, ...]()
    if resolved.lanes in ("auto", "streams"):
        side_attention, _ = choose_attention(kv, model.num_heads, max_pages_per_row=pages_for(context))
        side = side_attention, _stream(device, "prompts", side=True)
        shares, share_notes = _shares(resolved, device, (stream, side[1]))
    halves = None
    if resolved.lanes == "halves":
        halves, _ = choose_attention(kv, model.num_heads, max_pages_per_row=pages_for(context))
    fallbacks = fallbacks_of(device, attention, why)
    stages.end("lanes")
    weight_bytes, place = program.weight_bytes(), _place(resolved.model, checkpoint)
    splitter, costs = _splitter(resolved, model, place, weight_bytes, device, cache, shares)
    own = Runner(
        program,
        attention,
        stream if team is None else team.lockstep(stream),
        kv=kv,
        max_rows=resolved.max_rows,
        token_budget=resolved.token_budget,
        context=context,
        host_bound=host_bound_tokens(checkpoint.config, resolved.tensor_parallel),
        graphs=resolved.graphs,
        side=side,
        halves=halves,
        rank=None if team is None else 0,
        speculate=speculation(resolved, program, head, attention, kv, context, fallbacks),
    )
    runner: Runner | LeadingRunner = own
    if team is not None:
        from overlap.parallel.leading import LeadingRunner

        team.wait_ready()
        runner = LeadingRunner(own, team)
    planner = Planner(
        max_rows=resolved.max_rows,
        num_pages=num_pages,
        token_budget=resolved.token_budget,
        prefill_chunk=resolved.prefill_chunk,
        context=context,
        prefix_cache=resolved.prefix_cache,
        max_waiting=resolved.max_waiting,
        splitter=splitter,
        drafts=resolved.num_drafts,
        ladder=resolved.draft_ladder,
        drafts_with_prompts=resolved.drafts_with_prompts,
        strips=own.short_steps,
        drafts_ahead=resolved.num_drafts if head is not None else 0,
        pace=Pace() if resolved.paces_drafts else None,
    )
    stages.end("runner")
    size = num_pages * page_bytes(model, resolved.dtype)
    memory = f"kv cache: {num_pages} pages of {PAGE} tokens, {size / 2**20:.0f} MiB"
    notes = _notes(resolved, program, memory, context, f"{attention.name}: {why}", team)
    return Parts(
        resolved=resolved,
        model=checkpoint.config,
        text=text,
        planner=planner,
        runner=runner,
        own=own,
        notes=(
            *notes,
            *share_notes,
            *drafter_notes(resolved, head, short=own.short_steps),
            *(f"slower: {reason}" for reason in fallbacks),
        ),
        team=team,
        costs=costs,
        fallbacks=fallbacks,
    )


def _notes(
    resolved: Resolved, program: Llama, memory: str, context: int, attention: str, team: Team | None
) -> tuple[str, ...]:
    """Return what runs how, a sentence each."""
    shared = () if team is None else (f"tensor parallel: {team.size} ranks; the figures above are those of each",)
    return (
        f"weights: {program.weight_bytes() / 2**20:.0f} MiB as {resolved.dtype}",
        memory,
        "prefix cache: " + ("on: pages that nobody needs keep prefixes" if resolved.prefix_cache else "off, as asked"),
        f"context: {context} tokens a request at most",
        f"attention: {attention}",
        "linear: " + ", ".join(program.kinds()),
        *shared,
    )


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
        torch.cuda.current_stream(device).synchronize()  # not the device: somebody may be capturing a graph
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + cached)
    return int(psutil.virtual_memory().available)


def _shares(
    resolved: Resolved, device: torch.device, lanes: tuple[Stream, ...]
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Return how many SMs the decode rows can have to themselves in two lanes, and what is to be said of it."""
    if device.type != "cuda" or (resolved.lanes == "streams" and not resolved.decode_sms):
        return (), ()
    from overlap.streams.green import NoShares, default_shares, fits, splits

    try:
        cuts = splits(device.index or 0)
        shares = (resolved.decode_sms,) if resolved.decode_sms else default_shares(cuts.num_sms)
        if not all(fits(share, cuts.num_sms) for share in shares):
            raise ConfigError(
                f"decode_sms is {resolved.decode_sms}; this device has {cuts.num_sms} SMs. Leave prompts some."
            )
        for lane in lanes:
            try:
                for share in shares:
                    lane.use(share)
            finally:
                lane.use(0)
        parts = [f"{cuts.num_sms_of(share, 'own')} + {cuts.num_sms_of(share, 'rest')}" for share in shares]
    except NoShares as why:
        return (), (f"lanes: no SM shares: {why}",)
    return shares, (f"lanes: SM shares, decode rows + prompts: {', '.join(parts)} of {cuts.num_sms}",)


def _place(model: str, checkpoint: Checkpoint) -> str:
    """Return where a model is, whatever name led there."""
    if not isinstance(checkpoint, DummyCheckpoint):
        return str(checkpoint.path.resolve())
    path = Path(model).expanduser()
    return str(path.resolve()) if path.exists() else model


def _splitter(
    resolved: Resolved,
    model: ModelConfig,
    place: str,
    weight_bytes: int,
    device: torch.device,
    cache: Path,
    shares: tuple[int, ...],
) -> tuple[Splitter | None, Costs | None]:
    """Return what says how prompts and decode rows share the device (None if they share each step), and its memory.

    `place` is where the model is: what it takes is kept by that.
    """
    if resolved.lanes in ("mixed", "halves"):
        return None, None
    if resolved.lanes != "auto":
        fixed = shares[0] if shares else 0
        return Always("serial" if resolved.lanes == "serial" else "lanes", share=fixed), None
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else f"a CPU of {torch.get_num_threads()} cores"
    size = getattr(torch, resolved.dtype).itemsize
    bandwidth, flops = (3e12, 4e14) if cuda else (2e10, 1e11)  # only a first guess: what steps take is measured
    nominal = Nominal(
        weights_s=weight_bytes / bandwidth,
        kv_token_s=page_bytes(model, resolved.dtype) / PAGE / bandwidth,
        token_s=2 * weight_bytes / size / flops,
        step_s=5e-4,
        attend_s=4 * model.num_layers * model.num_heads * model.head_dim / flops,
    )
    launched = " without graphs" if cuda and not resolved.graphs else ""  # steps then take what the host takes
    machine = f"{place} {resolved.dtype} on {name}{launched}"
    cost = CostModel(nominal, machine)
    costs = Costs(cost, cost_path(cache, machine))
    cost.load(costs.path)
    target_s = resolved.target_itl_s
    # A trial of lanes captures graphs: a cold engine that tried them at once lost half a second (docs/log.md).
    patience = 256 if cuda and target_s is None else 0
    budget = resolved.token_budget
    policy = SplitPolicy(cost, token_budget=budget, target_itl_s=target_s, shares=shares, patience=patience)
    return policy, costs


def _stream(device: torch.device, name: str = "compute", *, side: bool = False) -> Stream:
    """Return a new stream. The main lane's goes before the side lane's: its readers wait for each token."""
    if device.type == "cuda":
        from overlap.streams.cuda import CudaStream

        return CudaStream(device, name, priority=0 if side else -1, half="rest" if side else "own")
    from overlap.streams.cpu import CpuStream

    return CpuStream(name)
