"""What can go wrong with a grammar.

GrammarError
├── InvalidGrammar   a client's grammar is too large, no grammar, matches nothing, or asks for more than its limits
├── NoGrammars       the model's tokenizer or its lack of end tokens allows no grammar at all
└── TooManyGrammars  so many others wait to be compiled that this one is not taken; nothing is wrong with it
"""

from __future__ import annotations


class GrammarError(Exception):
    """Root of this package's errors. `field` is the path of what a client has set."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field
        self.problem = problem


class InvalidGrammar(GrammarError):
    """The grammar itself is refused; says by which limit, or for what reason of the library's."""


class NoGrammars(GrammarError):
    """No grammar can be kept to with this model."""


class TooManyGrammars(GrammarError):
    """The queue of grammars is full; another process may take it, or this one a little later."""
