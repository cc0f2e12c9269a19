"""The gated SiLU of Llama's feed-forward.

Legend: T tokens, I intermediate size.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def silu_mul(gate_up_TX: Tensor) -> Tensor:
    """Return `silu(gate) * up`, [T, I], for `gate_up` [T, 2 * I] with the gate in its first half.

    The SiLU is rounded to the dtype before the product, as it is when written as two ops.
    """
    if gate_up_TX.is_cuda:
        from overlap.ops import activation_triton

        return activation_triton.silu_mul(gate_up_TX)
    gate_TI, up_TI = gate_up_TX.chunk(2, dim=-1)
    return F.silu(gate_TI).mul_(up_TI)
