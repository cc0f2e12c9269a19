"""Between text and token ids: tokenizer, chat template, incremental detokenizing, stop strings."""

from overlap.text.detokenize import Detokenizer
from overlap.text.stops import StopStrings
from overlap.text.templates import ChatTemplate
from overlap.text.text import Text, TokenizerSource
from overlap.text.tokenizer import Tokenizer

__all__ = ["ChatTemplate", "Detokenizer", "StopStrings", "Text", "Tokenizer", "TokenizerSource"]
