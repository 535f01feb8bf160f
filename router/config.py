"""The options of one router, as a launcher hands them over. Plain data."""

from __future__ import annotations

import dataclasses
import ipaddress
import json
from dataclasses import dataclass, field

from router.policy import DEFAULT
from router.registry import Patience
from router.validate import Limits

PAGES = ("auto", "on", "off")


@dataclass(frozen=True)
class RouterConfig:
    """One router's options. Times in seconds (`_s`) are explained at `Patience` and `Persistence`."""

    model_dir: str  # for its tokenizer
    redis_url: str = field(repr=False)  # may have a password in it
    model: str = ""  # the served name; "": as the nodes say
    cluster: str = "default"
    host: str = "127.0.0.1"  # to listen on
    port: int = 0  # 0: the kernel chooses
    http: bool = True  # OpenAI's API, in addition to gRPC
    http_port: int = 0  # 0: the kernel chooses
    advertise_host: str = ""  # "" is `host`
    policy: str = DEFAULT  # a name of router.policy.POLICIES
    metrics: bool = False  # for Prometheus, over HTTP, at a port of its own
    metrics_port: int = 0  # 0: the kernel chooses
    tenants_file: str = ""  # reloaded when it changes; "": whoever reaches the port may use it, sharing one cache
    tls_cert: str = ""  # PEM files, reloaded when they change; "": no TLS
    tls_key: str = ""
    tls_client_ca: str = ""  # "": clients need no certificate
    cluster_token: str = field(default="", repr=False)  # that nodes require
    admin_port: int = -1  # -1: closed, 0: the kernel chooses
    admin_host: str = "127.0.0.1"
    admin_key_file: str = ""  # required unless admin_host is a loopback address
    max_concurrent_requests: int = 1024  # over both APIs and all tenants; 0: no bound
    status_page: str = "auto"  # the live page at / over HTTP: "on", "off", or "auto" (on if there are no tenants)
    otlp_endpoint: str = ""  # "http://host:port" of an OTLP receiver for traces; "": as OpenTelemetry's variables say
    max_message_bytes: int = 16 * 2**20
    max_prompt_bytes: int = 4 * 2**20
    poll_s: float = 0.25
    node_ttl_s: float = 3.0
    cool_down_s: float = 2.0
    stall_s: float = 5.0
    probe_timeout_s: float = 5.0
    progress_timeout_s: float = 300.0
    max_attempts: int = 8
    node_wait_s: float = 20.0
    drain_s: float = 10.0  # how long a stopping router waits for its requests

    @property
    def is_local(self) -> bool:
        """Whether only clients on this machine can reach its ports."""
        return is_loopback(self.host)

    @property
    def shows_page(self) -> bool:
        """Whether the HTTP port serves the live page, which requires no key."""
        return self.status_page == "on" or (self.status_page == "auto" and not self.tenants_file)

    @property
    def limits(self) -> Limits:
        return Limits(self.max_message_bytes, self.max_prompt_bytes)

    @property
    def patience(self) -> Patience:
        return Patience(
            poll_s=self.poll_s,
            ttl_s=self.node_ttl_s,
            cool_down_s=self.cool_down_s,
            stall_s=self.stall_s,
            probe_s=self.probe_timeout_s,
            progress_s=self.progress_timeout_s,
        )

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> RouterConfig:
        """Raises `TypeError` for an unknown option, `ValueError` for invalid JSON."""
        return cls(**json.loads(text))


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`. False for names other than localhost, which may mean anything."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
