"""Training an EAGLE-3 head for a model: answers from the model itself, then soft targets over a draft vocabulary.

The loss is the cross entropy between the target's distribution and the head's, at each step of the unroll; later steps
count less. A run is a function of its settings and its corpus: batches depend on seed and step number, so a run that
was cut goes on from its checkpoint to the same weights (unless `minutes` ends it: then the clock decides).

Legend: B texts, L positions, N draft vocabulary, S steps of the unroll.
"""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from overlap.errors import ConfigError
from overlap.models.llama import Llama
from overlap.observe.progress import bar
from overlap.spec.data import Corpus, TextBatch, batches, draft_vocabulary, text_batch
from overlap.spec.eagle import load_head
from overlap.spec.head_files import HeadConfig, read_head
from overlap.spec.head_module import HeadModule
from overlap.spec.target_states import TargetStates

STEP_WEIGHT: Final = 0.8
"""How much a step of the unroll counts beside the one before it."""
_BETAS: Final = (0.9, 0.95)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSettings:
    """How to train. Raises ConfigError for a number that cannot be."""

    steps: int = 4000
    batch_size: int = 32
    """Texts in a batch."""
    length: int = 512
    """Positions of a text that are used; a multiple of 16."""
    unroll: int = 4
    """Steps of the unroll: how many drafts in a row the head learns."""
    learning_rate: float = 1e-3
    draft_vocabulary: int = 4096
    intermediate: int = 640
    """The head's feed-forward size. With 4096 draft tokens, a head for 576 channels takes 11.9 MB."""
    seed: int = 0
    minutes: float | None = None
    """End after so long, the learning rate going down by then; None trains all steps."""
    save_every: int = 500
    """Steps between two checkpoints."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "unroll", "draft_vocabulary", "intermediate", "save_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be 1 or more, not {getattr(self, name)!r}.")
        if self.length < 32 or self.length % 16:
            raise ConfigError(f"length must be a multiple of 16, 32 or more, not {self.length!r}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a head is worth on texts that it was not trained on, all answered greedily."""

    accepted: tuple[float, ...]
    """For each draft position, the share of drafts accepted where all before were."""
    mean_emitted: float
    """Tokens that a verify emits on average: 1 and the accepted drafts."""
    num_positions: int
    """From how many positions."""


class HeadTraining:
    """One run: the head, its optimizer, and the number of steps done."""

    def __init__(self, target: Llama, corpus: Corpus, settings: TrainSettings, start: Path | None = None) -> None:
        """`start` is a head to go on from: its shape and draft vocabulary hold, not those of the settings.

        Raises ModelError if it is none, or not one of the target.
        """
        self.settings = settings
        self.target = target
        self.corpus = corpus
        self.step = 0
        self.losses: list[float] = []
        self._device = target.device
        length = min(settings.length, target.config.context // 16 * 16)
        self._length = length
        self._states = TargetStates(target, settings.batch_size, length)
        if start is None:
            ids_N = draft_vocabulary(corpus, target.vocab_size, settings.draft_vocabulary)
            self.config, begun = head_shape(target, settings, len(ids_N)), dict[str, Tensor]()
        else:
            load_head(start, target)  # says what does not fit
            self.config, begun = read_head(start)
            if self.config.kind != "eagle3":
                raise ConfigError(f"{str(start)!r} is an {self.config.kind} head; only EAGLE-3 heads are trained.")
            ids_N = torch.arange(self.config.draft_vocab_size) + begun.get("d2t", torch.zeros((), dtype=torch.int64))
        width = len(self._states.taps) * target.config.hidden_size
        module = HeadModule(self.config, width, target.config.context + settings.unroll, settings.seed)
        module.take(begun)
        self.head = module.to(self._device)
        self.ids_N = ids_N.to(self._device)
        self._draft_id_V = torch.full((target.vocab_size,), -1, device=self._device)
        self._draft_id_V[self.ids_N] = torch.arange(len(ids_N), device=self._device)
        self._parameters = dict(self.head.weights.items())
        self._optimizer = torch.optim.AdamW(
            self._parameters.values(),
            lr=settings.learning_rate,
            betas=_BETAS,
            weight_decay=0.01,
            fused=self._device.type == "cuda",
        )

    def run(self, checkpoint: Path | None = None, *, progress: bool | None = None) -> None:
        """Train to the last step or until the minutes are over; write `checkpoint` now and then, and at the end."""
        settings, began = self.settings, time.monotonic()
        seconds = math.inf if settings.minutes is None else settings.minutes * 60
        with bar(settings.steps, "training", "step", asked=progress) as shown:
            shown.update(self.step)
            for batch in batches(self.corpus, settings.batch_size, self._length, settings.seed, self.step):
                spent = (time.monotonic() - began) / seconds
                if self.step >= settings.steps or spent >= 1:
                    break
                loss = self._train(batch, max(spent, self.step / settings.steps))
                self.step += 1
                if self.step % 10 == 0 or self.step == settings.steps:
                    self.losses.append(float(loss))
                    shown.set_postfix_str(f"loss {self.losses[-1]:.3f}", refresh=False)
                shown.update(1)
                if checkpoint is not None and self.step % settings.save_every == 0:
                    self.save(checkpoint)
        if checkpoint is not None:
            self.save(checkpoint)

    def _train(self, batch: TextBatch, done: float) -> Tensor:
        """Take one step at `done` (0 to 1) of the run; return the loss, on the device."""
        rate = self.settings.learning_rate * min(1.0, (self.step + 1) / 50) * (0.05 + 0.95 * (1 - done))
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        loss = self.loss(batch)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self._parameters.values(), 1.0)
        self._optimizer.step()
        return loss.detach()

    def loss(self, batch: TextBatch) -> Tensor:
        """Return the weighted cross entropy of a batch, a scalar."""
        batch = batch.to(self._device)
        tokens_BL, final_BLC, taps_BLA, embedded = self._read(batch)
        wanted_BLN = self._states.narrow_logits(final_BLC, self.ids_N).softmax(-1)
        total, weight = torch.zeros((), device=self._device), 1.0
        with self._autocast():
            for step, logits_BLN in enumerate(self.head(embedded, taps_BLA)):
                # Index t of step s says the token behind position t + s + 1.
                shift = step + 1
                said_BLN = logits_BLN[:, : tokens_BL.shape[1] - shift].float().log_softmax(-1)
                entropy_BL = -(wanted_BLN[:, shift:] * said_BLN).sum(-1)
                counts_BL = self._counting(batch, shift)
                total = total + weight * (entropy_BL * counts_BL).sum() / counts_BL.sum().clamp(min=1)
                weight *= STEP_WEIGHT
        return total

    def _read(self, batch: TextBatch) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        tokens_BL = batch.tokens_BL
        final_BLC, taps_BLA = self._states.states(tokens_BL)
        embedded = self._states.embedded(tokens_BL, self.settings.unroll)
        if self._device.type == "cpu":
            return tokens_BL, final_BLC.float(), taps_BLA.float(), [one.float() for one in embedded]
        return tokens_BL, final_BLC, taps_BLA, embedded

    def _counting(self, batch: TextBatch, shift: int) -> Tensor:
        """Return float [B, L - shift]: 1 where position t + shift is of the answer, or the last of the prompt."""
        places_L = torch.arange(shift, batch.tokens_BL.shape[1], device=self._device)[None, :]
        inside = (places_L < batch.lengths_B[:, None]) & (places_L >= batch.prompts_B[:, None] - 1)
        return inside.float()

    def _autocast(self) -> Any:
        return torch.autocast("cuda", torch.bfloat16) if self._device.type == "cuda" else nullcontext()

    @torch.no_grad()
    def report(self, judged: Corpus) -> Report:
        """Return the acceptance per position on other texts, which must have been answered greedily.

        On such a text the unroll is what the engine would draft: as long as all drafts were right, the head reads its
        own drafts. So a draft counts where all before it were the target's likeliest tokens.
        """
        unroll = self.settings.unroll
        right, tried = torch.zeros(unroll, dtype=torch.float64), torch.zeros(unroll, dtype=torch.float64)
        for start in range(0, len(judged), self.settings.batch_size):
            which = range(start, min(start + self.settings.batch_size, len(judged)))
            batch = text_batch(judged, which, self._length).to(self._device)
            tokens_BL, final_BLC, taps_BLA, embedded = self._read(batch)
            likeliest_BL = self._states.likeliest(final_BLC)
            width = tokens_BL.shape[1] - unroll  # where all steps have a target
            going_BL = torch.ones_like(tokens_BL[:, :width], dtype=torch.bool)
            with self._autocast():
                for step, logits_BLN in enumerate(self.head(embedded, taps_BLA)):
                    place = step + 1
                    counts_BL = going_BL & self._counting(batch, place)[:, :width].bool()
                    said_BL = self.ids_N[logits_BLN[:, :width].argmax(-1)]
                    going_BL = counts_BL & (said_BL == likeliest_BL[:, place : place + width])
                    right[step] += float(going_BL.sum())
                    tried[step] += float(counts_BL.sum())
        accepted = (right / tried.clamp(min=1)).tolist()
        mean = 1 + sum(math.prod(accepted[: step + 1]) for step in range(unroll))
        return Report(accepted=tuple(accepted), mean_emitted=mean, num_positions=int(tried[0]))

    def tensors(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the head under its published names."""
        found = {name: tensor.to(dtype) for name, tensor in self.head.named_tensors().items()}
        ids_N = self.ids_N.cpu()
        found["d2t"] = ids_N - torch.arange(len(ids_N))
        found["t2d"] = (self._draft_id_V >= 0).cpu()
        return found

    def save(self, path: Path) -> None:
        """Write a checkpoint that `resume` reads: weights, moments and the step number."""
        columns = {"step": torch.tensor(self.step), "losses": torch.tensor(self.losses), "ids": self.ids_N}
        for name, parameter in self._parameters.items():
            columns[f"weight/{name}"] = parameter.data
            for key, value in self._optimizer.state.get(parameter, {}).items():
                columns[f"{key}/{name}"] = value
        partial = path.with_suffix(".partial")
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in columns.items()}, partial)
        partial.replace(path)

    def resume(self, path: Path) -> None:
        """Go on from a checkpoint of the same settings and corpus. ConfigError if it belongs to others."""
        found = load_file(path)
        shapes = {name: tuple(parameter.shape) for name, parameter in self._parameters.items()}
        kept = {name: tuple(found[f"weight/{name}"].shape) for name in shapes if f"weight/{name}" in found}
        if shapes != kept or not torch.equal(found["ids"], self.ids_N.cpu()):
            raise ConfigError(f"The checkpoint {str(path)!r} is of another corpus or head. Remove it to begin anew.")
        self.step, self.losses = int(found["step"]), found["losses"].tolist()
        for name, parameter in self._parameters.items():
            parameter.data.copy_(found[f"weight/{name}"])
            moments = {key: found[f"{key}/{name}"] for key in ("exp_avg", "exp_avg_sq") if f"{key}/{name}" in found}
            if moments:
                state = {key: value.to(self._device) for key, value in moments.items()}
                self._optimizer.state[parameter] = {"step": found[f"step/{name}"], **state}


def head_shape(target: Llama, settings: TrainSettings, draft_vocab_size: int) -> HeadConfig:
    """Return the shape of a head for a target: its heads and rope, and the feed-forward size of the settings."""
    config = target.config
    return HeadConfig(
        kind="eagle3",
        hidden_size=config.hidden_size,
        num_layers=1,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        intermediate_size=settings.intermediate,
        rms_norm_eps=config.rms_norm_eps,
        rope_theta=config.rope_theta,
        rope_scaling=config.rope_scaling,
        vocab_size=target.vocab_size,
        draft_vocab_size=draft_vocab_size,
    )
