"""Attention by FlashInfer: XQA for decode rows, paged prefill for prompt chunks. Imported only on CUDA.

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

SEMAPHORES: Final = 8 << 20
"""Bytes at the head of XQA's workspace that must start as zeros; XQA leaves them zero."""
_WRAPPERS: Final = 2


class FlashInferAttention:
    """Attention of one lane on CUDA. Its workspaces must not be shared with a lane that may run at the same time."""

    captures_decode = True

    def __init__(
        self,
        kv: Tensor,
        num_heads: int,
        max_pages_per_row: int,
        *,
        workspace_bytes: int = 128 << 20,
    ) -> None:
        """Load the kernels (building them if nvcc is there and they are not), and run each once.

        `kv` is [pages, layers, 2, PAGE, K, D] in bfloat16 or float16. `workspace_bytes` is the size of the scratch
        memory of decode, and again of prefill. Raises whatever FlashInfer raises if a kernel can not be had.
        """
        self._device = kv.device
        self._dtype = kv.dtype
        self._num_heads = num_heads
        self._num_kv_heads, self._head_dim = kv.shape[4], kv.shape[5]
        self._keys = [kv[:, layer, 0] for layer in range(kv.shape[1])]
        self._values = [kv[:, layer, 1] for layer in range(kv.shape[1])]
        self._all_sms = self._sms = torch.cuda.get_device_properties(kv.device).multi_processor_count
        self._semaphores = torch.zeros(SEMAPHORES, dtype=torch.uint8, device=kv.device)
        self._scratch = torch.empty(workspace_bytes, dtype=torch.uint8, device=kv.device)
        backend = self._prefill_backend()
        self.name = f"flashinfer (xqa, {backend})"
        prefill_scratch = torch.empty(workspace_bytes, dtype=torch.uint8, device=kv.device)
        self._wrappers = [
            BatchPrefillWithPagedKVCacheWrapper(prefill_scratch, "NHD", backend=backend) for _ in range(_WRAPPERS)
        ]
        self._turn = 0
        self._prefill: Any = None
        self._num_decode = 0
        self._seq_lens = self._page_table = torch.empty(0, dtype=torch.int32, device=kv.device)
        self._warm_up(max_pages_per_row)

    def plan(self, rows: AttentionRows) -> None:
        """Keep the decode rows' columns, and plan the chunks from what the host knows."""
        num_decode = rows.num_decode
        self._sms = rows.sms or self._all_sms
        self._num_decode = num_decode * rows.width
        if num_decode and rows.width > 1:  # each position as a row of its own: XQA reads the row's pages once for each
            within_J = torch.arange(1 - rows.width, 1, dtype=torch.int32, device=self._device)
            most = rows.page_table.shape[1] * PAGE
            self._seq_lens = (rows.seq_lens[:num_decode, None] + within_J).clamp_(max=most).view(-1, 1)
            self._page_table = rows.page_table[:num_decode].repeat_interleave(rows.width, dim=0)
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
        self._prefill.plan(
            qo_indptr=_pinned(_offsets(counts)),
            paged_kv_indptr=_pinned(_offsets(-(-lengths // PAGE))),
            paged_kv_indices=_pinned(rows.chunk_pages),
            paged_kv_last_page_len=_pinned((lengths - 1) % PAGE + 1),
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
        if num_decode:
            xqa(
                q_THD[:num_decode, None],
                keys,
                values,
                self._page_table,
                self._seq_lens,
                out_THD[:num_decode, None],
                self._scratch,
                self._semaphores,
                self._num_kv_heads,
                PAGE,
                sm_count=self._sms,
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


def _pinned(column: Ints) -> Tensor:
    """Return a pinned copy. torch's caching allocator gives its memory out again only when copies from it are done."""
    return torch.from_numpy(np.ascontiguousarray(column)).pin_memory()
