"""What a model's text holds besides text: reasoning between `<think>` tags, and tool calls.

Text comes in pieces of any size; what is certain goes on at once, and what may yet turn out to be part of a tag waits.
Which form a model writes its calls in is told from its chat template (`call_format`):

    hermes   <tool_call>{"name": "f", "arguments": {...}}</tool_call>, any number of them (Hermes, Qwen 2.5 and 3)
    llama    {"name": "f", "parameters": {...}} as the whole answer, more behind a ";" (Llama 3.1 and newer)
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

CallFormat: TypeAlias = Literal["hermes", "llama"]
Thinking: TypeAlias = Literal["never", "maybe", "inside"]

OPEN_CALL: Final = "<tool_call>"
CLOSE_CALL: Final = "</tool_call>"
_OPEN_THOUGHT: Final = "<think>"
CLOSE_THOUGHT: Final = "</think>"
_PYTHON_TAG: Final = "<|python_tag|>"
_ARGUMENTS: Final = ("arguments", "parameters")


@dataclass(frozen=True, slots=True)
class Text:
    """Some more of the answer's text."""

    text: str


@dataclass(frozen=True, slots=True)
class Thought:
    """Some more of the reasoning."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegins:
    """The model calls a function."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallGoesOn:
    """Some more of a call's arguments, as JSON text."""

    index: int
    arguments: str


Part: TypeAlias = Text | Thought | CallBegins | CallGoesOn


def call_format(template: str | None) -> CallFormat | None:
    """Return how a model with this chat template writes tool calls; None if the template takes no tools."""
    if template is None or "tools" not in template:
        return None
    return "llama" if OPEN_CALL not in template and '"parameters":' in template else "hermes"


def thinking(template: str | None, prompt_end: str) -> Thinking:
    """Return whether answers to a prompt that ends in `prompt_end` may hold reasoning, or begin inside it."""
    if template is None or CLOSE_THOUGHT not in template:
        return "never"
    return "inside" if prompt_end.rstrip().endswith(_OPEN_THOUGHT) else "maybe"


class MessageReader:
    """Reads one answer. `names` are the functions that may be called; a call of another one stays text."""

    def __init__(
        self,
        *,
        thinking: Thinking = "never",
        calls: CallFormat | None = None,
        names: Collection[str] = (),
        parallel: bool = True,
    ) -> None:
        self._thinking = thinking
        self._thought = ""  # text that may hold the tag which is waited for
        self._began = False
        self._after_thought = False
        self._calls = None if calls is None else _CallReader(calls, names, parallel)

    @property
    def called(self) -> bool:
        """Whether a function was called so far."""
        return self._calls is not None and self._calls.count > 0

    @property
    def passes(self) -> bool:
        """Whether all text that comes now is text of the answer, as it is: then nobody has to push it."""
        return self._thinking == "never" and self._calls is None and not self._after_thought

    def push(self, text: str) -> list[Part]:
        """Take in some text; return what is certain now."""
        return self._read(text, last=False)

    def end(self) -> list[Part]:
        """Return what was held back. Nothing is pushed afterwards."""
        parts = self._read("", last=True)
        return parts if self._calls is None else [*parts, *self._calls.read("", last=True)]

    def _read(self, text: str, *, last: bool) -> list[Part]:
        if self._thinking == "never":
            return self._content(text)
        self._thought += text
        if self._thinking == "maybe":  # reasoning is what an answer begins with, or there is none
            begun = self._thought.lstrip()
            if not last and len(begun) < len(_OPEN_THOUGHT) and _OPEN_THOUGHT.startswith(begun):
                return []
            if not begun.startswith(_OPEN_THOUGHT):
                self._thinking = "never"
                return self._content(self._thought)
            self._thinking = "inside"
            self._thought = begun[len(_OPEN_THOUGHT) :]
        thought, closed, rest = self._thought.partition(CLOSE_THOUGHT)
        if closed:
            self._thinking, self._thought, self._after_thought = "never", "", True
            return [*self._reasoning(thought.rstrip()), *self._content(rest)]
        certain = len(thought) if last else len(thought) - _held(thought, CLOSE_THOUGHT)
        if not last:
            certain = len(thought[:certain].rstrip())  # spaces go with what follows them
        self._thought = thought[certain:]
        return self._reasoning(thought[:certain])

    def _reasoning(self, text: str) -> list[Part]:
        if not self._began:
            text = text.lstrip()
        self._began = self._began or bool(text)
        return [Thought(text)] if text else []

    def _content(self, text: str) -> list[Part]:
        if self._after_thought:  # the lines between reasoning and answer are part of neither
            text = text.lstrip()
            self._after_thought = not text
        if self._calls is not None:
            return self._calls.read(text, last=False)
        return [Text(text)] if text else []


def _held(text: str, tag: str) -> int:
    """Return how many of the last characters of `text` may be the beginning of `tag`."""
    longest = min(len(text), len(tag) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(tag[:size])), 0)


class _CallReader:
    """Tells tool calls from text."""

    def __init__(self, form: CallFormat, names: Collection[str], parallel: bool) -> None:
        self._form = form
        self._names = names
        self._parallel = parallel
        self._text = ""
        self._call: CallObject | None = None
        self._id_told = False
        self._only_text = False
        self._closing = False
        self.count = 0

    def read(self, text: str, *, last: bool) -> list[Part]:
        """Take in some text; return what is certain now, and all of it if this is the `last`."""
        self._text += text
        parts: list[Part] = []
        while self._step(parts, last=last):
            pass
        return parts

    def _step(self, parts: list[Part], *, last: bool) -> bool:
        """Read on. True while there may be more to read."""
        if self._call is not None:
            return self._go_on(self._call, parts, last=last)
        if self._closing:
            return self._close(last=last)
        if self._only_text:
            self._say(parts, len(self._text), last=last)
            return False
        if self._form == "llama":
            return self._begin_llama(last=last)
        before, tag, rest = self._text.partition(OPEN_CALL)
        if not tag:
            self._say(parts, len(self._text) - (0 if last else _held(self._text, OPEN_CALL)), last=last)
            return False
        self._say(parts, len(before), last=False)  # the spaces before a call are no part of the answer
        self._text = rest
        self._call = CallObject()
        return True

    def _begin_llama(self, *, last: bool) -> bool:
        begun = self._text.lstrip(" \t\r\n;," if self.count else None)
        if not last and len(begun) < len(_PYTHON_TAG) and _PYTHON_TAG.startswith(begun):
            return False
        begun = begun.removeprefix(_PYTHON_TAG).lstrip()
        if begun.startswith("{"):
            self._text, self._call = begun, CallObject()
            return True
        self._only_text = bool(begun)
        return self._only_text

    def _close(self, *, last: bool) -> bool:
        """Skip the tag that ends a call. Some models leave it out."""
        rest = self._text.lstrip()
        if not last and len(rest) < len(CLOSE_CALL) and CLOSE_CALL.startswith(rest):
            return False
        self._closing = False
        self._text = rest.removeprefix(CLOSE_CALL)
        return bool(self._text)

    def _say(self, parts: list[Part], certain: int, *, last: bool) -> None:
        text, self._text = self._text[:certain], self._text[certain:]
        said = text if last and not self.count else text.rstrip()
        if not last:
            self._text = text[len(said) :] + self._text
        if self.count and not self._only_text:
            said = said.lstrip()
        if said:
            parts.append(Text(said))

    def _go_on(self, call: CallObject, parts: list[Part], *, last: bool) -> bool:
        rest = call.feed(self._text)
        self._text = ""
        wanted = call.name is not None and call.name in self._names and (self._parallel or not self.count)
        if wanted and call.name is not None:
            if not self._id_told:
                self._id_told = True
                parts.append(CallBegins(self.count, f"call_{secrets.token_hex(12)}", call.name))
            if arguments := call.take_arguments():
                parts.append(CallGoesOn(self.count, arguments))
        if rest is None and not last and not call.failed:
            return False
        ignored = not self._parallel and self.count > 0
        if not self._id_told and not ignored:  # it was no call after all: show what the model wrote
            tag = OPEN_CALL if self._form == "hermes" else ""
            parts.append(Text(tag + call.raw))
            self._only_text = self._form == "llama"
        else:
            self._closing = self._form == "hermes"
        self.count += self._id_told
        self._id_told, self._call = False, None
        self._text = rest or ""
        return bool(self._text)


class CallObject:
    """The JSON object of one call, read as it comes: `name` once it is known, the arguments as they grow."""

    def __init__(self) -> None:
        self.raw = ""
        """All that was read of it."""
        self.name: str | None = None
        self.failed = False
        """Whether this cannot become a call any more."""
        self._at = 0
        self._depth = 0
        self._quoted = -1  # where the string that is being read began
        self._escaped = False
        self._key = ""
        self._awaits: Literal["key", "colon", "value"] = "key"
        self._value = -1  # where the value at depth 1 that is being read began
        self._arguments: tuple[int, int | None] | None = None
        self._taken = 0

    def feed(self, text: str) -> str | None:
        """Read on; return what comes after the object, or None while it has not ended."""
        self.raw += text
        while self._at < len(self.raw) and not self.failed:
            ended = self._read(self.raw[self._at], self._at)
            self._at += 1
            if ended:
                rest, self.raw = self.raw[self._at :], self.raw[: self._at]
                if self.name is not None and self._arguments is None:
                    self.raw += "{}"
                    self._arguments = (len(self.raw) - 2, len(self.raw))
                return rest
        return None

    def take_arguments(self) -> str:
        """Return what is new in the arguments' JSON text."""
        if self._arguments is None:
            return ""
        start, end = self._arguments
        if self.raw[start] == '"':  # some models write the arguments' JSON as a string
            if end is None or self._taken:
                return ""
            self._taken = end
            return _string(self.raw[start:end]) or ""
        begin = max(start, self._taken)
        self._taken = self._at if end is None else end
        return self.raw[begin : self._taken]

    def _read(self, character: str, at: int) -> bool:
        if self._quoted >= 0:
            self._read_string(character, at)
        elif character == '"':
            self._quoted = at
            self._begin_value(at)
        elif character in "{[":
            self._begin_value(at)
            self._depth += 1
        elif character in "}]":
            return self._close(at)
        elif character == ":" and self._depth == 1 and self._awaits == "colon":
            self._awaits = "value"
        elif character == "," and self._depth == 1:
            self._end_value(at)
            self._awaits = "key"
        elif not character.isspace():
            self.failed = self._depth == 0
            self._begin_value(at)
        return False

    def _read_string(self, character: str, at: int) -> None:
        if self._escaped:
            self._escaped = False
        elif character == "\\":
            self._escaped = True
        elif character == '"':
            begun, self._quoted = self._quoted, -1
            if self._depth == 1 and self._awaits == "key":
                self._key = _string(self.raw[begun : at + 1]) or ""
                self._awaits = "colon"
            elif self._depth == 1:
                self._end_value(at + 1)

    def _close(self, at: int) -> bool:
        if self._depth == 1:
            self._end_value(at)
        self._depth -= 1
        if self._depth == 1:
            self._end_value(at + 1)
        self.failed = self._depth < 0
        return self._depth == 0

    def _begin_value(self, at: int) -> None:
        if self._depth == 1 and self._awaits == "value" and self._value < 0:
            self._value = at
            if self._key in _ARGUMENTS and self._arguments is None:
                self._arguments = (at, None)

    def _end_value(self, end: int) -> None:
        begun, self._value = self._value, -1
        if begun < 0:
            return
        if self._key == "name":
            self.name = _string(self.raw[begun:end])
            self.failed = self.name is None
        elif self._arguments == (begun, None):
            self._arguments = (begun, end)


def _string(text: str) -> str | None:
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, str) else None
