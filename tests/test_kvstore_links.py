"""What a link is measured to bring, when it counts as unknown, and what is on its way."""

from __future__ import annotations

import pytest

from kvstore.directory import ON_DISK
from kvstore.links import HALF_LIFE_BYTES, MEMORY_S, Link, Links, Stretch, link_of


def moved(link: Link, num_bytes: int, began_s: float, ended_s: float) -> float:
    link.begin(num_bytes)
    return link.end(num_bytes, num_bytes, began_s, ended_s)


def test_unknown_until_something_came() -> None:
    link = Link()
    assert link.bytes_per_s(0.0) == 0.0
    link.begin(1000)
    assert link.in_flight_bytes == 1000
    assert link.end(1000, 0, 1.0, 2.0) == 0.0, "what brought nothing is no measurement"
    assert (link.in_flight_bytes, link.bytes_per_s(2.0)) == (0, 0.0)
    assert moved(link, 1000, 2.0, 4.0) == 2.0
    assert link.bytes_per_s(4.0) == pytest.approx(500.0)


def test_waiting_behind_others_is_no_part_of_the_speed() -> None:
    link = Link()
    for _ in range(4):
        link.begin(1000)
    seconds = [link.end(1000, 1000, 0.0, float(ended_s)) for ended_s in (1, 2, 3, 4)]
    assert seconds == [1.0] * 4
    assert link.bytes_per_s(4.0) == pytest.approx(1000.0)


def test_fades_by_bytes() -> None:
    link = Link()
    moved(link, 1000, 0.0, 1.0)
    moved(link, 10 * HALF_LIFE_BYTES, 1.0, 2.0)
    assert link.bytes_per_s(2.0) == pytest.approx(10 * HALF_LIFE_BYTES, rel=0.01)


def test_forgets_what_is_old() -> None:
    link = Link()
    moved(link, 1000, 0.0, 10.0)
    assert link.bytes_per_s(10.0 + MEMORY_S / 2) == pytest.approx(100.0)
    assert link.bytes_per_s(10.0 + MEMORY_S) == 0.0
    moved(link, 1000, 50.0, 51.0)
    assert link.bytes_per_s(51.0) == pytest.approx(1000.0)


def test_stretches_of_a_row_over_several_links() -> None:
    now_s = [100.0]
    links = Links(10, lambda: now_s[0])
    links.begin("here", 4, is_local=True).end(4, 99.0, 100.0)
    waiting = links.begin("there", 3)
    row = links.stretches([("here", 7), ("here", 2), ("there", 0), ("new", 3), ("new", 4)])
    assert row == [Stretch(2, 40.0, 0), Stretch(1, 0.0, 30), Stretch(2, 0.0, 0)]
    waiting.end(2, 100.0, 101.0)
    local, remote = vars(links.local), vars(links.remote)
    assert local == {"num_blocks": 4, "num_bytes": 40, "seconds": 1.0}
    assert remote == {"num_blocks": 2, "num_bytes": 20, "seconds": 1.0}
    now_s[0] = 100.0 + 2 * MEMORY_S
    assert links.stretches([("other", 0), ("here", 0)]) == [Stretch(1), Stretch(1)]


def test_the_disk_behind_an_arena_is_a_link_of_its_own() -> None:
    links = Links(10, lambda: 100.0)
    links.begin(link_of(("here", 5)), 4).end(4, 99.0, 100.0)
    links.begin(link_of(("here", ON_DISK)), 4).end(4, 90.0, 100.0)
    row = links.stretches([("here", 1), ("here", ON_DISK), ("here", ON_DISK), ("here", 2)])
    assert row == [Stretch(1, 40.0), Stretch(2, 4.0), Stretch(1, 40.0)]
