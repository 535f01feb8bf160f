"""Reads /metrics as Prometheus does."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable, Mapping

from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families


async def http(address: str, request: bytes) -> tuple[bytes, str]:
    """Status line and body."""
    host, port = address.rsplit(":", 1)
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(request)
    head, _, body = (await asyncio.wait_for(reader.read(), 20)).partition(b"\r\n\r\n")
    writer.close()
    return head.split(b"\r\n")[0], body.decode()


async def scrape(address: str) -> dict[tuple[str, ...], float]:
    """(name, label values) -> value; what Prometheus' own parser makes of the page."""
    status, body = await http(address, b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
    assert status == b"HTTP/1.1 200 OK"
    families = text_string_to_metric_families(body)
    return {(s.name, *map(s.labels.get, sorted(s.labels))): s.value for family in families for s in family.samples}


Labels = dict[str, set[str]]  # label -> its values


def shown(families: Iterable[Metric]) -> dict[str, Labels]:
    """Metric, as a page's table names it -> its labels, without `le`."""
    found: dict[str, Labels] = {}
    for family in families:
        labels = found.setdefault(family.name + "_total" * (family.type == "counter"), {})
        for sample in family.samples:
            for label, value in sample.labels.items():
                if label != "le":
                    labels.setdefault(label, set()).add(value)
    return found


def documented(page: str) -> dict[str, Labels]:
    """The same of a page's tables, whose second column is as "tier: memory, disk; why" or "histogram".

    A label without values may have any.
    """
    found: dict[str, Labels] = {}
    for row in re.findall(r"^\| (`baton_.*) \|$", page, re.MULTILINE):
        metrics, column = row.split(" | ")[0], row.split("|")[1].strip()
        labels: Labels = {}
        for part in filter(None, column.replace("histogram", "").split(";")):
            names, _, values = part.partition(":")
            labels |= {name.strip(): set() for name in names.split(",")}
            labels[names.split(",")[-1].strip()] = {value.strip() for value in values.split(",") if value.strip()}
        for metric in re.findall(r"`(baton_\w+)`", metrics):
            assert metric not in found, f"{metric} is there twice"
            found[metric] = labels
    return found


def check_documented(page: str, families: Iterable[Metric], common: Iterable[str] = ()) -> None:
    """The page's tables have these metrics and no others, with these labels (but those in `common`) and values."""
    there, told = shown(families), documented(page)
    assert set(told) == set(there)
    for metric, labels in there.items():
        names = set(labels) - set(common)
        assert set(told[metric]) == names or not labels, metric
        for name, values in _told_values(told[metric]).items():
            assert values == labels.get(name, values), f"{metric}: {name}"


def _told_values(labels: Mapping[str, set[str]]) -> Labels:
    return {name: values for name, values in labels.items() if values}
