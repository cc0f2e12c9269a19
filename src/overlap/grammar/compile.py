"""From a StructuredOutput to a matcher of llguidance's, or to a RequestError that says what is wrong with it."""

from __future__ import annotations

import json
from collections import OrderedDict
from typing import Final

from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance._tokenizer import TokenizerWrapper

from overlap.errors import RequestError
from overlap.structured import StructuredOutput
from overlap.text.tokenizer import Tokenizer

SPACE: Final = r"\x20|\n\x20{0,40}"
"""White space between the parts of JSON: none, a space, or a line's end with an indent. More of it, which the standard
allows, lets a small model write spaces for ever."""
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
        return LLMatcher.grammar_from_json_schema(_schema(form), overrides={"whitespace_pattern": SPACE})
    start, rules = _rules(form)
    if form.behind:
        rules += f"\nbefore[suffix={json.dumps(form.behind)}]: /(?s:.*)/\nspace: /\\s*/"
        start = f"before space {start}"
    return LLMatcher.grammar_from_lark(f"start: {start}\n{rules}")


def _schema(form: StructuredOutput) -> str:
    return form.text if form.kind == "json_schema" else '{"type": "object"}'


def _rules(form: StructuredOutput) -> tuple[str, str]:
    """Return a form as the name of a rule and the rules of Lark."""
    match form.kind:
        case "choice":
            return "form", "form: " + " | ".join(json.dumps(one, ensure_ascii=False) for one in json.loads(form.text))
        case "regex":
            return "form", f"form: {_pattern(form.text)}"
        case "lark":
            raise RequestError("A grammar cannot be combined with reasoning in front. Ask for another form.")
        case _:
            schema = json.loads(_schema(form))
            if isinstance(schema, bool):
                schema = {} if schema else {"not": {}}
            schema["x-guidance"] = {"whitespace_pattern": SPACE}
            return "form", f"form: %json {json.dumps(schema)}"


def _pattern(regex: str) -> str:
    """Return a regex between slashes."""
    return "/" + regex.replace("\\/", "/").replace("/", "\\/").replace("\n", "\\n") + "/"


def check(form: StructuredOutput) -> None:
    """Raise RequestError if a form cannot be used with any vocabulary."""
    failed, messages = LLMatcher.validate_grammar_with_warnings(_grammar(form), None, limits=limits())
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
