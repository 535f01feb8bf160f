"""Whether a request's grammar can be enforced, determined before anything is spent on the request."""

from __future__ import annotations

import json

from batonpb import common_pb2
from grammar.compiler import Compiler
from grammar.errors import GrammarError, TooManyGrammars
from grammar.queue import GrammarQueue
from grammar.source import Grammar, grammar_of
from router.errors import ClusterBusy, InvalidRequest
from router.tokenizer import Tokenizer
from router.tool_grammar import TOOLS, hold_to_tools, schemas
from router.validate_chat import Chat

MAX_VERDICTS = 256
Verdict = tuple[str, str] | None  # a field and the problem with it


class GrammarChecker:
    """One per router. A grammar is compiled on a thread, in bounded time, and the verdict is kept.

    The library reads the model's tokenizer itself, when the first grammar comes.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._compiler = Compiler(tokenizer.folder, sorted(tokenizer.eos_token_ids))
        self._verdicts = GrammarQueue(self._compile, MAX_VERDICTS)

    async def check(self, sampling: common_pb2.SamplingParams, chat: Chat | None = None) -> None:
        """Raises `InvalidRequest`, with the field and the reason, and `ClusterBusy` if too many grammars wait.

        Costs nothing if there is no grammar. If the chat's tools determine the grammar, `sampling` has it afterwards,
        in place of the client's.
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

    async def _problem(self, sampling: common_pb2.SamplingParams) -> Verdict:
        try:
            grammar = grammar_of(sampling)
        except GrammarError as error:
            return error.field, error.problem
        return None if grammar is None else await self._verdict_of(grammar)

    async def _verdict_of(self, grammar: Grammar) -> Verdict:
        try:
            return await self._verdicts.get(grammar)
        except TooManyGrammars as error:
            raise ClusterBusy(str(error)) from error

    def _compile(self, grammar: Grammar) -> Verdict:
        try:
            self._compiler.matcher(grammar)
        except GrammarError as error:
            return error.field, error.problem
        return None
