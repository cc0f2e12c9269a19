"""EAGLE heads against a slow reference written from their definition, over the hidden states of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from overlap.errors import ModelError
from overlap.messages import SamplingParams
from overlap.models.llama import Llama
from overlap.schedule.plan import SampleKind
from overlap.spec.drafter import Drafter, Drafts, Read
from overlap.spec.eagle import load_head
from overlap.state.rows import SlotRows

HEADS, KV_HEADS, SIZE, EPS = 4, 2, 16, 1e-5


class Slow:
    """A head over a whole text, recomputed for every draft: no cache, no pages, no chunks; one position at a time."""

    def __init__(self, kind: str, tensors: dict[str, Tensor], layers: int, reference: Any) -> None:
        self.kind, self.tensors, self.layers, self.reference = kind, tensors, layers, reference
        self.embedding = reference.model.embed_tokens.weight

    def drafts(self, tokens: list[int], count: int) -> list[int]:
        """Return greedy drafts behind `tokens`, of which the last has not been read by the target."""
        with torch.inference_mode():
            out = self.reference(torch.tensor([tokens[:-1]]), output_hidden_states=True)
            states = out.hidden_states  # [t] is what stands in front of layer t; the last is behind the final norm
            num_layers = len(states) - 1
            if self.kind == "eagle3":
                picked = [states[t][0] for t in (2, num_layers // 2, num_layers - 3)]
                hidden = [
                    self.tensors["fc.weight"] @ torch.cat([part[i] for part in picked]) for i in range(len(tokens) - 1)
                ]
            else:
                hidden = [states[num_layers][0, i] for i in range(len(tokens) - 1)]
            text = list(tokens)
            for _ in range(count):
                state, token = self.say(text[1:], hidden)
                hidden.append(state)
                text.append(token)
        return text[len(tokens) :]

    def say(self, tokens: list[int], hidden: list[Tensor]) -> tuple[Tensor, int]:
        """Position i reads (tokens[i], hidden[i]), where tokens[i] is the text's token i + 1."""
        if self.kind == "eagle3":
            embedded = [self.norm(self.embedding[token], "midlayer.input_layernorm") for token in tokens]
            inputs = [
                torch.cat([e, self.norm(h, "midlayer.hidden_norm")]) for e, h in zip(embedded, hidden, strict=True)
            ]
            state = self.layer("midlayer.", inputs, hidden)[-1]
            draft = int((self.tensors["lm_head.weight"] @ self.norm(state, "norm")).argmax())
            return state, draft + int(self.tensors["d2t"][draft])
        fc, bias = self.tensors["fc.weight"], self.tensors["fc.bias"]
        stream = [fc @ torch.cat([self.embedding[t], h]) + bias for t, h in zip(tokens, hidden, strict=True)]
        for index in range(self.layers):
            prefix = f"layers.{index}."
            inputs = [self.norm(x, f"{prefix}input_layernorm") for x in stream] if index else stream
            stream = self.layer(prefix, inputs, stream)
        return stream[-1], int(self.reference.lm_head(stream[-1]).argmax())

    def layer(self, prefix: str, inputs: list[Tensor], residual: list[Tensor]) -> list[Tensor]:
        weight = {name.removeprefix(prefix): t for name, t in self.tensors.items() if name.startswith(prefix)}
        q, k, v = (
            [(weight[f"self_attn.{part}_proj.weight"] @ x).view(-1, SIZE) for x in inputs] for part in ("q", "k", "v")
        )
        out = []
        for i in range(len(inputs)):
            heads = []
            for head in range(HEADS):
                query, shared = self.rotate(q[i][head], i), head // (HEADS // KV_HEADS)
                scores = torch.stack([query @ self.rotate(k[j][shared], j) / SIZE**0.5 for j in range(i + 1)])
                heads.append(sum(share * v[j][shared] for j, share in enumerate(scores.softmax(0))))
            x = residual[i] + weight["self_attn.o_proj.weight"] @ torch.cat(heads)
            normed = self.norm(x, f"{prefix}post_attention_layernorm")
            gate, up = weight["mlp.gate_proj.weight"] @ normed, weight["mlp.up_proj.weight"] @ normed
            out.append(x + weight["mlp.down_proj.weight"] @ (gate * torch.sigmoid(gate) * up))
        return out

    def norm(self, x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean() + EPS).sqrt() * self.tensors[f"{name}.weight"]

    def rotate(self, x: Tensor, position: int) -> Tensor:
        angles = position / 10000.0 ** (torch.arange(0, SIZE, 2) / SIZE)
        first, second = x[: SIZE // 2], x[SIZE // 2 :]
        return torch.cat([first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()])


class Spy:
    """Passes everything on, and keeps what was drafted behind how many known tokens."""

    def __init__(self, inner: Drafter) -> None:
        self.max_drafts, self.taps, self._inner = inner.max_drafts, inner.taps, inner
        self.seen: list[tuple[int, list[int]]] = []

    def draft(self, read: Read, slots: SlotRows, kind: SampleKind) -> Drafts:
        found = self._inner.draft(read, slots, kind)
        self.seen.append((int(read.positions[read.last[0]]) + 2, found.tokens_RK[0].tolist()))
        return found


@pytest.fixture(scope="module")
def reference(tiny_llama_dir: Path) -> Any:
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float32).eval()


@pytest.mark.parametrize(("kind", "layers"), [("eagle3", 1), ("eagle", 1), ("eagle", 2)])
def test_drafts_equal_those_of_the_definition_in_every_chunking(
    kind: str, layers: int, target: Llama, reference: Any, spec: Any, tmp_path: Path
) -> None:
    for seed, chunk in ((0, 1), (1, 5), (2, 64)):
        tensors = spec.write_random_head(tmp_path / str(seed), target, kind, layers, seed)
        prompt = torch.randint(3, 512, (11,), generator=torch.Generator().manual_seed(seed)).tolist()
        spy = Spy(spec.chain(load_head(tmp_path / str(seed), target), 3, 1))
        answer = spec.Reference(target, spy).run([prompt], [SamplingParams(temperature=0)], 5, chunk=chunk)[0]
        text, slow = [*prompt, *answer], Slow(kind, tensors, layers, reference)
        known = [record for record in spy.seen if len(prompt) < record[0] <= len(text)]
        assert len(known) >= 4
        for length, drafts in known[:: 1 if chunk == 1 else 2]:
            assert drafts == slow.drafts(text[:length], 3)


def test_a_head_of_another_model_is_refused(target: Llama, spec: Any, tmp_path: Path) -> None:
    spec.write_random_head(tmp_path, target, "eagle3")
    config = (tmp_path / "config.json").read_text(encoding="utf-8")
    (tmp_path / "config.json").write_text(config.replace('"vocab_size": 512', '"vocab_size": 999'), encoding="utf-8")
    with pytest.raises(ModelError, match="made for a model of 999 tokens"):
        load_head(tmp_path, target)


def test_a_broken_head_is_refused_by_what_is_wrong(target: Llama, spec: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has 0 safetensors files"):
        load_head(tmp_path, target)
    spec.write_random_head(tmp_path, target, "eagle3")
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[:1000])
    with pytest.raises(ModelError, match="broken or truncated"):
        load_head(tmp_path, target)
    (tmp_path / "model.safetensors").write_bytes(weights)
    config = (tmp_path / "config.json").read_text(encoding="utf-8")
    (tmp_path / "config.json").write_text(config.replace('size": 96', 'size": 97'), encoding="utf-8")
    with pytest.raises(ModelError, match=r"mlp.gate_proj.weight.*\[96, 64\]; it should be \[97, 64\]"):
        load_head(tmp_path, target)
