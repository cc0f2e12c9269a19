"""What a drafter is trained on: prompts, and the target's own answers to them, made with the engine.

A head learns to say what its target would say, so the texts of others would teach it the wrong thing.

Legend: A answers.
"""

from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from overlap.errors import ConfigError
from overlap.messages import SamplingParams
from overlap.spec.asking import Asked, encode_question
from overlap.spec.prompts import built_in

QUESTION_TOKENS: Final = 96
"""Of a question that the model makes up, at most; a longer one is none."""
LEAST_WORDS: Final = 3
TRIES_A_QUESTION: Final = 2
WINDOW: Final = 64
"""Batches among whose texts those of about the same length are put together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """Answered prompts as token ids, one behind the other."""

    tokens: npt.NDArray[np.int32]
    ends: npt.NDArray[np.int64]
    """[A]: where each text ends among the tokens, prompt and answer."""
    prompts: npt.NDArray[np.int64]
    """[A]: how many tokens of each text are its prompt."""

    def __len__(self) -> int:
        return len(self.ends)

    def text(self, index: int) -> npt.NDArray[np.int32]:
        """Return the tokens of one text."""
        return self.tokens[int(self.ends[index - 1]) if index else 0 : int(self.ends[index])]

    def save(self, path: Path) -> None:
        """Write it as one safetensors file."""
        columns = {"tokens": self.tokens, "ends": self.ends, "prompts": self.prompts}
        save_file({name: torch.from_numpy(column) for name, column in columns.items()}, path)

    @classmethod
    def load(cls, path: Path) -> Corpus:
        """Read what `save` wrote."""
        found = load_file(path)
        return cls(tokens=found["tokens"].numpy(), ends=found["ends"].numpy(), prompts=found["prompts"].numpy())


def join(texts: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Corpus:
    """Return a corpus of (prompt, answer) pairs. ConfigError if there is none."""
    if not texts:
        raise ConfigError("There is nothing to train on: no prompt was answered in time. Give it more minutes.")
    both = [[*prompt, *answer] for prompt, answer in texts]
    return Corpus(
        tokens=np.fromiter(itertools.chain.from_iterable(both), dtype=np.int32),
        ends=np.cumsum([len(text) for text in both], dtype=np.int64),
        prompts=np.array([len(prompt) for prompt, _ in texts], dtype=np.int64),
    )


def prompts_from(path: Path | None, count: int, seed: int) -> list[str]:
    """Return `count` prompts: the lines of a text file in random order, again and again, or built-in ones."""
    if path is None:
        return [prompt for _, prompt in itertools.islice(built_in(seed), count)]
    known = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not known:
        raise ConfigError(f"{str(path)!r} has no prompts. Write one a line.")
    random.Random(seed).shuffle(known)
    return list(itertools.islice(itertools.cycle(known), count))


def split(prompts: Sequence[str], held_out: int) -> tuple[list[str], list[str]]:
    """Return (prompts to train on, prompts to judge by): no text is in both."""
    judged = list(dict.fromkeys(prompts))[:held_out]
    kept = set(judged)
    return [prompt for prompt in prompts if prompt not in kept], judged


async def self_asked(
    engine: Asked, count: int, *, seed: int, seconds: float = math.inf, progress: bool | None
) -> list[str]:
    """Let a chat model make up `count` different questions itself, or as many as it can in `seconds`; in no order.

    Told nothing but that a user speaks now, it says what users say: it asks of more than any list of ours, and about as
    often as it was asked itself. Source: Magpie (arXiv:2406.08464). Raises ConfigError for a model without a template.
    """
    if engine.chat_template is None:
        raise ConfigError("The model has no chat template, so it can not make up questions. Give it --self-asked 0.")
    one, other = [await encode_question(engine, text) for text in ("Alpha", "9 is")]
    begun = one[: next(place for place, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1])]
    tries = count * TRIES_A_QUESTION
    params = [
        SamplingParams(temperature=1.0, top_p=0.95, seed=seed + number, max_tokens=QUESTION_TOKENS)
        for number in range(tries)
    ]
    found: dict[str, None] = {}
    late = time.monotonic() + seconds
    outputs = engine.generate_batch([begun] * tries, params, progress=progress)
    try:
        async for output in outputs:
            text = output.text.strip()
            if output.finish_reason == "stop" and len(text.split()) >= LEAST_WORDS:
                found[text] = None
            if len(found) == count or time.monotonic() > late:
                break
    finally:
        await outputs.aclose()  # type: ignore[attr-defined]  # it is an async generator
    return list(found)


async def answer(
    engine: Asked,
    prompts: Sequence[str],
    *,
    answer_tokens: int,
    temperature: float,
    seed: int,
    seconds: float,
    progress: bool | None,
) -> Corpus:
    """Let the engine answer `prompts` in its chat template, as many as `seconds` allow, and return the texts.

    The first answers to three of four prompts are greedy, all else is drawn at `temperature`. Seeds are `seed`,
    `seed + 1` and so on.
    """
    known = {prompt: await encode_question(engine, prompt) for prompt in dict.fromkeys(prompts)}
    ids = [known[prompt] for prompt in prompts]
    params, met = [], set[str]()
    for number, prompt in enumerate(prompts):
        heat = 0.0 if prompt not in met and number % 4 else temperature
        met.add(prompt)
        params.append(SamplingParams(temperature=heat, seed=seed + number, max_tokens=answer_tokens))
    texts: list[tuple[list[int], list[int]]] = []
    late = time.monotonic() + seconds
    outputs = engine.generate_batch(ids, params, progress=progress)
    try:
        async for output in outputs:
            texts.append((ids[output.index], list(output.token_ids)))
            if time.monotonic() > late:
                break
    finally:
        await outputs.aclose()  # type: ignore[attr-defined]  # it is an async generator
    return join(texts)


def draft_vocabulary(corpus: Corpus, vocab_size: int, size: int) -> Tensor:
    """Return the `size` most frequent tokens of the corpus, ascending, int64; the lowest ids of equals."""
    counts = np.bincount(corpus.tokens, minlength=vocab_size)
    return torch.from_numpy(np.sort(np.argsort(-counts, kind="stable")[: min(size, vocab_size)]))


@dataclass(frozen=True, slots=True, kw_only=True)
class TextBatch:
    """Texts side by side, int64 [B, L] with zeros behind each, and what part of each is its answer, int64 [B]."""

    tokens_BL: Tensor
    lengths_B: Tensor
    prompts_B: Tensor

    def to(self, device: torch.device) -> TextBatch:
        """Return it on a device, without waiting for it."""
        if device.type != "cuda":
            return self
        columns = (self.tokens_BL, self.lengths_B, self.prompts_B)
        tokens_BL, lengths_B, prompts_B = (column.pin_memory().to(device, non_blocking=True) for column in columns)
        return TextBatch(tokens_BL=tokens_BL, lengths_B=lengths_B, prompts_B=prompts_B)


def batches(corpus: Corpus, size: int, length: int, seed: int, first: int = 0) -> Iterator[TextBatch]:
    """Yield batches for ever from batch number `first` on: which texts are in it depends on seed and number alone.

    Each pass over the corpus has another order. The texts of a batch are of about the same length: what is shorter than
    the longest is padding. Texts longer than `length` are cut; L is a multiple of 16.
    """
    a_pass = max(1, len(corpus) // size)
    lengths = np.minimum(np.diff(corpus.ends, prepend=0), length)
    order: npt.NDArray[np.int64] | None = None
    for number in itertools.count(first):
        if order is None or number % a_pass == 0:
            order = _order(lengths, size, a_pass, np.random.default_rng((seed, number // a_pass)))
        yield text_batch(corpus, order[number % a_pass], length)


def _order(
    lengths: npt.NDArray[np.int64], size: int, a_pass: int, chance: np.random.Generator
) -> npt.NDArray[np.int64]:
    """Return the texts of each batch of a pass, [a_pass, size] (fewer if there are not as many)."""
    texts = chance.permutation(len(lengths))[: a_pass * size]
    for start in range(0, len(texts), WINDOW * size):
        window = texts[start : start + WINDOW * size]
        window[:] = window[np.argsort(lengths[window], kind="stable")]
    return chance.permutation(texts.reshape(a_pass, -1))


def text_batch(corpus: Corpus, which: Sequence[int] | npt.NDArray[np.int64], length: int) -> TextBatch:
    """Return the texts with these numbers as a batch."""
    texts = [corpus.text(int(index))[:length] for index in which]
    width = -(-max(map(len, texts)) // 16) * 16
    tokens = np.zeros((len(texts), width), dtype=np.int64)
    for row, text in enumerate(texts):
        tokens[row, : len(text)] = text
    return TextBatch(
        tokens_BL=torch.from_numpy(tokens),
        lengths_B=torch.tensor([len(text) for text in texts]),
        prompts_B=torch.from_numpy(corpus.prompts[np.asarray(which)]),
    )
