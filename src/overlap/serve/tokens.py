"""/tokenize and /detokenize, as vLLM has them."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from overlap.serve.chat import checked_tools, plain_message
from overlap.serve.door import Door
from overlap.serve.errors import ApiError
from overlap.serve.protocol import decode


class TokenizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """The body of /tokenize: a text or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] = []  # msgspec copies it
    add_special_tokens: bool = True
    """For a text; a chat template writes its own."""
    add_generation_prompt: bool = True
    return_token_strs: bool = False


class Tokens(msgspec.Struct, frozen=True, kw_only=True):
    """What /tokenize answers."""

    count: int
    max_model_len: int
    tokens: tuple[int, ...]
    token_strs: tuple[str, ...] | UnsetType = UNSET


class DetokenizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """The body of /detokenize."""

    model: str | None = None
    tokens: list[int]


class Detokenized(msgspec.Struct, frozen=True, kw_only=True):
    """What /detokenize answers."""

    prompt: str


def parse_tokenize(body: bytes) -> TokenizeRequest:
    """Understand the body of /tokenize. Raises ApiError."""
    request = decode(body, TokenizeRequest, unsupported={})
    if (request.prompt is None) == (request.messages is None):
        raise ApiError(400, "Send a prompt or messages, one of the two.", param="prompt")
    return request


def parse_detokenize(body: bytes) -> DetokenizeRequest:
    """Understand the body of /detokenize. Raises ApiError."""
    return decode(body, DetokenizeRequest, unsupported={})


async def tokenize(door: Door, request: TokenizeRequest) -> Tokens:
    """Return the tokens of a text or of messages. Raises ApiError and RequestError for what cannot be encoded."""
    if request.prompt is not None:
        tokens = await door.encode(request.prompt, add_special_tokens=request.add_special_tokens)
    else:
        messages = [plain_message(f"messages[{at}]", message) for at, message in enumerate(request.messages or ())]
        tools, _ = checked_tools(request.tools, None)
        tokens = await door.encode_chat(messages, tools or None, add_generation_prompt=request.add_generation_prompt)
    strings = tuple(door.decode([token]) for token in tokens) if request.return_token_strs else UNSET
    return Tokens(count=len(tokens), max_model_len=door.context, tokens=tuple(tokens), token_strs=strings)
