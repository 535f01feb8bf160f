"""Which node goes to which machine, with which share of its cores and GPUs. Pure: machines in, placements out."""

from __future__ import annotations

import itertools
import math
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
    ray_resource: str = ""  # that Ray has on this machine alone

    @property
    def label(self) -> str:
        """Nodes and arenas of one label share memory. Two machines may have one name, hence Ray's id."""
        return self.ray_node_id[:8]


@dataclass(frozen=True)
class Placement:
    """Where one rank of a node goes; most nodes have but one."""

    node_id: str  # "prefill-0"
    role: str
    machine: Machine
    num_threads: int
    num_gpus: float  # 0.0: the node runs on the CPU
    core_share: int = 0  # of so many even shares of the machine's cores
    num_core_shares: int = 0  # 0: it computes on any core
    is_crowded: bool = False  # the machine's nodes have more threads than it has cores
    rank: int = 0


def place(config: ClusterConfig, machines: Sequence[Machine], existing: Sequence[Placement] = ()) -> list[Placement]:
    """Spreads each role over the machines that it may use, always to the one with the fewest ranks for its size.

    The ranks of a stage are on one machine. Where any machine has GPUs, only those that have some get nodes. Raises
    `ConfigError` where a role has no machine, or none with enough GPUs. Ranks of one machine get shares of its cores
    that do not overlap. Where these do not suffice for all their threads, no share is kept: what is idle in one node is
    then another's. `existing` stay where they are, and are left out of the answer; who joins them is not pinned.
    """
    ranks_on = Counter(placement.machine.ray_node_id for placement in existing)
    role_on = Counter((placement.role, placement.machine.ray_node_id) for placement in existing)
    chosen: list[tuple[str, str, int, Machine]] = []
    for node_id, role in _new_nodes(config, existing):
        width = config.width(role)
        for stage in range(width.pp):
            machine = min(
                _allowed(config, role, machines),
                key=lambda m: (role_on[role, m.ray_node_id], ranks_on[m.ray_node_id] / (m.gpus or max(1, m.cores))),
            )
            chosen += [(node_id, role, stage * width.tp + tp_rank, machine) for tp_rank in range(width.tp)]
            ranks_on[machine.ray_node_id] += width.tp
            role_on[role, machine.ray_node_id] += width.tp
    placements: list[Placement] = []
    placed_on = Counter(placement.machine.ray_node_id for placement in existing)
    for node_id, role, rank, machine in chosen:
        index, ranks = placed_on[machine.ray_node_id], ranks_on[machine.ray_node_id]
        placed_on[machine.ray_node_id] += 1
        here = [placement.num_gpus for placement in existing if placement.machine.ray_node_id == machine.ray_node_id]
        num_gpus = _gpu_share(machine, here, ranks - len(here), is_wide=config.width(role).num_ranks > 1)
        is_crowded = ranks * (config.num_threads or 1) > machine.cores
        is_pinned = config.pin_cores and not is_crowded and not machine.gpus and not existing
        placements.append(
            Placement(
                node_id=node_id,
                role=role,
                machine=machine,
                num_threads=config.num_threads or max(1, len(share(range(machine.cores), index, ranks))),
                num_gpus=num_gpus,
                core_share=index if is_pinned else 0,
                num_core_shares=ranks if is_pinned else 0,
                is_crowded=is_crowded,
                rank=rank,
            )
        )
    return placements


def gpu_share(ranks: int, gpus: int) -> float:
    """How much of a GPU each of `ranks` on one machine asks for, so that all of them fit: a whole one, or 1/n."""
    if gpus == 0 or ranks == 0:
        return 0.0
    return 1.0 / -(-ranks // gpus)


def _gpu_share(machine: Machine, taken: Sequence[float], num_new: int, is_wide: bool) -> float:
    """How much of a GPU each of `num_new` ranks gets beside those that have `taken` theirs."""
    free = machine.gpus - math.ceil(sum(taken))
    if machine.gpus and free <= 0:
        raise ConfigError(f"nodes: all {machine.gpus} GPUs of {machine.address} are taken")
    num_gpus = gpu_share(num_new, free)
    if is_wide and 0.0 < num_gpus < 1.0:
        problem = f"{num_new} ranks on {machine.address}, which has {free} GPUs free: each needs one of its own"
        raise ConfigError(f"--tensor-parallel-size, --pipeline-parallel-size: {problem}")
    return num_gpus


def _new_nodes(config: ClusterConfig, existing: Sequence[Placement]) -> list[tuple[str, str]]:
    """(id, role) of each node that is not there yet, with the lowest numbers that are free."""
    taken = {placement.node_id for placement in existing}
    num_left = Counter(config.roles) - Counter(p.role for p in existing if p.rank == 0)
    nodes: list[tuple[str, str]] = []
    for role in dict.fromkeys(config.roles):
        free = (name for n in itertools.count() if (name := f"{role}-{n}") not in taken)
        nodes += [(name, role) for name in itertools.islice(free, num_left[role])]
    return nodes


def surplus(config: ClusterConfig, existing: Sequence[Placement]) -> set[str]:
    """Nodes that are more than are wanted: of each role, those with the highest numbers."""
    names: dict[str, list[str]] = {}
    for placement in existing:
        if placement.rank == 0:
            names.setdefault(placement.role, []).append(placement.node_id)
    num_wanted = Counter(config.roles)
    return {name for role, ids in names.items() for name in sorted(ids, key=_number)[num_wanted[role] :]}


def usable(config: ClusterConfig, machines: Sequence[Machine]) -> list[Machine]:
    """Those that a node of any role may be on, now or later; the others need no store. Raises `ConfigError`."""
    roles = sorted(set(config.roles))
    ids = {m.ray_node_id for role in roles for m in _named(role, _hosts(config, role), machines)}
    return [m for m in machines if m.ray_node_id in ids]


def router_machines(config: ClusterConfig, machines: Sequence[Machine], own: Machine) -> list[Machine]:
    """The machine of each router: the launcher's `own`, or --router-hosts in turn. Raises `ConfigError`."""
    named = _named("router", config.router_hosts, machines) if config.router_hosts else [own]
    return [named[index % len(named)] for index in range(config.routers)]


def num_usable(config: ClusterConfig, machines: Sequence[Machine], own: Machine) -> int:
    """How many machines nodes or routers may be on; 0 as long as one that is named is not there."""
    try:
        found = [*usable(config, machines), *router_machines(config, machines, own)]
    except ConfigError:
        return 0
    return len({machine.ray_node_id for machine in found})


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


def _number(node_id: str) -> int:
    return int(node_id.rpartition("-")[2])
