"""ChatTemplate: chat messages to the text that the model was trained on, by its own Jinja template.

Templates come with models and are not trusted: they run in Jinja's immutable sandbox. The environment is that of
`transformers` (`utils/chat_template_utils.py`), so that the same template gives the same text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

from overlap.errors import RequestError


class _GenerationBlocks(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's part for training; here it only renders what it holds."""

    tags = {"generation"}  # noqa: RUF012  # Jinja's own way to declare them

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


class _Namespace(jinja2.utils.Namespace):
    """Jinja's namespace without names that lead into the interpreter."""

    def __init__(*args: Any, **values: Any) -> None:
        # No named `self`, so that a template may say namespace(self=1), as with Jinja's own.
        self, *given = args
        attributes = dict(*given, **values)
        for name in attributes:
            _refuse_private(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja's sandbox, where touching a forbidden attribute is an error at once and does not render as nothing."""

    def unsafe_undefined(self, obj: Any, attribute: str) -> jinja2.Undefined:
        raise jinja2.exceptions.SecurityError(f"{attribute!r} of {type(obj).__name__!r} is not for templates")


def _refuse_private(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace may not have the name {name!r}")


def _raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML, which the model has never seen.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _local_now() -> datetime:
    return datetime.now()  # noqa: DTZ005  # the user's date, as transformers has it


def _environment(now: Callable[[], datetime]) -> _Sandbox:
    environment = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda format: now().strftime(format)  # noqa: A006
    # A function, not the class: a template gets no type to climb from.
    environment.globals["dict"] = lambda *given, **values: dict(*given, **values)
    environment.globals["namespace"] = _Namespace
    return environment


class ChatTemplate:
    """A model's chat template. Thread-safe.

    `source` is the Jinja text, or None for a model without one. A template that does not compile harms only the
    requests that need it, so it is told by `render`. `bos_token` and `eos_token` are what a template may write; None
    leaves the name undefined, which renders as nothing. `now` is the clock of `strftime_now`: local time by default.
    """

    def __init__(
        self,
        source: str | None,
        *,
        bos_token: str | None = None,
        eos_token: str | None = None,
        unk_token: str | None = None,
        pad_token: str | None = None,
        now: Callable[[], datetime] = _local_now,
    ) -> None:
        self.source = source
        tokens = {"bos_token": bos_token, "eos_token": eos_token, "unk_token": unk_token, "pad_token": pad_token}
        self._tokens = {name: token for name, token in tokens.items() if token is not None}
        self._template: jinja2.Template | None = None
        self._broken: Exception | None = None
        if source is not None:
            try:
                self._template = _environment(now).from_string(source)
            except Exception as error:  # Jinja's compiler meets RecursionError and SyntaxError too
                self._broken = error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """Return the prompt's text. It holds its own BOS: encode it with `special=False`.

        `tools` are the functions that the model may call, as JSON schemas (OpenAI's form). Raises RequestError for
        messages of the wrong form, a model without a template, and whatever goes wrong in the template.
        """
        checked = checked_messages(messages)
        if self._broken is not None:
            raise RequestError(
                f"The model's chat template does not compile: {_told(self._broken)}. Send text or token ids instead."
            ) from self._broken
        if self._template is None:
            raise RequestError(
                "The model has no chat template, so it can not answer chat messages. "
                "Send text or token ids, or use an instruct model."
            )
        try:
            return self._template.render(
                messages=checked,
                tools=None if tools is None else [dict(tool) for tool in tools],
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._tokens,
            )
        except Exception as error:  # a template may raise anything
            raise RequestError(f"The model's chat template refused these messages: {_told(error)}.") from error


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).rstrip('.')}" if str(error) else type(error).__name__


def checked_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages with each content as one string, for templates know no parts.

    Text parts are put together with nothing between them. None is "". Other keys (`name`, `tool_calls`, ...) stay.
    Raises RequestError that names the message which is wrong.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise RequestError(f"messages must be a sequence of chat messages, not {type(messages).__name__}.")
    if not messages:
        raise RequestError("messages is empty. Send one message at least.")
    return [_checked(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _checked(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise RequestError(f"{where} must be a mapping with role and content, not {type(message).__name__}.")
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise RequestError(f'{where} must have a role such as "user", not {role!r}.')
    if "content" not in message and "tool_calls" not in message:
        raise RequestError(f"{where} has no content. Give it text.")
    content = message.get("content")
    if content is None:
        return {**message, "content": ""}
    if isinstance(content, str):
        return dict(message)
    if isinstance(content, Mapping) or not isinstance(content, Iterable) or isinstance(content, bytes):
        raise RequestError(f"{where}.content must be text or a list of text parts, not {type(content).__name__}.")
    texts = (_part_text(part, f"{where}.content[{index}]") for index, part in enumerate(content))
    return {**message, "content": "".join(texts)}


def _part_text(part: object, where: str) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if not isinstance(part, Mapping) or not isinstance(kind, str):
        raise RequestError(f'{where} must be {{"type": "text", "text": ...}}, not {type(part).__name__} {part!r:.80}.')
    if kind != "text":
        raise RequestError(f"{where} is of the type {kind!r}, which this model can not read. Send text parts only.")
    text = part.get("text")
    if not isinstance(text, str):
        raise RequestError(f"{where}.text must be a string, not {type(text).__name__}.")
    return text
