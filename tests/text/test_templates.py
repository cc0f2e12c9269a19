"""ChatTemplate: equal to transformers on real template styles, and safe with bad ones."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from overlap.errors import RequestError
from overlap.text import ChatTemplate

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA2 = """{% if messages[0]['role'] == 'system' %}
    {% set offset = 1 %}
{% else %}
    {% set offset = 0 %}
{% endif %}
{% for message in messages[offset:] %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {% endif %}
    {% if message['role'] == 'user' %}
        {{ bos_token + '[INST] ' + message['content'].strip() + ' [/INST]' }}
    {% else %}
        {% generation %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endgeneration %}
    {% endif %}
{% endfor %}
"""
TOOLS = """{%- set ns = namespace(calls=0) %}
{%- if tools is not none %}
    {{- '<|im_start|>system\\n# Tools\\n' }}
    {%- for tool in tools %}
        {{- '\\n' }}{{ tool | tojson }}{{ '\\n' }}{{ tool | tojson(indent=2) }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'skip' %}{% continue %}{% endif %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content }}
    {%- if message.tool_calls %}
        {%- for call in message.tool_calls %}
            {%- set ns.calls = ns.calls + 1 %}
            {{- '\\n<tool_call>\\n' }}{{ call.function | tojson }}{{ '\\n</tool_call>' }}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' ~ ns.calls ~ missing }}{%- endif %}
"""
TALK: list[dict[str, Any]] = [
    {"role": "system", "content": "Be <brief> & kind."},
    {"role": "user", "content": "  Wie geht's, 世界?\n"},
    {"role": "assistant", "content": "Gut."},
    {"role": "user", "content": "12 + 30?"},
]
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "wetter", "description": "<b>é</b>", "parameters": {"type": "object", "properties": {}}},
}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "wetter", "arguments": {"x": 1}}}]}


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("tools", [None, [TOOL]])
@pytest.mark.parametrize("talk", [TALK, TALK[1:2], [*TALK, CALL]], ids=["long", "short", "call"])
@pytest.mark.parametrize("source", [SMOLLM2, LLAMA3, LLAMA2, TOOLS], ids=["smollm2", "llama3", "llama2", "tools"])
def test_a_template_renders_what_transformers_renders(
    source: str, talk: list[dict[str, Any]], tools: list[dict[str, Any]] | None, add_generation_prompt: bool
) -> None:
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    [expected], _ = render_jinja_template(
        [talk], tools=tools, chat_template=source, add_generation_prompt=add_generation_prompt, **tokens
    )
    rendered = ChatTemplate(source, bos_token="<s>", eos_token="</s>").render(
        talk, tools=tools, add_generation_prompt=add_generation_prompt
    )
    assert rendered == expected


def test_the_date_is_the_clocks() -> None:
    template = ChatTemplate("{{ strftime_now('%d %b %Y') }}", now=lambda: datetime(2024, 7, 26))  # noqa: DTZ001
    assert template.render(TALK) == "26 Jul 2024"


def test_text_parts_and_none_become_text() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    template = ChatTemplate("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    talk: list[dict[str, Any]] = [{"role": "user", "content": parts}, {"role": "assistant", "content": None}]
    assert template.render(talk) == "[ab][]"
    assert talk[0]["content"] is parts, "the caller's messages stay as they are"


@pytest.mark.parametrize(
    ("messages", "told"),
    [
        ([], "messages is empty"),
        ("hello", "sequence of chat messages, not str"),
        ({"role": "user", "content": "x"}, "sequence of chat messages, not dict"),
        (["x"], r"messages\[0\] must be a mapping"),
        ([{"content": "x"}], "must have a role"),
        ([{"role": 3, "content": "x"}], "must have a role .* not 3"),
        ([{"role": "user"}], r"messages\[0\] has no content"),
        ([{"role": "user", "content": 3}], "not int"),
        ([{"role": "user", "content": {"type": "text"}}], "not dict"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], r"content\[0\] .* 'image_url'"),
        ([{"role": "user", "content": ["x"]}], r"content\[0\] must be"),
        ([{"role": "user", "content": [{"type": "text"}]}], r"text must be a string, not NoneType"),
    ],
)
def test_messages_of_the_wrong_form_are_refused_by_name(messages: Any, told: str) -> None:
    with pytest.raises(RequestError, match=told):
        ChatTemplate(SMOLLM2).render(messages)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception.__globals__ }}",
        "{{ dict.__class__ }}",
        "{{ dict.__init__ }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ namespace(__class__=1) }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ strftime_now.__closure__ }}",
        "{{ messages.append(1) }}",
        "{{ '{0.__class__.__mro__}'.format('') }}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ raise_exception('no') }}",
        "{{ missing.attribute }}",
        "{{ 1 / 0 }}",
        "{% if %}",
        "{% include 'x' %}",
    ],
)
def test_a_template_that_breaks_out_or_breaks_down_harms_only_its_request(source: str) -> None:
    template = ChatTemplate(source)
    with pytest.raises(RequestError, match="chat template"):
        template.render(TALK)


def test_a_model_without_a_template_says_what_to_do() -> None:
    with pytest.raises(RequestError, match=r"no chat template.*Send text or token ids"):
        ChatTemplate(None).render(TALK)
