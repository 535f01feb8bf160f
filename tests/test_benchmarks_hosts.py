"""The figures that benchmarks/hosts.py makes of what it measured, and the floor beside them."""

from __future__ import annotations

import pytest

from benchmarks.hosts import HandOff, Setting, live_figures
from benchmarks.lan import burst_bytes, floor_s

SETTING = Setting("tcp", "bfloat16", block_bytes=368_640, block_tokens=16)


def hand_off(late_tokens: int = 0) -> HandOff:
    return HandOff(ttft_s=0.5, gap_s=0.125, step_s=0.01, late_tokens=late_tokens, received_bytes=23_592_960)


def test_the_floor_is_what_the_rate_leaves_of_the_bytes_behind_a_burst() -> None:
    assert floor_s(1e9 / 8 + burst_bytes(1e9), 1e9) == pytest.approx(1.0)
    assert floor_s(1.0, 1e9) == 0.0
    assert floor_s(1e9, 0.0) == 0.0, "there is none where nothing is limited"


def test_a_live_hand_off_is_held_against_its_last_chunk_and_a_step() -> None:
    figures = {
        figure.row.name.split(":")[0]: figure for figure in live_figures(SETTING, 1024, "1 Gbit/s", [hand_off()])
    }
    link_ms = 1e3 * floor_s(512 // 16 * 368_640, 1e9)
    assert figures["gap"].row.values == (125.0,)
    assert figures["gap"].floor == (pytest.approx(link_ms + 10.0),)
    assert figures["last"].row.values == (pytest.approx(115.0),)
    assert figures["last"].floor == (pytest.approx(link_ms),)
    assert figures["received"].row.values == (pytest.approx(23.59296),)


@pytest.mark.parametrize(("rate", "late_tokens"), [("1 Gbit/s", 512), ("unlimited", 0)])
def test_no_floor_where_blocks_were_computed_again_or_nothing_is_limited(rate: str, late_tokens: int) -> None:
    assert not any(figure.floor for figure in live_figures(SETTING, 1024, rate, [hand_off(late_tokens)]))
