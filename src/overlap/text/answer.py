"""AnswerText: the text of one answer as its tokens come, ended by its stop strings."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from overlap.messages import SamplingParams
from overlap.text.stops import StopStrings
from overlap.text.tokenizer import Tokenizer


class AnswerText:
    """Turns tokens into text that never ends in half a character or in part of a stop string.

    Without a tokenizer (random weights made from a configuration alone) the text stays empty.
    """

    __slots__ = ("_detokenizer", "_includes_stops", "_looks", "_stops", "_unstopped")

    def __init__(self, tokenizer: Tokenizer | None, prompt_ids: Sequence[int], params: SamplingParams) -> None:
        self._detokenizer = (
            tokenizer.detokenizer(prompt_ids, skip_special_tokens=params.skip_special_tokens) if tokenizer else None
        )
        self._stops = StopStrings(params.stop_strings)
        self._looks = bool(params.stop_strings)
        self._unstopped = params.min_tokens  # so many tokens are still to come in whose text no stop is looked for
        self._includes_stops = params.include_stop_str_in_output

    def push(self, token: int) -> tuple[str, str | None]:
        """Take in a token; return the text that may be shown now, and the stop string that ends the answer, if any."""
        if self._detokenizer is None:
            return "", None
        text = self._detokenizer.push(token)
        if self._unstopped:
            self._unstopped -= 1
            return text, None
        return self._searched(text)

    @property
    def plain(self) -> Callable[[int], str] | None:
        """What does the same as `push` where no stop string can end the answer, and returns the text only."""
        if self._looks:
            return None
        return _no_text if self._detokenizer is None else self._detokenizer.push

    @property
    def includes_stops(self) -> bool:
        """Whether what ends the answer is part of its text."""
        return self._includes_stops

    def _searched(self, text: str) -> tuple[str, str | None]:
        emit, matched = self._stops.push(text)
        return (emit + matched if matched is not None and self._includes_stops else emit), matched

    def end(self) -> tuple[str, str | None]:
        """Return the rest of the text, and the stop string that it runs into, if any. Nothing is pushed afterwards."""
        if self._detokenizer is None:
            return "", None
        rest = self._detokenizer.flush()
        if self._unstopped:
            return rest, None
        emit, matched = self._searched(rest)
        return (emit, matched) if matched is not None else (emit + self._stops.flush(), None)


def _no_text(_token: int) -> str:
    return ""
