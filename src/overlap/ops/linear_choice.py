"""Which kernel multiplies some rows by a matrix: a table of what was measured, and a guess where rows are few.

`python bench/in_step.py` measures and prints lines for `MEASURED`, in a step, where kernels wait for each other; most
are still of `python bench/kernels.py`, which times each alone. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Final, Literal, TypeAlias

FEW_ROWS: Final = 16
"""With more rows than this the library's matrix product is taken, but for what was measured."""
MAX_ROWS: Final = 256
"""With more rows than this it always is."""
Op: TypeAlias = Literal["plain", "add", "norm", "rope", "norm_rope", "gated", "norm_gated"]
"""What is done around the product: nothing; the residual added to it; the RMS norm before it; rotation and write of
keys and values after it; norm and rotation; SiLU and product of its two halves; norm and SiLU."""


@dataclass(frozen=True, slots=True)
class Tiles:
    """How a kernel cuts a matrix."""

    kernel: Literal["gemv", "split", "dot", "blocks"]
    """"gemv" multiplies in float32 registers, "split" on the tensor cores, each warp a part of the inputs, "dot" there,
    too, over large weights (and knows no norm and no rotation), "blocks" there for more rows. "gemv" and "dot" are for
    few rows."""
    block_o: int
    """Rows of the weight that a program owns."""
    block_i: int
    """Inputs that it takes at a time."""
    warps: int
    stages: int = 1
    """Tiles in flight (dot and blocks; the others keep one ahead, in registers)."""
    block_t: int = 16
    """Rows of x that a program owns (split and blocks; the others own all)."""

    def blocks(self, lines: int) -> int:
        """Return how many blocks a weight of so many rows is cut into."""
        return -(-lines // self.block_o)

    def program_rows(self, rows: int) -> int:
        """Return how many rows of x a program owns, of so many in all."""
        return self.block_t if self.kernel in ("split", "blocks") else bucket(rows)

    def owns_heads(self, head_dim: int) -> bool:
        """Whether a program has a whole head, so that it can norm one."""
        return self.kernel == "blocks" and self.block_o == head_dim


def bucket(rows: int) -> int:
    """Return the power of two up to which numbers of rows share a choice: 1, 2, 4, ..., 256."""
    return 1 << (rows - 1).bit_length()


def choose(op: Op, outputs: int, inputs: int, rows: int) -> Tiles | None:
    """Return the kernel for [rows, inputs] times a weight of `outputs` results, or None for the library's.

    `outputs` counts what comes out: a gated matrix has twice as many rows. None for a norm means: the norm in front, by
    a kernel of its own or the product there (`ops.fused.Ahead`), and then whatever is best without it; for a rotation,
    the same.
    """
    if not 1 <= rows <= MAX_ROWS or inputs % 8:
        return None
    key = (op, outputs, inputs, bucket(rows))
    if key in MEASURED:
        return MEASURED[key]
    return None if rows > FEW_ROWS or key in _LIBRARY else guess(*key)


@cache
def guess(op: Op, outputs: int, inputs: int, rows: int) -> Tiles | None:
    """Return what should be good: every SM busy, whole rows of small matrices in flight before the wait.

    For at most `FEW_ROWS`. Past four rows the norm is better a kernel of its own, which runs once for all programs.
    """
    weight_rows = 2 * outputs if "gated" in op else outputs
    large = weight_rows * inputs > LARGE
    if (rows > 4 and "norm" in op) or (large and (op == "rope" or (rows > 2 and "norm" in op))):
        return None
    block_i = 1024 if inputs <= 1024 or inputs > 2048 else 2048
    # Past two rows, x costs a program as much to read as its part of a large weight: the tensor cores share it more.
    if rows > 4 and not large:
        return Tiles("split", 8 if weight_rows // 16 < _PROGRAMS else 16, block_i, block_i // 256)
    if rows > 2 and large:
        block_o = next((block for block in (64, 32) if weight_rows // block >= _PROGRAMS), 16)
        return Tiles("dot", block_o, 128 if block_o > 16 or inputs < 1024 else 256, 4 if block_o > 16 else 2, 4)
    block_o = next((block for block in (8, 4) if block * rows <= 16 and weight_rows // block >= _PROGRAMS), 2)
    return Tiles("gemv", block_o, block_i, block_i // (256 if large else 512))


_PROGRAMS: Final = 132
"""At least so many programs: the SMs of an H100 and an H200."""

LARGE: Final = 1 << 23
"""Numbers in a weight from which on reading it takes longer than starting to."""

MEASURED: Final[dict[tuple[Op, int, int, int], Tiles | None]] = {
    ("rope", 960, 576, 1): Tiles("gemv", 8, 1024, 2, 1),
    ("norm_rope", 960, 576, 1): None,
    ("norm", 960, 576, 1): None,
    ("plain", 960, 576, 1): Tiles("gemv", 4, 1024, 4, 1),
    ("add", 576, 576, 1): Tiles("gemv", 2, 1024, 4, 1),
    ("norm_gated", 1536, 576, 1): None,
    ("gated", 1536, 576, 1): Tiles("gemv", 4, 1024, 2, 1),
    ("add", 576, 1536, 1): Tiles("gemv", 2, 2048, 8, 1),
    ("plain", 49152, 576, 1): Tiles("gemv", 4, 1024, 4, 1),
    ("norm_rope", 6144, 4096, 1): None,
    ("norm", 6144, 4096, 1): None,
    ("plain", 6144, 4096, 1): Tiles("gemv", 2, 2048, 8, 1),
    ("add", 4096, 4096, 1): Tiles("gemv", 2, 2048, 8, 1),
    ("norm_gated", 14336, 4096, 1): None,
    ("gated", 14336, 4096, 1): Tiles("gemv", 2, 2048, 8, 1),
    ("add", 4096, 14336, 1): Tiles("gemv", 8, 2048, 8, 1),
    ("plain", 128256, 4096, 1): Tiles("gemv", 4, 2048, 8, 1),
    ("norm", 4096, 1024, 1): Tiles("gemv", 4, 1024, 4, 1),
    ("plain", 4096, 1024, 1): Tiles("gemv", 8, 1024, 4, 1),
    ("add", 1024, 2048, 1): Tiles("gemv", 2, 2048, 4, 1),
    ("norm_gated", 3072, 1024, 1): Tiles("gemv", 8, 1024, 4, 1),
    ("gated", 3072, 1024, 1): Tiles("gemv", 4, 1024, 4, 1),
    ("add", 1024, 3072, 1): Tiles("gemv", 2, 2048, 8, 1),
    ("plain", 151936, 1024, 1): Tiles("gemv", 16, 1024, 2, 1),
    ("norm_rope", 4096, 1024, 1): None,
    ("rope", 960, 1152, 1): Tiles("gemv", 2, 2048, 4, 1),
    ("norm_rope", 960, 576, 2): Tiles("gemv", 2, 1024, 2, 1),
    ("norm", 960, 576, 2): None,
    ("plain", 960, 576, 2): Tiles("gemv", 4, 1024, 4, 1),
    ("add", 576, 576, 2): Tiles("gemv", 4, 1024, 4, 1),
    ("norm_gated", 1536, 576, 2): None,
    ("gated", 1536, 576, 2): Tiles("gemv", 4, 1024, 4, 1),
    ("add", 576, 1536, 2): Tiles("gemv", 2, 2048, 8, 1),
    ("plain", 49152, 576, 2): Tiles("gemv", 8, 1024, 4, 1),
    ("norm_rope", 6144, 4096, 2): None,
    ("norm", 6144, 4096, 2): None,
    ("plain", 6144, 4096, 2): Tiles("gemv", 8, 1024, 4, 1),
    ("add", 4096, 4096, 2): Tiles("gemv", 4, 2048, 8, 1),
    ("norm_gated", 14336, 4096, 2): None,
    ("gated", 14336, 4096, 2): Tiles("gemv", 4, 2048, 8, 1),
    ("add", 4096, 14336, 2): Tiles("gemv", 16, 1024, 4, 1),
    ("plain", 128256, 4096, 2): Tiles("gemv", 2, 2048, 8, 1),
    ("norm", 4096, 1024, 2): None,
    ("plain", 4096, 1024, 2): Tiles("gemv", 4, 1024, 4, 1),
    ("add", 1024, 2048, 2): Tiles("gemv", 2, 2048, 8, 1),
    ("norm_gated", 3072, 1024, 2): None,
    ("gated", 3072, 1024, 2): Tiles("gemv", 8, 1024, 4, 1),
    ("add", 1024, 3072, 2): Tiles("gemv", 2, 2048, 8, 1),
    ("plain", 151936, 1024, 2): Tiles("gemv", 2, 1024, 4, 1),
    ("norm_rope", 960, 576, 4): Tiles("gemv", 2, 1024, 4, 1),
    ("norm", 960, 576, 4): None,
    ("plain", 960, 576, 4): Tiles("split", 8, 1024, 4, 1, 16),
    ("add", 576, 576, 4): Tiles("split", 16, 1024, 4, 1, 16),
    ("norm_gated", 1536, 576, 4): None,
    ("gated", 1536, 576, 4): Tiles("split", 16, 1024, 4, 1, 16),
    ("add", 576, 1536, 4): Tiles("gemv", 2, 2048, 4, 1),
    ("plain", 49152, 576, 4): Tiles("dot", 128, 128, 8, 3),
    ("norm_rope", 6144, 4096, 4): None,
    ("norm", 6144, 4096, 4): None,
    ("plain", 6144, 4096, 4): Tiles("dot", 32, 256, 4, 4),
    ("add", 4096, 4096, 4): Tiles("gemv", 8, 1024, 4, 1),
    ("norm_gated", 14336, 4096, 4): None,
    ("gated", 14336, 4096, 4): None,
    ("add", 4096, 14336, 4): Tiles("gemv", 8, 1024, 4, 1),
    ("plain", 128256, 4096, 4): Tiles("gemv", 4, 1024, 4, 1),
    ("norm", 4096, 1024, 4): None,
    ("plain", 4096, 1024, 4): Tiles("gemv", 4, 1024, 4, 1),
    ("add", 1024, 2048, 4): Tiles("gemv", 2, 2048, 8, 1),
    ("norm_gated", 3072, 1024, 4): None,
    ("gated", 3072, 1024, 4): Tiles("dot", 16, 256, 2, 5),
    ("add", 1024, 3072, 4): Tiles("gemv", 4, 2048, 8, 1),
    ("plain", 151936, 1024, 4): Tiles("gemv", 8, 1024, 4, 1),
    ("norm_rope", 960, 576, 8): None,
    ("rope", 960, 576, 8): Tiles("split", 8, 1024, 4, 1, 16),
    ("norm", 960, 576, 8): None,
    ("plain", 960, 576, 8): Tiles("split", 8, 1024, 4, 1, 16),
    ("add", 576, 576, 8): Tiles("split", 8, 1024, 4, 1, 16),
    ("norm_gated", 1536, 576, 8): None,
    ("gated", 1536, 576, 8): Tiles("split", 16, 1024, 4, 1, 16),
    ("add", 576, 1536, 8): Tiles("split", 16, 2048, 8, 1, 16),
    ("plain", 49152, 576, 8): Tiles("dot", 128, 128, 8, 3),
    ("norm_rope", 6144, 4096, 8): None,
    ("norm", 6144, 4096, 8): None,
    ("plain", 6144, 4096, 8): None,
    ("add", 4096, 4096, 8): Tiles("dot", 16, 256, 2, 5),
    ("norm_gated", 14336, 4096, 8): None,
    ("gated", 14336, 4096, 8): Tiles("dot", 64, 128, 4, 4),
    ("add", 4096, 14336, 8): None,
    ("plain", 128256, 4096, 8): Tiles("dot", 128, 128, 8, 3),
    ("norm", 4096, 1024, 8): None,
    ("plain", 4096, 1024, 8): Tiles("split", 16, 1024, 4, 1, 16),
    ("add", 1024, 2048, 8): Tiles("split", 16, 2048, 8, 1, 16),
    ("norm_gated", 3072, 1024, 8): None,
    ("gated", 3072, 1024, 8): Tiles("split", 32, 1024, 4, 1, 16),
    ("add", 1024, 3072, 8): Tiles("split", 8, 2048, 8, 1, 16),
    ("plain", 151936, 1024, 8): Tiles("dot", 64, 128, 4, 4),
    ("rope", 6144, 4096, 8): Tiles("split", 16, 512, 4, 1, 16),
    ("norm_rope", 4096, 1024, 8): None,
    ("rope", 4096, 1024, 8): None,
    ("rope", 960, 1152, 8): Tiles("split", 16, 2048, 8, 1, 16),
    ("norm_gated", 640, 576, 8): Tiles("gemv", 2, 1024, 2, 1),
    ("add", 576, 640, 8): Tiles("split", 8, 1024, 4, 1, 16),
    ("norm_rope", 960, 576, 16): None,
    ("rope", 960, 576, 16): Tiles("split", 16, 1024, 4, 1, 16),
    ("norm", 960, 576, 16): None,
    ("plain", 960, 576, 16): Tiles("split", 32, 1024, 4, 1, 16),
    ("add", 576, 576, 16): Tiles("split", 16, 1024, 4, 1, 16),
    ("norm_gated", 1536, 576, 16): None,
    ("gated", 1536, 576, 16): Tiles("split", 16, 1024, 4, 1, 16),
    ("add", 576, 1536, 16): Tiles("split", 16, 2048, 8, 1, 16),
    ("plain", 49152, 576, 16): Tiles("dot", 64, 64, 4, 6),
    ("norm_rope", 6144, 4096, 16): None,
    ("norm", 6144, 4096, 16): None,
    ("plain", 6144, 4096, 16): Tiles("dot", 16, 256, 2, 5),
    ("add", 4096, 4096, 16): None,
    ("norm_gated", 14336, 4096, 16): None,
    ("gated", 14336, 4096, 16): Tiles("dot", 64, 128, 4, 4),
    ("add", 4096, 14336, 16): None,
    ("plain", 128256, 4096, 16): Tiles("dot", 64, 128, 4, 4),
    ("norm", 4096, 1024, 16): None,
    ("plain", 4096, 1024, 16): Tiles("dot", 16, 256, 2, 5),
    ("add", 1024, 2048, 16): Tiles("split", 16, 2048, 8, 1, 16),
    ("norm_gated", 3072, 1024, 16): None,
    ("gated", 3072, 1024, 16): Tiles("split", 16, 1024, 4, 1, 16),
    ("add", 1024, 3072, 16): Tiles("split", 8, 2048, 8, 1, 16),
    ("plain", 151936, 1024, 16): Tiles("dot", 64, 128, 4, 4),
    ("add", 1024, 2048, 32): Tiles("split", 16, 2048, 8, 1, 16),
    ("norm_gated", 3072, 1024, 32): None,
    ("gated", 3072, 1024, 32): Tiles("blocks", 64, 64, 4, 5, 64),
    ("plain", 151936, 1024, 32): Tiles("blocks", 64, 64, 4, 5, 64),
    ("norm_gated", 3072, 1024, 64): None,
    ("gated", 3072, 1024, 64): Tiles("blocks", 32, 128, 4, 4, 64),
    ("plain", 151936, 1024, 64): Tiles("blocks", 64, 64, 4, 5, 64),
    ("plain", 151936, 1024, 128): Tiles("blocks", 64, 64, 8, 4, 128),
    ("plain", 151936, 1024, 256): Tiles("blocks", 128, 64, 8, 4, 128),
    ("norm_rope", 960, 576, 32): None,
    ("rope", 960, 576, 32): Tiles("blocks", 16, 64, 4, 6, 64),
    ("norm", 960, 576, 32): None,
    ("plain", 960, 576, 32): Tiles("blocks", 32, 128, 4, 4, 16),
    ("add", 576, 576, 32): Tiles("blocks", 16, 64, 4, 6, 64),
    ("norm_gated", 1536, 576, 32): None,
    ("gated", 1536, 576, 32): Tiles("blocks", 64, 64, 4, 5, 64),
    ("add", 576, 1536, 32): Tiles("split", 16, 2048, 8, 1, 16),
    ("plain", 49152, 576, 32): Tiles("blocks", 128, 64, 4, 4, 32),
    ("norm_rope", 960, 576, 64): None,
    ("rope", 960, 576, 64): Tiles("blocks", 32, 64, 4, 6, 64),
    ("norm", 960, 576, 64): None,
    ("plain", 960, 576, 64): Tiles("blocks", 16, 64, 4, 6, 64),
    ("add", 576, 576, 64): Tiles("blocks", 16, 64, 4, 6, 64),
    ("norm_gated", 1536, 576, 64): None,
    ("gated", 1536, 576, 64): Tiles("blocks", 32, 64, 4, 6, 64),
    ("add", 576, 1536, 64): Tiles("split", 16, 2048, 8, 1, 32),
    ("plain", 49152, 576, 64): Tiles("blocks", 64, 64, 4, 5, 64),
    ("norm_rope", 4096, 1024, 64): None,
    ("rope", 4096, 1024, 64): None,
    ("norm", 4096, 1024, 64): None,
    ("plain", 4096, 1024, 64): None,
    ("add", 1024, 2048, 64): None,
    ("norm_rope", 960, 576, 128): None,
    ("rope", 960, 576, 128): Tiles("blocks", 32, 128, 4, 4, 64),
    ("norm", 960, 576, 128): None,
    ("plain", 960, 576, 128): None,
    ("add", 576, 576, 128): Tiles("blocks", 32, 64, 4, 6, 64),
    ("norm_gated", 1536, 576, 128): None,
    ("gated", 1536, 576, 128): Tiles("blocks", 32, 128, 4, 4, 64),
    ("add", 576, 1536, 128): None,
    ("plain", 49152, 576, 128): Tiles("blocks", 64, 64, 8, 4, 128),
    ("norm_rope", 960, 576, 256): None,
    ("rope", 960, 576, 256): Tiles("blocks", 64, 64, 4, 5, 64),
    ("norm", 960, 576, 256): None,
    ("plain", 960, 576, 256): None,
    ("add", 576, 576, 256): Tiles("blocks", 32, 64, 4, 6, 64),
    ("norm_gated", 1536, 576, 256): None,
    ("gated", 1536, 576, 256): Tiles("blocks", 64, 64, 4, 5, 64),
    ("add", 576, 1536, 256): Tiles("blocks", 32, 128, 4, 4, 64),
    ("plain", 49152, 576, 256): Tiles("blocks", 64, 64, 8, 4, 128),
}
"""(op, outputs, inputs, bucket of rows) -> the fastest found, None for the library. Lines of both benches."""

_LIBRARY: Final = frozenset(
    ("plain", outputs * (2 if op == "gated" else 1), inputs, rows)
    for (op, outputs, inputs, rows), tiles in MEASURED.items()
    if tiles is None and op in ("add", "gated")
)
"""Products whose fused op lost against the library's with separate kernels: then it is the library's that runs."""
