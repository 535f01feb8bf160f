"""Ports that are given by option: that no two are the same, and that those of routers are free before a start."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deploy.config import ClusterConfig

MAX_PORT = 65535


@dataclass(frozen=True)
class Port:
    """One that a server is to listen on."""

    option: str
    host: str
    number: int


def given_ports(config: ClusterConfig) -> list[Port]:
    """Those of all routers, as if they were on one machine: its next ones take the next ports."""
    doors = [("--port", config.host, config.port), ("--admin-port", config.locks.admin_host, config.locks.admin_port)]
    if config.http:
        doors.append(("--http-port", config.host, config.http_port))
    return [Port(door, host, first + nth) for door, host, first in doors if first > 0 for nth in range(config.routers)]


def metrics_ports(config: ClusterConfig) -> list[Port]:
    """Those of all servers where they are on one machine; elsewhere it is not known yet how many are on each."""
    if config.ray_address or not config.metrics or not config.metrics_port:
        return []
    num_servers = 1 + len(config.roles) + config.routers  # with the store
    return [Port("--metrics-port", config.host, config.metrics_port + nth) for nth in range(num_servers)]


def clash(ports: Sequence[Port]) -> str:
    """What is wrong with them among themselves, in words; "" where nothing is. Pure."""
    seen: dict[int, str] = {}
    for port in ports:
        if port.number > MAX_PORT:
            return f"{port.option} leaves no port up to {MAX_PORT} for each server"
        if (other := seen.setdefault(port.number, port.option)) != port.option:
            return f"{port.option} and {other} both ask for port {port.number}"
    return ""


def not_to_be_had(ports: Sequence[Port]) -> str:
    """Why one cannot be listened on, on this machine; "" where all can."""
    for port in ports:
        host = port.host.strip("[]")
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            socket.create_server((host, port.number), family=family, dualstack_ipv6=host == "::").close()
        except OSError as error:
            return f"{port.option} {port.number}: cannot listen there on {port.host}: {error.strerror}"
    return ""
