"""Attention by FlashInfer: XQA for decode rows, paged prefill for prompt chunks. Imported only on CUDA.

Many decode rows, and those that verify drafts, are a kernel of our own (`ops.decode_triton`): see `MANY_PAIRS`.

XQA reads lengths and page tables from the device, so decode needs no plan. Prefill is planned from lengths that the
host knows, so its plan copies to the device but never waits for it. Two prefill wrappers take turns, since a plan
writes to the wrapper's pinned workspace, which the copy of the step before may still be reading (mini-sglang#103).

Legend: T tokens, N decode rows, H query heads, K key/value heads, D head size.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import torch
from flashinfer import BatchPrefillWithPagedKVCacheWrapper
from flashinfer.jit import gen_batch_prefill_module
from flashinfer.xqa import xqa
from torch import Tensor

from overlap.cache.pages import PAGE, Ints
from overlap.ops.attention import AttentionRows
from overlap.ops.decode_triton import DecodeKernel
from overlap.ops.host_memory import host_zeros

SEMAPHORES: Final = 8 << 20
"""Bytes at the head of XQA's workspace that must start as zeros; XQA leaves them zero."""
_WRAPPERS: Final = 2
MANY_PAIRS: Final = 512
"""Rows times key heads from which on our own kernel is the faster one (`python bench/attention.py`)."""
MANY_VERIFIES: Final = 16
"""The same, of rows that verify drafts: rows."""
MOST_WIDE: Final = 8
"""Positions of a row that are tried in one XQA row: past it kernels are rarely built, and building takes minutes."""


class FlashInferAttention:
    """Attention of one lane on CUDA. Its workspaces must not be shared with a lane that may run at the same time."""

    captures_decode = True

    def __init__(
        self,
        kv: Tensor,
        num_heads: int,
        max_pages_per_row: int,
        *,
        width: int = 1,
        workspace_bytes: int = 128 << 20,
        many_pairs: int = MANY_PAIRS,
        max_rows: int = 256,
    ) -> None:
        """Load the kernels (building them if nvcc is there and they are not), and run each once.

        `kv` is [pages, layers, 2, PAGE, K, D] in bfloat16 or float16. `workspace_bytes` is the size of the scratch
        memory of decode, and again of prefill. `width` is the most positions of a decode row, for which a kernel is
        loaded, too; where none can be had, our own runs them. From `many_pairs` rows times key heads on our own kernel
        decodes, and up to `max_rows` rows it verifies drafts. Raises whatever FlashInfer raises if a kernel can not be
        had.
        """
        self._device = kv.device
        self._dtype = kv.dtype
        self._num_heads = num_heads
        self._num_kv_heads, self._head_dim = kv.shape[4], kv.shape[5]
        self._keys = [kv[:, layer, 0] for layer in range(kv.shape[1])]
        self._values = [kv[:, layer, 1] for layer in range(kv.shape[1])]
        self._all_sms = self._sms = torch.cuda.get_device_properties(kv.device).multi_processor_count
        self._semaphores = torch.zeros(SEMAPHORES, dtype=torch.uint8, device=kv.device)
        self._many_pairs = many_pairs
        self._own = DecodeKernel(kv, num_heads, max_rows, width)
        self._uses_own = False
        self._width = 1
        self._scratch = torch.empty(workspace_bytes, dtype=torch.uint8, device=kv.device)
        backend = self._prefill_backend()
        many = -(-many_pairs // self._num_kv_heads)
        self.name = f"flashinfer (xqa, {backend}; decode rows from {many} on and most verifies by a kernel of our own)"
        prefill_scratch = torch.empty(workspace_bytes, dtype=torch.uint8, device=kv.device)
        self._wrappers = [
            BatchPrefillWithPagedKVCacheWrapper(prefill_scratch, "NHD", backend=backend) for _ in range(_WRAPPERS)
        ]
        self._columns = [_Columns(kv.device) for _ in range(_WRAPPERS)]
        self._turn = 0
        self._prefill: Any = None
        self._num_decode = 0
        self._wide = 1  # positions of a row in one XQA row: 1, or the width of the step
        self._loaded_width = 1
        self._masks: dict[tuple[int, int], Tensor] = {}
        self._seq_lens = self._page_table = torch.empty(0, dtype=torch.int32, device=kv.device)
        self._warm_up(max_pages_per_row)
        if 1 < width <= MOST_WIDE:
            self._load_wide(max_pages_per_row, width)

    def plan(self, rows: AttentionRows) -> None:
        """Keep the decode rows' columns, and plan the chunks from what the host knows."""
        num_decode, width = rows.num_decode, rows.width
        self._sms = rows.sms or self._all_sms
        self._num_decode, self._width = num_decode * width, width
        wide = width > 1 and width == self._loaded_width
        if width > 1:
            many = not wide or num_decode >= MANY_VERIFIES
        else:
            many = num_decode * self._num_kv_heads >= self._many_pairs
        self._uses_own = many and self._own.takes(num_decode, width)
        self._wide = width if wide and not self._uses_own else 1
        if num_decode and width > 1 and not self._uses_own and not wide:
            # each position as a row of its own: XQA reads the row's pages once for each
            within_J = torch.arange(1 - width, 1, dtype=torch.int32, device=self._device)
            most = rows.page_table.shape[1] * PAGE
            self._seq_lens = (rows.seq_lens[:num_decode, None] + within_J).clamp_(max=most).view(-1, 1)
            self._page_table = rows.page_table[:num_decode].repeat_interleave(width, dim=0)
        elif num_decode:
            self._seq_lens = rows.seq_lens[:num_decode].view(num_decode, 1)
            self._page_table = rows.page_table[:num_decode]
        self._prefill = None
        if num_decode == len(rows.counts):
            return
        counts = rows.counts[num_decode:]
        lengths = rows.starts[num_decode:] + counts
        self._turn = (self._turn + 1) % _WRAPPERS
        self._prefill = self._wrappers[self._turn]
        pinned = self._columns[self._turn].put(
            _offsets(counts), _offsets(-(-lengths // PAGE)), rows.chunk_pages, (lengths - 1) % PAGE + 1
        )
        self._prefill.plan(
            qo_indptr=pinned[0],
            paged_kv_indptr=pinned[1],
            paged_kv_indices=pinned[2],
            paged_kv_last_page_len=pinned[3],
            num_qo_heads=self._num_heads,
            num_kv_heads=self._num_kv_heads,
            head_dim_qk=self._head_dim,
            page_size=PAGE,
            causal=True,
            q_data_type=self._dtype,
            kv_data_type=self._dtype,
            non_blocking=True,
        )

    def attend(self, layer: int, q_THD: Tensor, out: Tensor | None = None) -> Tensor:
        """Return [T, H * D]."""
        tokens, num_decode = q_THD.shape[0], self._num_decode
        keys, values = self._keys[layer], self._values[layer]
        shape = (tokens, self._num_heads, self._head_dim)
        out_THD = torch.empty(shape, dtype=self._dtype, device=self._device) if out is None else out.view(shape)
        if num_decode and self._uses_own:
            lengths, q_own = self._seq_lens.view(-1), q_THD[:num_decode]
            self._own.attend(layer, q_own, self._page_table, lengths, out_THD[:num_decode], self._width)
        elif num_decode:
            wide = self._wide
            num_rows = num_decode // wide
            # [rows, beams, positions, heads, head size] with a mask, and no dimension for positions without one
            several = (num_rows, 1, wide) if wide > 1 else (num_rows, 1)
            xqa(
                q_THD[:num_decode].view(*several, *shape[1:]),
                keys,
                values,
                self._page_table,
                self._seq_lens,
                out_THD[:num_decode].view(*several, *shape[1:]),
                self._scratch,
                self._semaphores,
                self._num_kv_heads,
                PAGE,
                sm_count=self._sms,
                q_seq_len=wide,
                mask=self._mask(num_rows, wide) if wide > 1 else None,
            )
        if self._prefill is not None:
            self._prefill.run(q_THD[num_decode:], (keys, values), out=out_THD[num_decode:])
        return out_THD.view(tokens, -1)

    def _prefill_backend(self) -> str:
        """Return "fa3" where it is the faster and is built already (building it takes ten minutes), else "fa2"."""
        if self._head_dim != 128 or torch.cuda.get_device_capability(self._device)[0] != 9:
            return "fa2"
        kinds = (self._dtype, self._dtype, self._dtype, torch.int32, self._head_dim, self._head_dim)
        module = gen_batch_prefill_module("fa3", *kinds, 0, False, False, False)
        return "fa3" if module.is_compiled else "fa2"

    def _mask(self, num_rows: int, width: int) -> Tensor:
        """Return which of its row's positions each position sees, packed: itself and those in front of it.

        Made by kernels, at the first step of a size, and kept: graphs hold its address.
        """
        size = 1 << (num_rows - 1).bit_length()
        mask = self._masks.get((size, width))
        if mask is None:
            seen_J = (2 << torch.arange(width, dtype=torch.int32, device=self._device)) - 1
            mask = seen_J[None, :].expand(size, -1).contiguous().view(torch.uint16).view(size, width, 2)
            self._masks[size, width] = mask
        return mask[:num_rows]

    def _load_wide(self, max_pages_per_row: int, width: int) -> None:
        """Load the kernel for rows of `width` positions and run it once; without it there is a slower way."""
        self._loaded_width = width
        rows = AttentionRows(
            num_decode=1,
            width=width,
            seq_lens=torch.full((1,), width, dtype=torch.int32, device=self._device),
            page_table=torch.zeros((1, max_pages_per_row), dtype=torch.int32, device=self._device),
            starts=np.zeros(1, dtype=np.int32),
            counts=np.full(1, width, dtype=np.int32),
            chunk_pages=np.empty(0, dtype=np.int32),
        )
        q_THD = torch.zeros((width, self._num_heads, self._head_dim), dtype=self._dtype, device=self._device)
        try:
            self.plan(rows)
            self.attend(0, q_THD)
            self.name = f"{self.name}, {width} positions a row"
        except Exception as failure:  # whatever a build or a load raises: the engine still runs
            self._loaded_width = 1
            self.name = f"{self.name}, no XQA of {width} positions ({type(failure).__name__})"

    def _warm_up(self, max_pages_per_row: int) -> None:
        """Run one mixed step over page 0, so that no load, build or cached table comes in the middle of a step."""
        table = torch.zeros((2, max_pages_per_row), dtype=torch.int32, device=self._device)
        ones = np.ones(2, dtype=np.int32)
        for _ in range(_WRAPPERS):
            rows = AttentionRows(
                num_decode=1,
                seq_lens=torch.ones(2, dtype=torch.int32, device=self._device),
                page_table=table,
                starts=np.zeros(2, dtype=np.int32),
                counts=ones,
                chunk_pages=np.zeros(1, dtype=np.int32),
            )
            self.plan(rows)
            self.attend(0, torch.zeros((2, self._num_heads, self._head_dim), dtype=self._dtype, device=self._device))


def _offsets(counts: Ints) -> Ints:
    out = np.zeros(len(counts) + 1, dtype=np.int32)
    np.cumsum(counts, out=out[1:])
    return out


class _Columns:
    """Pinned memory for the columns of one wrapper's plan, written again two steps later: then that has landed."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._held = torch.empty(0, dtype=torch.int32)

    def put(self, *columns: Ints) -> list[Tensor]:
        """Return the columns as int32 in pinned memory."""
        total = sum(map(len, columns))
        if total > len(self._held):
            self._held = host_zeros((max(1024, 1 << (total - 1).bit_length()),), self._device)
        words, parts, start = self._held.numpy(), [], 0
        for column in columns:
            words[start : start + len(column)] = column
            parts.append(self._held[start : start + len(column)])
            start += len(column)
        return parts
