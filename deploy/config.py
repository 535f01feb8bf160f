"""What a cluster is to be: the options of `baton serve` as one frozen value, checked once. Plain data, without Ray.

Also where a cluster keeps its files. Every name is derived from the cluster's own random id, so that two clusters
on one machine share nothing and a clean-up can only ever remove its own.
"""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from deploy.locks import Locks
from deploy.ports import clash, given_ports
from deploy.widths import Width
from router import amounts
from router.errors import UnusableTenants
from router.policy import DEFAULT, POLICIES
from router.tenants import read_tenants

NO_LOCKS = Locks()
MAX_NODES = 256
MAX_START_S = 86_400.0
MAX_STORE_DIR = 70  # characters: an ipc socket's path may have 107, and a few follow the folder's
MAX_TEMP_DIR = 24  # characters: Ray's sockets lie some 75 characters deeper


class DeployError(Exception):
    """What keeps a cluster from starting, running or stopping, in one line for the person at the terminal."""


class ConfigError(DeployError):
    """An option is out of its range; names the option and the limit."""


def parse_bytes(text: str) -> int:
    """See `router.amounts`. Raises `ConfigError`."""
    try:
        return amounts.parse_bytes(text)
    except ValueError as error:
        raise ConfigError(str(error)) from None


@dataclass(frozen=True)
class ClusterConfig:
    """One cluster. Zero and "" mean "work it out"; `..._bytes` are for each node, the store's for each machine."""

    model_dir: Path
    prefill: int = 1
    decode: int = 1
    both: int = 0
    tensor_parallel_size: int = 1  # of each node, but where its role has another
    pipeline_parallel_size: int = 1
    prefill_tensor_parallel_size: int = 0
    decode_tensor_parallel_size: int = 0
    prefill_pipeline_parallel_size: int = 0
    decode_pipeline_parallel_size: int = 0
    routers: int = 1
    policy: str = DEFAULT  # of the routers
    host: str = "127.0.0.1"
    port: int = 0
    http: bool = True  # OpenAI's API at each router, beside gRPC's
    http_port: int = 0
    cluster: str = "default"
    redis_url: str = field(default="", repr=False)  # may have a password in it; "": an embedded Redis
    ray_address: str = ""  # "": an own Ray on this machine
    served_model_name: str = ""  # "": the model folder's name
    tenants_file: Path | None = None  # None: whoever reaches a router may use it, and all share one cache
    locks: Locks = NO_LOCKS  # of the routers' doors
    dtype: str = "auto"
    block_size: int = 16  # tokens
    kv_bytes: int = 256 * 2**20  # of a wide node, for each rank
    store_bytes: int = 256 * 2**20
    store_base: Path = Path("/dev/shm")
    store_encryption: bool = True  # between machines, blocks go to holders of this cluster's key alone, encrypted
    store_tcp: bool = True  # where nothing is encrypted, blocks go over plain TCP, not ZeroMQ
    store_eviction: str = "s3fifo"
    store_disk_bytes: int = 0  # of each machine; 0: no disk
    store_disk_admission: str = "all"
    store_disk_dir: Path | None = None  # kept when the cluster stops; each machine has a folder of its own in it
    max_model_len: int = 0
    max_num_batched_tokens: int = 512
    max_num_requests: int = 64
    num_threads: int = 0  # 0: the machine's cores shared out among its nodes
    pin_cores: bool = True  # each node computes on its share of them, where they suffice
    metrics: bool = True  # of each store, node and router, for Prometheus, over HTTP
    metrics_port: int = 0  # of each machine's first server, and the next ports of the next ones; 0: any
    prefill_hosts: tuple[str, ...] = ()  # addresses, names or custom resources of Ray machines; (): any
    decode_hosts: tuple[str, ...] = ()
    router_hosts: tuple[str, ...] = ()  # (): the launcher's machine
    min_machines: int = 0  # that a start waits for
    start_timeout_s: float = 300.0
    stop_timeout_s: float = 15.0
    log_level: str = "warning"
    log_format: str = "text"  # or "json"
    status_page: str = "auto"  # of each router; see `RouterConfig`
    otlp_endpoint: str = ""  # likewise

    def __post_init__(self) -> None:
        def check(option: str, ok: bool, limit: str) -> None:
            if not ok:
                raise ConfigError(f"{option} must be {limit}")

        counts = (self.prefill, self.decode, self.both)
        check("--prefill, --decode and --both", min(counts) >= 0, "0 or more")
        check("nodes", 1 <= sum(counts) <= MAX_NODES, f"between 1 and {MAX_NODES}, got {sum(counts)}")
        check("--decode", self.both > 0 or self.decode > 0, "1 or more where there is no --both node")
        for kind, sizes in (("tensor", "tp"), ("pipeline", "pp")):
            least = min(getattr(width, sizes) for width in self.widths)
            check(f"--{kind}-parallel-size", least >= 1, f"1 or more, got {least}")
        check("--routers", 1 <= self.routers <= MAX_NODES, f"between 1 and {MAX_NODES}, got {self.routers}")
        check("--policy", self.policy in POLICIES, f"one of {', '.join(sorted(POLICIES))}")
        check("--port", 0 <= self.port <= 65535, f"between 0 and 65535, got {self.port}")
        check("--http-port", 0 <= self.http_port <= 65535, f"between 0 and 65535, got {self.http_port}")
        check("--metrics-port", 0 <= self.metrics_port <= 65535, f"between 0 and 65535, got {self.metrics_port}")
        check("--min-machines", self.min_machines >= 0, "0 or more")
        check("--min-machines", self.min_machines <= 1 or bool(self.ray_address), "1 at most without --ray-address")
        check("--block-size", 1 <= self.block_size <= 1024, f"between 1 and 1024 tokens, got {self.block_size}")
        check("--kv-memory", self.kv_bytes >= 2**20, f"1M or more, got {self.kv_bytes} bytes")
        check("--store-memory", self.store_bytes >= 2**20, f"1M or more, got {self.store_bytes} bytes")
        check("--store-disk-bytes", self.store_disk_bytes >= 0, f"0 or more, got {self.store_disk_bytes}")
        check("--store-disk-dir", not self.store_disk_bytes or self.store_disk_dir is not None, "given with a disk")
        check("--max-model-len", self.max_model_len >= 0, f"0 or more, got {self.max_model_len}")
        check("--max-batched-tokens", self.max_num_batched_tokens >= 1, "1 or more")
        check("--max-requests", self.max_num_requests >= 1, "1 or more")
        check("--num-threads", self.num_threads >= 0, f"0 or more, got {self.num_threads}")
        name_ok = re.fullmatch(r"[A-Za-z0-9._-]{1,64}", self.cluster) is not None
        check("--cluster", name_ok, f"1 to 64 letters, digits, '.', '_' or '-', got {self.cluster!r}")
        base = str(self.store_base)
        check("--store-dir", len(base) <= MAX_STORE_DIR - 24, f"{MAX_STORE_DIR - 24} characters at most, got {base!r}")
        seconds = self.start_timeout_s
        check(
            "--start-timeout", 0.0 < seconds <= MAX_START_S, f"above 0 and up to {MAX_START_S:.0f} s, got {seconds:g}"
        )
        is_address = re.fullmatch(r"auto|.+:[0-9]{1,5}|", self.ray_address) is not None
        check("--ray-address", is_address, f"HOST:PORT, or auto, got {self.ray_address!r}")
        is_url = not self.otlp_endpoint or self.otlp_endpoint.startswith(("http://", "https://"))
        check("--otlp-endpoint", is_url, f"http://HOST:PORT or https://HOST:PORT, got {self.otlp_endpoint!r}")
        check("--ray-address", not self.ray_address.startswith("ray://"), "host:port of a Ray that this machine is in")
        check("the model", self.model_dir.is_dir(), f"a Hugging Face folder; there is no folder {self.model_dir}")

        if problem := self.locks.problem() or clash(given_ports(self)):
            raise ConfigError(problem)
        if self.tenants_file is not None:
            try:
                read_tenants(self.tenants_file)
            except UnusableTenants as error:
                raise ConfigError(f"--tenants: {error}") from None

    @property
    def model_name(self) -> str:
        return self.served_model_name or self.model_dir.resolve().name

    @property
    def widths(self) -> tuple[Width, ...]:
        """Of nodes of all roles, also of those that have none yet."""
        return self.width("prefill"), self.width("decode"), self.width("both")

    def width(self, role: str) -> Width:
        tp = {"prefill": self.prefill_tensor_parallel_size, "decode": self.decode_tensor_parallel_size}.get(role)
        pp = {"prefill": self.prefill_pipeline_parallel_size, "decode": self.decode_pipeline_parallel_size}.get(role)
        return Width(tp or self.tensor_parallel_size, pp or self.pipeline_parallel_size)

    @property
    def roles(self) -> tuple[str, ...]:
        """One role a node, in the order in which they are placed."""
        return ("prefill",) * self.prefill + ("decode",) * self.decode + ("both",) * self.both


def temp_base() -> Path:
    """Where a launcher's own folder goes: the usual place for temporary files, unless its path is too long.

    Raises `DeployError` where there is none that can be written to.
    """
    try:
        base = Path(tempfile.gettempdir())
    except OSError as error:
        raise DeployError(f"TMPDIR: {error.strerror}") from None
    return base if len(str(base)) <= MAX_TEMP_DIR else Path("/tmp")


def cluster_dir(cluster_id: str) -> Path:
    """A launcher's own folder: Redis, Ray's session."""
    return temp_base() / f"baton-{cluster_id}"


def machine_dir(base: Path, cluster_id: str, ray_node_id: str) -> Path:
    """A machine's own folder: its arena, its sockets, its servers' start times.

    The machine's id is a part of it because two machines may see one file system.
    """
    return base / f"baton-{cluster_id}-{ray_node_id[:8]}"
