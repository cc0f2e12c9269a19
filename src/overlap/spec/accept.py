"""One verify, on the device: what the target would have chosen, how much of a draft that confirms, and what comes out.

Exact by Gumbel coupling. The target's choice at a position is the argmax of its filtered logits plus the noise
g(seed, position), which is what the engine without a drafter takes; a draft is accepted as far as it equals these
choices, and the first choice past it is the bonus. So what is emitted never depends on the drafts, only how many
tokens a step emits does. The drafter adds the same noise to its own logits, which makes equal draws likely (the
"Gumbel coupling" of Daliri, Musco and Suresh, arXiv:2408.07978). Nothing here waits for the device.

Legend: R rows, K drafts of a row at most, J = K + 1 verified positions, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from overlap.sample.sampler import sample_all
from overlap.schedule.plan import SampleKind
from overlap.state.rows import SlotRows

NOTHING: Final = -1
"""What stands in `Accepted.tokens_RJ` past a row's last emitted token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    """The outcome of one verify, all int32 on the device."""

    num_accepted_R: Tensor
    """How many drafts of each row were confirmed, 0 to K."""
    tokens_RJ: Tensor
    """The emitted tokens of each row: its accepted drafts, then the bonus, then NOTHING."""
    bonus_R: Tensor
    """The last emitted token of each row: the input of its next step."""

    @property
    def num_emitted(self) -> Tensor:
        """How many tokens each row emits, [R]: one more than it accepted."""
        return self.num_accepted_R + 1


def target_choices(logits_RJV: Tensor, rows: SlotRows, slots_R: Tensor, starts_R: Tensor, kind: SampleKind) -> Tensor:
    """Return the target's token at each verified position, int32 [R, J].

    `logits` is float32; `starts` (int32) is the absolute position of the first token to be chosen in each row, the
    one behind its last known token; `kind` must allow for what the slots ask (see `sampler.sample_all`).
    """
    num_rows, width, vocabulary = logits_RJV.shape
    positions_RJ = starts_R[:, None] + torch.arange(width, dtype=torch.int32, device=starts_R.device)[None, :]
    slots_RJ = slots_R[:, None].expand(-1, width)
    flat = logits_RJV.reshape(num_rows * width, vocabulary)
    return sample_all(flat, rows, slots_RJ.reshape(-1), positions_RJ.reshape(-1), kind).int().view(num_rows, width)


def accept(choices_RJ: Tensor, drafts_RK: Tensor, num_drafts_R: Tensor) -> Accepted:
    """Compare drafts with the target's choices: all int32; `num_drafts` may be 0, which is a plain decode row."""
    most = drafts_RK.shape[1]
    places_K = torch.arange(most, dtype=torch.int32, device=drafts_RK.device)
    equal_RK = (drafts_RK == choices_RJ[:, :most]) & (places_K[None, :] < num_drafts_R[:, None])
    num_accepted_R = equal_RK.int().cumprod(dim=1, dtype=torch.int32).sum(dim=1, dtype=torch.int32)
    places_J = torch.arange(choices_RJ.shape[1], dtype=torch.int32, device=drafts_RK.device)
    emitted_RJ = places_J[None, :] <= num_accepted_R[:, None]
    return Accepted(
        num_accepted_R=num_accepted_R,
        tokens_RJ=choices_RJ.masked_fill(~emitted_RJ, NOTHING),
        bonus_R=choices_RJ.gather(1, num_accepted_R.long()[:, None])[:, 0],
    )
