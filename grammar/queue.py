"""Grammars are worked at one after another on a thread, and a bounded number of them waits for it.

The worst take tenths of a second. What was made of a grammar is kept, and whoever comes with it again waits for nobody;
whoever comes while it is being made gets the same.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Generic, TypeVar

from grammar.errors import TooManyGrammars
from grammar.source import FIELD, Grammar

MAX_WAITING = 32  # grammars, the one that is worked at included: seconds of waiting, at the worst

T = TypeVar("T")


class GrammarQueue(Generic[T]):
    """`make` runs on the thread. What it returns is kept for the last `max_kept` grammars, what it raises is not."""

    def __init__(self, make: Callable[[Grammar], T], max_kept: int) -> None:
        self._make = make
        self._max_kept = max_kept
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grammar")
        self._made: OrderedDict[Grammar, T] = OrderedDict()  # the one that was asked for last comes last
        self._waiting: dict[Grammar, asyncio.Future[T]] = {}

    async def get(self, grammar: Grammar) -> T:
        """What `make` returns. Raises `TooManyGrammars`, and what `make` raises."""
        if grammar in self._made:
            self._made.move_to_end(grammar)
            return self._made[grammar]
        coming = self._waiting.get(grammar) or self._begin(grammar)
        return await asyncio.shield(coming)  # others may wait for it, too

    def _begin(self, grammar: Grammar) -> asyncio.Future[T]:
        if len(self._waiting) >= MAX_WAITING:
            raise TooManyGrammars(FIELD, f"{MAX_WAITING} others wait to be compiled, and no more may")
        coming = asyncio.get_running_loop().run_in_executor(self._thread, self._make, grammar)
        self._waiting[grammar] = coming
        coming.add_done_callback(partial(self._keep, grammar))
        return coming

    def _keep(self, grammar: Grammar, coming: asyncio.Future[T]) -> None:
        del self._waiting[grammar]
        if coming.cancelled() or coming.exception() is not None:
            return
        self._made[grammar] = coming.result()
        if len(self._made) > self._max_kept:
            self._made.popitem(last=False)
