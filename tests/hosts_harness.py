"""A `ProcessCluster` on several hosts, which are network namespaces: each with a store, and any nodes beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import ServerProcess
from harness import ProcessCluster

from batonpb import node_pb2
from benchmarks.lan import Host, Lan, reason_to_skip
from deploy.process import SECRETS

SKIP = reason_to_skip()
NETNS = [pytest.mark.netns, pytest.mark.skipif(bool(SKIP), reason=SKIP)]


class HostsCluster(ProcessCluster):
    """Store `n` and the nodes that are started with it are on host `n`, the router is on `router_host`.

    Redis and the client are where the test is, on the same network.
    """

    def __init__(
        self,
        lan: Lan,
        model: Path,
        redis_url: str,
        folder: Path,
        router_host: int,
        wire_key: str = "",
        **engine_options: Any,
    ) -> None:
        super().__init__(model, redis_url, folder, **engine_options)
        self.lan = lan
        self._router_host = router_host
        self._environment = {SECRETS["wire_key"]: wire_key}

    async def launch(self, name: str, kind: str, config: dict[str, Any]) -> None:
        index = self._router_host if kind == "router" else int(config["host"].removeprefix("host-"))
        host = self.lan.hosts[index]
        where = {
            "store": {"advertise_host": host.address, "trusts_network": True},
            "node": {"advertise_host": host.address, "bind_host": host.address, "trusts_network": True},
            "router": {"advertise_host": host.address, "host": host.address},
        }
        self.processes[name] = await ServerProcess.start(
            kind, config | where[kind], prefix=host.command(), extra=self._environment
        )

    def host_of(self, name: str) -> Host:
        """The host of a node that is called."""
        address = self.processes[name].record["address"].rpartition(":")[0]
        return next(host for host in self.lan.hosts if host.address == address)

    async def came(self, name: str) -> node_pb2.Traffic:
        """What a node fetched from other hosts so far."""
        return (await self.load(name)).fetches.remote
