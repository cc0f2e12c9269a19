"""AnswerText: the text of one answer as its tokens come, ended by its stop strings."""

from __future__ import annotations

from collections.abc import Sequence

from overlap.messages import SamplingParams
from overlap.text.stops import StopStrings
from overlap.text.tokenizer import Tokenizer


class AnswerText:
    """Turns tokens into text that never ends in half a character or in part of a stop string.

    Without a tokenizer (random weights made from a configuration alone) the text stays empty.
    """

    __slots__ = ("_detokenizer", "_stops")

    def __init__(self, tokenizer: Tokenizer | None, prompt_ids: Sequence[int], params: SamplingParams) -> None:
        self._detokenizer = (
            tokenizer.detokenizer(prompt_ids, skip_special_tokens=params.skip_special_tokens) if tokenizer else None
        )
        self._stops = StopStrings(params.stop_strings)

    def push(self, token: int) -> tuple[str, str | None]:
        """Take in a token; return the text that may be shown now, and the stop string that ends the answer, if any."""
        return ("", None) if self._detokenizer is None else self._stops.push(self._detokenizer.push(token))

    def end(self) -> tuple[str, str | None]:
        """Return the rest of the text, and the stop string that it runs into, if any. Nothing is pushed afterwards."""
        if self._detokenizer is None:
            return "", None
        emit, matched = self._stops.push(self._detokenizer.flush())
        return (emit, matched) if matched is not None else (emit + self._stops.flush(), None)
