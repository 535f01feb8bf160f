"""Waiting for as long as something moves."""

from __future__ import annotations

from kvstore.patience import Patience


def test_what_moves_may_take_longer_than_the_patience() -> None:
    patience = Patience(1.0, 0, 10.0)
    assert not any(patience.is_over(step, 10.0 + 0.9 * step) for step in range(1, 20))


def test_what_stands_still_is_ended() -> None:
    patience = Patience(1.0, 0, 10.0)
    assert [patience.is_over(position, now_s) for position, now_s in ((0, 10.5), (1, 10.9), (1, 11.8), (1, 11.9))] == [
        False,
        False,
        False,
        True,
    ]


def test_it_is_looked_at_often_enough() -> None:
    assert 0.0 < Patience(2.0, 0, 0.0).look_s <= 0.5
