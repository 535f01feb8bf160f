"""What benchmarks/kvstore.py makes of its turns, which blocks its clients take, and one small run with real stores."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.kvstore import arguments, run, wanted
from benchmarks.kvstore_tables import (
    ENCRYPTED,
    Contender,
    Measurement,
    Own,
    Table,
    baton,
    both_ways,
    choose,
    here_measurements,
    tables,
    wire_measurements,
)
from benchmarks.kvstore_worker import Picks, Setting, content

SETTING = Setting(block_bytes=4096, num_blocks=12, num_positions=8, folder="")


def test_a_turn_is_the_sum_of_the_clients_rates_and_the_mean_of_their_times() -> None:
    seconds = [[0.1, 0.5, 0.1], [0.2, 0.2]]
    assert Measurement("GB/s", 16, "fetch", (), 2).figure(seconds, 10**9) == pytest.approx(160 + 80)
    assert Measurement("us", 1, "fetch", (), 2).figure(seconds, 1) == pytest.approx(150_000)


def test_blocks_are_taken_again_only_after_all_others() -> None:
    picks = Picks(SETTING)
    taken = [picks.take("fetch", 4) for _ in range(6)]
    names = [name for one, _ in taken for name in one]
    positions = [position for _, one in taken for position in one]
    assert sorted(names[:12]) == list(range(12)) and names[12:] == names[:12] != sorted(names[:12])
    assert all(sorted(positions[start : start + 8]) == list(range(8)) for start in (0, 8, 16))


def test_what_is_published_was_never_there_and_look_ups_take_runs() -> None:
    one, other = Picks(SETTING), Picks(Setting(4096, 12, 8, "", client=1))
    published = [name for picks in (one, other) for _ in range(3) for name in picks.take("publish", 2)[0]]
    assert len(set(published)) == 12 and min(published) >= SETTING.num_blocks
    first, *rest = one.take("locate", 12)[0]
    assert first == 0 and rest == list(range(1, 12))


def test_content_follows_from_the_name() -> None:
    assert content(1, 64) == content(1, 64) != content(2, 64)
    assert len(content(1, 64)) == 64


def test_rows_are_chosen_by_name_and_who_has_none_is_not_started() -> None:
    contenders = [baton(), Contender(ENCRYPTED, ""), Contender("tcp", "")]
    table = Table("", 1 << 20, 1, 1, contenders, wire_measurements("1 MiB"))
    plain = choose(table, re.compile("received$"), is_quick=False)
    assert [own.row for one in plain.measurements for own in one.own] == ["1 MiB: 16 blocks over TCP, as received"]
    assert [one.name for one in plain.contenders] == ["baton", "tcp"]
    assert all(one.num_clients == 1 for one in choose(table, re.compile(""), is_quick=True).measurements)


def test_publishing_comes_after_fetching() -> None:
    operations = [one.operation for one in here_measurements("1 MiB")]
    assert operations == sorted(operations)  # f before p


def test_peers_run_both_ways_but_for_the_bare_socket() -> None:
    peers = [Contender("memcpy", "", joins="baton"), Contender("tcp", "")]
    assert [one.name for one in both_ways(peers, is_quick=False)] == ["memcpy", "memcpy, nt", "tcp"]
    assert all(one.is_limit for one in both_ways(peers, is_quick=False))


def test_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quick = tables(wanted(arguments(["--quick", "--peer", "none"])))
    assert [one.title for one in quick] == ["same machine, 1 MiB blocks", "over TCP, 1 MiB blocks", quick[-1].title]
    assert all(one.name.startswith("baton") for table in quick for one in table.contenders)
    with pytest.raises(SystemExit):
        arguments(["--peer", "mooncake", "--peer-folder", str(tmp_path)])
    assert "install_peers.sh" in capsys.readouterr().err


def test_a_small_run() -> None:
    def one(operation: str) -> Measurement:
        return Measurement("us", 2, operation, (Own(operation, operation),))

    contenders = [baton(), Contender("memcpy", "benchmarks.kvstore_memcpy", joins="baton")]
    contenders.append(Contender("tcp", "benchmarks.kvstore_wires", "tcp"))
    operations = ("fetch", "copy", "locate", "publish")
    table = Table("", 64 << 10, 16, 8, contenders, [one(operation) for operation in operations])
    rows, peers, versions = run(table, turns=1, turn_s=0.01)
    assert [row.name for row in rows] == list(operations) and all(row.values[0] > 0 for row in rows)
    has_figures = {peer.name: [bool(values) for values in peer.values] for peer in peers}
    assert has_figures == {"memcpy": [True, False, False, False], "tcp": [False, True, False, False]}
    assert set(versions) == {"baton", "memcpy", "tcp"}
