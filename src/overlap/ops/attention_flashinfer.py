"""Attention on CUDA: decode rows by a kernel of our own, prompt chunks by FlashInfer's paged prefill.

The decode kernel (`ops.decode_triton`) reads lengths and page tables from the device, so it needs no plan. Prefill is
planned from lengths that the host knows, so its plan copies to the device but never waits for it. Two prefill wrappers
take turns, since a plan writes to the wrapper's pinned workspace, which the copy of the step before may still be
reading (mini-sglang#103).

Legend: T tokens, N decode rows, H query heads, K key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from flashinfer import BatchPrefillWithPagedKVCacheWrapper
from flashinfer.jit import gen_batch_prefill_module
from torch import Tensor

from overlap.cache.pages import PAGE, Ints
from overlap.ops.attention import AttentionRows
from overlap.ops.decode_triton import DecodeKernel
from overlap.ops.host_memory import host_zeros

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
        width: int = 1,
        workspace_bytes: int = 128 << 20,
        max_rows: int = 256,
    ) -> None:
        """Load the kernels (building them if nvcc is there and they are not), and run each once.

        `kv` is [pages, layers, 2, PAGE, K, D] in bfloat16 or float16. `workspace_bytes` is the size of the scratch
        memory of prefill. `width` is the most positions of a decode row, `max_rows` the most decode rows. Raises
        whatever FlashInfer or Triton raises if a kernel can not be had.
        """
        self._device = kv.device
        self._dtype = kv.dtype
        self._num_heads = num_heads
        self._num_kv_heads, self._head_dim = kv.shape[4], kv.shape[5]
        self._sides = [(kv[:, layer, 0], kv[:, layer, 1]) for layer in range(kv.shape[1])]
        self._decode = DecodeKernel(kv, num_heads, max_rows, width)
        self._num_decode = self._sms = 0
        self._width, self._strips = 1, False
        self._seq_lens = self._page_table = torch.empty(0, dtype=torch.int32, device=kv.device)
        backend = self._prefill_backend()
        self.name = f"decode rows by a kernel of our own, prompts by flashinfer {backend}"
        scratch = torch.empty(workspace_bytes, dtype=torch.uint8, device=kv.device)
        self._wrappers = [
            BatchPrefillWithPagedKVCacheWrapper(scratch, "NHD", backend=backend) for _ in range(_WRAPPERS)
        ]
        self._columns = [_Columns(kv.device) for _ in range(_WRAPPERS)]
        self._turn = 0
        self._prefill: Any = None
        self._compiled: Any = None
        self._parts: dict[tuple[int, int, int], _Parts] = {}  # of this plan's static buffers
        for each in dict.fromkeys((1, width)):
            self._warm_up(max_pages_per_row, each)
        if self._compiled is None:
            self.name += ", whose launches give up the interpreter"

    def plan(self, rows: AttentionRows) -> None:
        """Keep the decode rows' columns, and plan the chunks from what the host knows."""
        num_decode = rows.num_decode
        self._num_decode, self._width, self._sms = num_decode, rows.width, rows.sms
        self._strips = rows.strips
        self._seq_lens, self._page_table = rows.seq_lens[:num_decode], rows.page_table[:num_decode]
        self._prefill = None
        self._parts.clear()
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
        self._compiled = compiled_run(self._prefill)

    def attend(self, layer: int, q_THD: Tensor, out: Tensor | None = None) -> Tensor:
        """Return [T, H * D]."""
        if out is None:
            parts = self._cut(q_THD, torch.empty(q_THD.shape, dtype=self._dtype, device=self._device))
        else:
            place = q_THD.data_ptr(), out.data_ptr(), q_THD.shape[0]
            found = self._parts.get(place)
            parts = self._parts[place] = found or self._cut(q_THD, out)
        if self._num_decode:
            out_NHD = parts.decoded_NHD
            where = parts.q_NHD, self._page_table, self._seq_lens, out_NHD
            self._decode.attend(layer, *where, self._width, self._sms, strips=self._strips)
        if self._prefill is not None:
            with keeping_the_lock(self._compiled):
                self._prefill.run(parts.q_PHD, self._sides[layer], out=parts.read_PHD)
        return parts.out_TX

    def _cut(self, q_THD: Tensor, out: Tensor) -> _Parts:
        tokens, decoded = q_THD.shape[0], self._num_decode * self._width
        out_THD = out.view(tokens, self._num_heads, self._head_dim)
        return _Parts(
            q_THD[:decoded], out_THD[:decoded], q_THD[decoded:], out_THD[decoded:], out_THD.view(tokens, -1)
        )  # fmt: skip

    def _prefill_backend(self) -> str:
        """Return "fa3" where it is the faster and is built already (building it takes ten minutes), else "fa2"."""
        if self._head_dim != 128 or torch.cuda.get_device_capability(self._device)[0] != 9:
            return "fa2"
        kinds = (self._dtype, self._dtype, self._dtype, torch.int32, self._head_dim, self._head_dim)
        module = gen_batch_prefill_module("fa3", *kinds, 0, False, False, False)
        return "fa3" if module.is_compiled else "fa2"

    def _warm_up(self, max_pages_per_row: int, width: int) -> None:
        """Run mixed steps over page 0, so that nothing of FlashInfer's is loaded or built in the middle of a step.

        The decode kernel is compiled for one row; for other numbers it is when they first come, a few seconds each
        where Triton's cache has not got them.
        """
        tokens = width + 1
        for _ in range(_WRAPPERS):
            rows = AttentionRows(
                num_decode=1,
                width=width,
                seq_lens=torch.tensor([width, 1], dtype=torch.int32, device=self._device),
                page_table=torch.zeros((2, max_pages_per_row), dtype=torch.int32, device=self._device),
                starts=np.zeros(2, dtype=np.int32),
                counts=np.array([width, 1], dtype=np.int32),
                chunk_pages=np.zeros(1, dtype=np.int32),
            )
            self.plan(rows)
            q_THD = torch.zeros((tokens, self._num_heads, self._head_dim), dtype=self._dtype, device=self._device)
            self.attend(0, q_THD)


@dataclass(frozen=True, slots=True)
class _Parts:
    """Queries and answers of a step, cut into those of decode rows and those of prompt chunks (P tokens)."""

    q_NHD: Tensor
    decoded_NHD: Tensor
    q_PHD: Tensor
    read_PHD: Tensor
    out_TX: Tensor
    """All answers, [T, H * D]."""


def compiled_run(wrapper: Any) -> Any:
    """Return the compiled function behind a planned wrapper's `run`; None if FlashInfer keeps it in another place."""
    run = getattr(getattr(wrapper, "_cached_module", None), "paged_run", None)
    for cell in getattr(run, "__closure__", None) or ():
        with suppress(ValueError):  # a cell may be empty
            held = cell.cell_contents
            if type(held).__name__ == "Function" and hasattr(held, "release_gil"):
                return held
    return None


_GIVE_UP: Final[dict[int, bool]] = {}
"""Whether a function of FlashInfer's gave up the lock when it was first met here, by its identity."""


@contextmanager
def keeping_the_lock(function: Any) -> Iterator[None]:
    """Have a compiled function of FlashInfer's keep the interpreter's lock; None does nothing.

    It gives it up for the microseconds of a launch, and beside a thread that computes in Python waits for it afterwards
    for as long as a layer takes on the device. Set for the block alone, since the function is the process's.
    """
    if function is None:
        yield
        return
    gives_up = _GIVE_UP.setdefault(id(function), function.release_gil)  # another engine may be in here, too
    function.release_gil = False
    try:
        yield
    finally:
        function.release_gil = gives_up


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
