"""Whether a request's grammar can be kept to, found out before anything is spent on the request."""

from __future__ import annotations

import asyncio
import functools
from concurrent.futures import ThreadPoolExecutor

from batonpb import common_pb2
from grammar.compiler import Compiler
from grammar.errors import GrammarError
from grammar.source import Grammar, grammar_of
from router.errors import InvalidRequest
from router.tokenizer import Tokenizer

MAX_VERDICTS = 256


class GrammarChecker:
    """One for a router. A grammar is compiled on a thread, in bounded time, and the verdict is kept.

    The library reads the model's tokenizer anew, when the first grammar comes.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._compiler = Compiler(tokenizer.folder, sorted(tokenizer.eos_token_ids))
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grammar")
        self._verdict = functools.lru_cache(MAX_VERDICTS)(self._compile)

    async def check(self, sampling: common_pb2.SamplingParams) -> None:
        """Raises `InvalidRequest`, with the field and the reason. Costs nothing where there is no grammar."""
        try:
            grammar = grammar_of(sampling)
        except GrammarError as error:
            raise InvalidRequest(error.field, error.problem) from error
        if grammar is None:
            return
        problem = await asyncio.get_running_loop().run_in_executor(self._thread, self._verdict, grammar)
        if problem is not None:
            raise InvalidRequest(*problem)

    def _compile(self, grammar: Grammar) -> tuple[str, str] | None:
        """A field and what is wrong with it, or None."""
        try:
            self._compiler.matcher(grammar)
        except GrammarError as error:
            return error.field, error.problem
        return None
