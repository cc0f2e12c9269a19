"""Requests for an answer of a certain form. The engine cannot hold to one yet, so they are refused by name.

Everything that asks for a form comes through here: once SamplingParams can hold one, these functions return it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from overlap.serve.errors import ApiError


def sampling_of_format(form: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the sampling parameters for a `response_format` of OpenAI's. Raises ApiError for what is not supported."""
    kind = None if form is None else form.get("type")
    if form is None or kind == "text":
        return {}
    if kind in ("json_object", "json_schema"):
        raise ApiError(
            400,
            f"response_format of the type {kind!r} is not supported yet: this server cannot hold an answer to a form. "
            "Ask for the form in the prompt, and check the answer.",
            param="response_format",
            code="unsupported_parameter",
        )
    raise ApiError(400, f"response_format.type must be 'text', 'json_object' or 'json_schema', not {str(kind)[:64]!r}.",
                   param="response_format")  # fmt: skip


def check_choice(choice: str | Mapping[str, Any]) -> bool:
    """Return whether a `tool_choice` lets the model call tools. Raises ApiError for one that makes it call one."""
    if choice in ("none", "auto"):
        return choice == "auto"
    if choice == "required" or isinstance(choice, Mapping):
        raise ApiError(
            400,
            "tool_choice that makes the model call a tool is not supported yet: this server cannot hold an answer to a "
            "form. Send 'auto' or 'none'.",
            param="tool_choice",
            code="unsupported_parameter",
        )
    raise ApiError(400, f"tool_choice must be 'auto' or 'none', not {choice[:64]!r}.", param="tool_choice")
