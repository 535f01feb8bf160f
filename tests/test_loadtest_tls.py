"""`baton bench` against a router whose doors have TLS and ask clients for a certificate, over both of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from functools import partialmethod

import pytest
from certificates import Identity, make, needs_openssl
from http_support import talking
from router_fakes import FakeCluster

from deploy.cli import main
from loadtest.grpc_client import GrpcClient
from loadtest.http_client import HttpClient

pytestmark = needs_openssl
BACKENDS = ("grpc", "openai", "openai-chat")
FLAGS = ["--num-prompts", "3", "--input-len", "8", "--output-len", "4", "--max-client-lag-ms", "0"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Identity]:
    folder = tmp_path_factory.mktemp("tls")
    return {name: make(folder, name) for name in ("router", "client", "other")}


@pytest.fixture
async def cluster(redis_url: str, made: dict[str, Identity]) -> AsyncIterator[FakeCluster]:
    own = made["router"]
    files = {"tls_cert": str(own.cert), "tls_key": str(own.key), "tls_client_ca": str(made["client"].cert)}
    async with talking(redis_url, **files) as cluster:
        yield cluster


async def bench(cluster: FakeCluster, backend: str, *words: str) -> int:
    address = cluster.address if backend == "grpc" else cluster.http_url.removeprefix("http://")
    return await asyncio.to_thread(main, ["bench", "--backend", backend, "--address", address, *FLAGS, *words])


@pytest.mark.parametrize("backend", BACKENDS)
async def test_with_a_certificate(cluster: FakeCluster, made: dict[str, Identity], backend: str) -> None:
    client = ["--tls-cert", str(made["client"].cert), "--tls-key", str(made["client"].key)]
    trust = ["--tls-ca", str(made["router"].cert), "--tls-server-name", "localhost"]
    assert await bench(cluster, backend, *trust, *client) == 0
    assert len(cluster.nodes["decode0"].seen.admits) == 3


@pytest.mark.parametrize("backend", BACKENDS)
async def test_without_the_right_one(
    cluster: FakeCluster,
    made: dict[str, Identity],
    backend: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for kind in (GrpcClient, HttpClient):  # which wait for a server that still starts
        monkeypatch.setattr(kind, "get_model", partialmethod(kind.get_model, wait_s=0.3))
    trust = ["--tls-ca", str(made["router"].cert)]
    other = ["--tls-cert", str(made["other"].cert), "--tls-key", str(made["other"].key)]
    wrong_name = ["--tls-server-name", "elsewhere"]
    own = ["--tls-cert", str(made["client"].cert), "--tls-key", str(made["client"].key)]
    for words in (trust, [*trust, *other], [*trust, *own, *wrong_name], ["--tls", *own]):
        assert await bench(cluster, backend, *words) == 2
        assert "does not serve" in capsys.readouterr().err
    assert not cluster.nodes["decode0"].seen.admits
