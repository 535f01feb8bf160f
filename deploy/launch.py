"""Places a cluster's servers on Ray machines and keeps them alive: the one file that imports ray.

Ray starts processes, puts them on machines and GPUs, and starts them again when they die. No token and no block goes
through it. Whatever `start` made, `stop` removes: actors, folders, Ray's session, Redis.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import shutil
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from deploy.actors import ServerActor, Started
from deploy.config import ClusterConfig, ConfigError, DeployError, cluster_dir
from deploy.cores import num_usable_cores
from deploy.drain import drain
from deploy.placement import Machine, Placement, place, router_machines, usable
from deploy.processes import CLUSTER_VARIABLE, end_all, environment, processes_of, signals_kept
from deploy.redis import EmbeddedRedis, check_given
from deploy.specs import PlacedSpec, Specs
from deploy.widths import kv_pieces
from engine.config import EngineConfig, ModelConfig, kv_layout
from engine.errors import UnsupportedModel
from kvstore.blocks import KVLayout
from kvstore.curve import new_wire_key
from node.gate import new_cluster_token

logger = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
OBJECT_STORE_BYTES = 100 * 2**20  # nothing of ours goes through it
POLL_S = 0.1
ROUTER_POLL_S = 0.5  # a router looks for nodes more often than this
ANSWER_S = 2.0
KILL_WAIT_S = 5.0
CONNECT_TIMEOUT_S = 5.0
DRAIN_S = 600.0  # for the requests of a node that is to go; what is left then goes on elsewhere
RAY_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_memory_monitor_refresh_ms": "0",  # a node's memory is bounded by its options, and is no leak to kill it for
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


class StartFailed(DeployError):
    """A part of the cluster did not come up; what had come up is stopped."""


class Interrupted(DeployError):
    """Someone asked to stop while the cluster was starting."""


@dataclass
class _Member:
    """A server in its actor."""

    placed: PlacedSpec
    actor: Any
    group: PlacementGroup | None = None  # of a wide node's ranks
    started: Started | None = None
    asked_part: Any = None  # what part of its start is done; it has not answered yet

    @property
    def name(self) -> str:
        return self.placed.spec.name

    @property
    def node_id(self) -> str:
        """The node's, of a rank too; "" for other servers."""
        return self.placed.placement.node_id if self.placed.placement is not None else ""

    @property
    def kind(self) -> str:
        return self.placed.spec.kind


class Cluster:
    """One cluster, from `start` to `stop`. `report` gets a line for each thing that came up, `on_part` a node and
    how much of its start is done, from 0 to 1. Setting `interrupt` (from a signal handler, say) makes a start under way
    end with `Interrupted`.

    `start` and `stop` belong to the main thread: the kernel ends Redis and Ray with the thread that started them.
    """

    def __init__(
        self,
        config: ClusterConfig,
        report: Callable[[str], None] = logger.info,
        interrupt: threading.Event | None = None,
        on_part: Callable[[str, float], None] = lambda name, part: None,
    ) -> None:
        self.config = config
        self.cluster_id = secrets.token_hex(4)
        self.redis_url = config.redis_url
        self.wire_key = ""  # of the stores, once `start` has made one
        self.folders = [cluster_dir(self.cluster_id)]  # of this machine; `stop` removes them
        self._report = report
        self._on_part = on_part
        self._interrupt = interrupt or threading.Event()
        self._redis: EmbeddedRedis | None = None
        self._members: list[_Member] = []

    @property
    def routers(self) -> tuple[str, ...]:
        """Addresses, "ip:port"."""
        return tuple(str(m.started.record["address"]) for m in self._members if m.kind == "router" and m.started)

    @property
    def router_http(self) -> tuple[str, ...]:
        """Where each router speaks OpenAI's API, "ip:port"; "" for nowhere."""
        routers = [m.started.record for m in self._members if m.kind == "router" and m.started]
        return tuple(str(record["http_address"]) for record in routers)

    @property
    def router_metrics(self) -> tuple[str, ...]:
        """Where each router shows its metrics; "" for nowhere."""
        routers = [m.started.record for m in self._members if m.kind == "router" and m.started]
        return tuple(str(record["metrics_address"]) for record in routers)

    @property
    def router_admins(self) -> tuple[str, ...]:
        """Each router's door for its operator; "" is none."""
        routers = [m.started.record for m in self._members if m.kind == "router" and m.started]
        return tuple(str(record["admin_address"]) for record in routers)

    @property
    def pids(self) -> dict[str, int]:
        """Of each server, by its name, as it is now; those that are just coming up again are left out."""
        refs = {member.name: member.actor.ready.remote() for member in self._members}
        ray.wait(list(refs.values()), num_returns=len(refs), timeout=ANSWER_S)
        return {name: started.pid for name, ref in refs.items() if (started := _answer(ref)) is not None}

    def check(self) -> None:
        """What can be said of the cluster before anything is started. Raises `DeployError`."""
        self._model()

    def start(self) -> None:
        """Returns when every server is up. Raises `DeployError`, and leaves nothing behind, when one is not."""
        try:
            self._start()
        except BaseException:
            self.stop()
            raise

    def _start(self) -> None:
        model = self._model()
        if self.redis_url:
            asyncio.run(check_given(self.redis_url, self.config.cluster))
        self.folders[0].mkdir(mode=0o700)
        self._start_ray()
        machines, own = self._wait_for_machines()
        placements = place(self.config, machines)
        self._start_redis(own)
        self._report(f"ray: {_count(len(machines), 'machine')}, redis: {'embedded' if self._redis else 'given'}")
        if self.config.pin_cores:
            for address, cores in sorted({(p.machine.address, p.machine.cores) for p in placements if p.is_crowded}):
                self._report(f"{address}: more threads than its {_count(cores, 'core')}, so no node is pinned to any")
        self.wire_key = new_wire_key() if self.config.store_encryption else ""
        layout, pieces = self._layout(model, placements), kv_pieces(self.config.widths, model)
        self._specs = Specs(
            self.config, self.cluster_id, self.redis_url, layout, pieces, self.wire_key, new_cluster_token()
        )
        self.folders.append(self._specs.folder(own))
        self._add(self._specs.all(machines, placements, own))
        self._wait_until_started(self._members)
        self._wait_until_routed()

    def _add(self, placed: Iterable[PlacedSpec]) -> list[_Member]:
        """Actors for these, each rank of a wide node in its bundle of the node's placement group."""
        added: list[_Member] = []
        ranks: dict[str, list[PlacedSpec]] = {}
        for one in placed:
            if one.placement is not None and one.is_wide:
                ranks.setdefault(one.placement.node_id, []).append(one)
            else:
                added.append(_Member(one, _actor(one)))
        for node in ranks.values():
            group = _group(node)
            added += [_Member(rank, _actor(rank, group, bundle), group) for bundle, rank in enumerate(node)]
        self._members += added
        return added

    def scale(self, config: ClusterConfig) -> list[str]:
        """Adds nodes, then drains and removes others, until there are as many as `config` says; returns what was done.

        Raises `DeployError`; what was new is gone then, and the rest as it was.
        """
        placements = [member.placed.placement for member in self._members if member.placed.placement is not None]
        wanted = Counter(config.roles)
        by_role = {
            role: [p.node_id for p in placements if p.role == role and p.rank == 0]
            for role in wanted | Counter(p.role for p in placements)
        }
        gone = {name for role, names in by_role.items() for name in sorted(names, key=_number)[wanted[role] :]}
        machines, _ = self._machines()
        new = place(config, machines, [placement for placement in placements if placement.node_id not in gone])
        lines = self._grow(new) + self._shrink(gone)
        self.config = config
        return lines or ["nothing to do"]

    def _grow(self, placements: Sequence[Placement]) -> list[str]:
        with_stores = {member.placed.machine.ray_node_id for member in self._members if member.kind == "store"}
        machines = {p.machine.ray_node_id: p.machine for p in placements if p.machine.ray_node_id not in with_stores}
        added = self._add([*self._specs.stores(machines.values()), *self._specs.nodes(placements)])
        try:
            self._wait_until_started(added)
        except DeployError:
            self._call("remove_folder", [member for member in added if member.kind == "store"])  # its machine is new
            self._remove(added)
            raise
        return [f"{member.name} is up on {member.placed.machine.address}" for member in added]

    def _shrink(self, node_ids: Collection[str]) -> list[str]:
        gone = [member for member in self._members if member.node_id in node_ids]
        leaders = [member for member in gone if member.kind == "node" and member.started]
        addresses = [self._address(member) for member in leaders]
        with ThreadPoolExecutor(max(1, len(leaders))) as threads:
            is_over = self._interrupt.is_set
            token = self._specs.cluster_token
            left = list(threads.map(lambda at: drain(at, DRAIN_S, is_over, token) if at else 0, addresses))
        self._call("stop", gone)
        self._remove(gone)
        return [
            f"{member.name} is drained and gone" + (f", but {n} requests had to move" if n else "")
            for member, n in zip(leaders, left, strict=True)
        ]

    def _remove(self, members: Collection[_Member]) -> None:
        for member in members:
            ray.kill(member.actor, no_restart=True)
            self._members.remove(member)
        for group in {id(member.group): member.group for member in members}.values():
            if group is not None:
                remove_placement_group(group)

    def _address(self, member: _Member) -> str:
        """Where a node listens now, for it has another port after each restart; "" where it is just coming back."""
        try:
            started: Started = ray.get(member.actor.ready.remote(), timeout=ANSWER_S)
        except ray.exceptions.RayError:
            return ""
        return str(started.record["address"])

    def stop(self) -> list[str]:
        """Stops everything, in the order of the requests' way: routers, nodes, stores. Idempotent.

        Returns what it could not remove, in words; an empty list is how it should be.
        """
        if ray.is_initialized():
            for kinds in (("router",), ("node", "rank"), ("store",)):
                members = [member for member in self._members if member.kind in kinds]
                # Ranks that follow are told with their leader, and leave behind it.
                leaderless = {member.node_id for member in members if member.kind == "node" and not member.started}
                self._call(
                    "stop", [member for member in members if member.started and member.node_id not in leaderless]
                )
                with_store = {m.placed.machine.ray_node_id for m in self._members if m.kind == "store"}
                last = [m for m in members if "store" in kinds or m.placed.machine.ray_node_id not in with_store]
                self._call("remove_folder", last)
                for member in members:
                    ray.kill(member.actor, no_restart=True)
            ray.shutdown()
        self._members.clear()
        if self._redis is not None:
            self._redis.stop()
        left = end_all(processes_of(CLUSTER_VARIABLE, self.cluster_id), KILL_WAIT_S)
        for folder in self.folders:
            shutil.rmtree(folder, ignore_errors=True)
        return [f"process {name}" for name in left] + [f"folder {path}" for path in self.folders if path.exists()]

    # --- the steps of a start ---

    def _model(self) -> ModelConfig:
        """The model that is to be served, read before anything is started for it."""
        try:
            model = ModelConfig.from_pretrained(self.config.model_dir)
        except UnsupportedModel as error:
            raise StartFailed(str(error)) from None
        self._layout(model, ())
        return model

    def _layout(self, model: ModelConfig, placements: Sequence[Placement]) -> KVLayout:
        """One layout for all nodes, whatever they run on: their blocks are to fit each other."""
        device = "cuda" if any(placement.num_gpus for placement in placements) else "cpu"
        try:
            layers, heads = kv_pieces(self.config.widths, model)
            engine = EngineConfig(self.config.dtype, device, self.config.block_size)
            return kv_layout(model, replace(engine, kv_layer_pieces=layers, kv_head_pieces=heads))
        except UnsupportedModel as error:
            raise StartFailed(str(error)) from None

    def _start_ray(self) -> None:
        logging.getLogger("ray").setLevel(logging.ERROR)
        try:
            _check_address(self.config.ray_address)
            with signals_kept():
                if self.config.ray_address:
                    ray.init(address=self.config.ray_address, logging_level=logging.ERROR)
                else:
                    self._start_own_ray()
        except Exception as error:
            where = f"at {self.config.ray_address}" if self.config.ray_address else "here"
            raise StartFailed(f"no Ray {where}: {_first_line(error)}") from error

    def _start_own_ray(self) -> None:
        # A token of one's own keeps Ray from writing one into the home folder. It stays for the life of this process,
        # because Ray reads it only once.
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        with environment(RAY_SETTINGS | {CLUSTER_VARIABLE: self.cluster_id}):
            ray.init(
                address="local",
                num_cpus=0,  # actors ask for none, and Ray starts no workers ahead
                object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=False,
                _node_ip_address=LOOPBACK,  # on other addresses its servers listen to the network
                logging_level=logging.ERROR,
                _temp_dir=str(self.folders[0] / "ray"),
            )

    def _wait_for_machines(self) -> tuple[list[Machine], Machine]:
        """`_machines`, once at least `min_machines` are there that this cluster may use."""
        deadline = time.monotonic() + self.config.start_timeout_s
        while True:
            machines, own = self._machines()
            if (count := self._num_wanted(machines, own)) >= self.config.min_machines:
                return machines, own
            self._check_patience(deadline, [f"{self.config.min_machines - count} machines more than the {count} there"])
            time.sleep(POLL_S)

    def _num_wanted(self, machines: Sequence[Machine], own: Machine) -> int:
        try:
            wanted = [*usable(self.config, machines), *router_machines(self.config, machines, own)]
        except ConfigError:  # one that is named is not there, or not yet
            return 0
        return len({machine.ray_node_id for machine in wanted})

    def _machines(self) -> tuple[list[Machine], Machine]:
        """All machines of this Ray, and the one that this process runs on."""
        own_id = ray.get_runtime_context().get_node_id()
        machines = [self._machine(node, own_id) for node in ray.nodes() if node["Alive"]]
        return machines, next(machine for machine in machines if machine.ray_node_id == own_id)

    def _machine(self, node: Mapping[str, Any], own_id: str) -> Machine:
        resources = node["Resources"]
        cores = num_usable_cores() if node["NodeID"] == own_id else int(resources.get("CPU", 1))
        return Machine(
            ray_node_id=node["NodeID"],
            address=node["NodeManagerAddress"] if self.config.ray_address else LOOPBACK,
            name=node["NodeManagerHostname"],
            cores=cores,
            gpus=int(resources.get("GPU", 0)),
            tags=frozenset(resources),
            ray_resource=f"node:{node['NodeManagerAddress']}",
        )

    def _start_redis(self, own: Machine) -> None:
        if not self.redis_url:
            self._redis = EmbeddedRedis(self.folders[0] / "redis", own.address if self.config.ray_address else "")
            self._redis.start()
            self.redis_url = self._redis.url

    def _wait_until_started(self, members: Sequence[_Member]) -> None:
        waiting = {member.actor.ready.remote(): member for member in members}
        deadline = time.monotonic() + self.config.start_timeout_s
        while waiting:
            done, _ = ray.wait(list(waiting), timeout=POLL_S)
            for ref in done:
                self._note(waiting.pop(ref), ref)
            for member in waiting.values():
                if member.kind == "node":
                    self._ask_part(member)
            self._check_patience(deadline, (member.name for member in waiting.values()))

    def _wait_until_routed(self) -> None:
        """Until the routers have found the nodes, the last of which came up just now."""
        begin = time.monotonic()
        for member in (member for member in self._members if member.kind == "router"):
            while not _said_yes(member.actor.is_ready.remote()):
                self._check_patience(begin + self.config.start_timeout_s, [member.name])
                time.sleep(POLL_S)
        time.sleep(max(0.0, begin + ROUTER_POLL_S - time.monotonic()))

    def _check_patience(self, deadline: float, waiting_for: Iterable[str]) -> None:
        if self._interrupt.is_set():
            raise Interrupted("stopped while it was starting")
        if time.monotonic() > deadline:
            raise StartFailed(f"not up within {self.config.start_timeout_s:.0f} s: {', '.join(waiting_for)}")

    def _note(self, member: _Member, ref: Any) -> None:
        try:
            started: Started = ray.get(ref)
        except ray.exceptions.RayError as error:
            raise StartFailed(f"{member.name} died while it was starting: {_first_line(error)}") from None
        if started.error:
            raise StartFailed(f"{member.name}: {started.error}")
        member.started = started
        if member.kind == "node":
            self._on_part(member.name, 1.0)
        self._report(f"{member.name} is up on {member.placed.machine.address}, pid {started.pid}")

    def _ask_part(self, member: _Member) -> None:
        """Passes on how far a node's start is, when it has answered; waits for nothing, and asks once at a time."""
        if member.asked_part is None:
            member.asked_part = member.actor.part.remote()
        elif ray.wait([member.asked_part], timeout=0)[0]:
            with contextlib.suppress(ray.exceptions.RayError):  # if it died, its `ready` says so
                self._on_part(member.name, ray.get(member.asked_part))
            member.asked_part = None

    def _call(self, method: str, members: Sequence[_Member]) -> None:
        """Calls a method on all at once and waits for all, but never for long: what hangs is killed afterwards."""
        refs = [getattr(member.actor, method).remote() for member in members]
        if refs:
            ray.wait(refs, num_returns=len(refs), timeout=self.config.stop_timeout_s)
        for member, ref in zip(members, refs, strict=True):
            try:
                ray.get(ref, timeout=0)
            except ray.exceptions.RayError as error:
                logger.warning("%s failed name=%s error=%s", method, member.name, _first_line(error))


def _group(ranks: Sequence[PlacedSpec]) -> PlacementGroup:
    """One bundle for each rank, so that a wide node has all its GPUs or none; each on the machine that was chosen."""
    bundles = [{rank.machine.ray_resource: 0.001} | ({"GPU": rank.num_gpus} if rank.num_gpus else {}) for rank in ranks]
    is_packed = len({rank.machine.ray_node_id for rank in ranks}) == 1
    return placement_group(bundles, strategy="STRICT_PACK" if is_packed else "PACK")


def _actor(placed: PlacedSpec, group: PlacementGroup | None = None, bundle: int = 0) -> Any:
    where: Any = NodeAffinitySchedulingStrategy(placed.machine.ray_node_id, soft=False)
    if group is not None:
        where = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle)
    options = {"num_cpus": 0, "num_gpus": placed.num_gpus, "max_restarts": -1, "scheduling_strategy": where}
    return ray.remote(ServerActor).options(**options).remote(replace(placed.spec, life=secrets.token_hex(4)))


def _answer(ref: Any) -> Started | None:
    try:
        started: Started = ray.get(ref, timeout=0)
    except ray.exceptions.RayError:
        return None
    return started


def _said_yes(ref: Any) -> bool:
    try:
        return bool(ray.get(ref, timeout=ANSWER_S))
    except ray.exceptions.RayError:
        return False


def _check_address(address: str) -> None:
    """Raises `OSError` where nobody listens: Ray itself would try for two minutes, then end the process."""
    if address and address != "auto":
        host, _, port = address.rpartition(":")
        socket.create_connection((host, int(port)), CONNECT_TIMEOUT_S).close()


def _number(node_id: str) -> int:
    return int(node_id.rpartition("-")[2])


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
