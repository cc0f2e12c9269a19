"""From logits to tokens: temperature, top-k, top-p, min-p, and a draw by the Gumbel-max trick.

Small functions on [S, V] float32, one after the other, so that what comes before the filters (penalties, logit bias,
masks) and what reuses the noise (speculation) can be put between them. No row looks at another, and each sum over a
row is exact whatever its order, so a row's token has the same bits alone or in any batch. Nothing here waits for the
device.

Legend: E emitting rows, S sampled (not greedy) rows of them, V vocabulary.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from torch import Tensor

from overlap.sample.philox import gumbel
from overlap.sample.shaping import shape_logits
from overlap.schedule.plan import SampleKind
from overlap.state.rows import SlotRows

COLDEST: Final = 1e-20
"""Temperatures under this act as this: the most likely token wins either way, and nothing divides by 0."""
_WEIGHT_ONE: Final = 2.0**40
"""A probability of 1 as an integer: a row of 2**22 such weights still fits into int64."""


def sample(
    logits_EV: Tensor,
    rows: SlotRows,
    emit_slots: Tensor,
    emit_positions: Tensor,
    sampled: Tensor,
    truncated: bool,
) -> Tensor:
    """Return the token of each emitting row, int32 [E].

    `logits` is float32 [E, V]; `emit_slots` and `emit_positions` (the absolute position of the token to be chosen)
    are int32 [E]; `sampled` is int32 [S], the rows among E that are not greedy, ascending. `truncated` says whether
    any of those uses top-k, top-p or min-p. Greedy rows take the most likely token, the lowest id of equals. A row
    whose logits are not finite gets some token of the vocabulary and harms no other.
    """
    num_rows, num_sampled = logits_EV.shape[0], sampled.shape[0]
    if num_sampled == 0:
        return logits_EV.argmax(dim=-1).int()
    if logits_EV.is_cuda:
        return _draw_by_kernels(logits_EV, rows, emit_slots, emit_positions, truncated).int()
    if num_sampled == num_rows:
        return _draw(logits_EV, rows, emit_slots, emit_positions, truncated).int()
    tokens = logits_EV.argmax(dim=-1).int()
    drawn = _draw(
        logits_EV.index_select(0, sampled),
        rows,
        emit_slots.index_select(0, sampled),
        emit_positions.index_select(0, sampled),
        truncated,
    ).int()
    return tokens.index_copy_(0, sampled.long(), drawn)


def sample_all(
    logits_EV: Tensor, rows: SlotRows, emit_slots: Tensor, emit_positions: Tensor, kind: SampleKind
) -> Tensor:
    """Return the token of each emitting row, int64 [E], with nothing decided by the host: what a graph captures.

    The same tokens as `sample`, which looks only at the rows that need it. Here every row takes the path of `kind`, and
    a greedy row (its slot's temperature is 0) its most likely token at the end. `kind` must allow for what the rows
    ask: "greedy" for greedy rows only, "sampled" also for temperatures, "truncated" also for filters, "shaped" for
    anything: it changes the logits first (see `sample.shaping`), for which `rows.shapes` has to be there.
    """
    if kind == "shaped":
        logits_EV = shape_logits(logits_EV, rows.shapes.rows, emit_slots, emit_positions)
    if logits_EV.is_cuda and kind != "greedy":
        return _draw_by_kernels(logits_EV, rows, emit_slots, emit_positions, kind in ("truncated", "shaped"))
    most_likely = logits_EV.argmax(dim=-1)
    if kind == "greedy":
        return most_likely
    drawn = _draw(logits_EV, rows, emit_slots, emit_positions, kind in ("truncated", "shaped"))
    return torch.where(rows.temperature.index_select(0, emit_slots) > 0, drawn, most_likely)


def _draw_by_kernels(logits_EV: Tensor, rows: SlotRows, slots: Tensor, positions: Tensor, truncated: bool) -> Tensor:
    """Return what `sample_all` returns, by Triton kernels: the same tokens, each logit read twice, nothing sorted."""
    from overlap.sample import draw_triton

    return draw_triton.draw(logits_EV, rows, slots, positions, truncated)


def _draw(logits_SV: Tensor, rows: SlotRows, slots: Tensor, positions: Tensor, truncated: bool) -> Tensor:
    scaled_SV = scale(logits_SV, rows.temperature.index_select(0, slots))
    if truncated:
        scaled_SV = truncate(
            scaled_SV,
            rows.top_k.index_select(0, slots),
            rows.top_p.index_select(0, slots),
            rows.min_p.index_select(0, slots),
        )
    seed_lo, seed_hi = rows.seed_lo.index_select(0, slots), rows.seed_hi.index_select(0, slots)
    return gumbel(seed_lo, seed_hi, positions, scaled_SV.shape[1], scaled_SV).argmax(dim=-1)


def scale(logits_SV: Tensor, temperature_S: Tensor) -> Tensor:
    """Return `(logits - max) / temperature`, a new tensor: the most likely token is at 0, and nothing overflows up."""
    shifted_SV = logits_SV - logits_SV.amax(dim=-1, keepdim=True)
    return shifted_SV.div_(temperature_S.clamp(min=COLDEST)[:, None])


def truncate(scaled_SV: Tensor, top_k_S: Tensor, top_p_S: Tensor, min_p_S: Tensor) -> Tensor:
    """Return `scaled` with -inf for each token that top-k, then top-p, then min-p leaves out.

    `scaled` comes from `scale`. top_k 0 (or V and more), top_p 1 and min_p 0 keep all. Ties at the k-th value all
    stay; among equals at the border of top-p the lowest ids stay.
    """
    ranked_SV = _descending(scaled_SV)
    num_kept_S1 = _count_kept(ranked_SV, top_k_S[:, None].long(), top_p_S[:, None])
    border_S1 = ranked_SV.gather(1, num_kept_S1 - 1)
    room_S1 = num_kept_S1 - (ranked_SV > border_S1).sum(dim=-1, keepdim=True)
    at_border_SV = scaled_SV == border_S1
    stays_SV = (scaled_SV > border_S1) | (at_border_SV & (at_border_SV.cumsum(dim=-1, dtype=torch.int32) <= room_S1))
    stays_SV &= scaled_SV.exp() >= min_p_S[:, None]
    return scaled_SV.masked_fill(~stays_SV, -torch.inf)


def _count_kept(ranked_SV: Tensor, top_k_S1: Tensor, top_p_S1: Tensor) -> Tensor:
    """Return how many of the ranked tokens top-k and then top-p keep, int64 [S, 1], at least 1."""
    vocabulary = ranked_SV.shape[1]
    k_S1 = top_k_S1.masked_fill(top_k_S1 <= 0, vocabulary).clamp(max=vocabulary)
    in_top_k_SV = ranked_SV >= ranked_SV.gather(1, k_S1 - 1)
    # Integer weights: float sums depend on their order, which differs with the batch (on CUDA: with its shape).
    weight_SV = (ranked_SV.exp() * _WEIGHT_ONE).long() * in_top_k_SV
    before_SV = weight_SV.cumsum(dim=-1)
    total_S1 = before_SV[:, -1:].clone()
    before_SV -= weight_SV
    in_top_p_SV = (before_SV.double() < top_p_S1.double() * total_S1.double()) | (top_p_S1 >= 1)
    return (in_top_k_SV & in_top_p_SV).sum(dim=-1, keepdim=True).clamp(min=1)


def _descending(values_SV: Tensor) -> Tensor:
    """Return each row's values from high to low. On the CPU numpy's sort is 1.7 to 3.6 times as fast."""
    if values_SV.is_cuda:
        return values_SV.sort(dim=-1, descending=True).values
    ascending = np.negative(values_SV.numpy())
    ascending.sort(axis=-1)
    return torch.from_numpy(np.negative(ascending, out=ascending))
