"""Waiting for as long as something moves."""

from __future__ import annotations

import asyncio

import pytest

from kvstore.patience import Standstill, while_moving


class Walk:
    """Moves a step each `pause_s`, then stands still for ever, or ends."""

    def __init__(self, num_steps: int, pause_s: float, ends: bool = True) -> None:
        self.position = 0
        self.is_over = False
        self._num_steps, self._pause_s, self._ends = num_steps, pause_s, ends

    async def go(self) -> None:
        try:
            for _ in range(self._num_steps):
                await asyncio.sleep(self._pause_s)
                self.position += 1
            if not self._ends:
                await asyncio.Event().wait()
        finally:
            self.is_over = True


async def test_what_moves_may_take_longer_than_the_patience() -> None:
    walk = Walk(20, 0.05)
    await while_moving(walk.go(), lambda: walk.position, 0.5)
    assert walk.position == 20


async def test_what_stands_still_is_ended() -> None:
    walk = Walk(3, 0.01, ends=False)
    with pytest.raises(Standstill):
        await while_moving(walk.go(), lambda: walk.position, 0.2)
    assert walk.position == 3 and walk.is_over


async def test_an_error_is_handed_on() -> None:
    async def fail() -> None:
        raise OSError("broken")

    with pytest.raises(OSError, match="broken"):
        await while_moving(fail(), lambda: 0, 1.0)


async def test_a_cancellation_ends_the_work_too() -> None:
    walk = Walk(0, 0.0, ends=False)
    waiting = asyncio.create_task(while_moving(walk.go(), lambda: 0, 10.0))
    await asyncio.sleep(0.05)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert walk.is_over
