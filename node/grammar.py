"""A request's grammar as a mask over the engine's tokens: the only file that knows both."""

from __future__ import annotations

from collections.abc import Sequence

from llguidance import LLMatcher

from batonpb import common_pb2
from engine.errors import InvalidRequest
from engine.mask import Words
from grammar.compiler import Compiler, check
from grammar.errors import GrammarError, TooManyGrammars
from grammar.queue import GrammarQueue
from grammar.source import Grammar, grammar_of
from node.errors import Busy

MAX_KEPT = 32  # compiled grammars; most clients send the same one again and again


class GrammarMask:
    """An `engine.mask.TokenMask`. What it keeps is where in the text it is, which the output tokens tell anew."""

    def __init__(self, matcher: LLMatcher, grammar: Grammar) -> None:
        """`matcher` is at the beginning of the text."""
        self._matcher = matcher
        self._grammar = grammar
        self._num_consumed = 0

    def fill(self, output_ids: Sequence[int], words: Words) -> None:
        """Reads the tokens that it has not seen; of a request that comes from elsewhere that may be many.

        Raises `InvalidRequest` where those are no beginning of a text of the grammar, and beyond the library's limits.
        """
        try:
            self._matcher.consume_tokens(list(output_ids[self._num_consumed :]))
            self._num_consumed = len(output_ids)
            check(self._matcher, self._grammar)
            self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
            check(self._matcher, self._grammar)  # a matcher that fails here allows the end, as if all were well
        except GrammarError as error:
            raise InvalidRequest(error.field, error.problem) from error


class GrammarMasks:
    """Makes them, for one node."""

    def __init__(self, compiler: Compiler) -> None:
        self._matchers = GrammarQueue(compiler.matcher, MAX_KEPT)

    async def mask(self, sampling: common_pb2.SamplingParams) -> GrammarMask | None:
        """The mask of a request, None where it has no grammar. Raises `InvalidRequest`, `Busy`."""
        try:
            grammar = grammar_of(sampling)
            if grammar is None:
                return None
            matcher = await self._matchers.get(grammar)
            return GrammarMask(matcher.deep_copy(), grammar)
        except TooManyGrammars as error:
            raise Busy(str(error)) from error
        except GrammarError as error:
            raise InvalidRequest(error.field, error.problem) from error
