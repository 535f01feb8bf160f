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
    """An `engine.mask.TokenMask`. Its only state is the position in the text, which the output tokens can restore."""

    def __init__(self, matcher: LLMatcher, grammar: Grammar) -> None:
        """`matcher` is at the beginning of the text."""
        self._matcher = matcher
        self._grammar = grammar
        self._num_consumed = 0

    def fill(self, output_ids: Sequence[int], words: Words) -> None:
        """Reads the tokens it has not seen yet, which may be many for a request from another node.

        Raises `InvalidRequest` if they do not begin a text of the grammar, or when a limit of the library is reached.
        """
        try:
            self._matcher.consume_tokens(list(output_ids[self._num_consumed :]))
            self._num_consumed = len(output_ids)
            check(self._matcher, self._grammar)
            self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
            check(self._matcher, self._grammar)  # a failed matcher would allow the end as if the text were complete
        except GrammarError as error:
            raise InvalidRequest(error.field, error.problem) from error


class GrammarMasks:
    """Makes the masks of one node."""

    def __init__(self, compiler: Compiler) -> None:
        self._matchers = GrammarQueue(compiler.matcher, MAX_KEPT)

    async def mask(self, sampling: common_pb2.SamplingParams) -> GrammarMask | None:
        """The mask of a request; None if it has no grammar. Raises `InvalidRequest`, `Busy`."""
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
