"""The file that tells Prometheus where everything is: what it says, and that it is never half a file."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest

from deploy.metrics_targets import TargetsFile, targets
from kvstore.directory import ArenaRecord, NodeRecord


def node(node_id: str, role: str, metrics_address: str) -> NodeRecord:
    return NodeRecord(
        node_id=node_id,
        incarnation="i",
        role=role,
        address="10.0.0.2:5",
        model="m",
        kv_root="0" * 32,
        block_size=16,
        block_bytes=1024,
        vocab_size=8,
        max_model_len=64,
        host="h",
        metrics_address=metrics_address,
    )


def arena(metrics_address: str) -> ArenaRecord:
    return ArenaRecord(
        arena_id="0" * 32,
        address="tcp://10.0.0.2:7",
        host="h",
        slot_bytes=1024,
        num_slots=4,
        metrics_address=metrics_address,
    )


def test_one_entry_for_each_that_shows_metrics() -> None:
    nodes = [node("prefill-0", "prefill", "10.0.0.2:9401"), node("decode-0", "decode", "")]
    found = targets("c", ["10.0.0.1:9400", ""], nodes, [arena("10.0.0.2:9400")])
    assert [(one["targets"], one["labels"]) for one in found] == [
        (["10.0.0.2:9401"], labels("node", "prefill", "prefill-0")),
        (["10.0.0.1:9400"], labels("router", "", "router-0")),
        (["10.0.0.2:9400"], labels("store", "", "store-10.0.0.2")),
    ]


def labels(component: str, role: str, name: str) -> dict[str, str]:
    return {"baton_cluster": "c", "baton_component": component, "baton_role": role, "baton_name": name}


def test_the_file_follows_and_is_empty_at_the_end(tmp_path: Path) -> None:
    file = tmp_path / "targets.json"
    kept = TargetsFile(file, "c")
    kept.update([node("both-0", "both", "10.0.0.2:1")], [])
    first = file.stat().st_ino
    assert json.loads(file.read_text())[0]["targets"] == ["10.0.0.2:1"]
    kept.update([node("both-0", "both", "10.0.0.2:1")], [])
    assert file.stat().st_ino == first, "nothing new, nothing written"
    kept.update([node("both-0", "both", "10.0.0.2:2")], [])
    assert json.loads(file.read_text())[0]["targets"] == ["10.0.0.2:2"]
    kept.clear()
    assert json.loads(file.read_text()) == []
    assert [*tmp_path.iterdir()] == [file]


def test_a_file_that_cannot_be_written_is_a_line_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        TargetsFile(tmp_path / "none" / "targets.json", "c").clear()
    assert "event=no_metrics_targets" in caplog.text
    TargetsFile(None, "c").update([], [])


def test_a_disk_that_stays_full_is_told_of_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """And again when it is full for the second time."""
    folder = tmp_path / "there"
    kept = TargetsFile(folder / "targets.json", "c")
    for num_told in (1, 2):
        for _ in range(3):
            kept.update([node("both-0", "both", f"10.0.0.2:{num_told}")], [])
        assert caplog.text.count("event=no_metrics_targets") == num_told
        folder.mkdir()
        kept.update([node("both-0", "both", f"10.0.0.2:{num_told}")], [])
        assert json.loads((folder / "targets.json").read_text())[0]["targets"] == [f"10.0.0.2:{num_told}"]
        shutil.rmtree(folder)
