"""The dashboard and the alerts: sound files, whose expressions name metrics and labels that processes really show.

`promtool`, where it is on the PATH, parses the expressions as Prometheus does; without it, names, labels and brackets
are looked at.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import REPOSITORY
from node_harness import running_machine
from prometheus_client.parser import text_string_to_metric_families
from router_fakes import FakeCluster, running
from scraping import http

from kvstore.server import StoreConfig, StoreServer

FOLDER = REPOSITORY / "deploy" / "dashboards"
BOARD: dict[str, Any] = json.loads((FOLDER / "baton.json").read_text())
RULES: list[dict[str, Any]] = yaml.safe_load((FOLDER / "alerts.yaml").read_text())["groups"][0]["rules"]
PANELS = [panel for panel in BOARD["panels"] if panel["type"] != "row"]
TARGETS = [(panel["title"], target["expr"]) for panel in PANELS for target in panel["targets"]]
EXPRESSIONS = TARGETS + [(rule["alert"], rule["expr"]) for rule in RULES]
OF_PROMETHEUS = {"up": {"job", "instance"}}
ADDED = {"instance", "job", "le"}  # labels that Prometheus adds, or that buckets have
DURATION = re.compile(r"\d+(ms|s|m|h|d)")
promtool = shutil.which("promtool")


async def shown_labels(address: str) -> dict[str, set[str]]:
    """Sample -> the labels that it has, on one page."""
    status, body = await http(address, b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
    assert status == b"HTTP/1.1 200 OK"
    labels: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(body):
        for sample in family.samples:
            labels.setdefault(sample.name, set()).update(sample.labels)
    return labels


async def test_each_expression_names_metrics_and_labels_that_are_shown(
    tiny_model_dir: Path, redis_url: str, short_dir: Path
) -> None:
    """Names are from the pages of a store, a node and a router that run."""
    shown = dict(OF_PROMETHEUS)
    async with (
        running_machine(tiny_model_dir, redis_url, short_dir) as machine,
        running(FakeCluster(redis_url)) as fakes,
    ):
        await fakes.open(metrics=True)
        store = StoreServer(
            StoreConfig(
                dir=str(short_dir / "s"), redis_url=redis_url, slot_bytes=64, memory_bytes=1 << 14, metrics=True
            )
        )
        node, record = await machine.node(role="both", store_dir=""), await store.start()
        for address in (fakes.metrics_address, node.record.metrics_address, record.metrics_address):
            shown |= await shown_labels(address)
        await store.stop()
    for title, expression in EXPRESSIONS:
        names, labels = parts(expression)
        assert names, f"{title}: {expression}"
        assert names <= set(shown), f"{title}: nobody shows {names - set(shown)}"
        known = ADDED.union(*(shown[name] for name in names))
        assert labels <= known, f"{title}: no metric of it has {labels - known}"


def parts(expression: str) -> tuple[set[str], set[str]]:
    """The metrics and the labels that an expression names."""
    bare = re.sub(r'"[^"]*"', '""', expression)
    for bracket in ("()", "{}", "[]"):
        assert bare.count(bracket[0]) == bare.count(bracket[1]), expression
    grouped = re.findall(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\(([^)]*)\)", bare)
    matched = re.findall(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"\"", bare)
    labels = set(matched) | {name.strip() for group in grouped for name in group.split(",") if name.strip()}
    return set(re.findall(r"\bbaton_\w+|\bup\b(?=\{)", bare)), labels


def test_the_parser_sees_names_and_labels() -> None:
    names, labels = parts('sum by (role, le) (rate(baton_a_total{x=~"baton_b|y"}[5m])) / ignoring (z) up{job="q"} > 0')
    assert names == {"baton_a_total", "up"} and labels == {"role", "le", "x", "z", "job"}


def test_the_board_is_one_that_grafana_takes() -> None:
    assert BOARD["uid"] == "baton" and BOARD["schemaVersion"] >= 38 and "id" not in BOARD
    ids = [panel["id"] for panel in BOARD["panels"]]
    assert len(set(ids)) == len(ids)
    variables = {variable["name"] for variable in BOARD["templating"]["list"]}
    assert set(re.findall(r"\$\{?(\w+)", json.dumps(BOARD))) <= variables | {"__rate_interval", "__all"}
    for panel in PANELS:
        assert panel["title"] and panel["targets"] and panel["type"] in ("timeseries", "stat")
        assert panel["datasource"]["uid"] == "${datasource}", "whichever Prometheus there is"
        assert panel["fieldConfig"]["defaults"]["unit"]
        refs = [target["refId"] for target in panel["targets"]]
        assert len(set(refs)) == len(refs) and all(target["legendFormat"] for target in panel["targets"])


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in BOARD["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells


def test_each_alert_says_when_how_bad_and_what() -> None:
    names = [rule["alert"] for rule in RULES]
    assert len(set(names)) == len(names) and all(name.startswith("Baton") for name in names)
    for rule in RULES:
        assert DURATION.fullmatch(rule["for"]) and rule["labels"]["severity"] in ("info", "warning", "critical")
        assert rule["annotations"]["summary"]
        assert set(rule) == {"alert", "expr", "for", "labels", "annotations"}


@pytest.mark.skipif(promtool is None, reason="no promtool on the PATH (it comes with Prometheus)")
def test_prometheus_parses_all_of_it(tmp_path: Path) -> None:
    assert promtool is not None
    rules = [
        {"record": f"panel:{index}", "expr": re.sub(r"\$model_name", ".*", expr).replace("$__rate_interval", "1m")}
        for index, (_, expr) in enumerate(TARGETS)
    ]
    panels = tmp_path / "panels.yaml"
    panels.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    checked = subprocess.run(
        [promtool, "check", "rules", str(FOLDER / "alerts.yaml"), str(panels)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
