"""Which node goes to which machine, with which share of its cores and GPUs. Pure: machines in, placements out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from deploy.config import ClusterConfig, ConfigError
from deploy.cores import share


@dataclass(frozen=True)
class Machine:
    """One Ray machine. `address` is what others reach it by; `cores` and `gpus` are whole numbers."""

    ray_node_id: str
    address: str
    name: str
    cores: int
    gpus: int = 0
    tags: frozenset[str] = frozenset()  # names of its custom resources in Ray

    @property
    def label(self) -> str:
        """Nodes and arenas of one label share memory. Two machines may have one name, hence Ray's id."""
        return self.ray_node_id[:8]


@dataclass(frozen=True)
class Placement:
    node_id: str  # "prefill-0"
    role: str
    machine: Machine
    num_threads: int
    num_gpus: float  # 0.0: the node runs on the CPU
    core_share: int = 0  # of so many even shares of the machine's cores
    num_core_shares: int = 0  # 0: it computes on any core
    is_crowded: bool = False  # the machine's nodes have more threads than it has cores


def place(config: ClusterConfig, machines: Sequence[Machine]) -> list[Placement]:
    """Spreads each role over the machines that it may use, always to the one with the fewest nodes for its size.

    Where any machine has GPUs, only those that have some get nodes. Raises `ConfigError` where a role has no machine.
    Nodes of one machine get shares of its cores that do not overlap. Where these do not suffice for all their threads,
    no share is kept: what is idle in one node is then another's.
    """
    nodes_on: Counter[str] = Counter()
    role_on: Counter[tuple[str, str]] = Counter()
    chosen: list[tuple[str, str, Machine]] = []
    for index, role in enumerate(config.roles):
        machine = min(
            _allowed(config, role, machines),
            key=lambda m: (role_on[role, m.ray_node_id], nodes_on[m.ray_node_id] / (m.gpus or max(1, m.cores))),
        )
        chosen.append((f"{role}-{config.roles[:index].count(role)}", role, machine))
        nodes_on[machine.ray_node_id] += 1
        role_on[role, machine.ray_node_id] += 1
    placements: list[Placement] = []
    placed_on: Counter[str] = Counter()
    for node_id, role, machine in chosen:
        index, nodes = placed_on[machine.ray_node_id], nodes_on[machine.ray_node_id]
        placed_on[machine.ray_node_id] += 1
        is_crowded = nodes * (config.num_threads or 1) > machine.cores
        is_pinned = config.pin_cores and not is_crowded and not machine.gpus
        placements.append(
            Placement(
                node_id=node_id,
                role=role,
                machine=machine,
                num_threads=config.num_threads or max(1, len(share(range(machine.cores), index, nodes))),
                num_gpus=gpu_share(nodes, machine.gpus),
                core_share=index if is_pinned else 0,
                num_core_shares=nodes if is_pinned else 0,
                is_crowded=is_crowded,
            )
        )
    return placements


def gpu_share(nodes: int, gpus: int) -> float:
    """How much of a GPU each of `nodes` on one machine asks for, so that all of them fit: a whole one, or 1/n."""
    if gpus == 0 or nodes == 0:
        return 0.0
    return 1.0 / -(-nodes // gpus)


def usable(config: ClusterConfig, machines: Sequence[Machine]) -> list[Machine]:
    """Those that a node of any role may be on, now or later; the others need no store. Raises `ConfigError`."""
    roles = sorted(set(config.roles))
    ids = {m.ray_node_id for role in roles for m in _named(role, _hosts(config, role), machines)}
    return [m for m in machines if m.ray_node_id in ids]


def router_machines(config: ClusterConfig, machines: Sequence[Machine], own: Machine) -> list[Machine]:
    """The machine of each router: the launcher's `own`, or --router-hosts in turn. Raises `ConfigError`."""
    named = _named("router", config.router_hosts, machines) if config.router_hosts else [own]
    return [named[index % len(named)] for index in range(config.routers)]


def _allowed(config: ClusterConfig, role: str, machines: Sequence[Machine]) -> Sequence[Machine]:
    allowed = _named(role, _hosts(config, role), machines)
    return [m for m in allowed if m.gpus] or allowed


def _hosts(config: ClusterConfig, role: str) -> tuple[str, ...]:
    return {"prefill": config.prefill_hosts, "decode": config.decode_hosts}.get(role, ())


def _named(role: str, names: Sequence[str], machines: Sequence[Machine]) -> list[Machine]:
    """Those of one of these addresses, names or tags; all where nobody is named."""
    known = {name for m in machines for name in (m.address, m.name, *m.tags)}
    if unknown := set(names) - known:
        there = ", ".join(m.address for m in machines)
        raise ConfigError(f"--{role}-hosts: no Ray machine {', '.join(sorted(unknown))}; there are: {there}")
    return [m for m in machines if not names or {m.address, m.name, *m.tags} & set(names)]
