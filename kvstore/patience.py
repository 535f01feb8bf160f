"""How long to wait for something that moves: as long as it does."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

from kvstore.local import to_end

_LOOKS = 8  # within one patience


class Standstill(Exception):
    """Nothing moved for too long."""


async def while_moving(work: Coroutine[Any, Any, None], position: Callable[[], int], patience_s: float) -> None:
    """Runs `work`, for as long as `position` changes. `Standstill` once it has been the same for `patience_s`.

    Raises what `work` raises. `work` has ended when this does, also by a cancellation.
    """
    task = asyncio.ensure_future(work)
    last, moved_s = position(), time.monotonic()
    try:
        while not task.done():
            await asyncio.wait([task], timeout=patience_s / _LOOKS)
            now_s = time.monotonic()
            if (here := position()) != last:
                last, moved_s = here, now_s
            elif not task.done() and now_s - moved_s >= patience_s:
                raise Standstill
    finally:
        task.cancel()
        await to_end([task])
        if not task.cancelled():
            task.exception()  # perhaps nobody else will ask for it
    task.result()
