"""Whether a request's grammar can be enforced, determined before anything is spent on the request."""

from __future__ import annotations

import asyncio
import functools
import json
from concurrent.futures import ThreadPoolExecutor

from batonpb import common_pb2
from grammar.compiler import Compiler
from grammar.errors import GrammarError
from grammar.source import Grammar, grammar_of
from router.errors import InvalidRequest
from router.tokenizer import Tokenizer
from router.tool_grammar import TOOLS, hold_to_tools, schemas
from router.validate_chat import Chat

MAX_VERDICTS = 256


class GrammarChecker:
    """One per router. A grammar is compiled on a thread, in bounded time, and the verdict is kept.

    The library reads the model's tokenizer itself, when the first grammar comes.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._compiler = Compiler(tokenizer.folder, sorted(tokenizer.eos_token_ids))
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grammar")
        self._verdict = functools.lru_cache(MAX_VERDICTS)(self._compile)

    async def check(self, sampling: common_pb2.SamplingParams, chat: Chat | None = None) -> None:
        """Raises `InvalidRequest`, with the field and the reason. Costs nothing if there is no grammar.

        If the chat's tools determine the grammar, `sampling` has it afterwards, in place of the client's.
        """
        if problem := await self._problem(sampling):
            raise InvalidRequest(*problem)
        if chat is not None and hold_to_tools(sampling, chat, self._tokenizer.added_tokens):
            if problem := await self._problem(sampling):
                raise InvalidRequest(TOOLS, await self._blame(chat) or problem[1])

    async def _blame(self, chat: Chat) -> str:
        """Which tool's parameters cannot be enforced, and why; "" if each of them can be by itself."""
        for name, schema in schemas(chat).items():
            if problem := await self._verdict_of(Grammar("json_schema", json.dumps(schema))):
                return f"parameters of {name!r}: {problem[1]}"
        return ""

    async def _problem(self, sampling: common_pb2.SamplingParams) -> tuple[str, str] | None:
        """A field and the problem with it, or None."""
        try:
            grammar = grammar_of(sampling)
        except GrammarError as error:
            return error.field, error.problem
        return None if grammar is None else await self._verdict_of(grammar)

    async def _verdict_of(self, grammar: Grammar) -> tuple[str, str] | None:
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._verdict, grammar)

    def _compile(self, grammar: Grammar) -> tuple[str, str] | None:
        try:
            self._compiler.matcher(grammar)
        except GrammarError as error:
            return error.field, error.problem
        return None
