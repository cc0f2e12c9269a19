"""Pages of KV memory."""

from __future__ import annotations

from typing import Final

PAGE: Final = 16
"""Tokens in a page. XQA and FlashInfer's paged prefill both take 16; a page of SmolLM2-135M in bf16 is 360 KiB."""
