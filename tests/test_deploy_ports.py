"""Ports given by option: no two the same, none beyond the last one, and those in use are named before a start."""

from __future__ import annotations

import socket
from typing import Any

import pytest
from conftest import POCKET

from deploy.config import ClusterConfig, ConfigError
from deploy.locks import Locks
from deploy.ports import Port, clash, given_ports, metrics_ports, not_to_be_had


def test_each_router_takes_the_next_ones() -> None:
    config = ClusterConfig(POCKET, port=8200, http_port=8000, routers=2, locks=Locks(admin_port=0))
    assert [(port.option, port.number) for port in given_ports(config)] == [
        *(("--port", 8200), ("--port", 8201)),
        *(("--http-port", 8000), ("--http-port", 8001)),
    ]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"port": 8000, "http_port": 8000}, "--http-port and --port both ask for port 8000"),
        ({"port": 8000, "http_port": 8001, "routers": 2}, "--http-port and --port both ask for port 8001"),
        ({"port": 8000, "locks": Locks(admin_port=8000)}, "--admin-port and --port both ask for port 8000"),
        ({"port": 65535, "routers": 2}, "--port leaves no port up to 65535 for each server"),
    ],
)
def test_ports_that_cannot_be(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ClusterConfig(POCKET, **options)


def test_without_http_its_port_is_nobodys() -> None:
    assert ClusterConfig(POCKET, port=8000, http_port=8000, http=False).port == 8000


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0", "[::]"])
def test_a_port_in_use_is_named(host: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        number = int(taken.getsockname()[1])
        words = not_to_be_had([Port("--http-port", host, number)])
        assert words.startswith(f"--http-port {number}: cannot listen there on {host}: ")
    assert not_to_be_had([Port("--http-port", host, number)]) == ""


def test_metrics_take_a_port_for_each_server() -> None:
    """Of one machine: of several, nobody knows yet how many servers are on each."""

    def problem(**options: Any) -> str:
        config = ClusterConfig(POCKET, metrics_port=65530, **options)
        return clash([*given_ports(config), *metrics_ports(config)])

    assert problem() == "", "a store, two nodes, a router"
    assert problem(port=65533) == "--metrics-port and --port both ask for port 65533"
    assert problem(prefill=4) == "--metrics-port leaves no port up to 65535 for each server"
    assert problem(prefill=4, metrics=False) == problem(prefill=4, ray_address="auto") == ""
