"""The wire key's way: made by the launcher, handed to stores and nodes, and shown to nobody."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import POCKET, ServerProcess

from deploy import process
from deploy.config import ClusterConfig
from deploy.placement import Machine, place
from deploy.specs import PlacedSpec, Specs
from kvstore.blocks import KVLayout
from kvstore.curve import new_wire_key

KEY = new_wire_key()
LAYOUT = KVLayout("m", "float32", block_size=16, num_layers=1, num_kv_heads=1, head_dim=8)


def specs_of(wire_key: str = KEY, **options: Any) -> list[PlacedSpec]:
    config = ClusterConfig(model_dir=POCKET, **options)
    machines = [Machine(f"{n:056x}", f"10.0.0.{n + 1}", f"host-{n}", 8, 0) for n in range(2)]
    specs = Specs(config, "0123abcd", "redis://127.0.0.1:1", LAYOUT, wire_key=wire_key)
    assert not wire_key or wire_key not in repr(specs)
    return list(specs.all(machines, place(config, machines), machines[0]))


def test_stores_and_nodes_get_it_and_show_it_to_nobody() -> None:
    placed = specs_of()
    keys = [(one.spec.kind, getattr(one.spec.config, "wire_key", "")) for one in placed]
    assert keys == [("store", KEY), ("store", KEY), ("node", KEY), ("node", KEY), ("router", "")]
    assert all(KEY not in repr(one) for one in placed)
    assert not any(one.spec.config.trusts_network for one in placed if one.spec.kind == "store")


@pytest.mark.parametrize("metrics", [True, False])
def test_stores_and_nodes_are_told_whether_to_show_metrics(metrics: bool) -> None:
    placed = specs_of(metrics=metrics)
    assert [one.spec.config.metrics for one in placed if one.spec.kind != "router"] == [metrics] * 4


def test_without_encryption_stores_are_told_to_trust_the_network() -> None:
    placed = specs_of("", store_encryption=False)
    assert all(one.spec.config.trusts_network for one in placed if one.spec.kind == "store")


@pytest.mark.parametrize("tcp", [True, False])
def test_stores_are_told_whether_blocks_may_go_over_plain_tcp(tcp: bool) -> None:
    placed = specs_of("", store_encryption=False, store_tcp=tcp)
    assert [one.spec.config.tcp for one in placed if one.spec.kind == "store"] == [tcp] * 2


@pytest.mark.parametrize("kind", ["store", "node"])
def test_a_process_takes_it_from_its_environment_alone(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config: dict[str, object] = {"dir": "/x", "slot_bytes": 1, "memory_bytes": 1}
    if kind == "node":
        config = {"node_id": "n", "model_dir": "m", "model": "m"}
    config |= {"redis_url": "redis://127.0.0.1:1"}
    monkeypatch.setenv("BATON_WIRE_KEY", KEY)
    server: Any = process.build(kind, json.dumps(config))
    assert server.config.wire_key == KEY
    with pytest.raises(ValueError, match="BATON_WIRE_KEY") as error:
        process.build(kind, json.dumps(config | {"wire_key": KEY}))
    assert KEY not in str(error.value)


async def test_a_store_process_without_it_is_for_its_own_machine_alone(redis_url: str, short_dir: Path) -> None:
    config = {"dir": str(short_dir / "s"), "redis_url": redis_url, "slot_bytes": 1 << 12, "memory_bytes": 1 << 20}
    with pytest.raises(AssertionError, match="ended with 1"):
        await ServerProcess.start("store", config | {"bind_host": "0.0.0.0"})
    assert not (short_dir / "s").exists()
