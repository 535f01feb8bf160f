"""From a grammar to a matcher: a state machine over the tokens of one model that says which may come next.

The library is llguidance: Rust, derivatives of regular expressions in an Earley parser, computed lazily. It bounds its
own work; `LIMITS` are set so that no client can keep a core busy or fill the memory. Everything here may take
milliseconds, releases Python's lock meanwhile, and should run on a thread.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from grammar.errors import InvalidGrammar, NoGrammars
from grammar.source import FIELD, Grammar

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

MAX_REASON_CHARS = 300
# Without a bound a model may emit white space forever. Pretty printing needs a line break and its indent.
JSON_OPTIONS: JsonCompileOptions = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{0,32}", "lenient": False}
LIMITS = LLParserLimits(
    initial_lexer_fuel=200_000,  # 50,000 take about 1 ms
    step_lexer_fuel=50_000,  # 14,000 take about 1 ms
    step_max_items=20_000,
    max_lexer_states=50_000,  # of about 400 bytes
    max_grammar_size=200_000,
    verbose_errors=False,  # the parser's state is of no use to a client
)


class Compiler:
    """Compiles for one model folder's `tokenizer.json`. Thread-safe; reads the file on first use."""

    def __init__(self, folder: Path, eos_token_ids: Sequence[int], vocab_size: int | None = None) -> None:
        """`vocab_size` is the width of the model's logits; None: that of the tokenizer."""
        self._folder = folder
        self._eos_token_ids = sorted(eos_token_ids)
        self._vocab_size = vocab_size
        self._reading = threading.Lock()
        self._tokenizer: LLTokenizer | None = None

    def matcher(self, grammar: Grammar) -> LLMatcher:
        """A newly compiled matcher at the beginning of the text. Raises `InvalidGrammar`, `NoGrammars`."""
        tokenizer = self._read_tokenizer()
        try:
            matcher = LLMatcher(tokenizer, _to_library(grammar), log_level=0, limits=LIMITS)
        except Exception as error:  # the library raises many kinds of errors
            raise InvalidGrammar(grammar.field, _shortened(str(error))) from error
        check(matcher, grammar)
        matcher.compute_bitmask()  # a grammar that nothing matches, or that is too expensive, usually shows here
        check(matcher, grammar)
        return matcher

    def _read_tokenizer(self) -> LLTokenizer:
        with self._reading:
            if self._tokenizer is None:
                self._tokenizer = self._new_tokenizer()
            return self._tokenizer

    def _new_tokenizer(self) -> LLTokenizer:
        if not self._eos_token_ids:
            raise NoGrammars(FIELD, "this model has no end token, so no text of it could end where a grammar does")
        try:
            source = (self._folder / "tokenizer.json").read_text(encoding="utf-8")
            return LLTokenizer(source, n_vocab=self._vocab_size, eos_token=self._eos_token_ids)
        except Exception as error:
            raise NoGrammars(FIELD, f"this model's tokenizer does not allow it: {_shortened(str(error))}") from error


def check(matcher: LLMatcher, grammar: Grammar) -> None:
    """Raises `InvalidGrammar` for a matcher that has stopped without completing a text."""
    if matcher.is_error():
        raise InvalidGrammar(grammar.field, _reason(matcher))


def _reason(matcher: LLMatcher) -> str:
    error = matcher.get_error()
    return "no text matches it" if error.startswith("NoExtension") else _shortened(error)


def _shortened(text: str) -> str:
    text = " ".join(text.replace("<non-verbose/>", "").split())
    return text if len(text) <= MAX_REASON_CHARS else f"{text[:MAX_REASON_CHARS]}…"


def _to_library(grammar: Grammar) -> str:
    """In the library's own form. Raises `ValueError`."""
    if grammar.kind == "regex":
        return LLMatcher.grammar_from_regex(grammar.text)
    if grammar.kind == "choice":
        choices = " | ".join(json.dumps(choice) for choice in json.loads(grammar.text))
        return LLMatcher.grammar_from_lark(f"start: {choices}")
    if grammar.kind == "lark":
        return LLMatcher.grammar_from_lark(grammar.text)
    schema = '{"type": "object"}' if grammar.kind == "json_object" else grammar.text
    return LLMatcher.grammar_from_json_schema(schema, overrides=JSON_OPTIONS)
