"""The OpenAPI document, made from the structs that requests are decoded into and answers are encoded from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import msgspec

import overlap
from overlap.serve.chat import ChatRequest
from overlap.serve.completions import CompletionRequest
from overlap.serve.protocol import MAX_N, MAX_STOPS, MEANINGLESS, UNSUPPORTED
from overlap.serve.responses import ResponseRequest
from overlap.serve.shapes import Answer, ChatChoice, TextChoice
from overlap.serve.tokens import Detokenized, DetokenizeRequest, TokenizeRequest, Tokens


class ErrorDetail(msgspec.Struct, frozen=True, kw_only=True):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorObject(msgspec.Struct, frozen=True, kw_only=True):
    """What every failure is answered with."""

    error: ErrorDetail


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """Whether the engine can answer."""

    status: str


_POSTS: Final[tuple[tuple[str, type, Any, str], ...]] = (
    ("/v1/chat/completions", ChatRequest, Answer[ChatChoice], "Answer a conversation."),
    ("/v1/completions", CompletionRequest, Answer[TextChoice], "Go on with a text."),
    ("/v1/responses", ResponseRequest, dict[str, Any], "Answer in the shape of the Responses API. Nothing is stored."),
    ("/tokenize", TokenizeRequest, Tokens, "Turn a text or messages into tokens."),
    ("/detokenize", DetokenizeRequest, Detokenized, "Turn tokens into text."),
)
_GETS: Final[tuple[tuple[str, Any, str], ...]] = (
    ("/v1/models", dict[str, Any], "List the one model."),
    ("/v1/models/{model}", dict[str, Any], "Describe the one model."),
    ("/health", Status, "Whether the engine is alive. Asks for no key."),
    ("/ready", Status, "Whether requests would be answered now."),
    ("/openapi.json", dict[str, Any], "This document."),
)
_STREAMED: Final = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
_FAILURES: Final = ("400", "401", "404", "408", "413", "429", "500", "503")
_BOUNDS: Final[Mapping[str, Mapping[str, object]]] = {
    "temperature": {"minimum": 0, "maximum": 2},
    "top_k": {"minimum": -1, "maximum": 2**31 - 1},
    "top_p": {"exclusiveMinimum": 0, "maximum": 1},
    "min_p": {"minimum": 0, "maximum": 1},
    "presence_penalty": {"minimum": -2, "maximum": 2},
    "frequency_penalty": {"minimum": -2, "maximum": 2},
    "repetition_penalty": {"exclusiveMinimum": 0},
    "n": {"minimum": 1, "maximum": MAX_N},
    "seed": {"minimum": -(2**63), "maximum": 2**63 - 1},
    "max_tokens": {"minimum": 1},
    "max_completion_tokens": {"minimum": 1},
    "max_output_tokens": {"minimum": 1},
    "min_tokens": {"minimum": 0},
    "logprobs": {"minimum": 0, "maximum": 20},
    "top_logprobs": {"minimum": 0, "maximum": 20},
    "prompt": {"minLength": 1, "minItems": 1},
    "messages": {"minItems": 1},
    "stop": {"minLength": 1, "maxItems": MAX_STOPS},
}
"""What the fields' types do not say, for programs that make requests up."""


def document(*, keys: bool, model_name: str | None = None) -> dict[str, Any]:
    """Return the OpenAPI 3.1 document; `keys` says whether clients need one, `model_name` what they may ask for."""
    kinds: list[Any] = [*(kind for _, kind, _, _ in _POSTS), *(kind for _, _, kind, _ in _POSTS), Status, ErrorObject]
    kinds += [kind for _, kind, _ in _GETS]
    schemas, components = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    schema_of: dict[Any, Mapping[str, Any]] = {str(kind): schema for kind, schema in zip(kinds, schemas, strict=True)}
    paths: dict[str, Any] = {}
    for path, asked, answered, summary in _POSTS:
        paths[path] = {"post": _operation(path, summary, schema_of[str(answered)], body=schema_of[str(asked)])}
    for path, answered, summary in _GETS:
        paths[path] = {"get": _operation(path, summary, schema_of[str(answered)])}
    for _, kind, _, _ in _POSTS:
        _bound(components[kind.__name__], model_name)
    for kind in (ChatRequest, CompletionRequest):
        components[kind.__name__]["additionalProperties"] = False
        properties = components[kind.__name__]["properties"]
        for name in sorted(MEANINGLESS):
            properties[name] = {"description": "Accepted, and has no meaning here."}
        for name, harmless in UNSUPPORTED.items():
            properties[name] = {
                "enum": [*harmless, None],
                "description": "Not supported: these values ask for nothing.",
            }
    found: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "overlap", "version": overlap.__version__},
        "paths": paths,
        "components": {"schemas": components},
    }
    if keys:
        found["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        found["security"] = [{"key": []}]
        paths["/health"]["get"]["security"] = []
    return found


def _bound(schema: dict[str, Any], model_name: str | None) -> None:
    """Say of a request what its struct's types do not."""
    for name, property_ in schema["properties"].items():
        property_.update(_BOUNDS.get(name, {}))
        if name == "model" and model_name is not None:
            property_["enum"] = [model_name, None]


def _operation(
    path: str, summary: str, answered: Mapping[str, Any], body: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    content: dict[str, Any] = {"application/json": {"schema": answered}}
    if path in _STREAMED:
        content["text/event-stream"] = {"schema": {}}  # programs check each event by it
    failure = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorObject"}}}
    operation: dict[str, Any] = {
        "summary": summary,
        "operationId": path.strip("/").replace("/", "_").replace(".", "_").replace("{", "").replace("}", ""),
        "responses": {
            "200": {"description": summary, "content": content},
            **{status: {"description": "An error object.", "content": failure} for status in _FAILURES},
        },
    }
    if "{model}" in path:
        operation["parameters"] = [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}]
    if path == "/health" or path == "/ready":
        operation["responses"] = {
            status: {"description": summary, "content": content} for status in ("200", "401", "503")
        }
    if body is not None:
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": body}}}
    return operation
