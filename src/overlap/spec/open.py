"""From a configuration to a drafter: what is loaded before KV memory is divided, and what is made over it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from overlap.cache.pages import PAGE, pages_for
from overlap.environment import package_index
from overlap.errors import ConfigError
from overlap.models import build, open_checkpoint
from overlap.models.llama import Llama
from overlap.ops.attention import Attention, choose_attention, fallbacks_of
from overlap.resolve import Resolved
from overlap.spec.chain import ChainDrafter, ModelHead, head_kv
from overlap.spec.drafter import Drafter, Head
from overlap.spec.eagle import EagleHead, load_head
from overlap.spec.ngram import NgramDrafter
from overlap.spec.shipped import shipped_head
from overlap.spec.step import Speculation
from overlap.state.rows import SlotRows


def open_head(
    resolved: Resolved, target: Llama, *, device: torch.device, dtype: torch.dtype, cache: Path, progress: bool
) -> Head | None:
    """Load the network that drafts; None where none does. Raises ConfigError (ModelError) for one that does not fit."""
    if resolved.speculative == "eagle":
        own = resolved.draft_model
        return load_head(shipped_head(resolved.model, target) if own is None else Path(own), target)
    if resolved.speculative != "draft":
        return None
    checkpoint = open_checkpoint(
        str(resolved.draft_model), cache_dir=cache, index_url=package_index(), progress=progress
    )
    try:
        vocabulary = checkpoint.config.vocab_size
        if vocabulary != target.vocab_size:
            raise ConfigError(
                f"draft_model {resolved.draft_model!r} has a vocabulary of {vocabulary} tokens, and {resolved.model!r} "
                f"one of {target.vocab_size}. Take a smaller model of the same family."
            )
        if checkpoint.config.context < resolved.context:
            raise ConfigError(
                f"draft_model {resolved.draft_model!r} was made for {checkpoint.config.context} positions, and the "
                f"engine may hold {resolved.context}. Open it with context={checkpoint.config.context}."
            )
        return ModelHead(build(checkpoint, device=device, dtype=dtype, progress=progress))
    finally:
        checkpoint.close()


def head_page_bytes(head: Head, dtype: torch.dtype) -> int:
    """Return the bytes that a head keeps beside each page of the target's KV."""
    return 2 * head.num_layers * PAGE * head.num_kv_heads * head.head_dim * dtype.itemsize


def speculation(
    resolved: Resolved,
    target: Llama,
    head: Head | None,
    attention: Attention,
    kv: Tensor,
    context: int,
    fallbacks: dict[str, int],
) -> Callable[[SlotRows], Speculation] | None:
    """Return what makes an engine's Speculation over its slots' rows; None without a drafter.

    `attention` and `kv` are the target's; `context` is the most tokens of a request. If the drafter's attention is
    slower than it could be, `fallbacks` gets why, once it is made.
    """
    if resolved.speculative is None:
        return None

    def make(rows: SlotRows) -> Speculation:
        drafter = _drafter(resolved, head, kv, context, fallbacks)
        return Speculation(target, attention, kv, rows, drafter, context, resolved.draft_ladder)

    return make


def _drafter(resolved: Resolved, head: Head | None, kv: Tensor, context: int, fallbacks: dict[str, int]) -> Drafter:
    if head is None:
        return NgramDrafter(resolved.max_rows, context, resolved.num_drafts, kv.device)
    own_kv = head_kv(head, kv.shape[0], kv.dtype, kv.device)
    own_attention, why = choose_attention(
        own_kv,
        head.num_heads,
        max_pages_per_row=pages_for(context),
        width=resolved.num_drafts + 1,
        max_rows=resolved.max_rows,
    )
    fallbacks |= fallbacks_of(kv.device, own_attention, why, "the drafter's attention")
    return ChainDrafter(head, own_kv, own_attention, resolved.num_drafts, context)


def drafter_notes(resolved: Resolved, head: Head | None, *, short: bool) -> tuple[str, ...]:
    """Return a sentence on what drafts; none without a drafter. `short` is `Runner.short_steps`."""
    if resolved.speculative is None:
        return ()
    ladder = resolved.draft_ladder
    fewer = "".join(f", {drafts} of more than {rows}" for (rows, _), (_, drafts) in pairwise(ladder))
    beside = "; with prompts only in short steps" if short else "; none in steps with prompts"
    when = "" if resolved.drafts_with_prompts else beside
    most = f"up to {ladder[0][1]} tokens a row{fewer}{' rows' * bool(fewer)}, verified and accepted on the device{when}"
    if head is None:
        return (f"speculation: {most}; drafted by prompt lookup, without weights",)
    kind = f"an {head.config.kind} head" if isinstance(head, EagleHead) else "a smaller model"
    return (f"speculation: {most}; drafted by {kind}, {resolved.draft_model or 'which comes with overlap'}",)
