"""Linear: y = x W^T + b, with the weight kept in whatever form is fastest on its device.

Legend: T tokens, I inputs, O outputs.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Final, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from overlap.ops.linear_choice import MAX_ROWS, Op, Tiles, choose

_PACKABLE: Final = (torch.float32, torch.bfloat16)
_SKINNY: Final = (torch.bfloat16, torch.float16)
_UNPADDED: Final = 16
"""Rows of a packed matrix up to which each number of them has a kernel of its own."""
_WHOLE_SUM: Final = 1024
"""In float32, longer rows are packed in parts of at most so many inputs. Past it, oneDNN cuts the sum in another way
for one row than for several (measured: torch 2.13, AVX-512), so that a row's bits would depend on the batch. Parts cost
10 to 30% of such a matrix's time (576 × 1536 and 2048 × 8192)."""


class Linear:
    """A matrix and an optional bias, made by `empty` (or `sharing`), filled by rows, then closed by `finish`.

    On the CPU `finish` reorders the weight for oneDNN and drops the plain one: half the time of `F.linear` at 1 to 16
    rows (measured, bfloat16 and float32, 2 cores). In float32, a packed row's bits do not depend on the other rows; in
    bfloat16 they can, past 1024 inputs (parts, as in float32, would round in between). It runs `padded_rows` of them,
    since oneDNN compiles and keeps a kernel for each number that it meets.
    """

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None, *, shared: bool = False) -> None:
        self.out_features, self.in_features = weight_OI.shape
        self._plain_OI: Tensor | None = weight_OI
        self._packed: tuple[Tensor, ...] = ()
        self._part = self.in_features
        self._bias_O = bias_O
        self._shared = shared
        self._device, self._dtype = weight_OI.device, weight_OI.dtype

    @classmethod
    def empty(
        cls, out_features: int, in_features: int, *, bias: bool, device: torch.device | str, dtype: torch.dtype
    ) -> Linear:
        """Return a Linear whose numbers are still to be written through `weight_rows` and `bias_rows`."""
        return cls(
            torch.empty(out_features, in_features, device=device, dtype=dtype),
            torch.empty(out_features, device=device, dtype=dtype) if bias else None,
        )

    @classmethod
    def sharing(cls, weight_OI: Tensor) -> Linear:
        """Return a Linear over a weight that somebody else keeps, too (a tied embedding): `finish` spares that one."""
        return cls(weight_OI, None, shared=True)

    def weight_rows(self, start: int, stop: int) -> Tensor:
        """Return rows of the weight, [stop - start, I], to be written. Only before `finish`."""
        if self._plain_OI is None:
            raise RuntimeError("the weight of this Linear was packed already; write it before `finish`")
        return self._plain_OI[start:stop]

    def bias_rows(self, start: int, stop: int) -> Tensor:
        """Return a part of the bias, [stop - start], to be written."""
        if self._bias_O is None:
            raise RuntimeError("this Linear has no bias")
        return self._bias_O[start:stop]

    def finish(self) -> Linear:
        """Bring the weight into its fastest form, and return self. Idempotent."""
        if self._plain_OI is not None and _packs(self._device, self._dtype):
            if self._dtype is torch.float32 and self.in_features > _WHOLE_SUM:
                num_parts = -(-self.in_features // _WHOLE_SUM)
                self._part = -(-self.in_features // (num_parts * 32)) * 32
            self._packed = tuple(
                torch.ops.mkldnn._reorder_linear_weight(part_OI.contiguous(), None)
                for part_OI in torch.split(self._plain_OI, self._part, dim=1)
            )
            self._plain_OI = None
        return self

    def __call__(self, x_TI: Tensor) -> Tensor:
        """Return [T, O] for x [T, I] of the weight's dtype."""
        if self._packed:
            rows = x_TI.shape[0]
            more = padded_rows(rows) - rows
            return self._by_packed(F.pad(x_TI, (0, 0, 0, more)))[:rows] if more else self._by_packed(x_TI)
        assert self._plain_OI is not None  # one of the two is always there
        tiles = self.tiles("plain", x_TI.shape[0])
        if tiles is not None and x_TI.stride(1) == 1:
            from overlap.ops import linear_triton

            return linear_triton.linear(x_TI, self._plain_OI, self._bias_O, tiles)
        return F.linear(x_TI, self._plain_OI, self._bias_O)

    def _by_packed(self, x_TI: Tensor) -> Tensor:
        if len(self._packed) == 1:
            y_TO: Tensor = torch.ops.mkldnn._linear_pointwise(x_TI, self._packed[0], self._bias_O, "none", [], "")
        else:
            parts = zip(torch.split(x_TI, self._part, dim=1), self._packed, strict=True)
            part_TI, packed = next(parts)
            y_TO = torch.ops.mkldnn._linear_pointwise(part_TI, packed, self._bias_O, "none", [], "")
            for part_TI, packed in parts:
                y_TO = torch.ops.mkldnn._linear_pointwise.binary(part_TI, y_TO, packed, None, "add")
        return y_TO

    def wide(self, x_TI: Tensor) -> Tensor:
        """Return the same in float32, [T, O]: rounded to the weight's dtype on the way only where a library does it."""
        tiles = self.tiles("plain", x_TI.shape[0])
        if tiles is not None and x_TI.stride(1) == 1:
            from overlap.ops import linear_triton

            return linear_triton.linear(x_TI, self.weight, self._bias_O, tiles, dtype=torch.float32)
        return self(x_TI).float()

    def tiles(self, op: Op, rows: int) -> Tiles | None:
        """Return how a kernel of ours does `op` around this product at so many rows, or None if none of ours should.

        Never one on the CPU, in float32, for more than 256 rows, or where Triton is missing.
        """
        if rows > MAX_ROWS or self._device.type != "cuda" or self._dtype not in _SKINNY or not _has_triton():
            return None
        outputs = self.out_features // 2 if "gated" in op else self.out_features
        return choose(op, outputs, self.in_features, rows)

    @property
    def weight(self) -> Tensor:
        """The weight [O, I] as it was written; RuntimeError if it was packed."""
        if self._plain_OI is None:
            raise RuntimeError("the weight of this Linear was packed; its plain form is gone")
        return self._plain_OI

    @property
    def packed(self) -> bool:
        """Whether the weight was packed, so that its plain form is gone."""
        return bool(self._packed)

    @property
    def bias(self) -> Tensor | None:
        """The bias [O], if there is one."""
        return self._bias_O

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weight, and of what is multiplied by it."""
        return self._dtype

    @property
    def kind(self) -> str:
        """What runs it: "onednn packed", "triton to 64 rows, then cublas", "cublas", or "plain" (`F.linear`)."""
        if self._packed:
            return "onednn packed"
        if self._device.type != "cuda":
            return "plain"
        ops: tuple[Op, ...] = get_args(Op)
        sizes = [1 << power for power in reversed(range(MAX_ROWS.bit_length()))]
        most = next((rows for rows in sizes if any(self.tiles(op, rows) is not None for op in ops)), None)
        return "cublas" if most is None else f"triton to {most} rows, then cublas"

    @property
    def num_bytes(self) -> int:
        """Bytes that this Linear keeps: nothing for a weight that is only shared."""
        elements = 0 if self._shared and not self._packed else self.out_features * self.in_features
        return (elements + (0 if self._bias_O is None else self.out_features)) * self._dtype.itemsize


def padded_rows(rows: int) -> int:
    """Return how many rows of a packed matrix are run for so many: up to 16 as they are, then an eighth more at most.

    For each number of rows oneDNN compiles a kernel, which takes 0.4 to 1.5 ms (measured), and keeps 0.4 MB of it in
    caches of 1,024 kernels. So a process grew by hundreds of MiB, and then went on growing by the holes that one kernel
    in place of another left. Of these numbers there are 78 up to 8,192 rows.
    """
    if rows <= _UNPADDED:
        return rows
    step = max(8, 1 << (rows - 1).bit_length() - 4)
    return -(-rows // step) * step


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def _packs(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this build of torch and this processor have oneDNN's packed matrices for the dtype."""
    if device.type != "cpu" or dtype not in _PACKABLE or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    ops = torch.ops.mkldnn
    if not all(hasattr(ops, name) for name in ("_reorder_linear_weight", "_linear_pointwise")):
        return False
    return dtype is torch.float32 or bool(ops._is_mkldnn_bf16_supported())
