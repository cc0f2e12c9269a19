"""Programmatic dependent launch: what a Triton kernel must be given so that it starts while the one before it runs.

A kernel that is launched so may begin as soon as every block of the kernel before it has let it (most of ours do in
their first instruction). Until its own `gdc_wait` it may read only what no kernel writes, which is weights, and what is
said below. It must wait before its first read of anything else and before its first write. Every kernel of ours waits
in every block, so a kernel that has ended implies that all before it have, and the order of the stream is kept for what
comes behind. A kernel that may be the first of a graph is a plain one: what it waits for lies in front of the graph,
where it cannot be started early.

The kernels that write keys and values let the next one begin only behind their own wait. So when it begins, all in
front of *them* has ended, and it may read before its wait what they do not write. Attention does, since only they stand
in front of it: it asks for the lengths, the page table, and the keys of earlier steps.
"""

from __future__ import annotations

from functools import cache

import torch


def early(device: torch.device) -> dict[str, bool]:
    """Return the launch options (and the constexpr `PDL`) of a kernel on `device`: early where it can be."""
    if device.type == "cuda" and _has_early_launch(device.index or 0):
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}


@cache
def _has_early_launch(index: int) -> bool:
    return torch.cuda.get_device_capability(index) >= (9, 0)
