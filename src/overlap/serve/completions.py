"""/v1/completions: text that goes on."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import UNSET

from overlap.messages import Output, Prompt
from overlap.serve.errors import ApiError
from overlap.serve.logprobs import Decode, TextLogprobs, text_logprobs
from overlap.serve.protocol import MAX_ANSWERS, MAX_LOGPROBS, Asked, Sampled, asked, decode, sampling
from overlap.serve.shapes import Choice, Progress, TextChoice


class CompletionRequest(Sampled, frozen=True, kw_only=True):
    """The body of /v1/completions."""

    prompt: str | list[str | int | list[int]]
    max_tokens: int = 16
    logprobs: int | bool | None = None
    echo: bool = False


def parse_completion(body: bytes) -> Asked:
    """Understand the body of /v1/completions. Raises ApiError, and RequestError for a value out of range."""
    request = decode(body, CompletionRequest)
    logprobs = request.logprobs
    if logprobs is True:
        raise ApiError(400, f"logprobs must be an integer from 0 to {MAX_LOGPROBS}.", param="logprobs")
    if logprobs is False:  # what chat completions have for none; some clients send it here too
        logprobs = None
    if request.echo and logprobs is not None:
        raise ApiError(
            400,
            "echo with logprobs is not supported yet: this server has no log-probabilities of prompts. Leave one out.",
            param="echo",
            code="unsupported_parameter",
        )
    prompts = _prompts(request.prompt)
    return asked(
        request, prompts, sampling(request, max_tokens=request.max_tokens, logprobs=logprobs), echo=request.echo
    )


def _prompts(prompt: str | Sequence[str | int | list[int]]) -> tuple[Prompt, ...]:
    """Tell apart a text, the ids of one prompt, several texts, and the ids of several prompts."""
    if isinstance(prompt, str):
        return (prompt,)
    kinds = {type(item) for item in prompt}
    if kinds == {int}:
        return ([token for token in prompt if isinstance(token, int)],)
    if len(kinds) != 1:
        what = "is empty" if not kinds else "mixes kinds"
        raise ApiError(400, f"prompt {what}. Send a text, token ids, a list of texts, or a list of lists of token ids.",
                       param="prompt")  # fmt: skip
    if len(prompt) > MAX_ANSWERS:
        raise ApiError(400, f"prompt has {len(prompt)} prompts; send {MAX_ANSWERS} at most.", param="prompt")
    return tuple(item for item in prompt if not isinstance(item, int))


class TextAnswer:
    """One choice of a completion as it comes."""

    def __init__(self, index: int, decode: Decode, *, echoed: str = "", token_ids: bool = False) -> None:
        self._index = index
        self._decode = decode
        self._echoed = echoed
        self._progress = Progress()
        self._token_ids = token_ids
        self._offset = len(echoed)

    def opening(self) -> list[Choice]:
        """A completion opens with its first text; an echo comes at once."""
        return [TextChoice(index=self._index, text=self._echoed)] if self._echoed else []

    def chunks(self, output: Output) -> list[Choice]:
        """Return what is new as the choices of chunks; the last has the finish reason."""
        tokens = self._progress.tokens(output)
        choices: list[Choice] = []
        logprobs = self._logprobs(output)
        if output.text_delta or logprobs is not None or (self._token_ids and tokens):
            choices.append(
                TextChoice(
                    index=self._index,
                    text=output.text_delta,
                    logprobs=logprobs,
                    token_ids=tuple(tokens) if self._token_ids else UNSET,
                )
            )
        if output.finish_reason is not None:
            choices.append(TextChoice(index=self._index, text="", finish_reason=output.finish_reason))
        return choices

    def whole(self, output: Output) -> Choice:
        """Return the answer in one piece."""
        return TextChoice(
            index=self._index,
            text=self._echoed + output.text,
            logprobs=self._logprobs(output),
            finish_reason=output.finish_reason,
            token_ids=tuple(output.token_ids) if self._token_ids else UNSET,
        )

    def _logprobs(self, output: Output) -> TextLogprobs | None:
        entries = self._progress.logprobs(output)
        if not entries:
            return None
        told, self._offset = text_logprobs(entries, self._decode, self._offset)
        return told
