from __future__ import annotations

from typing import Any

import pytest

from overlap.serve.tools import CallBegins, CallGoesOn, MessageReader, Part, Text, Thought, call_format, thinking

F = {"name": "f", "arguments": '{"a": "}\\"<", "b": [1,{}]}'}
CASES: list[tuple[str, str | None, list[Any]]] = [
    (
        '<tool_call>\n{"name": "f", "arguments": {"a": "}\\"<", "b": [1,{}]}}\n</tool_call>\n'
        '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>',
        "hermes",
        [("f", '{"a": "}\\"<", "b": [1,{}]}'), ("g", "{}")],
    ),
    ('Sure.\n<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', "hermes", ["Sure.", ("f", '{"a": 1}')]),
    ('<tool_call>{"name": "h", "arguments": {}}', "hermes", ['<tool_call>{"name": "h", "arguments": {}}']),
    ("1 < 2 <tool_calm> x \n", "hermes", ["1 < 2 <tool_calm> x \n"]),
    ("<tool_call>nope</tool_call>", "hermes", ["<tool_call>nope</tool_call>"]),
    ('<tool_call>{"name": "f"}', "hermes", [("f", "{}")]),
    ('{"name": "f", "parameters": {"x": 1}}; {"name": "g", "parameters": {}}', "llama",
     [("f", '{"x": 1}'), ("g", "{}")]),
    ('{"answer": 42}', "llama", ['{"answer": 42}']),
    ('<|python_tag|>{"name": "f", "arguments": "{\\"x\\": 1}"}', "llama", [("f", '{"x": 1}')]),
    (' plain text {"name"', "llama", [' plain text {"name"']),
    ("<think>\n why \n\n</think>\n\nHi", None, [Thought("why"), "Hi"]),
    ("<thin", None, ["<thin"]),
    ("<think>cut <", None, [Thought("cut <")]),
]  # fmt: skip


def read(text: str, step: int, form: Any) -> list[Any]:
    """Read `text` in pieces of `step` characters; put together what belongs together."""
    reader = MessageReader(calls=form, names={"f", "g"}, thinking="never" if form else "maybe")
    parts: list[Part] = []
    for at in range(0, len(text), step):
        parts += reader.push(text[at : at + step])
    parts += reader.end()
    read: list[Any] = []
    for part in parts:
        match part:
            case Text(more) if read and isinstance(read[-1], str):
                read[-1] += more
            case Text(more):
                read.append(more)
            case Thought(more) if read and isinstance(read[-1], Thought):
                read[-1] = Thought(read[-1].text + more)
            case Thought():
                read.append(part)
            case CallBegins(_, id_, name):
                assert id_.startswith("call_")
                read.append((name, ""))
            case CallGoesOn(_, more):
                read[-1] = (read[-1][0], read[-1][1] + more)
    return read


@pytest.mark.parametrize(("text", "form", "expected"), CASES, ids=range(len(CASES)))
@pytest.mark.parametrize("step", [1, 2, 3, 5, 7, 11, 1000])
def test_text_in_any_pieces_reads_the_same(text: str, form: str | None, expected: list[Any], step: int) -> None:
    assert read(text, step, form) == expected


def test_a_second_call_is_dropped_where_only_one_was_asked_for() -> None:
    reader = MessageReader(calls="hermes", names={"f"}, parallel=False)
    one = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    parts = [*reader.push(one * 2), *reader.end()]
    assert [part.index for part in parts if isinstance(part, CallBegins)] == [0]
    assert not [part for part in parts if isinstance(part, Text)]


def test_the_form_of_calls_is_told_from_the_template() -> None:
    assert call_format(None) is None
    assert call_format("{{ messages }}") is None
    assert call_format("{{ tools }} <tool_call>") == "hermes"
    assert call_format('{{ tools }} {"name": function name, "parameters": dictionary}') == "llama"


def test_a_template_that_opens_reasoning_lets_the_answer_begin_inside_it() -> None:
    assert thinking("{{ messages }}", "") == "never"
    assert thinking("a</think>b", "assistant\n") == "maybe"
    assert thinking("a</think>b", "assistant\n<think>\n") == "inside"
