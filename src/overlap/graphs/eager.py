"""The eager driver: runs a program's pieces one after the other, and answers each joint as it comes."""

from __future__ import annotations

from collections.abc import Generator

from torch import Tensor

from overlap.models.program import Attend, Forward, Joint, Reduce
from overlap.ops.attention import Attention


def next_attend(forward: Forward, joint: Joint) -> Attend:
    """Return `joint`, or where it is a sum over ranks answer that and those behind it, until attention is next.

    What NCCL enqueues can be captured, so for a driver of one forward a sum is part of the piece.
    """
    while isinstance(joint, Reduce):
        joint = forward.send(joint.ranks.sum(joint.x_TC))
    return joint


def drive(forward: Forward, attention: Attention) -> Tensor:
    """Run `forward` to its end and return its hidden states [T, C]. A joint costs about 0.75 µs of host time."""
    try:
        joint = next(forward)
        while True:
            if isinstance(joint, Attend):
                joint = forward.send(attention.attend(joint.layer, joint.q_THD))
            else:
                joint = forward.send(joint.ranks.sum(joint.x_TC))
    except StopIteration as end:
        hidden: Tensor = end.value
        return hidden


def drive_in_blocks(forward: Forward, attention: Attention, block: int | None) -> Generator[None, None, Tensor]:
    """Run `forward` as `drive` does, pausing behind each `block` joints but the last; None for no pause."""
    if block is None:
        return drive(forward, attention)
    number = 0
    try:
        joint: Joint = next(forward)
        while True:
            attend = next_attend(forward, joint)
            if number and number % block == 0:
                yield
            joint = forward.send(attention.attend(attend.layer, attend.q_THD))
            number += 1
    except StopIteration as end:
        hidden: Tensor = end.value
        return hidden
