"""Folders of clusters that nobody could clean up after: removed when the last server in them has died, not before."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY, eventually

from deploy import leftovers
from deploy.actors import ServerActor, ServerSpec
from deploy.leftovers import hold, sweep
from kvstore.server import StoreConfig

OWN, OTHER = "baton-00000000-aaaaaaaa", "baton-11111111-aaaaaaaa"
SERVER = "import sys, time, pathlib, deploy.leftovers as l; held = l.hold(pathlib.Path(sys.argv[1]), sys.argv[2]);"
SERVER += "print(flush=True); time.sleep(600)"


def start_server(folder: Path, name: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", SERVER, str(folder), name]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    return process


def test_a_folder_goes_when_the_last_of_its_servers_was_killed(tmp_path: Path) -> None:
    servers = [start_server(tmp_path / OTHER, name) for name in ("store-10.0.0.1", "decode-0.1")]
    (tmp_path / OTHER / "arena-0.mem").write_bytes(bytes(4096))
    for server in servers:
        assert sweep(tmp_path, tmp_path / OWN) == []
        server.kill()
        server.communicate()
    assert sweep(tmp_path, tmp_path / OWN) == [tmp_path / OTHER]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["baton-11111111", "baton-1111111g-aaaaaaaa", "other-11111111-aaaaaaaa", OWN])
def test_what_is_no_other_cluster_s_stays(tmp_path: Path, name: str) -> None:
    held = hold(tmp_path / name, "store")
    assert held is not None
    held.close()
    assert sweep(tmp_path, tmp_path / OWN) == []
    assert (tmp_path / name).exists()


def test_a_folder_without_locks_or_of_another_machine_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "baton-22222222-aaaaaaaa").mkdir()
    (tmp_path / "baton-33333333-aaaaaaaa").symlink_to(tmp_path)
    (tmp_path / "boot_id").write_text("another boot")
    with monkeypatch.context() as patch:
        patch.setattr(leftovers, "BOOT_ID", tmp_path / "boot_id")
        held = hold(tmp_path / OTHER, "store")
        assert held is not None
        held.close()
    assert sweep(tmp_path, tmp_path / OWN) == []
    assert (tmp_path / OTHER).exists()


def test_a_disk_that_is_full_stops_no_server(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert hold(tmp_path / "file" / OTHER, "store") is None


async def test_a_store_makes_room_before_it_starts(short_dir: Path, redis_url: str) -> None:
    held = hold(short_dir / OTHER, "store")
    assert held is not None
    held.close()
    config = StoreConfig(dir=str(short_dir / OWN), redis_url=redis_url, slot_bytes=4096, memory_bytes=1 << 20)
    actor = ServerActor(ServerSpec("store", "store-here", config, short_dir / OWN))
    assert not (await actor.ready()).error
    assert not (short_dir / OTHER).exists()
    assert list((short_dir / OWN).glob("store-here.*.alive"))
    await actor.stop()
    await actor.remove_folder()
    await eventually(lambda: list(short_dir.iterdir()) == [])
