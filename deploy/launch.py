"""One cluster: its servers on the machines of a Ray, from start to stop, and other numbers of them meanwhile.

What is needed where is planned by `placement` and `specs`, purely; `on_ray` does it. Whatever `start` made, `stop`
removes: actors, folders, Ray's session, Redis.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

from deploy import on_ray
from deploy.config import ClusterConfig, DeployError, cluster_dir
from deploy.drain import drain
from deploy.layout import layout_of, read_model
from deploy.leftovers import sweep
from deploy.on_ray import Member, StartFailed
from deploy.placement import Machine, Placement, num_usable, place, surplus, usable
from deploy.ports import given_ports, not_to_be_had
from deploy.processes import CLUSTER_VARIABLE, end_all, processes_of
from deploy.redis import EmbeddedRedis, check_given
from deploy.specs import PlacedSpec, Specs
from deploy.store_dir import unusable
from deploy.widths import kv_pieces
from engine.config import ModelConfig
from kvstore.curve import new_wire_key
from node.gate import new_cluster_token

logger = logging.getLogger(__name__)

POLL_S = 0.1
ROUTER_POLL_S = 0.5  # a router looks for nodes more often than this
KILL_WAIT_S = 5.0
DRAIN_S = 600.0  # for the requests of a node that is to go; what is left then goes on elsewhere


class Interrupted(DeployError):
    """Someone asked to stop while the cluster was starting."""


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
        self._members: list[Member] = []

    @property
    def routers(self) -> tuple[str, ...]:
        """Addresses, "ip:port"."""
        return self._of_routers("address")

    @property
    def router_http(self) -> tuple[str, ...]:
        """Where each router speaks OpenAI's API, "ip:port"; "" for nowhere."""
        return self._of_routers("http_address")

    @property
    def router_metrics(self) -> tuple[str, ...]:
        """Where each router shows its metrics; "" for nowhere."""
        return self._of_routers("metrics_address")

    @property
    def router_admins(self) -> tuple[str, ...]:
        """Each router's door for its operator; "" is none."""
        return self._of_routers("admin_address")

    def _of_routers(self, field: str) -> tuple[str, ...]:
        return tuple(str(m.started.record[field]) for m in self._members if m.kind == "router" and m.started)

    @property
    def pids(self) -> dict[str, int]:
        """Of each server, by its name, as it is now; those that are just coming up again are left out."""
        return {name: started.pid for name, started in on_ray.answers(self._members).items()}

    def check(self) -> None:
        """What can be said of the cluster before anything is started. Raises `DeployError`."""
        read_model(self.config)

    def start(self) -> None:
        """Returns when every server is up. Raises `DeployError`, and leaves nothing behind, when one is not."""
        try:
            self._start()
        except BaseException:
            self.stop()
            raise

    def _start(self) -> None:
        model = read_model(self.config)
        if not self.config.ray_address:
            self._check_store_dir(model)
        if self.redis_url:
            asyncio.run(check_given(self.redis_url, self.config.cluster))
        if not self.config.router_hosts and (problem := not_to_be_had(given_ports(self.config))):
            raise StartFailed(problem)
        self._check_interrupt()
        self.folders[0].mkdir(mode=0o700)
        on_ray.join(self.config.ray_address, self.folders[0] / "ray", self.cluster_id)
        machines, own = self._wait_for_machines()
        placements = place(self.config, machines)
        if own in usable(self.config, machines):
            self._check_store_dir(model)
        self._check_interrupt()
        self._start_redis(own)
        self._report(f"ray: {_count(len(machines), 'machine')}, redis: {'embedded' if self._redis else 'given'}")
        if self.config.pin_cores:
            for address, cores in sorted({(p.machine.address, p.machine.cores) for p in placements if p.is_crowded}):
                self._report(f"{address}: more threads than its {_count(cores, 'core')}, so no node is pinned to any")
        self.wire_key = new_wire_key() if self.config.store_encryption else ""
        device = "cuda" if any(placement.num_gpus for placement in placements) else "cpu"
        layout, pieces = layout_of(self.config, model, device), kv_pieces(self.config.widths, model)
        self._specs = Specs(
            self.config, self.cluster_id, self.redis_url, layout, pieces, self.wire_key, new_cluster_token()
        )
        self.folders.append(self._specs.folder(own))
        self._add(self._specs.all(machines, placements, own))
        self._wait_until_started(self._members)
        self._wait_until_routed()

    def _add(self, placed: Iterable[PlacedSpec]) -> list[Member]:
        added = on_ray.add([*placed])  # all of them are known, or none is started
        self._members += added
        return added

    def scale(self, config: ClusterConfig) -> list[str]:
        """Forgets nodes that were lost with a machine, adds nodes, then drains and removes others, until there are as
        many as `config` says; returns what was done.

        Raises `DeployError`; what was new is gone then, and the rest as it was.
        """
        machines, _ = self._machines()
        lines = self._forget_lost(machines)
        placements = [member.placed.placement for member in self._members if member.placed.placement is not None]
        gone = surplus(config, placements)
        new = place(config, machines, [placement for placement in placements if placement.node_id not in gone])
        lines += self._grow(new) + self._shrink(gone)
        self.config = config
        return lines or ["nothing to do"]

    def _forget_lost(self, machines: Collection[Machine]) -> list[str]:
        """Ray starts a server again on its own machine or nowhere; a node is lost with any of its ranks."""
        there = {machine.ray_node_id for machine in machines}
        away = [member for member in self._members if member.placed.machine.ray_node_id not in there]
        lost = {member.node_id for member in away} - {""}
        self._remove([m for m in self._members if m.node_id in lost or (m in away and m.kind == "store")])
        return [f"{node_id} was lost with its machine" for node_id in sorted(lost)]

    def _grow(self, placements: Sequence[Placement]) -> list[str]:
        with_stores = {member.placed.machine.ray_node_id for member in self._members if member.kind == "store"}
        machines = {p.machine.ray_node_id: p.machine for p in placements if p.machine.ray_node_id not in with_stores}
        added = self._add([*self._specs.stores(machines.values()), *self._specs.nodes(placements)])
        try:
            self._wait_until_started(added)
        except DeployError:
            stores = [member for member in added if member.kind == "store"]  # their machines are new
            on_ray.call("remove_folder", stores, self.config.stop_timeout_s)
            self._remove(added)
            raise
        return [f"{member.name} is up on {member.placed.machine.address}" for member in added]

    def _shrink(self, node_ids: Collection[str]) -> list[str]:
        gone = [member for member in self._members if member.node_id in node_ids]
        leaders = [member for member in gone if member.kind == "node" and member.started]
        addresses = [member.address() for member in leaders]
        with ThreadPoolExecutor(max(1, len(leaders))) as threads:
            is_over = self._interrupt.is_set
            token = self._specs.cluster_token
            left = list(threads.map(lambda at: drain(at, DRAIN_S, is_over, token) if at else 0, addresses))
        on_ray.call("stop", gone, self.config.stop_timeout_s)
        self._remove(gone)
        return [
            f"{member.name} is drained and gone" + (f", but {n} requests had to move" if n else "")
            for member, n in zip(leaders, left, strict=True)
        ]

    def _remove(self, members: Collection[Member]) -> None:
        on_ray.kill(members)
        on_ray.free_groups(members)
        self._members = [member for member in self._members if member not in members]

    def stop(self) -> list[str]:
        """Stops everything, in the order of the requests' way: routers, nodes, stores. Idempotent.

        Returns what it could not remove, in words; an empty list is how it should be.
        """
        try:
            if on_ray.is_joined():
                self._stop_members()
                on_ray.leave()
        finally:  # whatever has become of that Ray
            left = self._clean_up()
        return left

    def _stop_members(self) -> None:
        for kinds in (("router",), ("node", "rank"), ("store",)):
            members = [member for member in self._members if member.kind in kinds]
            # Ranks that follow are told with their leader, and leave behind it.
            leaderless = {member.node_id for member in members if member.kind == "node" and not member.started}
            up = [member for member in members if member.started and member.node_id not in leaderless]
            on_ray.call("stop", up, self.config.stop_timeout_s)
            with_store = {m.placed.machine.ray_node_id for m in self._members if m.kind == "store"}
            last = [m for m in members if "store" in kinds or m.placed.machine.ray_node_id not in with_store]
            last = [m for m in last if m.placed.spec.folder not in self.folders]  # those of this machine go below
            on_ray.call("remove_folder", last, self.config.stop_timeout_s)
            on_ray.kill(members)

    def _clean_up(self) -> list[str]:
        self._members.clear()
        if self._redis is not None:
            self._redis.stop()
        left = end_all(processes_of(CLUSTER_VARIABLE, self.cluster_id), KILL_WAIT_S)
        for folder in self.folders:
            shutil.rmtree(folder, ignore_errors=True)
        return [f"process {name}" for name in left] + [f"folder {path}" for path in self.folders if path.exists()]

    # --- the steps of a start ---

    def _check_store_dir(self, model: ModelConfig) -> None:
        """This machine's: its store would say the same, but only once the rest has started."""
        sweep(self.config.store_base)
        slot_bytes = layout_of(self.config, model).block_bytes
        if problem := unusable(self.config.store_base, self.config.store_bytes, slot_bytes):
            raise StartFailed(problem)

    def _wait_for_machines(self) -> tuple[list[Machine], Machine]:
        """`_machines`, once at least `min_machines` are there that this cluster may use."""
        deadline = time.monotonic() + self.config.start_timeout_s
        while True:
            machines, own = self._machines()
            if (count := num_usable(self.config, machines, own)) >= self.config.min_machines:
                return machines, own
            self._check_patience(deadline, [f"{self.config.min_machines - count} machines more than the {count} there"])
            time.sleep(POLL_S)

    def _machines(self) -> tuple[list[Machine], Machine]:
        """All machines of this Ray, and the one that this process runs on."""
        return on_ray.machines(is_own=not self.config.ray_address)

    def _start_redis(self, own: Machine) -> None:
        if not self.redis_url:
            self._redis = EmbeddedRedis(self.folders[0] / "redis", own.address if self.config.ray_address else "")
            self._redis.start()
            self.redis_url = self._redis.url

    def _wait_until_started(self, members: Sequence[Member]) -> None:
        waiting, deadline = list(members), time.monotonic() + self.config.start_timeout_s
        while waiting:
            for member in on_ray.came_up(waiting, POLL_S):
                waiting.remove(member)
                self._note(member)
            for member in waiting:
                if member.kind == "node" and (part := member.part()) is not None:
                    self._on_part(member.name, part)
            self._check_patience(deadline, (member.name for member in waiting))

    def _wait_until_routed(self) -> None:
        """Until the routers have found the nodes, the last of which came up just now."""
        begin = time.monotonic()
        for member in (member for member in self._members if member.kind == "router"):
            while not member.is_ready():
                self._check_patience(begin + self.config.start_timeout_s, [member.name])
                time.sleep(POLL_S)
        time.sleep(max(0.0, begin + ROUTER_POLL_S - time.monotonic()))

    def _check_patience(self, deadline: float, waiting_for: Iterable[str]) -> None:
        self._check_interrupt()
        if time.monotonic() > deadline:
            raise StartFailed(f"not up within {self.config.start_timeout_s:g} s: {', '.join(waiting_for)}")

    def _check_interrupt(self) -> None:
        if self._interrupt.is_set():
            raise Interrupted("stopped while it was starting")

    def _note(self, member: Member) -> None:
        assert member.started is not None
        if member.kind == "node":
            self._on_part(member.name, 1.0)
        self._report(f"{member.name} is up on {member.placed.machine.address}, pid {member.started.pid}")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
