"""Prompt lookup on the device: what followed the last tokens when they last stood in the text.

No weights, no training, and good where answers repeat their prompt (code, summaries, extraction). Source: Saxena,
"Prompt Lookup Decoding" (2023); here the match is the longest first and then the newest, all rows at once.

Legend: S slots, R rows, T tokens, L positions of a slot, K drafts of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from overlap.schedule.plan import SampleKind
from overlap.spec.drafter import Drafts, Read
from overlap.state.rows import SlotRows


class NgramDrafter:
    """A Drafter that looks drafts up in the request's own tokens, which it keeps on the device (4 bytes each)."""

    captures = True
    taps: tuple[int, ...] = ()

    def __init__(
        self,
        num_slots: int,
        context: int,
        max_drafts: int,
        device: torch.device | str,
        *,
        longest: int = 4,
        shortest: int = 2,
    ) -> None:
        """`longest` and `shortest` bound how many tokens have to match, 1 or more. K is `max_drafts`."""
        self.max_drafts = max_drafts
        self._longest, self._shortest = longest, shortest
        # Behind the last position lies what is not to be kept: padding, and drafts past the context.
        self.history_SL = torch.full((num_slots + 1, context + 1), -1, dtype=torch.int32, device=device)

    def remember(self, slot: int, tokens: Tensor) -> None:
        """Keep tokens of the prefix cache, which no step reads."""
        self.history_SL[slot, : len(tokens)].copy_(tokens)

    def take_in(self, read: Read) -> None:
        """Keep what was read, and the token behind each."""
        self._keep(read.token_slots, read.positions, read.token_ids)
        self._keep(read.token_slots, read.positions + 1, read.next_tokens)

    def draft(self, read: Read, slots: SlotRows, kind: SampleKind) -> Drafts:  # noqa: ARG002 - the interface's
        """Keep what was read, then look the end of each row up. Rows without a match get no drafts."""
        self.take_in(read)
        lengths_R = read.positions.index_select(0, read.last) + 2  # the next token of the last is known, too
        return self.lookup(read.slots, lengths_R, read.most)

    def _keep(self, slots_T: Tensor, positions_T: Tensor, tokens_T: Tensor) -> None:
        width = self.history_SL.shape[1]
        index_T = slots_T.long() * width + positions_T.clamp(max=width - 1)
        self.history_SL.view(-1).index_copy_(0, index_T, tokens_T)

    def lookup(self, slots_R: Tensor, lengths_R: Tensor, most: int | None = None) -> Drafts:
        """Draft up to `most` tokens (None: K) for rows that have `lengths` (int32 [R]) known ones.

        A match near the end goes round: text that repeats itself every p tokens matches itself p tokens ago, and drafts
        the period again and again.
        """
        text_RL = self.history_SL.index_select(0, slots_R)[:, :-1]
        width = text_RL.shape[1]
        ends_L = torch.arange(width, device=text_RL.device)
        lengths_R1 = lengths_R.long().clamp(max=width)[:, None]
        matched_RL = torch.zeros_like(text_RL)
        going_RL = ends_L[None, :] < lengths_R1 - 1
        for back in range(self._longest):
            place_R1 = lengths_R1 - 1 - back
            wanted_R1 = text_RL.gather(1, place_R1.clamp(min=0))
            shifted_RL = text_RL.roll(back, dims=1)
            going_RL = going_RL & (shifted_RL == wanted_R1) & (ends_L[None, :] >= back) & (place_R1 >= 0)
            matched_RL = matched_RL + going_RL.int()
        score_RL = matched_RL.long() * width + ends_L[None, :]
        end_R1 = score_RL.argmax(dim=1, keepdim=True)
        found_R = matched_RL.gather(1, end_R1)[:, 0] >= self._shortest
        period_R1 = (lengths_R1 - 1 - end_R1).clamp(min=1)
        most = self.max_drafts if most is None else most
        ahead_K = torch.arange(most, device=text_RL.device)[None, :]
        tokens_RK = text_RL.gather(1, (end_R1 + 1 + ahead_K % period_R1).clamp(max=width - 1)).clamp(
            min=0
        )  # always a token
        return Drafts(tokens_RK=tokens_RK, num_R=found_R.int() * most)
