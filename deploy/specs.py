"""Which servers make up a cluster, each with its whole config. Pure: options, machines and placements in, specs out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

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
    placement: Placement | None = None  # of a node's rank
    is_wide: bool = False  # one of several ranks, which are placed together


@dataclass(frozen=True)
class Specs:
    """What all servers of a cluster share."""

    config: ClusterConfig
    cluster_id: str
    redis_url: str = field(repr=False)  # may have a password in it
    layout: KVLayout  # of the model that is served
    kv_pieces: tuple[int, int] = (1, 1)  # of layers and of heads, that blocks travel in
    wire_key: str = field(default="", repr=False)  # of its stores and their readers; "": none is asked for
    cluster_token: str = field(default="", repr=False)  # of its nodes and their callers
    _num_on: Counter[str] = field(default_factory=Counter, repr=False, compare=False)  # servers of a machine, so far

    @property
    def _logs(self) -> tuple[str, str]:
        return self.config.log_level, self.config.log_format

    def folder(self, machine: Machine) -> Path:
        return machine_dir(self.config.store_base, self.cluster_id, machine.ray_node_id)

    def all(self, machines: Sequence[Machine], placements: Sequence[Placement], own: Machine) -> Iterator[PlacedSpec]:
        """One store per machine that nodes may run on, the nodes as they were placed, and the routers.

        Servers on one machine whose ports are set by options take them in this order. Raises `ConfigError`.
        """
        yield from self.stores(usable(self.config, machines))
        yield from self.nodes(placements)
        routers: Counter[str] = Counter()
        for index, machine in enumerate(router_machines(self.config, machines, own)):
            nth = routers[machine.ray_node_id]
            routers[machine.ray_node_id] += 1
            yield PlacedSpec(self._router(index, nth, machine, self._metrics_port(machine)), machine)

    def stores(self, machines: Iterable[Machine]) -> Iterator[PlacedSpec]:
        for machine in machines:
            yield PlacedSpec(self._store(machine, self._metrics_port(machine)), machine)

    def nodes(self, placements: Sequence[Placement]) -> Iterator[PlacedSpec]:
        """A server for each rank."""
        for placement in placements:
            is_wide = self.config.width(placement.role).num_ranks > 1
            metrics_port = 0 if placement.rank else self._metrics_port(placement.machine)
            spec = self._node(placement, metrics_port)
            yield PlacedSpec(spec, placement.machine, placement.num_gpus, placement, is_wide)

    def _metrics_port(self, machine: Machine) -> int:
        """The machine's next metrics port, if ports are set by option; nodes added later get the following ones."""
        self._num_on[machine.ray_node_id] += 1
        return self.config.metrics_port and self.config.metrics_port + self._num_on[machine.ray_node_id] - 1

    def _store(self, machine: Machine, metrics_port: int) -> ServerSpec:
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
            metrics_port=metrics_port,
        )
        return ServerSpec("store", f"store-{machine.address}", config, self.folder(machine), *self._logs)

    def _node(self, placement: Placement, metrics_port: int) -> ServerSpec:
        machine, width = placement.machine, self.config.width(placement.role)
        config = NodeConfig(
            node_id=placement.node_id,
            model_dir=str(self.config.model_dir.resolve()),
            model=self.config.model_name,
            redis_url=self.redis_url,
            role=placement.role,
            cluster=self.config.cluster,
            engine=self._engine(placement),
            tensor_parallel_size=width.tp,
            pipeline_parallel_size=width.pp,
            rank=placement.rank,
            core_share=placement.core_share,
            num_core_shares=placement.num_core_shares,
            store_dir=str(self.folder(machine)),
            cluster_token=self.cluster_token,
            bind_host=machine.address,
            advertise_host=machine.address,
            host=machine.label,
            wire_key=self.wire_key,
            metrics=self.config.metrics,
            metrics_port=metrics_port,
        )
        environment = CROWDED if placement.is_crowded else {}
        kind: Literal["node", "rank"] = "rank" if placement.rank else "node"
        name = f"{placement.node_id}.{placement.rank}" if placement.rank else placement.node_id
        return ServerSpec(kind, name, config, self.folder(machine), *self._logs, environment)

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
            kv_layer_pieces=self.kv_pieces[0],
            kv_head_pieces=self.kv_pieces[1],
        )

    def _router(self, index: int, nth: int, machine: Machine, metrics_port: int) -> ServerSpec:
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
            metrics_port=metrics_port,
            status_page=self.config.status_page,
            otlp_endpoint=self.config.otlp_endpoint,
            **self.config.locks.router_options(nth),
        )
        return ServerSpec("router", f"router-{index}", config, self.folder(machine), *self._logs)
