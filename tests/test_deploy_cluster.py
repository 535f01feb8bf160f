"""What the launcher decides and cleans up, without a Ray: `test_deploy_launch.py` has a real one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_deploy_launch import left_of, small

from deploy import on_ray
from deploy.config import ConfigError
from deploy.launch import Cluster, Interrupted, StartFailed
from deploy.placement import Machine, Placement, place

ONE, TWO = (Machine(letter * 56, f"10.0.0.{n}", f"host-{n}", 8) for n, letter in ((1, "a"), (2, "b")))
A_RAY = "10.0.0.1:6379"


def test_nothing_is_started_where_some_part_has_no_place(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody would know of the rest."""
    started: list[Any] = []
    monkeypatch.setattr(on_ray, "_member", lambda *placed: started.append(placed))

    def specs() -> Iterator[Any]:
        yield SimpleNamespace(placement=None)
        raise ConfigError("no place for the next one")

    with pytest.raises(ConfigError):
        Cluster(small(tiny_model_dir))._add(specs())
    assert started == []


def test_a_stop_that_ray_spoils_removes_the_rest(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("Ray is gone")

    cluster = Cluster(small(tiny_model_dir))
    cluster.folders[0].mkdir()
    monkeypatch.setattr(on_ray, "is_joined", lambda: True)
    monkeypatch.setattr(on_ray, "call", fail)
    with pytest.raises(RuntimeError, match="Ray is gone"):
        cluster.stop()
    assert left_of(cluster) == []


@pytest.mark.parametrize(
    ("decode", "lines"),
    [
        (2, ["decode-0 was lost with its machine", "decode-0 is up on 10.0.0.1"]),
        (1, ["decode-0 was lost with its machine"]),
    ],
)
def test_nodes_of_a_machine_that_is_gone_are_replaced(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, decode: int, lines: list[str]
) -> None:
    """And those that live are not drained in their place."""
    config = small(tiny_model_dir, decode=2, ray_address=A_RAY)
    cluster = Cluster(config)
    killed: list[str] = []

    def store(machine: Machine) -> Any:
        placed = SimpleNamespace(placement=None, machine=machine)
        return SimpleNamespace(name=f"store-{machine.address}", kind="store", node_id="", placed=placed)

    def node(placement: Placement) -> Any:
        placed = SimpleNamespace(placement=placement, machine=placement.machine)
        return SimpleNamespace(name=placement.node_id, kind="node", node_id=placement.node_id, placed=placed)

    placements = place(config, [ONE, TWO])
    assert {p.node_id: p.machine for p in placements} == {"prefill-0": ONE, "decode-0": TWO, "decode-1": ONE}
    cluster._members = [store(ONE), store(TWO), *map(node, placements)]
    specs: Any = SimpleNamespace(stores=lambda machines: [], nodes=lambda placements: placements, cluster_token="")
    cluster._specs = specs
    monkeypatch.setattr(cluster, "_machines", lambda: ([ONE], ONE))
    monkeypatch.setattr(on_ray, "add", lambda placed: [*map(node, placed)])
    monkeypatch.setattr(on_ray, "kill", lambda members: killed.extend(member.name for member in members))
    monkeypatch.setattr(on_ray, "free_groups", lambda members: None)
    monkeypatch.setattr(cluster, "_wait_until_started", lambda members: None)
    assert cluster.scale(dataclasses.replace(config, decode=decode)) == lines
    assert killed == ["store-10.0.0.2", "decode-0"]
    there = {member.name for member in cluster._members}
    assert there == {"store-10.0.0.1", "prefill-0", "decode-1"} | ({"decode-0"} if decode == 2 else set())


# --- the folder of this machine's store ---


@pytest.mark.parametrize(("hosts", "is_checked"), [((), True), (("10.0.0.1",), True), (("10.0.0.2",), False)])
def test_on_a_given_ray_the_folder_counts_where_nodes_may_be(
    tiny_model_dir: Path, short_dir: Path, monkeypatch: pytest.MonkeyPatch, hosts: tuple[str, ...], is_checked: bool
) -> None:
    (short_dir / "file").touch()
    options = {"store_base": short_dir / "file", "prefill_hosts": hosts, "decode_hosts": hosts}
    cluster = Cluster(small(tiny_model_dir, ray_address=A_RAY, **options))

    def so_far(own: Machine) -> None:
        raise Interrupted("so far")

    monkeypatch.setattr(on_ray, "join", lambda *_: None)
    monkeypatch.setattr(cluster, "_machines", lambda: ([ONE, TWO], ONE))
    monkeypatch.setattr(cluster, "_start_redis", so_far)
    with pytest.raises(StartFailed if is_checked else Interrupted, match="--store-dir .*" if is_checked else "so far"):
        cluster.start()
    assert left_of(cluster) == []


def test_without_a_ray_it_is_looked_at_before_anything_starts(
    tiny_model_dir: Path, short_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (short_dir / "file").touch()
    monkeypatch.setattr(on_ray, "join", lambda *_: pytest.fail("Ray was started"))
    for base in (short_dir / "file", short_dir / "file" / "in"):
        with pytest.raises(StartFailed, match=f"--store-dir {base}: cannot be written to: Not a directory"):
            Cluster(small(tiny_model_dir, store_base=base)).start()
