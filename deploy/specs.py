"""Which servers make up a cluster, each with its whole config. Pure: options, machines and placements in, specs out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from deploy.actors import ServerSpec
from deploy.config import ClusterConfig, machine_dir
from deploy.node_config import NodeConfig
from deploy.placement import Machine, Placement, router_machines, usable
from engine.config import EngineConfig
from kvstore.blocks import KVLayout
from kvstore.server import StoreConfig
from router.config import RouterConfig

# An OpenMP thread without work spins for a while in case there is more. Where threads outnumber cores, it keeps a core
# from another node's thread that has some, and both are much slower for it; so it is to sleep there.
CROWDED = {"OMP_WAIT_POLICY": "passive"}
ANY_HOST = ("0.0.0.0", "::", "[::]")  # good to listen on, but no address to call


@dataclass(frozen=True)
class PlacedSpec:
    """A server and where it goes."""

    spec: ServerSpec
    machine: Machine
    num_gpus: float = 0.0


@dataclass(frozen=True)
class Specs:
    """What all servers of a cluster share."""

    config: ClusterConfig
    cluster_id: str
    redis_url: str = field(repr=False)  # may have a password in it
    layout: KVLayout  # of the model that is served
    wire_key: str = field(default="", repr=False)  # of its stores and their readers; "": none is asked for
    cluster_token: str = field(default="", repr=False)  # of its nodes and their callers
    ported_on: Counter[str] = field(default_factory=Counter)  # servers of each machine that have a metrics port

    def folder(self, machine: Machine) -> Path:
        return machine_dir(self.config.store_base, self.cluster_id, machine.ray_node_id)

    def all(self, machines: Sequence[Machine], placements: Sequence[Placement], own: Machine) -> Iterator[PlacedSpec]:
        """One store a machine that nodes may be on, the nodes where they were placed, the routers where they are to be.

        Servers of one machine that have ports by option take them in this order. Raises `ConfigError`.
        """
        for machine in usable(self.config, machines):
            yield PlacedSpec(self._store(machine), machine)
        for placement in placements:
            yield PlacedSpec(self._node(placement), placement.machine, placement.num_gpus)
        routers: Counter[str] = Counter()
        for index, machine in enumerate(router_machines(self.config, machines, own)):
            yield PlacedSpec(self._router(index, routers[machine.ray_node_id], machine), machine)
            routers[machine.ray_node_id] += 1

    def _metrics_port(self, machine: Machine) -> int:
        """The next one of a machine; 0 where the kernel is to choose."""
        if not self.config.metrics_port:
            return 0
        self.ported_on[machine.ray_node_id] += 1
        return self.config.metrics_port + self.ported_on[machine.ray_node_id] - 1

    def _store(self, machine: Machine) -> ServerSpec:
        disk = self.config.store_disk_dir
        config = StoreConfig(
            dir=str(self.folder(machine)),
            redis_url=self.redis_url,
            cluster=self.config.cluster,
            slot_bytes=self.layout.block_bytes,
            memory_bytes=self.config.store_bytes,
            eviction=self.config.store_eviction,
            disk_bytes=self.config.store_disk_bytes,
            disk_dir=str(disk.resolve() / machine.address) if disk is not None else "",
            disk_admission=self.config.store_disk_admission,
            disk_root=self.layout.root().hex(),
            advertise_host=machine.address,
            host=machine.label,
            wire_key=self.wire_key,
            trusts_network=not self.config.store_encryption,
            tcp=self.config.store_tcp,
            metrics=self.config.metrics,
            metrics_port=self._metrics_port(machine),
        )
        return ServerSpec("store", f"store-{machine.address}", config, self.folder(machine), self.config.log_level)

    def _node(self, placement: Placement) -> ServerSpec:
        machine = placement.machine
        config = NodeConfig(
            node_id=placement.node_id,
            model_dir=str(self.config.model_dir.resolve()),
            model=self.config.model_name,
            redis_url=self.redis_url,
            role=placement.role,
            cluster=self.config.cluster,
            engine=self._engine(placement),
            core_share=placement.core_share,
            num_core_shares=placement.num_core_shares,
            store_dir=str(self.folder(machine)),
            cluster_token=self.cluster_token,
            bind_host=machine.address,
            advertise_host=machine.address,
            host=machine.label,
            wire_key=self.wire_key,
            metrics=self.config.metrics,
            metrics_port=self._metrics_port(machine),
        )
        environment = CROWDED if placement.is_crowded else {}
        return ServerSpec("node", placement.node_id, config, self.folder(machine), self.config.log_level, environment)

    def _engine(self, placement: Placement) -> EngineConfig:
        return EngineConfig(
            dtype=self.layout.dtype,
            device="cuda" if placement.num_gpus else "cpu",
            block_size=self.config.block_size,
            kv_cache_bytes=self.config.kv_bytes,
            max_model_len=self.config.max_model_len,
            max_num_batched_tokens=self.config.max_num_batched_tokens,
            max_num_requests=self.config.max_num_requests,
            num_threads=placement.num_threads,
        )

    def _router(self, index: int, nth: int, machine: Machine) -> ServerSpec:
        """Router `index` of all, the `nth` one on its machine."""
        tenants = self.config.tenants_file
        config = RouterConfig(
            host=self.config.host,
            port=self.config.port + nth if self.config.port else 0,
            http=self.config.http,
            http_port=self.config.http_port + nth if self.config.http_port else 0,
            advertise_host=machine.address if self.config.host in ANY_HOST else "",
            redis_url=self.redis_url,
            cluster=self.config.cluster,
            model_dir=str(self.config.model_dir.resolve()),
            model=self.config.model_name,
            tenants_file=str(tenants.resolve()) if tenants is not None else "",
            cluster_token=self.cluster_token,
            policy=self.config.policy,
            metrics=self.config.metrics,
            metrics_port=self._metrics_port(machine),
            **self.config.locks.router_options(nth),
        )
        return ServerSpec("router", f"router-{index}", config, self.folder(machine), self.config.log_level)
