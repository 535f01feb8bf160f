"""Servers as actors on the machines of a Ray cluster, own or existing: the one file that imports ray.

Ray starts processes, places them on machines and GPUs, and restarts them when they die. No token and no block goes
through it. `deploy.launch` decides what is started where, and when.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from deploy.actors import ServerActor, Started
from deploy.config import DeployError
from deploy.cores import num_usable_cores
from deploy.placement import Machine
from deploy.processes import CLUSTER_VARIABLE, environment, signals_kept
from deploy.specs import PlacedSpec

logger = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
OBJECT_STORE_BYTES = 100 * 2**20  # nothing of ours goes through it
ANSWER_S = 2.0
CONNECT_TIMEOUT_S = 5.0
RAY_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_memory_monitor_refresh_ms": "0",  # a node's memory is bounded by its options, and is no leak to kill it for
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


class StartFailed(DeployError):
    """A part of the cluster did not come up; what had come up is stopped."""


@dataclass(eq=False)
class Member:
    """A server in its actor."""

    placed: PlacedSpec
    actor: Any
    group: PlacementGroup | None = None  # of a wide node's ranks
    asked_ready: Any = None  # its first start; answers once it is up, or cannot be
    asked_part: Any = None  # what part of its start is done; it has not answered yet
    started: Started | None = None

    @property
    def name(self) -> str:
        return self.placed.spec.name

    @property
    def node_id(self) -> str:
        """The node's id, also for its ranks; "" for other servers."""
        return self.placed.placement.node_id if self.placed.placement is not None else ""

    @property
    def kind(self) -> str:
        return self.placed.spec.kind

    def address(self) -> str:
        """A node's current address, as it has another port after each restart; "" while it is coming back."""
        try:
            started: Started = ray.get(self.actor.ready.remote(), timeout=ANSWER_S)
        except ray.exceptions.RayError:
            return ""
        return str(started.record["address"])

    def is_ready(self) -> bool:
        """For a router, whether it has nodes to serve with, as reported by itself."""
        try:
            return bool(ray.get(self.actor.is_ready.remote(), timeout=ANSWER_S))
        except ray.exceptions.RayError:
            return False

    def part(self) -> float | None:
        """The fraction of its start that is done, once it has answered; does not wait, and asks once at a time."""
        part: float | None = None
        if self.asked_part is None:
            self.asked_part = self.actor.part.remote()
        elif ray.wait([self.asked_part], timeout=0)[0]:
            with contextlib.suppress(ray.exceptions.RayError):  # if it died, its `ready` says so
                part = ray.get(self.asked_part)
            self.asked_part = None
        return part


# --- a Ray and its machines ---


def join(address: str, folder: Path, cluster_id: str) -> None:
    """Joins the Ray cluster at `address`; if "", starts one with its files in `folder`. Raises `StartFailed`."""
    logging.getLogger("ray").setLevel(logging.ERROR)
    try:
        _check_address(address)
        with signals_kept():
            if address:
                ray.init(address=address, logging_level=logging.ERROR)
            else:
                _start_own(folder, cluster_id)
    except Exception as error:
        where = f"at {address}" if address else "here"
        raise StartFailed(f"no Ray {where}: {_first_line(error)}") from error


def _start_own(folder: Path, cluster_id: str) -> None:
    # A token of one's own keeps Ray from writing one into the home folder. It stays for the life of this process,
    # because Ray reads it only once.
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    options: dict[str, Any] = {
        "address": "local",
        "num_cpus": 0,  # actors ask for none, and Ray starts no workers ahead
        "object_store_memory": OBJECT_STORE_BYTES,
        "include_dashboard": False,
        "_node_ip_address": LOOPBACK,  # on other addresses its servers listen to the network
        "logging_level": logging.ERROR,
        "_temp_dir": str(folder),
    }
    with environment(RAY_SETTINGS | {CLUSTER_VARIABLE: cluster_id}):
        try:
            ray.init(**options)
        except Exception:  # it gives itself 30 s, which was seen to be too little on a busy machine
            ray.shutdown()
            ray.init(**options)


def is_joined() -> bool:
    return bool(ray.is_initialized())


def leave() -> None:
    """Ends an own Ray cluster with all that is left in it."""
    ray.shutdown()


def machines(is_own: bool) -> tuple[list[Machine], Machine]:
    """All machines of this Ray cluster, and the one this process runs on. Those of an own Ray use loopback."""
    own_id = ray.get_runtime_context().get_node_id()
    found = [_machine(node, own_id, is_own) for node in ray.nodes() if node["Alive"]]
    return found, next(machine for machine in found if machine.ray_node_id == own_id)


def _machine(node: Mapping[str, Any], own_id: str, is_own: bool) -> Machine:
    resources = node["Resources"]
    cores = num_usable_cores() if node["NodeID"] == own_id else int(resources.get("CPU", 1))
    return Machine(
        ray_node_id=node["NodeID"],
        address=LOOPBACK if is_own else node["NodeManagerAddress"],
        name=node["NodeManagerHostname"],
        cores=cores,
        gpus=int(resources.get("GPU", 0)),
        tags=frozenset(resources),
        ray_resource=f"node:{node['NodeManagerAddress']}",
    )


# --- actors ---


def add(placed: Iterable[PlacedSpec]) -> list[Member]:
    """Actors for these, each rank of a wide node in its bundle of the node's placement group."""
    added: list[Member] = []
    ranks: dict[str, list[PlacedSpec]] = {}
    for one in placed:
        if one.placement is not None and one.is_wide:
            ranks.setdefault(one.placement.node_id, []).append(one)
        else:
            added.append(_member(one))
    for node in ranks.values():
        group = _group(node)
        added += [_member(rank, group, bundle) for bundle, rank in enumerate(node)]
    return added


def came_up(members: Sequence[Member], wait_s: float) -> list[Member]:
    """Returns the members that are up, as soon as one is, or after `wait_s`. Raises `StartFailed` if one fails."""
    waiting = {member.asked_ready: member for member in members}
    done, _ = ray.wait(list(waiting), timeout=wait_s)
    for ref in done:
        _note(waiting[ref], ref)
    return [waiting[ref] for ref in done]


def answers(members: Sequence[Member]) -> dict[str, Started]:
    """The results of their last starts, by name; members that are restarting are left out."""
    refs = {member.name: member.actor.ready.remote() for member in members}
    ray.wait(list(refs.values()), num_returns=len(refs), timeout=ANSWER_S)
    return {name: started for name, ref in refs.items() if (started := _answer(ref)) is not None}


def call(method: str, members: Sequence[Member], timeout_s: float) -> None:
    """Calls a method on all at once and waits up to `timeout_s`; members that hang are killed afterwards."""
    refs = [getattr(member.actor, method).remote() for member in members]
    if refs:
        ray.wait(refs, num_returns=len(refs), timeout=timeout_s)
    for member, ref in zip(members, refs, strict=True):
        try:
            ray.get(ref, timeout=0)
        except ray.exceptions.RayError as error:
            logger.warning("%s failed name=%s error=%s", method, member.name, _first_line(error))


def kill(members: Collection[Member]) -> None:
    """Kills members for good: Ray does not restart them."""
    for member in members:
        ray.kill(member.actor, no_restart=True)


def free_groups(members: Collection[Member]) -> None:
    """Releases the placement groups of wide nodes."""
    for group in {id(member.group): member.group for member in members}.values():
        if group is not None:
            remove_placement_group(group)


def _member(placed: PlacedSpec, group: PlacementGroup | None = None, bundle: int = 0) -> Member:
    actor = _actor(placed, group, bundle)
    return Member(placed, actor, group, asked_ready=actor.ready.remote())


def _group(ranks: Sequence[PlacedSpec]) -> PlacementGroup:
    """One bundle per rank, so that a wide node gets all its GPUs or none; each on its chosen machine."""
    bundles = [{rank.machine.ray_resource: 0.001} | ({"GPU": rank.num_gpus} if rank.num_gpus else {}) for rank in ranks]
    is_packed = len({rank.machine.ray_node_id for rank in ranks}) == 1
    return placement_group(bundles, strategy="STRICT_PACK" if is_packed else "PACK")


def _actor(placed: PlacedSpec, group: PlacementGroup | None = None, bundle: int = 0) -> Any:
    where: Any = NodeAffinitySchedulingStrategy(placed.machine.ray_node_id, soft=False)
    if group is not None:
        where = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle)
    options = {"num_cpus": 0, "num_gpus": placed.num_gpus, "max_restarts": -1, "scheduling_strategy": where}
    return ray.remote(ServerActor).options(**options).remote(replace(placed.spec, life=secrets.token_hex(4)))


def _note(member: Member, ref: Any) -> None:
    try:
        started: Started = ray.get(ref)
    except ray.exceptions.RayError as error:
        raise StartFailed(f"{member.name} died while it was starting: {_first_line(error)}") from None
    if started.error:
        raise StartFailed(f"{member.name}: {started.error}")
    member.started = started


def _answer(ref: Any) -> Started | None:
    try:
        started: Started = ray.get(ref, timeout=0)
    except ray.exceptions.RayError:
        return None
    return started


def _check_address(address: str) -> None:
    """Raises `OSError` if nobody listens: Ray itself would try for two minutes, then end the process."""
    if address and address != "auto":
        host, _, port = address.rpartition(":")
        socket.create_connection((host, int(port)), CONNECT_TIMEOUT_S).close()


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
