"""What a benchmark prints: its JSON lines."""

from __future__ import annotations

import pytest

from benchmarks.rows import Peer, Row, lines, tall_table

RATE = Row("prefill", "tok/s", (10.0, 30.0, 20.0))
TIME = Row("TPOT", "ms", (5.0,))


def test_a_row_alone() -> None:
    baton = {"min": 10.0, "median": 20.0, "max": 30.0, "n": 3}
    expected = {"benchmark": "b", "row": "prefill", "unit": "tok/s", "baton": baton}
    assert lines("b", [RATE], []) == [expected | {"peer": None, "peer_value": None, "ratio": None}]


def test_a_line_for_each_peer_that_has_the_row() -> None:
    peers = [Peer("one", [(40.0, 50.0, 30.0), (4.0,)]), Peer("two", [(10.0,), ()])]
    found = [(line["row"], line["peer"], line["ratio"]) for line in lines("b", [RATE, TIME], peers)]
    assert found == [("prefill", "one", 0.5), ("prefill", "two", 2.0), ("TPOT", "one", 1.25)]


def test_what_is_reached_of_a_limit_is_a_fraction_of_rates_and_of_times() -> None:
    found = lines("b", [RATE, TIME], [Peer("roofline", [[80.0], [1.0]], is_limit=True)])
    assert [(line["ratio"], line["reached"]) for line in found] == [(0.25, 0.25), (5.0, 0.2)]


def test_a_peer_that_misses_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="each row"):
        lines("b", [RATE, TIME], [Peer("one", [(1.0,)])])


def test_a_tall_table_has_a_line_for_each_who_has_figures() -> None:
    grid = tall_table("b", [RATE, TIME], [Peer("one", [(40.0, 50.0, 30.0), ()]), Peer("two", [(10.0,), (4.0,)])])
    assert list(grid.columns[2].cells) == ["baton", "one", "two", "baton", "two"]
    assert list(grid.columns[-1].cells) == ["", "0.50", "2.00", "", "1.25"]


def test_a_peer_at_zero_has_no_ratio() -> None:
    [line] = lines("serving", [Row("goodput", "req/s", (2.0,))], [Peer("peer", [[0.0]])])
    assert line["peer_value"]["median"] == 0.0 and line["ratio"] is None
