"""A conversation at the terminal: `overlap chat`."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from dataclasses import dataclass

from overlap import AsyncEngine, Output, SamplingParams
from overlap.errors import RequestError


@dataclass(slots=True)
class Conversation:
    """A conversation at the terminal, and the engine that keeps it going."""

    engine: AsyncEngine
    params: SamplingParams
    messages: list[dict[str, str]]
    opening: tuple[dict[str, str], ...]
    """What `/reset` goes back to."""

    async def answer(self, text: str) -> None:
        """Stream the answer to `text`. However the answer ends, what was shown of it stays in the conversation.

        A message that the engine refuses, as it does when the conversation has outgrown the context, is taken back.
        """
        self.messages.append({"role": "user", "content": text})
        shown = ""
        output: Output | None = None
        try:
            async with contextlib.aclosing(self.engine.generate(self.messages, self.params)) as outputs:
                async for output in outputs:
                    print(output.text_delta, end="", flush=True)
                    shown = output.text
            print(flush=True)
        except RequestError as error:
            note(f"{error} The message was not kept; /reset starts a new conversation.")
        finally:
            if output is None:
                self.messages.pop()
            else:
                self.messages.append({"role": "assistant", "content": shown})
        if output is not None and output.finish_reason == "length" and not self._was_cut(output):
            context = self.engine.context
            note(f"The conversation has filled the model's context of {context} tokens. /reset starts a new one.")

    def reset(self) -> None:
        """Forget all but the system message."""
        self.messages[:] = self.opening

    def _was_cut(self, output: Output) -> bool:
        """Whether the answer ended at `max_tokens`, as it was asked to."""
        return self.params.max_tokens is not None and output.usage.completion_tokens >= self.params.max_tokens


def converse(runner: asyncio.Runner, conversation: Conversation) -> None:
    """Read messages and answer them until the input or the reader ends it."""
    while True:
        try:
            line = _read_line()
        except EOFError:
            return
        except KeyboardInterrupt:
            note("\nCtrl-D or /exit ends.")
            continue
        match line.strip():
            case "":
                continue
            case "/exit":
                return
            case "/reset":
                conversation.reset()
                note("The conversation is forgotten.")
            case text if text.startswith("/") and " " not in text and "/" not in text[1:]:
                note(f"There is no command {text}. Commands: /reset, /exit.")
            case text:
                try:
                    runner.run(conversation.answer(text))
                except KeyboardInterrupt:
                    note("\n(stopped)")


def _read_line() -> str:
    """Read a line with line editing at a terminal, without a prompt from a pipe. Raises EOFError at the end."""
    if sys.stdin.isatty() and sys.stdout is not None and sys.stdout.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # gives input() line editing and history
        return input("> ")
    if sys.stdin.isatty():
        print("> ", end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line


def note(text: str) -> None:
    """Tell whoever sits at the terminal; stdout is for the model's text alone."""
    print(text, file=sys.stderr, flush=True)
