"""/v1/completions: text that goes on."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import UNSET

from overlap.messages import Output, Prompt
from overlap.serve.errors import ApiError
from overlap.serve.logprobs import Decode, TextLogprobs, joined, prompt_logprobs, prompt_table, text_logprobs
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
    only_echo = request.echo and request.max_tokens == 0
    prompts = _prompts(request.prompt)
    params = sampling(
        request,
        max_tokens=1 if only_echo else request.max_tokens,  # the engine's least; `answers.answer` leaves it out
        logprobs=logprobs,
        echoed_logprobs=logprobs if request.echo else None,
    )
    return asked(request, prompts, params, echo=request.echo, only_echo=only_echo)


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

    def __init__(
        self,
        index: int,
        decode: Decode,
        *,
        prompt: Sequence[int] = (),
        echoed: str | None = None,
        token_ids: bool = False,
        num_scores: int | None = None,
    ) -> None:
        """`echoed` is the text of `prompt` if it is to stand in front of the answer's.

        `num_scores` alternatives to each token of the prompt are told in a table of their own; None tells none.
        """
        self._num_scores = num_scores
        self._index = index
        self._decode = decode
        self._prompt = prompt
        self._echoed = echoed
        self._progress = Progress()
        self._token_ids = token_ids
        self._offset = len(echoed or "")
        self._opened = False

    def opening(self) -> list[Choice]:
        """A completion opens with its first text."""
        return []

    def plain(self, output: Output) -> str | None:
        """Return what is new, if that is text and nothing else."""
        if self._token_ids or output.finish_reason is not None or output.logprobs is not None:
            return None
        return None if self._echoed and not self._opened else output.text_delta

    def choice(self, text: str) -> Choice:
        """Return some text as the choice of a chunk."""
        return TextChoice(index=self._index, text=text)

    def chunks(self, output: Output) -> list[Choice]:
        """Return what is new as the choices of chunks: first the echo, last the finish reason."""
        choices: list[Choice] = []
        if self._echoed and not self._opened:
            choices.append(TextChoice(index=self._index, text=self._echoed, logprobs=self._scores(output)))
        self._opened = True
        tokens = self._progress.tokens(output)
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
        scores = self._scores(output)
        return TextChoice(
            index=self._index,
            text=(self._echoed or "") + output.text,
            logprobs=self._logprobs(output) if scores is None else joined(scores, self._logprobs(output)),
            finish_reason=output.finish_reason,
            token_ids=tuple(output.token_ids) if self._token_ids else UNSET,
            prompt_logprobs=prompt_table(output, self._num_scores, self._decode),
        )

    def _scores(self, output: Output) -> TextLogprobs | None:
        if output.prompt_logprobs is None or self._echoed is None:
            return None
        return prompt_logprobs(self._prompt, output.prompt_logprobs, self._decode, self._echoed)

    def _logprobs(self, output: Output) -> TextLogprobs | None:
        entries = self._progress.logprobs(output)
        if not entries:
            return None
        told, self._offset = text_logprobs(entries, self._decode, self._offset)
        return told
