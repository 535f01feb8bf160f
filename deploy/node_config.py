"""What one node process needs to know. Plain data and JSON: importing this costs no torch, so launchers can use it."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field

from engine.config import EngineConfig
from engine.shard import Shard

ROLES = ("prefill", "decode", "both")


@dataclass(frozen=True)
class NodeConfig:
    """A node: an engine with its options, where it listens, and where the rest of the cluster is found.

    `host` is the machine's label (nodes and arenas of one host share memory). `store_dir` is the folder of this
    machine's store process, empty if there is none: then everything is fetched over the wire and nothing is published.
    """

    node_id: str
    model_dir: str  # a Hugging Face folder
    model: str  # the served name
    redis_url: str = field(repr=False)  # may have a password in it
    role: str = "both"
    cluster: str = "default"
    engine: EngineConfig = field(default_factory=EngineConfig)
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    rank: int = 0  # of a wide node; 0 leads, and is the node for everyone else
    core_share: int = 0  # index of this node's share of the machine's cores, for the threads that compute
    num_core_shares: int = 0  # number of even shares; 0: threads run on any core
    store_dir: str = ""
    wire_key: str = field(default="", repr=False)  # that of the cluster's stores, if they have one
    cluster_token: str = field(default="", repr=False)  # that routers must present; "": none is required
    trusts_network: bool = False  # without a cluster_token, only this allows an address that other machines reach
    bind_host: str = "127.0.0.1"
    port: int = 0  # 0: the kernel chooses, as it does for the other ranks
    advertise_host: str = "127.0.0.1"
    host: str = ""
    heartbeat_s: float = 1.0
    ttl_s: float = 3.0
    drain_s: float = 10.0  # how long a stopping node waits for its requests
    stall_s: float = 30.0  # busy without a step for this long: the engine's thread is unhealthy
    max_queued_requests: int = 256  # prefill legs that may wait for room
    room_wait_s: float = 10.0  # how long a prefill leg waits for room before it is refused
    start_wait_s: float = 300.0  # how long an admitted decode leg keeps its room without a Start
    max_message_bytes: int = 16 * 2**20
    rank_timeout_s: float = 60.0  # a rank that is silent for this long is lost, and the node with it
    metrics: bool = True  # for Prometheus, over HTTP, at a port of their own
    metrics_port: int = 0  # 0: the kernel chooses

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"role: must be one of {', '.join(ROLES)}, got {self.role!r}")
        if not 0 <= self.core_share < max(1, self.num_core_shares):
            raise ValueError(f"core_share: must be below num_core_shares = {self.num_core_shares}")

        if min(self.tensor_parallel_size, self.pipeline_parallel_size) < 1:
            raise ValueError("tensor_parallel_size and pipeline_parallel_size: must be 1 or more")
        if not 0 <= self.rank < self.shard.num_ranks:
            raise ValueError(f"rank: must be below {self.shard.num_ranks}, got {self.rank}")

    @property
    def shard(self) -> Shard:
        """The part of the model that this process holds."""
        return Shard.of_rank(self.rank, self.tensor_parallel_size, self.pipeline_parallel_size)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> NodeConfig:
        """Raises `TypeError` for an unknown option, `ValueError` for invalid JSON."""
        fields = json.loads(text)
        engine = EngineConfig(**fields.pop("engine", {}))
        return cls(engine=engine, **fields)
