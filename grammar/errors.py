"""What can go wrong with a grammar.

GrammarError
├── InvalidGrammar   a client's grammar is too large, malformed, matches nothing, or exceeds the limits on work
├── NoGrammars       the model's tokenizer or its lack of end tokens allows no grammar at all
└── TooManyGrammars  too many others wait to be compiled; nothing is wrong with this one
"""

from __future__ import annotations


class GrammarError(Exception):
    """Root of this package's errors. `field` is the path of what a client has set."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field
        self.problem = problem


class InvalidGrammar(GrammarError):
    """The grammar itself is refused; the message names the limit, or gives the library's reason."""


class NoGrammars(GrammarError):
    """No grammar can be enforced with this model."""


class TooManyGrammars(GrammarError):
    """The queue of grammars is full; another process may take it, or this one a little later."""
