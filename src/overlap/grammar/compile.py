"""From a StructuredOutput to a matcher of llguidance's, or to a RequestError that says what is wrong with it."""

from __future__ import annotations

import json
from collections import OrderedDict
from typing import Final

from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance._tokenizer import TokenizerWrapper

from overlap.errors import RequestError
from overlap.structured import SPACE, StructuredOutput, lark_rule, schema_of
from overlap.text.tokenizer import Tokenizer

KEPT: Final = 16
"""Forms whose compilation is remembered: the answers of one request have one form."""
_MOST_TOLD: Final = 400
"""Characters of llguidance's error that are told: it may quote much of a form."""


def limits() -> LLParserLimits:
    """Return what a grammar may take: about 20 ms for its regexes, 15 ms for a mask, 50 MB for its lexer."""
    return LLParserLimits(max_lexer_states=30_000, verbose_errors=False)


def grammar_of(form: StructuredOutput) -> str:
    """Return a form as a grammar of llguidance's. Raises RequestError for what it can tell to be none."""
    if not form.behind and form.kind in ("regex", "lark"):
        return (LLMatcher.grammar_from_regex if form.kind == "regex" else LLMatcher.grammar_from_lark)(form.text)
    if not form.behind and form.kind != "choice":
        return LLMatcher.grammar_from_json_schema(schema_of(form), overrides={"whitespace_pattern": SPACE})
    start, rules = "form", [f"form: {lark_rule(form)}"]
    if form.behind:
        start = "before space form"
        rules += [f"before[suffix={json.dumps(form.behind)}]: /(?s:.*)/", "space: /\\s*/"]
    return LLMatcher.grammar_from_lark("\n".join([f"start: {start}", *rules]))


def check(form: StructuredOutput) -> None:
    """Raise RequestError if a form cannot be used with any vocabulary."""
    grammar = _grammar(form)
    try:
        failed, messages = LLMatcher.validate_grammar_with_warnings(grammar, None, limits=limits())
    except BaseException as error:  # a panic in llguidance is no Exception
        raise refusal(form, f"it could not be checked ({error!r:.200})") from error
    if failed:
        raise refusal(form, messages[0])


def _grammar(form: StructuredOutput) -> str:
    try:
        return grammar_of(form)
    except RequestError:
        raise
    except (ValueError, RecursionError) as error:
        raise refusal(form, str(error)) from None


def refusal(form: StructuredOutput, why: str) -> RequestError:
    """Return the error of a form that cannot be used."""
    first = " ".join(why.replace("<non-verbose/>", "").split())
    return RequestError(f"The answer cannot be held to this {form.kind}: {first[:_MOST_TOLD] or 'no reason is known'}")


class Grammars:
    """Compiles forms for one vocabulary. One thread at a time uses it.

    Making one takes 0.2 s for 49,152 tokens, most of it in llguidance with the GIL held: at start, not beside a loop.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_ids: tuple[int, ...]) -> None:
        """`vocab_size` is the model's, and so the width of a mask; `end_ids` are the tokens that end an answer."""
        self._vocabulary = LLTokenizer(
            TokenizerWrapper(_Vocabulary(tokenizer, vocab_size, end_ids)), n_vocab=vocab_size, eos_token=list(end_ids)
        )
        self.num_words: Final = -(-vocab_size // 32)
        """Words of a mask."""
        self._kept: OrderedDict[StructuredOutput, LLMatcher] = OrderedDict()

    def compile(self, form: StructuredOutput) -> LLMatcher:
        """Return a matcher that has read nothing yet. Raises RequestError for a form that cannot be used."""
        matcher = self._kept.pop(form, None)
        if matcher is None:
            matcher = LLMatcher(self._vocabulary, _grammar(form), log_level=0, limits=limits())
        self._kept[form] = matcher
        while len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        if matcher.is_error():
            raise refusal(form, matcher.get_error())
        return matcher.deep_copy()


class _Vocabulary:
    """A tokenizer as llguidance asks for it."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_ids: tuple[int, ...]) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = end_ids[0]
        tokens = tokenizer.token_bytes()[:vocab_size]
        self.tokens = tokens + [b""] * (vocab_size - len(tokens))  # what no text has: no form allows it
        self.special_token_ids = sorted({*tokenizer.special_ids, *end_ids})

    def __call__(self, text: bytes | str) -> list[int]:
        return self._tokenizer.encode(text if isinstance(text, str) else text.decode(errors="replace"), special=False)
