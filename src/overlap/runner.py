"""The runner: turns a plan into work on a stream, and the work's end into tokens. Decides nothing.

Every step crosses to the device as one packed copy from pinned memory and comes back as one copy into pinned memory.
Both rotate: a buffer is written again only when the flight that used it has landed, which the loop's depth of two
flights guarantees with three buffers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Final

import torch
from torch import Tensor

from overlap.cache.pages import Ints, pages_for
from overlap.graphs.eager import drive
from overlap.models.program import Batch, Program
from overlap.ops.attention import Attention, AttentionRows
from overlap.sample.sampler import sample
from overlap.schedule.plan import StepPlan
from overlap.state.inputs import build_inputs, sampled_rows, settle_tokens
from overlap.state.packing import Layout, capacity, pack
from overlap.state.rows import SlotRows
from overlap.streams.stream import Mark, Stream

DEPTH: Final = 3
"""Buffers in rotation: two flights in the air, and one being packed."""


class _Buffers:
    """The host ends of one step's two copies."""

    def __init__(self, words: int, max_rows: int, *, pinned: bool) -> None:
        self.packed = torch.zeros(words, dtype=torch.int32, pin_memory=pinned)
        self.packed_words: Ints = self.packed.numpy()
        self.tokens = torch.zeros(max_rows, dtype=torch.int32, pin_memory=pinned)
        self.tokens_words: Ints = self.tokens.numpy()


@dataclass(frozen=True, slots=True)
class TorchFlight:
    """A plan that is running, or queued to."""

    plan: StepPlan
    stream: Stream
    mark: Mark
    tokens: Ints

    async def wait_landed(self) -> Ints:
        """Return the tokens [E] once the device is done; raise what the step raised."""
        await self.stream.wait_reached(self.mark)
        return self.tokens.copy()


class Runner:
    """Owns the KV memory, the slots' rows and the buffers of one lane; the same code on CPU and CUDA."""

    def __init__(
        self,
        program: Program,
        attention: Attention,
        stream: Stream,
        *,
        kv: Tensor,
        max_rows: int,
        token_budget: int,
        context: int,
    ) -> None:
        self._program = program
        self._attention = attention
        self._stream = stream
        self._kv = kv
        self._device = kv.device
        on_cuda = kv.is_cuda
        self._rows = SlotRows(max_rows, pages_for(context), kv.device)
        words = capacity(max_rows, token_budget, kv.shape[0] + max_rows)
        self._buffers = [_Buffers(words, max_rows, pinned=on_cuda) for _ in range(DEPTH)]
        self._packed = torch.empty(words, dtype=torch.int32, device=kv.device) if on_cuda else None

    def launch(self, plan: StepPlan) -> TorchFlight:
        """Enqueue a plan and return at once."""
        buffers = self._buffers[plan.number % DEPTH]
        layout = pack(plan, buffers.packed_words)
        self._stream.launch("step", partial(self._step, plan, layout, buffers), tokens=plan.num_tokens)
        return TorchFlight(plan, self._stream, self._stream.mark(), buffers.tokens_words[: layout.num_emits])

    @torch.inference_mode()
    def _step(self, plan: StepPlan, layout: Layout, buffers: _Buffers) -> None:
        packed = buffers.packed[: layout.used]
        if self._packed is not None:
            packed = self._packed[: layout.used].copy_(packed, non_blocking=True)
        inputs = build_inputs(packed, layout, self._rows)
        self._attention.plan(
            AttentionRows(
                num_decode=plan.num_decode,
                seq_lens=inputs.seq_lens,
                page_table=inputs.page_table,
                starts=plan.starts,
                counts=plan.counts,
                chunk_pages=plan.chunk_pages,
            )
        )
        batch = Batch(token_ids=inputs.token_ids, positions=inputs.positions, kv_index=inputs.kv_index, kv=self._kv)
        hidden_TC = drive(self._program.forward(batch), self._attention)
        if not layout.num_emits:
            return
        if layout.num_emits != layout.num_tokens:
            hidden_TC = hidden_TC.index_select(0, inputs.emit_tokens)
        tokens = sample(
            self._program.logits(hidden_TC),
            self._rows,
            inputs.emit_slots,
            inputs.emit_positions,
            sampled_rows(packed, layout),
            plan.truncated,
        )
        settle_tokens(self._rows, inputs.emit_slots, tokens)
        buffers.tokens[: layout.num_emits].copy_(tokens, non_blocking=True)

    def usable(self) -> bool:
        """Return whether the device still works. Waits for it."""
        if self._device.type == "cuda":
            try:
                torch.cuda.synchronize(self._device)
            except RuntimeError:
                return False
        return True

    def state_bytes(self) -> int:
        """Return the bytes of device memory that slots and KV take."""
        return self._rows.nbytes + self._kv.nbytes

    def close(self) -> None:
        """Finish what is queued. The memory goes with the last reference."""
        self._stream.close()
