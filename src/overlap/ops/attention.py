"""Attention over paged KV: what a step must tell it, what each kind of it offers, and the torch reference.

Legend: R rows, N decode rows of them, T tokens, H query heads, K key/value heads, G = H / K, D head size, P pages of
the widest row, W pages of the widest decode row of this step, L layers.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from textwrap import shorten
from typing import Final, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from overlap.cache.pages import PAGE, Ints

_log: Final = logging.getLogger("overlap")


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionRows:
    """What a step's attention must know of its rows: decode rows first, then prompt chunks, as in StepPlan.

    Columns named as host are numpy int32 and may be upper bounds for decode rows; `seq_lens` is exact.
    """

    num_decode: int
    width: int = 1
    """Positions of each decode row in this step, the last ones that `seq_lens` counts. With more than one, `seq_lens`
    may go past the pages of `page_table`: what such positions attend to is of no use, and does no harm."""
    strips: bool = False
    """Whether decode rows may be parts of one text: then what a row reads may be written in this very step, in front of
    its own positions, too."""
    seq_lens: Tensor
    """int32 [R] on the device: tokens of the row in KV, this step's included."""
    page_table: Tensor
    """int32 [R, P] on the device; entries past the length are arbitrary but valid page ids."""
    starts: Ints
    """Host [R]: the position of each row's first token in this step."""
    counts: Ints
    """Host [R]: tokens of each row in this step, `width` for a decode row."""
    chunk_pages: Ints
    """Host: page ids of the chunk rows, row after row, ceil((start + count) / PAGE) of them each."""
    sms: int = 0
    """How many SMs the step runs on, for kernels that size themselves by that; 0 for all of the device."""


class Attention(Protocol):
    """Attention of one lane: bound to the KV memory, planned once a step, asked once a layer."""

    name: str
    captures_decode: bool
    """Whether decode rows read lengths and pages from the device alone, so that a graph of them can be replayed."""

    def plan(self, rows: AttentionRows) -> None:
        """Prepare for the rows of the next step. Enqueues only, never waits for the device."""

    def attend(self, layer: int, q_THD: Tensor, out: Tensor | None = None) -> Tensor:
        """Return softmax(q k / sqrt(D)) v of the planned rows, [T, H * D]; this step's k and v are in KV already.

        With `out`, contiguous and of that shape, the result is written there.
        """


@dataclass(frozen=True, slots=True)
class _Decode:
    """What all layers of a step share for its decode rows."""

    num_rows: int
    width: int
    index_LN: Tensor
    """int64 [L, 2, N * W]: which [PAGE, K, D] block of KV to gather, for keys and for values."""
    keys: Tensor
    """[N * W, PAGE, K, D] where each layer's keys are gathered to; `values` likewise."""
    values: Tensor
    keys_NKTD: Tensor
    values_NKTD: Tensor
    mask: Tensor | None
    """Additive, [N, 1, G, W * PAGE] (with J positions a row J * G); None if no key has to be hidden."""


@dataclass(frozen=True, slots=True)
class _Chunk:
    """What all layers of a step share for one prompt chunk."""

    tokens: slice
    length: int
    index_L2P: Tensor
    mask: Tensor | None
    """bool [count, length]; None for a chunk that starts its prompt, which is plainly causal."""


class TorchAttention:
    """Attention in plain torch: the reference, the CPU's attention, and the way out on CUDA.

    Decode rows run together: their pages are gathered into one buffer, and the G query heads of a key head ride as
    G queries (measured: half the time of `enable_gqa` and of bmm at every size tried). Each chunk runs alone.
    """

    name = "torch"
    captures_decode = False  # the host's bounds say how many pages are gathered

    def __init__(self, kv: Tensor, num_heads: int) -> None:
        """`kv` is [pages, layers, 2, PAGE, K, D], contiguous; `num_heads` is a multiple of K."""
        self._blocks = kv.view(-1, *kv.shape[3:])
        self._num_layers = kv.shape[1]
        self._num_heads = num_heads
        self._num_kv_heads, self._head_dim = kv.shape[4], kv.shape[5]
        self._layers_L1 = torch.arange(self._num_layers, device=kv.device)[:, None, None] * 2
        self._sides_12 = torch.arange(2, device=kv.device)[None, :, None]
        self._gathered = kv.new_empty(0)
        self._decode: _Decode | None = None
        self._chunks: list[_Chunk] = []

    def plan(self, rows: AttentionRows) -> None:
        """Find the blocks to gather and the keys to hide, for all layers at once."""
        num_decode, num_rows = rows.num_decode, len(rows.counts)
        self._decode = self._plan_decode(rows) if num_decode else None
        self._chunks = []
        first = num_decode * rows.width
        for row in range(num_decode, num_rows):
            start, count = int(rows.starts[row]), int(rows.counts[row])
            length = start + count
            mask = None
            if start:
                keys = torch.arange(length, device=rows.page_table.device)
                mask = keys[None, :] <= keys[start:, None]
            index = self._index(rows.page_table[row, : -(-length // PAGE)])
            self._chunks.append(_Chunk(slice(first, first + count), length, index, mask))
            first += count

    def _plan_decode(self, rows: AttentionRows) -> _Decode:
        num_rows, group = rows.num_decode, self._num_heads // self._num_kv_heads
        seq_lens = rows.seq_lens[:num_rows]
        if seq_lens.is_cuda:  # bounds will do: the mask comes from the device
            lengths = [int((rows.starts[:num_rows] + rows.counts[:num_rows]).max()), 0]
        else:
            lengths = seq_lens.tolist()
        longest = min(max(lengths), rows.page_table.shape[1] * PAGE)
        width = -(-longest // PAGE)
        index = self._index(rows.page_table[:num_rows, :width].reshape(-1))
        size = num_rows * width * PAGE * self._num_kv_heads * self._head_dim
        if len(self._gathered) < 2 * size:  # grows by doubling; fresh memory for each layer would be page faults
            self._gathered = self._gathered.new_empty(4 * size)
        shape = (num_rows * width, PAGE, self._num_kv_heads, self._head_dim)
        keys, values = self._gathered[:size].view(shape), self._gathered[size : 2 * size].view(shape)
        keys_NKTD, values_NKTD = (
            side.view(num_rows, width * PAGE, self._num_kv_heads, self._head_dim)[:, :longest].transpose(1, 2)
            for side in (keys, values)
        )
        mask = None
        if rows.width > 1:
            keys_L = torch.arange(longest, device=seq_lens.device)
            ends_NJ = seq_lens[:, None] + torch.arange(1 - rows.width, 1, device=seq_lens.device)
            hidden = keys_L[None, None, :] >= ends_NJ[:, :, None]
            blank = torch.zeros((num_rows, rows.width, longest), dtype=keys.dtype, device=keys.device)
            mask = blank.masked_fill_(hidden, -torch.inf).repeat_interleave(group, dim=1)[:, None]
        elif min(lengths) < longest:
            hidden = torch.arange(longest, device=seq_lens.device)[None, :] >= seq_lens[:, None]
            blank = torch.zeros((num_rows, longest), dtype=keys.dtype, device=keys.device)
            mask = blank.masked_fill_(hidden, -torch.inf)[:, None, None, :].expand(-1, 1, group, -1)
        return _Decode(num_rows, rows.width, index, keys, values, keys_NKTD, values_NKTD, mask)

    def _index(self, pages: Tensor) -> Tensor:
        """Return int64 [L, 2, pages]: the rows of `_blocks` that hold these pages' keys and values in each layer."""
        return pages.long()[None, None, :] * (2 * self._num_layers) + self._layers_L1 + self._sides_12

    def attend(self, layer: int, q_THD: Tensor, out: Tensor | None = None) -> Tensor:
        """Return [T, H * D]."""
        result = self._attend(layer, q_THD)
        return result if out is None else out.copy_(result)

    def _attend(self, layer: int, q_THD: Tensor) -> Tensor:
        decode = self._decode
        if decode is None:
            parts = []
        else:
            num_rows, width = decode.num_rows, decode.width
            if width == 1:
                q_NKGD = q_THD[:num_rows].view(num_rows, self._num_kv_heads, -1, self._head_dim)
            else:  # the positions of a row ride as more queries of its key heads
                q_NKGD = q_THD[: num_rows * width].view(num_rows, width, self._num_kv_heads, -1, self._head_dim)
                q_NKGD = q_NKGD.transpose(1, 2).reshape(num_rows, self._num_kv_heads, -1, self._head_dim)
            index_2N = decode.index_LN[layer]
            torch.index_select(self._blocks, 0, index_2N[0], out=decode.keys)
            torch.index_select(self._blocks, 0, index_2N[1], out=decode.values)
            out = F.scaled_dot_product_attention(q_NKGD, decode.keys_NKTD, decode.values_NKTD, attn_mask=decode.mask)
            if width > 1:
                out = out.view(num_rows, self._num_kv_heads, width, -1, self._head_dim).transpose(1, 2)
            parts = [out.reshape(num_rows * width, -1)]
        for chunk in self._chunks:
            parts.append(self._attend_chunk(layer, q_THD[chunk.tokens], chunk))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _attend_chunk(self, layer: int, q_THD: Tensor, chunk: _Chunk) -> Tensor:
        count, group = q_THD.shape[0], self._num_heads // self._num_kv_heads
        keys_KGTD, values_KGTD = (
            self._blocks.index_select(0, index)
            .view(-1, self._num_kv_heads, self._head_dim)[: chunk.length]
            .transpose(0, 1)[:, None]
            .expand(-1, group, -1, -1)
            for index in chunk.index_L2P[layer]
        )
        q_KGTD = q_THD.view(count, self._num_kv_heads, group, -1).permute(1, 2, 0, 3)
        out = F.scaled_dot_product_attention(
            q_KGTD, keys_KGTD, values_KGTD, attn_mask=chunk.mask, is_causal=chunk.mask is None
        )
        return out.permute(2, 0, 1, 3).reshape(count, -1)


def choose_attention(
    kv: Tensor, num_heads: int, *, max_pages_per_row: int, width: int = 1, max_rows: int = 256
) -> tuple[Attention, str]:
    """Return the fastest attention that this KV memory allows, warmed up, and why it was chosen.

    `kv` is [pages, layers, 2, PAGE, K, D], contiguous; H is a multiple of K; `width` is the most positions of a decode
    row, `max_rows` the most decode rows. Never raises for want of a kernel: plain torch runs everywhere.
    """
    unfit = _why_not_flashinfer(kv, num_heads)
    if unfit is None:
        try:
            from overlap.ops.attention_flashinfer import FlashInferAttention

            fast = FlashInferAttention(kv, num_heads, max_pages_per_row, width=width, max_rows=max_rows)
        except ImportError as missing:
            unfit = f"FlashInfer is not there ({missing}); install overlap[cuda] for faster attention"
        except Exception as failure:  # whatever a build or a load raises: the engine still runs
            unfit = f"FlashInfer has no kernel for this model here ({type(failure).__name__}: {failure})"
        else:
            return fast, "the fastest known on this device"
    return TorchAttention(kv, num_heads), unfit


def fallbacks_of(device: torch.device, attention: Attention, why: str, whose: str = "attention") -> dict[str, int]:
    """Return why attention is slower than it could be on a device, if it is, and warn of that: once an engine."""
    if device.type != "cuda" or not isinstance(attention, TorchAttention):
        return {}
    reason = shorten(f"{whose}: {attention.name}, since {why}", 200, placeholder=" ...")  # a build may say pages
    _log.warning("slower than it could be: %s", reason)
    return {reason: 1}


def _why_not_flashinfer(kv: Tensor, num_heads: int) -> str | None:
    group, head_dim = num_heads // kv.shape[4], kv.shape[5]
    if not kv.is_cuda:
        return "the only kind for this device"
    if kv.dtype not in (torch.bfloat16, torch.float16):
        return f"FlashInfer takes bfloat16 and float16, not {str(kv.dtype).removeprefix('torch.')}"
    capability = torch.cuda.get_device_capability(kv.device)
    if capability[0] < 8:
        return f"FlashInfer needs compute capability 8 or newer, and this device has {capability[0]}.{capability[1]}"
    if head_dim not in (64, 128, 256):
        return f"FlashInfer takes head sizes 64, 128 and 256, not {head_dim}"
    if group > 64:
        return f"the decode kernel takes up to 64 query heads for each key head, not {group}"
    return None
