"""Pieces: a forward as one graph between each two joints, with the joints answered in between.

Attention is planned on the host for every step, so it can not be part of a graph; all the rest is. While a forward is
recorded nothing runs, so the joints need no answer that is right: the model is sent the buffer in which the answer
will be. Two such buffers take turns, for attention may start to write while the piece before it still ends.

Launching them is calls of Python, one behind the other, beside readers who want the interpreter. torch gives it up in
each of its calls, if only to cut a tensor. So layers share the tensors that name the same memory, and what is cut, or
cut up by attention, is so once a step.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

import torch
from torch import Tensor

from overlap.graphs.capture import Graph, Place, Recorder
from overlap.graphs.eager import next_attend
from overlap.models.program import Batch, Forward, Program
from overlap.ops.attention import Attention


@dataclass(frozen=True, slots=True)
class Pieces:
    """A recorded forward of so many tokens."""

    graphs: tuple[Graph, ...]
    """One more than joints."""
    joints: tuple[tuple[int, Tensor, Tensor], ...]
    """(layer, queries [T, H, D], answer [T, H * D]) of each joint, few different ones; the queries are the pool's."""
    hidden_TC: Tensor
    """Where the hidden states come out; the pool's too, so theirs only until the next graph runs."""

    @property
    def num_tokens(self) -> int:
        """The bucket."""
        return self.hidden_TC.shape[0]

    def run(self, attention: Attention, num_tokens: int, block: int | None = None) -> Generator[None, None, Tensor]:
        """Enqueue a forward whose first `num_tokens` tokens are real; return their hidden states.

        Pauses behind each `block` joints but the last; None for no pause.
        """
        last = len(self.joints)
        cut: dict[int, Tensor] = {}

        def real(tensor: Tensor) -> Tensor:
            """Return its first `num_tokens` rows, the same object for the same tensor."""
            if num_tokens == len(tensor):
                return tensor
            if id(tensor) not in cut:
                cut[id(tensor)] = tensor[:num_tokens]
            return cut[id(tensor)]

        for number, (graph, (layer, q_THD, answer_TX)) in enumerate(zip(self.graphs[:last], self.joints, strict=True)):
            if block is not None and number and number % block == 0:
                yield
            graph.launch()
            attention.attend(layer, real(q_THD), real(answer_TX))
        self.graphs[last].launch()
        return self.hidden_TC[:num_tokens]

    def close(self) -> None:
        """Free the graphs."""
        for graph in self.graphs:
            graph.close()


def answer_buffers(program: Program, num_tokens: int, kv: Tensor) -> tuple[Tensor, Tensor]:
    """Return two buffers for answers, [num_tokens, H * D] each: zeros, so that padding is finite."""
    width = program.num_heads * program.head_dim
    buffers = torch.zeros((2, num_tokens, width), dtype=kv.dtype, device=kv.device)
    return buffers[0], buffers[1]


@torch.inference_mode()
def rehearse(forward: Forward, batch: Batch, answers: tuple[Tensor, Tensor]) -> None:
    """Run the pieces once with whatever the answers hold, so that every kernel is compiled and loaded.

    Writes no KV if the batch's kv_index is -1 throughout.
    """
    number = 0
    try:
        joint = next(forward)
        while True:
            next_attend(forward, joint)
            joint = forward.send(answers[number % 2][: len(batch.token_ids)])
            number += 1
    except StopIteration:
        return


@torch.inference_mode()
def record(forward: Forward, batch: Batch, answers: tuple[Tensor, Tensor], recorder: Recorder) -> Pieces:
    """Record a forward over `batch`, whose tensors must stay; nothing runs. Raises what capture raises."""
    graphs: list[Graph] = []
    joints: list[tuple[int, Place, int]] = []
    answers_TX = [answer[: len(batch.token_ids)] for answer in answers]
    try:
        with recorder.recording():
            recorder.begin()
            try:
                attend = next_attend(forward, next(forward))
                while True:
                    graphs.append(recorder.end())
                    turn = len(joints) % 2
                    joints.append((attend.layer, Place(attend.q_THD), turn))
                    del attend  # the queries' memory is to serve the next layers
                    recorder.begin()
                    attend = next_attend(forward, forward.send(answers_TX[turn]))
            except StopIteration as end:
                graphs.append(recorder.end())
                hidden = Place(end.value)
    except BaseException:
        for graph in graphs:
            graph.close()
        raise
    finally:
        forward.close()
    queries = {place: place.tensor() for place in dict.fromkeys(place for _, place, _ in joints)}
    return Pieces(
        graphs=tuple(graphs),
        joints=tuple((layer, queries[place], answers_TX[turn]) for layer, place, turn in joints),
        hidden_TC=hidden.tensor(),
    )
