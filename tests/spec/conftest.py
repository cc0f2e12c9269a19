"""A tiny target, random heads for it, and the reference engine: one step after the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from overlap.cache.pages import PAGE
from overlap.graphs.eager import drive
from overlap.messages import SamplingParams
from overlap.models import build, open_checkpoint
from overlap.models.llama import Llama
from overlap.models.program import Batch
from overlap.ops.attention import AttentionRows, TorchAttention
from overlap.schedule.plan import SampleKind
from overlap.spec.accept import accept, target_choices
from overlap.spec.chain import ChainDrafter, ModelHead, head_kv
from overlap.spec.drafter import Drafter, Drafts, Head, Read
from overlap.spec.eagle import load_head
from overlap.spec.head_files import HeadConfig, head_shapes, write_eagle3
from overlap.spec.ngram import NgramDrafter
from overlap.state.rows import SlotRows

CONTEXT, PAGES_A_ROW = 512, 12


@dataclass
class Reference:
    """A synchronous engine of R rows: verify, accept, bonus, draft. Tokens go in and come out as lists."""

    target: Llama
    drafter: Drafter | None = None
    drafts_of_row: Callable[[int, int], int] | None = None
    """(row, step) -> how many drafts of the row count; all of them if not given."""
    accepted: list[int] = field(default_factory=list)

    def run(self, prompts: list[list[int]], params: list[SamplingParams], new: int, chunk: int = 7) -> list[list[int]]:
        with torch.inference_mode():
            return self._run(prompts, params, new, chunk)

    def _run(self, prompts: list[list[int]], params: list[SamplingParams], new: int, chunk: int) -> list[list[int]]:
        num_rows, target = len(prompts), self.target
        self.slots = slot_rows(params)
        self.table = torch.randperm(num_rows * PAGES_A_ROW, generator=torch.Generator().manual_seed(3))
        self.table = self.table.view(num_rows, PAGES_A_ROW).int()
        shape = (num_rows * PAGES_A_ROW, target.num_layers, 2, PAGE, target.num_kv_heads, target.head_dim)
        self.kv = torch.zeros(shape)
        self.attention = TorchAttention(self.kv, target.num_heads)
        self.kind: SampleKind = "greedy" if all(one.temperature == 0 for one in params) else "truncated"
        width = 0 if self.drafter is None else self.drafter.max_drafts
        drafts_RK = torch.zeros((num_rows, width), dtype=torch.int32)
        num_R = torch.zeros(num_rows, dtype=torch.int32)
        answers: list[list[int]] = []
        for row, prompt in enumerate(prompts):
            token, drafts = self._prefill(row, prompt, chunk)
            answers.append([token])
            if drafts is not None:
                drafts_RK[row], num_R[row] = drafts.tokens_RK[0], drafts.num_R[0]
        step = 0
        while min(map(len, answers)) < new:
            if self.drafts_of_row is not None:
                most = torch.tensor([self.drafts_of_row(row, step) for row in range(num_rows)])
                num_R = torch.minimum(num_R, most.int())
            drafts_RK, num_R = self._verify(prompts, answers, drafts_RK, num_R)
            step += 1
        return [answer[:new] for answer in answers]

    def _forward(self, token_ids: Tensor, positions: Tensor, slots: Tensor, rows: AttentionRows) -> tuple[Tensor, ...]:
        kv_index = self.table[slots.long(), (positions // PAGE).long()] * PAGE + positions % PAGE
        batch = Batch(token_ids=token_ids, positions=positions, kv_index=kv_index, kv=self.kv)
        self.attention.plan(rows)
        taps = () if self.drafter is None else self.drafter.taps
        states = drive(self.target.forward(batch, taps), self.attention)
        hidden_size = self.target.config.hidden_size
        return states[:, :hidden_size], states[:, hidden_size:], kv_index

    def _prefill(self, row: int, prompt: list[int], chunk: int) -> tuple[int, Drafts | None]:
        slot, token, drafts = torch.tensor([row], dtype=torch.int32), -1, None
        for start in range(0, len(prompt), chunk):
            part = prompt[start : start + chunk]
            count, end = len(part), start + len(part)
            positions = torch.arange(start, end, dtype=torch.int32)
            rows = AttentionRows(
                num_decode=0, seq_lens=torch.tensor([end], dtype=torch.int32), page_table=self.table[row : row + 1],
                starts=np.array([start], dtype=np.int32), counts=np.array([count], dtype=np.int32),
                chunk_pages=np.array([], dtype=np.int32),
            )  # fmt: skip
            token_ids, token_slots = torch.tensor(part, dtype=torch.int32), slot.expand(count)
            final, hidden, kv_index = self._forward(token_ids, positions, token_slots, rows)
            logits = self.target.logits(final[-1:])[None]
            token = int(target_choices(logits, self.slots, slot, torch.tensor([end], dtype=torch.int32), self.kind))
            behind = prompt[start + 1 : end + 1] if end < len(prompt) else [*prompt[start + 1 :], token]
            if self.drafter is not None:
                read = Read(
                    token_ids=token_ids, next_tokens=torch.tensor(behind, dtype=torch.int32), positions=positions,
                    kv_index=kv_index, hidden=hidden, rows=rows, last=torch.tensor([count - 1]), slots=slot,
                    token_slots=token_slots, page_table=self.table[row : row + 1], longest=end - 1,
                )  # fmt: skip
                drafts = self.drafter.draft(read, self.slots, self.kind)
        return token, drafts

    def _verify(
        self, prompts: list[list[int]], answers: list[list[int]], drafts_RK: Tensor, num_R: Tensor
    ) -> tuple[Tensor, Tensor]:
        num_rows, width = drafts_RK.shape[0], drafts_RK.shape[1] + 1
        known = [len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True)]
        starts = torch.tensor(known, dtype=torch.int32) - 1
        inputs_RJ = torch.cat([torch.tensor([[answer[-1]] for answer in answers], dtype=torch.int32), drafts_RK], dim=1)
        positions = (starts[:, None] + torch.arange(width, dtype=torch.int32)).view(-1)
        slots = torch.arange(num_rows, dtype=torch.int32)
        token_slots = slots.repeat_interleave(width)
        rows = AttentionRows(
            num_decode=num_rows * width, seq_lens=positions + 1, page_table=self.table[token_slots.long()],
            starts=positions.numpy(), counts=np.ones(num_rows * width, dtype=np.int32),
            chunk_pages=np.array([], dtype=np.int32),
        )  # fmt: skip
        final, hidden, kv_index = self._forward(inputs_RJ.view(-1), positions, token_slots, rows)
        logits_RJV = self.target.logits(final).view(num_rows, width, -1)
        choices_RJ = target_choices(logits_RJV, self.slots, slots, starts + 1, self.kind)
        outcome = accept(choices_RJ, drafts_RK, num_R)
        for row, answer in enumerate(answers):
            answer += [token for token in outcome.tokens_RJ[row].tolist() if token >= 0]
            self.accepted.append(int(outcome.num_accepted_R[row]))
        if self.drafter is None:
            return drafts_RK, num_R
        read = Read(
            token_ids=inputs_RJ.view(-1), next_tokens=choices_RJ.view(-1), positions=positions, kv_index=kv_index,
            hidden=hidden, rows=rows, last=torch.arange(num_rows) * width + outcome.num_accepted_R, slots=slots,
            token_slots=token_slots, page_table=self.table, longest=max(known) + width,
        )  # fmt: skip
        drafts = self.drafter.draft(read, self.slots, self.kind)
        return drafts.tokens_RK, drafts.num_R


def slot_rows(params: list[SamplingParams]) -> SlotRows:
    """Rows with these parameters in slots 0, 1, ..."""
    rows = SlotRows(len(params), PAGES_A_ROW, "cpu")
    for slot, one in enumerate(params):
        seed = (one.seed or 0) % 2**64
        rows.temperature[slot], rows.top_k[slot] = one.temperature, one.top_k
        rows.top_p[slot], rows.min_p[slot] = one.top_p, one.min_p
        halves = np.array([seed & 0xFFFFFFFF, seed >> 32], dtype=np.uint32).view(np.int32)
        rows.seed_lo[slot], rows.seed_hi[slot] = int(halves[0]), int(halves[1])
    return rows


@pytest.fixture(scope="session")
def target(tiny_llama_dir: Path) -> Llama:
    checkpoint = open_checkpoint(tiny_llama_dir, cache_dir=tiny_llama_dir)
    program = build(checkpoint, device="cpu", dtype=torch.float32)
    checkpoint.close()
    return program


def head_config(target: Llama, kind: str, draft_vocabulary: int | None = None, layers: int = 1) -> HeadConfig:
    return HeadConfig(
        kind="eagle3" if kind == "eagle3" else "eagle", hidden_size=target.config.hidden_size, num_layers=layers,
        num_heads=4, num_kv_heads=2, head_dim=16, intermediate_size=96, rms_norm_eps=1e-5, rope_theta=10000.0,
        rope_scaling=None, vocab_size=target.vocab_size, draft_vocab_size=draft_vocabulary or target.vocab_size,
    )  # fmt: skip


def write_random_head(path: Path, target: Llama, kind: str, layers: int = 1, seed: int = 0) -> dict[str, Tensor]:
    """Write a head of random numbers, for EAGLE-3 over 200 tokens of the target's, and return its tensors."""
    generator = torch.Generator().manual_seed(seed)
    config = head_config(target, kind, 200 if kind == "eagle3" else None, layers)
    tensors = {
        name: torch.randn(shape, generator=generator) * (0.15 if len(shape) > 1 else 0.3) + (len(shape) == 1)
        for name, shape in head_shapes(config, 3 * target.config.hidden_size).items()
    }
    if kind == "eagle3":
        ids = torch.randperm(target.vocab_size, generator=generator)[:200].sort().values
        tensors["d2t"] = ids - torch.arange(200)
        tensors["t2d"] = torch.zeros(target.vocab_size, dtype=torch.bool).index_fill_(0, ids, True)
    else:
        tensors["fc.bias"] = torch.randn(target.config.hidden_size, generator=generator) * 0.1
    write_eagle3(path, config, tensors, num_hidden_layers=layers)  # the same files, whatever the architecture is called
    return tensors


def chain(head: Head, max_drafts: int, rows: int) -> ChainDrafter:
    kv = head_kv(head, rows * PAGES_A_ROW, torch.float32, "cpu")
    return ChainDrafter(head, kv, TorchAttention(kv, head.num_heads), max_drafts, CONTEXT)


def make_drafter(name: str, target: Llama, path: Path, max_drafts: int, rows: int) -> Drafter | None:
    """Return a new drafter: "none", "ngram", "eagle3", "eagle", "model" (the target itself) or "other model"."""
    if name == "none":
        return None
    if name == "ngram":
        return NgramDrafter(rows, CONTEXT, max_drafts, "cpu")
    if name == "model":
        return chain(ModelHead(target), max_drafts, rows)
    write_random_head(path / name, target, name)
    return chain(load_head(path / name, target), max_drafts, rows)


class Toolbox:
    """What test files of this folder share: pytest has no imports between them."""

    Reference = Reference
    slot_rows = staticmethod(slot_rows)
    head_config = staticmethod(head_config)
    write_random_head = staticmethod(write_random_head)
    make_drafter = staticmethod(make_drafter)
    chain = staticmethod(chain)


@pytest.fixture(scope="session")
def spec() -> type[Toolbox]:
    return Toolbox
