"""Requests for an answer of a certain form: what clients send for it, and the form that the engine holds to.

A form is asked for by `response_format`, by vLLM's extras, or by a `tool_choice` that makes the model call. What the
text of a call looks like is known only with the chat template, so that form is made last (`held`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from overlap.errors import RequestError
from overlap.messages import SamplingParams
from overlap.serve.errors import ApiError
from overlap.serve.tools import CLOSE_CALL, CLOSE_THOUGHT, OPEN_CALL, CallFormat, Thinking
from overlap.structured import StructuredOutput, json_rule, lark_rule

_NO_ARGUMENTS: Final = {"type": "object", "properties": {}, "additionalProperties": False}
_EXTRAS: Final = {
    "json": "guided_json",
    "regex": "guided_regex",
    "choice": "guided_choice",
    "grammar": "guided_grammar",
}


def form_of_format(format_: Mapping[str, Any], *, where: str = "response_format") -> StructuredOutput | None:
    """Return the form that a `response_format` (or the `text.format` of a response) asks for. Raises ApiError."""
    kind = format_.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return StructuredOutput.json_object()
    if kind != "json_schema":
        raise ApiError(400, f"{where}.type must be 'text', 'json_object' or 'json_schema', not {str(kind)[:64]!r}.",
                       param=where)  # fmt: skip
    inner = format_ if where == "text.format" else format_.get("json_schema")
    at = where if where == "text.format" else f"{where}.json_schema"
    if not isinstance(inner, Mapping):
        raise ApiError(400, f"{at} must be an object with a name and a schema.", param=where)
    schema = inner.get("schema", inner.get("schema_", {}))  # a description without a schema asks for any JSON object
    if not isinstance(schema, Mapping):
        raise ApiError(400, f"{at}.schema must be a JSON schema, as an object.", param=where)
    return _made(where, lambda: StructuredOutput.json_schema(schema or {"type": "object"}))


def form_of(format_: Mapping[str, Any] | None, extras: Mapping[str, object]) -> StructuredOutput | None:
    """Return the form that a request asks for; `extras` are vLLM's fields, those that were given. Raises ApiError."""
    forms: dict[str, StructuredOutput] = {}
    if format_ is not None and (form := form_of_format(format_)) is not None:
        forms["response_format"] = form
    for name, value in extras.items():
        for kind, asked in _asked(name, value).items():
            forms[f"{name}.{kind}" if name == "structured_outputs" else name] = _form_of_extra(name, kind, asked)
    if len(forms) > 1:
        names = " and ".join(forms)
        raise ApiError(400, f"{names} each ask for a form, and an answer has one. Send one of them.",
                       param=list(forms)[1].partition(".")[0])  # fmt: skip
    return next(iter(forms.values()), None)


def _asked(name: str, value: object) -> Mapping[str, object]:
    if name != "structured_outputs":
        return {kind: value for kind, extra in _EXTRAS.items() if extra == name}
    if not isinstance(value, Mapping):
        raise ApiError(400, f"{name} must be an object.", param=name)
    given = {kind: asked for kind, asked in value.items() if asked is not None and asked is not False}
    for kind in given:
        if kind not in (*_EXTRAS, "json_object"):
            raise ApiError(400, f"{name}.{kind[:64]} is not supported by this server. It has json, json_object, regex, "
                           "choice and grammar.", param=name, code="unsupported_parameter")  # fmt: skip
    return given


def _form_of_extra(name: str, kind: str, value: object) -> StructuredOutput:
    match kind, value:
        case "json", str() | Mapping():
            return _made(name, lambda: StructuredOutput.json_schema(value))
        case "json_object", True:
            return StructuredOutput.json_object()
        case "regex", str():
            return _made(name, lambda: StructuredOutput.regex(value))
        case "choice", list():
            return _made(name, lambda: StructuredOutput.choice(value))
        case "grammar", str():
            return _made(name, lambda: StructuredOutput.lark(value))
        case _:
            raise ApiError(400, f"{name}: a {kind} of the type {type(value).__name__} is none.", param=name)


def _made(where: str, make: Any) -> StructuredOutput:
    try:
        form: StructuredOutput = make()
    except RequestError as error:
        raise ApiError(400, f"{where}: {error}", param=where) from None
    return form


# ---------------------------------------------------------------- calls


def functions_to_call(choice: str | Mapping[str, Any], names: Sequence[str]) -> tuple[bool, tuple[str, ...]]:
    """Return whether a `tool_choice` lets the model call, and the functions of which it has to call one, if any."""
    if choice in ("none", "auto"):
        return choice == "auto", ()
    if choice == "required":
        return True, tuple(names)
    if isinstance(choice, Mapping) and choice.get("type") == "function":
        function = choice.get("function", choice)  # the Responses API has the name beside the type
        name = function.get("name") if isinstance(function, Mapping) else None
        if isinstance(name, str) and name in names:
            return True, (name,)
        raise ApiError(400, f"tool_choice names the function {str(name)[:64]!r}, which is none of tools.",
                       param="tool_choice")  # fmt: skip
    shown = choice if isinstance(choice, str) else choice.get("type")
    raise ApiError(400, f"tool_choice must be 'auto', 'none', 'required' or name a function, not {str(shown)[:64]!r}.",
                   param="tool_choice")  # fmt: skip


def held(
    params: SamplingParams,
    tools: Sequence[Mapping[str, Any]],
    must_call: Sequence[str],
    *,
    parallel: bool,
    calls: CallFormat | None,
    thinking: Thinking,
) -> SamplingParams:
    """Return the parameters with the form of the whole answer: calls, and the end of the reasoning that it begins in.

    A `response_format` beside tools that may be called is that of an answer which calls none. Raises ApiError.
    """
    form = params.structured
    if must_call and form is not None:
        raise ApiError(400, "response_format and a tool_choice that makes the model call exclude each other. Leave one "
                       "out.", param="tool_choice")  # fmt: skip
    if calls is not None and (must_call or (form is not None and tools)):
        wanted = [tool["function"] for tool in tools if not must_call or tool["function"]["name"] in must_call]
        many = parallel and calls == "hermes"
        form = _made("tools", lambda: _calls_form(calls, wanted, params.structured, many=many))
    if form is None:
        return params
    return replace(params, structured=replace(form, behind=CLOSE_THOUGHT) if thinking == "inside" else form)


def _calls_form(
    calls: CallFormat, functions: Sequence[Mapping[str, Any]], other: StructuredOutput | None, *, many: bool
) -> StructuredOutput:
    """Return the form of an answer that calls one of the functions, in the way that the model was taught."""
    key = "arguments" if calls == "hermes" else "parameters"
    begin, end = (f"{OPEN_CALL}\n", f"\n{CLOSE_CALL}") if calls == "hermes" else ("", "")
    rules = ['calls: call ("\\n" call)*' if many else "calls: call"]
    rules.append("call: " + " | ".join(f"call_{number}" for number in range(len(functions))))
    for number, function in enumerate(functions):
        parameters = function.get("parameters") or _NO_ARGUMENTS
        StructuredOutput.json_schema(parameters)  # for its bounds
        opening = f'{begin}{{"name": {json.dumps(function["name"])}, "{key}": '
        rules.append(f"call_{number}: {_quoted(opening)} arguments_{number} {_quoted('}' + end)}")
        rules.append(f"arguments_{number}: {json_rule(parameters)}")
    if other is not None:
        rules.append(f"other: {lark_rule(other)}")
    start = "start: calls" if other is None else "start: calls | other"
    return StructuredOutput.lark("\n".join([start, *rules]))


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
