"""What `generate` and `generate_batch` were given: checked, and as the engine's loop has to know it."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping
from numbers import Integral
from typing import TYPE_CHECKING

from overlap.errors import RequestError
from overlap.messages import Prompt, SamplingParams, Terms
from overlap.schedule.request import Request

if TYPE_CHECKING:
    from overlap.cache.pages import Ints
    from overlap.schedule.matcher import Matcher


def checked(params: object) -> SamplingParams:
    """Return what was given, or the defaults for None. Raises RequestError for anything else."""
    if params is None:
        return SamplingParams()
    if not isinstance(params, SamplingParams):
        raise RequestError(
            f"params must be SamplingParams, as in SamplingParams(max_tokens=16), or None, not {params!r:.80}."
        )
    return params


def listed(prompts: Iterable[Prompt]) -> list[Prompt]:
    """Return the prompts of a batch. Raises RequestError for what is none, and for a single prompt."""
    if isinstance(prompts, (str, bytes, Mapping)) or not isinstance(prompts, Iterable):
        raise RequestError(f"A batch is a list of prompts, not {prompts!r:.80}. Put a single prompt into a list.")
    items = list(prompts)
    for one, kind in ((Integral, "token ids"), (Mapping, "chat messages")):
        if items and all(isinstance(item, one) for item in items):
            raise RequestError(f"A batch is a list of prompts, not of {kind}. Put a single prompt into a list.")
    return items


def request_of(
    params: SamplingParams,
    terms: Terms,
    *,
    key: int,
    front: int,
    prompt: Ints,
    limit: int,
    matcher: Matcher | None,
    deadline: float | None,
    end_ids: set[int],
    vocab_size: int,
) -> Request:
    """Return what the engine's loop has to know of a request. Raises RequestError for what no answer could have."""
    if params.min_tokens > limit:
        raise RequestError(
            f"min_tokens is {params.min_tokens}, and behind this prompt of {len(prompt)} tokens there is room for "
            f"{limit}. Lower min_tokens, shorten the prompt, or open the engine with more context or kv_cache."
        )
    goes_on = params.ignore_eos and params.structured is None  # a form is complete where it ends
    stop_ids = {*params.stop_token_ids, *(() if goes_on else end_ids)}
    return Request(
        key=key,
        front=front,
        prompt=prompt,
        limit=limit,
        temperature=params.temperature,
        top_k=max(params.top_k, 0),
        top_p=params.top_p,
        min_p=params.min_p,
        seed=secrets.randbits(64) if params.seed is None else params.seed % 2**64,
        stop_ids=tuple(sorted(stop_ids)),
        shaping=params.shaping(stop_ids, vocab_size),
        logprobs=params.logprobs is not None,
        structured=params.structured,
        matcher=matcher,
        scores=0 if params.prompt_logprobs is None else len(prompt),
        priority=terms.priority,
        fairness_key=terms.fairness_key,
        salt=terms.cache_salt,
        deadline=deadline,
    )
