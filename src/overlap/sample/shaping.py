"""Logits changed before a token is drawn: masks, bias, penalties; and the log-probabilities that are told with it.

The order is that of vLLM: what is not allowed, then the bias (and tokens that may not come yet), then the repetition,
frequency and presence penalty; temperature and filters follow in `sample.sampler`. Every operation is on one element
at a time, so a row's values have the same bits alone or in any batch. Nothing here waits for the device.

Legend: N rows (one for each position of a token to be chosen), V vocabulary, K drafted tokens, B ceil(V / 32).
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from overlap.schedule.shaping import MOST_ALTERNATIVES, TOLD_WORDS
from overlap.state.shapes import ANSWERED, ShapeRows

_BITS: Final = 32


def shape_logits(
    logits_NV: Tensor,
    shapes: ShapeRows | None,
    slots_N: Tensor,
    positions_N: Tensor,
    *,
    drafted_NK: Tensor | None = None,
) -> Tensor:
    """Return the logits that rows draw from; a new tensor, float32 [N, V], or the one given if nothing applies.

    `slots` int32 [N] says whose bias and penalties a row gets, `positions` int32 [N] the absolute position of the token
    to be chosen. `shapes` counts each slot's tokens up to the step before this one; a row of a later position in the
    same step (speculation) gives as `drafted` int32 [N, K] the tokens of its own step that come before it, repeated as
    often as they come, -1 for none. `shapes` is None if no request has any shaping. Static shapes: may be captured.
    """
    if shapes is None:
        return logits_NV
    logits_NV = _biased(logits_NV, shapes, slots_N, positions_N)
    seen_NV = shapes.seen.index_select(0, slots_N)
    if drafted_NK is not None:
        counts_NK = (drafted_NK >= 0).int() * ANSWERED
        seen_NV.scatter_add_(1, drafted_NK.clamp(min=0).long(), counts_NK)
    repetition_N1 = shapes.repetition.index_select(0, slots_N)[:, None]
    lessened_NV = torch.where(logits_NV > 0, logits_NV / repetition_N1, logits_NV * repetition_N1)
    logits_NV = torch.where(seen_NV != 0, lessened_NV, logits_NV)
    counts_NV = seen_NV >> 1
    logits_NV -= shapes.frequency.index_select(0, slots_N)[:, None] * counts_NV
    logits_NV -= shapes.presence.index_select(0, slots_N)[:, None] * (counts_NV > 0)
    return logits_NV


def _biased(logits_NV: Tensor, shapes: ShapeRows, slots_N: Tensor, positions_N: Tensor) -> Tensor:
    place_W = torch.arange(shapes.entry_ids.shape[1], dtype=torch.int32, device=logits_NV.device)
    used_NW = place_W < shapes.num_entries.index_select(0, slots_N)[:, None]
    holds_NW = used_NW & (positions_N[:, None] < shapes.entry_untils.index_select(0, slots_N))
    # What is not used adds 0 somewhere, and not everything to one token, which would be slow on CUDA.
    ids_NW = torch.where(used_NW, shapes.entry_ids.index_select(0, slots_N), place_W % logits_NV.shape[1])
    values_NW = torch.where(holds_NW, shapes.entry_values.index_select(0, slots_N), 0.0)
    return logits_NV.scatter_add(1, ids_NW.long(), values_NW)


def mask_logits(logits_NV: Tensor, masks_MW: Tensor) -> Tensor:
    """Return the logits with -inf for each token that a row may not choose, a new tensor; other rows as they were.

    `masks` is int32 [M, 1 + B]: each line is a row among N, then the tokens that it may choose, bit `v % 32` of word
    `v // 32` for token v, the lowest bit first. A row that may choose nothing gets some token.
    """
    if logits_NV.is_cuda:
        from overlap.sample import mask_triton

        return mask_triton.mask_logits(logits_NV, masks_MW)
    rows_M = masks_MW[:, 0].long()
    allowed_MV = unpacked(masks_MW[:, 1:], logits_NV.shape[1])
    return logits_NV.index_copy(0, rows_M, logits_NV.index_select(0, rows_M).masked_fill_(~allowed_MV, -torch.inf))


def unpacked(allowed_NB: Tensor, vocab_size: int) -> Tensor:
    """Return a mask of bits as bool [N, V]."""
    bits = torch.arange(_BITS, dtype=torch.int32, device=allowed_NB.device)
    return ((allowed_NB[:, :, None] >> bits) & 1).view(len(allowed_NB), -1)[:, :vocab_size].bool()


def told_words(logits_NV: Tensor, tokens_N: Tensor) -> Tensor:
    """Return what is told with each token, int32 [N, TOLD_WORDS]; see `schedule.settled.Settled.told`.

    `logits` are the model's own, as they were before anything changed them: the values are their log-softmax.
    """
    num = min(MOST_ALTERNATIVES, logits_NV.shape[1])
    total_N1 = logits_NV.logsumexp(dim=-1, keepdim=True)
    top = logits_NV.topk(num, dim=-1)
    words = torch.full((len(tokens_N), TOLD_WORDS), -1, dtype=torch.int32, device=logits_NV.device)
    words[:, 0] = (logits_NV.gather(1, tokens_N.long()[:, None]) - total_N1)[:, 0].view(torch.int32)
    words[:, 1 : 1 + num] = top.indices.int()
    words[:, 1 + MOST_ALTERNATIVES : 1 + MOST_ALTERNATIVES + num] = (top.values - total_N1).view(torch.int32)
    return words
