"""`baton kv` against two real stores, one on this machine and one that is reached over the network alone."""

from __future__ import annotations

import asyncio
import json
import os
import stat
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from kvstore_support import SLOT_BYTES, chain, content, store_config, take, writer_of

from deploy.cli import main
from deploy.kv_tables import age, size
from deploy.state import ServeState, StateDir, start_ticks
from kvstore.client import KVClient
from kvstore.curve import new_wire_key
from kvstore.directory import Directory
from kvstore.server import StoreServer

CLUSTER_ID = "0123abcd"
HERE, THERE = chain(0, 5), chain(100, 3)
KEY = new_wire_key()


@dataclass
class Cluster:
    """Two stores and a state folder that tells of them."""

    state_dir: StateDir
    folder: Path  # of the state
    state: ServeState
    here: StoreServer
    there: StoreServer
    directory: Directory
    capsys: pytest.CaptureFixture[str]

    async def baton(self, *argv: str) -> tuple[int, str, str]:
        """Status, standard output and standard error of `baton kv`."""
        status = await asyncio.to_thread(main, ["kv", *argv, "--state-dir", str(self.folder)])
        out, err = self.capsys.readouterr()
        return status, out, err

    async def ask(self, *argv: str) -> dict[str, Any]:
        status, out, err = await self.baton(*argv, "--json")
        assert (status, err) == (0, ""), err
        return dict(json.loads(out))


@pytest.fixture
async def cluster(
    redis_url: str, short_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> AsyncIterator[Cluster]:
    stores = []
    for folder, host, hashes in ((f"baton-{CLUSTER_ID}-0a0b0c0d", "here", HERE), ("far/away", "there", THERE)):
        store = StoreServer(replace(store_config(short_dir / folder, redis_url, wire_key=KEY), host=host))
        await store.start()
        writer = KVClient(store._directory, SLOT_BYTES, Path(store.config.dir))
        assert await writer.publish(hashes, writer_of(hashes)) == len(hashes)
        await writer.close()
        stores.append(store)
    pid = os.getpid()
    bases, folder = (str(short_dir), "/nowhere"), tmp_path / "state"
    state = ServeState(pid, start_ticks(pid), "default", CLUSTER_ID, "m", redis_url, ("x:1",), bases, KEY)
    state_dir = StateDir(folder)
    state_dir.claim()
    state_dir.write(state)
    directory = Directory(redis_url)
    yield Cluster(state_dir, folder, state, *stores, directory, capsys)
    await directory.close()
    state_dir.release()
    for store in stores:
        store.arena.check_integrity()
        await store.stop()


def ids(cluster: Cluster) -> tuple[str, str]:
    return cluster.here.record().arena_id, cluster.there.record().arena_id


async def test_stats(cluster: Cluster) -> None:
    answer = await cluster.ask("stats")
    here, there = answer["arenas"]
    assert (here["arena_id"], there["arena_id"]) == ids(cluster) and answer["problems"] == []
    assert (here["host"], here["num_committed"], there["num_committed"]) == ("here", 5, 3)
    assert [tier["num_blocks"] for tier in here["tiers"]] == [5]
    status, out, _ = await cluster.baton("stats")
    assert status == 0 and "5/16" in out and "3/16" in out and "memory" in out
    assert max(map(len, out.splitlines())) <= 110 and "…" not in out, "nothing is cut off"
    (one,) = (await cluster.ask("stats", "--arena", ids(cluster)[1][:6]))["arenas"]
    assert one["host"] == "there"


async def test_ls(cluster: Cluster) -> None:
    answer = await cluster.ask("ls")
    assert answer["num_blocks"] == 8
    assert {row["hash"] for row in answer["blocks"]} == {block_hash.hex() for block_hash in [*HERE, *THERE]}
    assert {row["arena_id"] for row in answer["blocks"]} == {*ids(cluster)}
    (row,) = (await cluster.ask("ls", "--prefix", THERE[1].hex()[:12].upper()))["blocks"]
    assert row["hash"] == THERE[1].hex() and row["arena_id"] == ids(cluster)[1]
    assert len((await cluster.ask("ls", "--limit", "6"))["blocks"]) == 6
    status, out, _ = await cluster.baton("ls", "--arena", ids(cluster)[0], "--limit", "2")
    assert status == 0 and "2 of 5" in out and max(map(len, out.splitlines())) <= 110 and "…" not in out


async def test_inspect_shows_what_the_directory_says_and_what_the_store_says(cluster: Cluster) -> None:
    (place,) = (await cluster.ask("inspect", HERE[0].hex()))["places"]
    assert place["arena_id"] == ids(cluster)[0] and place["directory"] == f"slot {place['store']['place']}"
    assert place["verdict"] == "ok" and place["store"]["verifies"] and place["store"]["state"] == "ready"

    await cluster.directory.announce(ids(cluster)[1], [(HERE[0], 7)])
    here, there = (await cluster.ask("inspect", HERE[0].hex()))["places"]
    assert here["verdict"] == "ok"
    assert (there["verdict"], there["directory"], there["store"]) == ("stale entry", "slot 7", None)

    await cluster.directory.announce(ids(cluster)[0], [], gone=[HERE[1]])
    (place,) = (await cluster.ask("inspect", HERE[1].hex()))["places"]
    assert (place["verdict"], place["directory"]) == ("not announced", "")

    slot = cluster.here.arena.slot(HERE[2])
    assert slot is not None
    cluster.here._service._map.view(slot)[9] ^= 1
    assert (await cluster.ask("inspect", HERE[2].hex()))["places"][0]["verdict"] == "damaged"
    status, out, _ = await cluster.baton("inspect", HERE[0].hex())
    assert status == 0 and "stale entry" in out and HERE[0].hex() in out
    assert max(map(len, out.splitlines())) <= 110 and "…" not in out
    status, out, _ = await cluster.baton("inspect", chain(999, 1)[0].hex())
    assert status == 0 and "no arena holds" in out


async def test_evict(cluster: Cluster) -> None:
    answer = await cluster.ask("evict", HERE[0].hex(), THERE[0].hex().upper())
    assert [(one["num_memory_blocks"], one["num_disk_blocks"]) for one in answer["evicted"]] == [(1, 0), (1, 0)]
    assert await cluster.directory.locate(HERE[:1]) == {}
    assert (await cluster.ask("evict", "--all", "--arena", ids(cluster)[0]))["evicted"][0]["num_memory_blocks"] == 4
    assert cluster.here.arena.blocks() == [] and len(cluster.there.arena.blocks()) == 2
    for argv in (["evict"], ["evict", "--all", HERE[0].hex()]):
        status, out, err = await cluster.baton(*argv)
        assert (status, out) == (1, "") and "name blocks, or give --all" in err


async def test_drain(cluster: Cluster) -> None:
    arena_id = ids(cluster)[1]
    status, out, _ = await cluster.baton("drain", arena_id[:8])
    assert status == 0 and "takes no new blocks" in out
    assert cluster.there.record().draining and not cluster.here.record().draining
    _, out, _ = await cluster.baton("stats")
    assert f"{arena_id[:8]} (draining)" in out
    reader = KVClient(cluster.directory, SLOT_BYTES, None, wire_key=KEY)
    assert take(await reader.fetch(await reader.match(THERE))) == [content(block_hash) for block_hash in THERE]
    await reader.close()
    assert (await cluster.ask("drain", arena_id, "--undo"))["arenas"] == [{"arena_id": arena_id, "draining": False}]
    assert not cluster.there.record().draining


async def test_which_arena(cluster: Cluster) -> None:
    absent = next(digit for digit in "0123456789abcdef" if not any(name.startswith(digit) for name in ids(cluster)))
    for argv in (["drain", absent], ["stats", "--arena", absent]):
        status, out, err = await cluster.baton(*argv)
        assert (status, out) == (1, "") and f"no arena's id begins with {absent}" in err and ids(cluster)[0][:8] in err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["inspect", "abc"], "'abc' is no block's name, which has 32 hex digits"),
        (["inspect", "x" * 32], "32 hex digits"),
        (["inspect", "ab" * 17], "32 hex digits"),
        (["evict", "ab" * 16, "ab"], "32 hex digits"),
        (["ls", "--prefix", "xyz"], "begins no block's name"),
        (["ls", "--limit", "0"], "no number of rows"),
        (["ls", "--limit", "-1"], "no number of rows"),
        (["drain", "here"], "begins no arena's id"),
        (["drain"], "usage"),
        ([], "usage"),
    ],
)
def test_what_is_no_argument(argv: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["kv", *argv])
    assert caught.value.code == 2
    assert words in capsys.readouterr().err


def test_without_a_cluster(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kv", "stats", "--state-dir", str(tmp_path)]) == 1
    assert "no cluster is up" in capsys.readouterr().err


# --- the wire key ---


async def test_a_key_that_others_may_have_read_is_not_used(cluster: Cluster) -> None:
    file = cluster.folder / "serve.json"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600 and KEY in file.read_text()
    file.chmod(0o644)
    status, out, err = await cluster.baton("stats", "--json")
    assert status == 1 and "mode 644" in err and KEY not in out + err
    answer = json.loads(out)
    assert [arena["host"] for arena in answer["arenas"]] == ["here"], "its own machine's store needs no key"
    assert len(answer["problems"]) == 1 and "on there" in answer["problems"][0]


async def test_without_a_key_the_way_ends_at_this_machine(cluster: Cluster) -> None:
    cluster.state_dir.write(replace(cluster.state, wire_key=""))
    status, _, err = await cluster.baton("ls")
    assert status == 1 and "on another machine, where without a wire key a store hears no operator" in err


async def test_a_store_that_does_not_answer(cluster: Cluster) -> None:
    cluster.state_dir.write(replace(cluster.state, wire_key=new_wire_key()))
    status, out, err = await cluster.baton("inspect", THERE[0].hex())
    assert status == 1 and "no answer" in out and f"arena {ids(cluster)[1][:8]} on there" in err


def test_the_state_shows_its_key_to_nobody(tmp_path: Path) -> None:
    state = ServeState(1, 1, "default", CLUSTER_ID, "m", "", wire_key=KEY)
    assert KEY not in repr(state)
    leftover = tmp_path / "serve.part"
    leftover.touch(mode=0o644)
    leftover.chmod(0o644)
    StateDir(tmp_path).write(state)
    assert stat.S_IMODE((tmp_path / "serve.json").stat().st_mode) == 0o600
    assert StateDir(tmp_path).read() == state


def test_where_files_have_no_modes_no_key_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stat.S_IMODE", lambda mode: 0o777)
    StateDir(tmp_path).write(ServeState(1, 1, "default", CLUSTER_ID, "m", "", wire_key=KEY))
    assert KEY not in (tmp_path / "serve.json").read_text()


# --- words ---


def test_sizes_and_ages() -> None:
    assert [size(number) for number in (0, 1023, 1536, 1 << 20, 5 << 40)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "1 MiB",
        "5120 GiB",
    ]
    assert [age(seconds) for seconds in (-1, 0.0, 90, 5400)] == ["?", "0.0 s", "1.5 min", "1.5 h"]
