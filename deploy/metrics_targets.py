"""Where Prometheus finds each store, node and router: a file for its `file_sd_configs`, kept up to date."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path

from kvstore.directory import ArenaRecord, NodeRecord

logger = logging.getLogger(__name__)

Target = dict[str, object]


def targets(
    cluster: str, routers: Sequence[str], nodes: Sequence[NodeRecord], arenas: Sequence[ArenaRecord]
) -> list[Target]:
    """One entry a server that shows metrics. Labels are `baton_...`, which no series of ours has."""
    found = [("router", f"router-{index}", "", address) for index, address in enumerate(routers)]
    found += [("node", node.node_id, node.role, node.metrics_address) for node in nodes]
    for arena in arenas:
        machine = arena.address.removeprefix("tcp://").rpartition(":")[0]
        found.append(("store", f"store-{machine}", "", arena.metrics_address))
    return [
        {
            "targets": [address],
            "labels": {"baton_cluster": cluster, "baton_component": kind, "baton_role": role, "baton_name": name},
        }
        for kind, name, role, address in sorted(found)
        if address
    ]


class TargetsFile:
    """The file, or None for none. It is replaced in one go, and only where something is new."""

    def __init__(self, file: Path | None, cluster: str) -> None:
        self._file = file
        self._cluster = cluster
        self._written: list[Target] | None = None
        self._is_failing = False
        self.routers: Sequence[str] = ()

    @property
    def is_kept(self) -> bool:
        return self._file is not None

    def update(self, nodes: Sequence[NodeRecord], arenas: Sequence[ArenaRecord]) -> None:
        """Where it cannot be written, the log says so once, and the cluster goes on."""
        self._write(targets(self._cluster, self.routers, nodes, arenas))

    def clear(self) -> None:
        """Nothing is there to be asked any more."""
        self._write([])

    def _write(self, now: list[Target]) -> None:
        if self._file is None or now == self._written:
            return
        part = self._file.with_name(f".{self._file.name}.part")
        try:
            part.write_text(json.dumps(now, indent=1) + "\n")
            part.replace(self._file)
        except OSError as error:
            if not self._is_failing:
                logger.warning("event=no_metrics_targets file=%s error=%s", self._file, error)
            self._is_failing = True
        else:
            self._written, self._is_failing = now, False
