"""StructuredOutput: the form that an answer is held to. What users write; imports no torch and no llguidance."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias

from overlap.errors import RequestError

FormKind: TypeAlias = Literal["json_schema", "json_object", "regex", "choice", "lark"]

MOST_BYTES: Final = 64 << 10
"""Bytes of a form, as UTF-8."""
MOST_DEPTH: Final = 64
"""How deep a schema, or the brackets of a regex or grammar, may be nested."""
MOST_ITEMS: Final = 512
"""Properties and enum items of a schema, all together; choices."""
SPACE: Final = r"\x20|\n\x20{0,40}"
"""White space between the parts of JSON: none, a space, or a line's end with an indent. More of it, which the standard
allows, lets a small model write spaces for ever."""
_KINDS: Final = ("json_schema", "json_object", "regex", "choice", "lark")


@dataclass(frozen=True, slots=True)
class StructuredOutput:
    """What an answer must look like, from its first character to its last. Make one by the methods named as the kinds.

    The answer ends where the form is complete, also with `ignore_eos`. One that `max_tokens`, a stop string or a stop
    id cuts short is the beginning of something that fits. Raises RequestError for what is too large (64 KiB, 64 levels,
    512 properties and enum items) or is no JSON where it has to be; whether the form itself can be used is found out
    when a request with it starts.
    """

    kind: FormKind
    text: str
    """The schema as JSON, the regex, the choices as a JSON list, or the grammar; empty for a `json_object`."""
    behind: str = ""
    """If not empty: anything may come first, up to this text, and the form is that of what comes behind it. It is what
    ends a model's reasoning, as in "</think>"."""

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | str) -> StructuredOutput:
        """JSON that fits a JSON schema. Keywords that cannot be held to are refused, and not ignored."""
        try:
            return cls("json_schema", schema if isinstance(schema, str) else json.dumps(schema))
        except (TypeError, ValueError, RecursionError) as error:
            if isinstance(error, RequestError):
                raise
            raise RequestError(f"The JSON schema is no JSON: {error}.") from None

    @classmethod
    def json_object(cls) -> StructuredOutput:
        """Any JSON object."""
        return cls("json_object", "")

    @classmethod
    def regex(cls, pattern: str) -> StructuredOutput:
        """A text that matches all of `pattern`, in the syntax of Rust's `regex`: no look-around, no back-references."""
        return cls("regex", pattern)

    @classmethod
    def choice(cls, choices: Sequence[str]) -> StructuredOutput:
        """One of these texts."""
        listed = isinstance(choices, Iterable) and not isinstance(choices, str)
        if not listed or not all(isinstance(one, str) and one for one in choices):
            raise RequestError(f"The choices must be a list of texts that are not empty, not {choices!r:.200}.")
        return cls("choice", json.dumps(list(choices)))

    @classmethod
    def lark(cls, grammar: str) -> StructuredOutput:
        """A text of this grammar, in llguidance's dialect of Lark; its first rule is `start`."""
        return cls("lark", grammar)

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise RequestError(f"A form is one of {', '.join(_KINDS)}, not {self.kind!r:.80}.")
        if not isinstance(self.text, str) or not isinstance(self.behind, str):
            raise RequestError(f"A form of the kind {self.kind} is written as text, not {type(self.text).__name__}.")
        try:
            size = len(self.text.encode()) + len(self.behind.encode())
        except UnicodeEncodeError:
            raise RequestError("The form has half of a surrogate pair, which no text may have. Remove it.") from None
        if size > MOST_BYTES:
            raise RequestError(f"The form takes {size} bytes; {MOST_BYTES} are the most. Make it shorter.")
        if self.kind in ("json_schema", "choice"):
            self._check_json()
        elif self.kind != "json_object":
            if not self.text:
                raise RequestError(f"The form of the kind {self.kind} is empty. Leave it out to ask for no form.")
            self._check_brackets()

    def _check_json(self) -> None:
        try:
            value = json.loads(self.text)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"The {self.kind} is no JSON: {error}.") from None
        if self.kind == "json_schema":
            self._check_schema(value)
        elif not isinstance(value, list) or not all(isinstance(one, str) and one for one in value):
            raise RequestError(f"The choices must be a list of texts that are not empty, not {self.text:.80}.")
        elif not 1 <= len(value) <= MOST_ITEMS:
            raise RequestError(f"There are {len(value)} choices; give 1 to {MOST_ITEMS}.")

    def _check_schema(self, value: object) -> None:
        if not isinstance(value, (dict, bool)):
            raise RequestError(f"A JSON schema is an object, not {self.text:.80}.")
        depth = items = 0
        level: list[object] = [value]
        while level:
            depth += 1
            inner: list[object] = []
            for node in level:
                if isinstance(node, dict):
                    named = (node.get(key) for key in ("properties", "enum"))
                    items += sum(len(one) for one in named if isinstance(one, (dict, list)))
                    inner += node.values()
                elif isinstance(node, list):
                    inner += node
            level = [node for node in inner if isinstance(node, (dict, list))]
        if depth > MOST_DEPTH:
            raise RequestError(f"The JSON schema is nested {depth} levels deep; {MOST_DEPTH} are the most. Flatten it.")
        if items > MOST_ITEMS:
            raise RequestError(
                f"The JSON schema has {items} properties and enum items; {MOST_ITEMS} are the most. Ask for less."
            )

    def _check_brackets(self) -> None:
        depth = deepest = 0
        for character in self.text:
            depth += (character in "([{") - (character in ")]}")
            deepest = max(deepest, depth)
        if deepest > MOST_DEPTH:
            raise RequestError(
                f"The {self.kind} has brackets nested {deepest} deep; {MOST_DEPTH} are the most. Flatten it."
            )


def json_rule(schema: Mapping[str, Any]) -> str:
    """Return the body of a rule of Lark for JSON that fits `schema`."""
    return "%json " + json.dumps({**schema, "x-guidance": {"whitespace_pattern": SPACE}})


def schema_of(form: StructuredOutput) -> str:
    """Return the schema of a form of JSON, as the JSON text of an object."""
    if form.kind == "json_object":
        return '{"type": "object"}'
    return {"true": "{}", "false": '{"not": {}}'}.get(form.text.strip(), form.text)


def lark_rule(form: StructuredOutput) -> str:
    """Return the body of a rule of Lark for a form; what it may stand behind is left out."""
    match form.kind:
        case "choice":
            return " | ".join(json.dumps(one, ensure_ascii=False) for one in json.loads(form.text))
        case "regex":
            return "/" + form.text.replace("\\/", "/").replace("/", "\\/").replace("\n", "\\n") + "/"
        case "lark":
            return f"%lark {{\n{form.text}\n}}"
        case _:
            return json_rule(json.loads(schema_of(form)))
