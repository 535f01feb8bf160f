"""Who may come in, as the launcher and the commands see it: options, the cluster token's way, TLS of clients, Redis."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from certificates import Identity, make, needs_openssl
from conftest import POCKET
from router_fakes import FakeCluster, running, saying

from deploy import process
from deploy.cli import main
from deploy.config import ClusterConfig, ConfigError
from deploy.locks import Locks
from deploy.placement import Machine, place
from deploy.redis import EmbeddedRedis
from deploy.redis_url import has_password
from deploy.serve_arguments import add_serve_arguments, config_from
from deploy.specs import PlacedSpec, Specs
from kvstore.blocks import KVLayout
from kvstore.directory import Directory
from kvstore.errors import DirectoryUnavailable
from node.gate import new_cluster_token

TOKEN = new_cluster_token()
LAYOUT = KVLayout("m", "float32", block_size=16, num_layers=1, num_kv_heads=1, head_dim=8)
PASSWORD = "sesame-open"


def config_of(*argv: str) -> ClusterConfig:
    parser = argparse.ArgumentParser()
    add_serve_arguments(parser)
    return config_from(parser.parse_args([str(POCKET), *argv]))


def specs_of(**options: Any) -> list[PlacedSpec]:
    config = ClusterConfig(model_dir=POCKET, **options)
    machines = [Machine(f"{n:056x}", f"10.0.0.{n + 1}", f"host-{n}", 8, 0) for n in range(2)]
    specs = Specs(config, "0123abcd", f"redis://:{PASSWORD}@127.0.0.1:1", LAYOUT, cluster_token=TOKEN)
    assert TOKEN not in repr(specs) and PASSWORD not in repr(specs)
    return list(specs.all(machines, place(config, machines), machines[0]))


# --- the cluster token ---


def test_nodes_and_routers_get_it_and_show_it_to_nobody() -> None:
    placed = specs_of()
    tokens = [(one.spec.kind, getattr(one.spec.config, "cluster_token", "")) for one in placed]
    assert tokens == [("store", ""), ("store", ""), ("node", TOKEN), ("node", TOKEN), ("router", TOKEN)]
    assert not any(TOKEN in repr(one) or PASSWORD in repr(one) for one in placed)
    assert not any(one.spec.config.trusts_network for one in placed if one.spec.kind == "node")


@pytest.mark.parametrize(
    ("kind", "config"), [("node", {"node_id": "n", "model": "m"}), ("router", {"tenants_file": "t"})]
)
def test_a_process_takes_secrets_from_its_environment(
    kind: str, config: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BATON_CLUSTER_TOKEN", TOKEN)
    monkeypatch.setenv("BATON_REDIS_URL", f"redis://:{PASSWORD}@127.0.0.1:1")
    server: Any = process.build(kind, json.dumps({"model_dir": "m"} | config))
    built = server.config if kind == "node" else server._config
    assert built.cluster_token == TOKEN and PASSWORD in built.redis_url
    assert TOKEN not in repr(built) and PASSWORD not in repr(built)


# --- options ---


@needs_openssl
def test_locks_reach_the_routers(tmp_path: Path) -> None:
    own = make(tmp_path, "own")
    (tmp_path / "admins").write_text("0" * 64)
    argv = f"--tls-cert {own.cert} --tls-key {own.key} --tls-client-ca {own.cert} --admin-port 9000 --admin-host ::1"
    config = config_of(*argv.split(), "--admin-key-file", str(tmp_path / "admins"), "--max-concurrent-requests", "7")
    placed = specs_of(locks=config.locks, routers=2)
    first, second = [one.spec.config for one in placed if one.spec.kind == "router"]
    assert (first.tls_cert, first.tls_key, first.tls_client_ca) == (str(own.cert), str(own.key), str(own.cert))
    assert (first.admin_port, second.admin_port, first.admin_host) == (9000, 9001, "::1")
    assert (first.admin_key_file, first.max_concurrent_requests) == (str(tmp_path / "admins"), 7)


def test_without_locks_there_is_no_admin_port() -> None:
    config = specs_of(locks=config_of().locks)[-1].spec.config
    assert (config.tls_cert, config.admin_port, config.admin_key_file) == ("", -1, "")


@pytest.mark.parametrize(
    ("locks", "message"),
    [
        (Locks(tls_cert=Path("a")), "--tls-cert, --tls-key and --tls-client-ca: a TLS certificate and its key"),
        (Locks(tls_client_ca=Path("a")), "--tls-cert, --tls-key and --tls-client-ca: an authority for clients'"),
        (Locks(tls_cert=Path("/no/a"), tls_key=Path("/no/b")), "TLS: /no/a: No such file"),
        (Locks(admin_key_file=Path("/no/a")), "--admin-key-file: /no/a"),
        (Locks(admin_port=0, admin_host="0.0.0.0"), "--admin-host must be a loopback address"),
        (Locks(admin_port=70000), "--admin-port must be between 0 and 65535"),
        (Locks(max_concurrent_requests=-1), "--max-concurrent-requests must be 0 or more"),
    ],
    ids=range(7),
)
def test_bad_locks_are_found_before_anything_starts(locks: Locks, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        ClusterConfig(model_dir=POCKET, locks=locks)
    assert message in str(error.value)


# --- Redis ---


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis://h:1/0", False),
        ("unix:///x.sock", False),
        ("redis://user@h", False),
        ("redis://:pw@h", True),
        ("rediss://user:pw@h:1", True),
        ("unix:///x.sock?password=pw", True),
        ("redis://[::1/x:y@", True),
    ],
)
def test_urls_with_a_password_are_known(url: str, expected: bool) -> None:
    assert has_password(url) is expected


def test_a_password_comes_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"rediss://:{PASSWORD}@redis.example:6380/0"
    with pytest.raises(ConfigError, match=r"--redis-url: .* BATON_REDIS_URL") as error:
        config_of("--redis-url", url)
    assert PASSWORD not in str(error.value)
    monkeypatch.setenv("BATON_REDIS_URL", url)
    config = config_of()
    assert config.redis_url == url and PASSWORD not in repr(config)
    assert config_of("--redis-url", "redis://other").redis_url == "redis://other", "what is said goes first"


@contextlib.asynccontextmanager
async def behind_tls(port: int, own: Identity) -> AsyncIterator[int]:
    """A TLS door before a Redis: the one that tests have was built without TLS."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(own.cert, own.key)

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        to_reader, to_writer = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(pump(reader, to_writer), pump(to_reader, writer))

    server = await asyncio.start_server(relay, "127.0.0.1", 0, ssl=context)
    yield int(server.sockets[0].getsockname()[1])
    server.close()


@needs_openssl
async def test_redis_with_a_password_behind_tls(
    short_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    own, other = make(tmp_path, "own"), make(tmp_path, "other")
    embedded = EmbeddedRedis(short_dir / "redis", "127.0.0.1")
    embedded.start()
    try:
        secret, _, where = embedded.url.removeprefix("redis://").partition("@")
        async with behind_tls(int(where.rpartition(":")[2].removesuffix("/0")), own) as port:

            async def nodes(user: str, authority: Identity) -> list[object]:
                directory = Directory(f"rediss://{user}127.0.0.1:{port}/0?ssl_ca_certs={authority.cert}")
                try:
                    return list(await directory.nodes())
                finally:
                    await directory.close()

            assert await nodes(f"{secret}@", own) == []
            for user, authority in (("", own), (f":{PASSWORD}@", own), (f"{secret}@", other)):
                with pytest.raises(DirectoryUnavailable) as error:
                    await nodes(user, authority)
                assert PASSWORD not in str(error.value) and secret.strip(":") not in str(error.value)
    finally:
        embedded.stop()
    assert secret.strip(":") not in caplog.text and PASSWORD not in caplog.text


# --- commands over TLS ---


@needs_openssl
async def test_commands_speak_tls(redis_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own, client = make(tmp_path, "own"), make(tmp_path, "client")
    async with running(FakeCluster(redis_url)) as cluster:
        await cluster.add("both0", saying("well met"))
        tls = {"tls_cert": str(own.cert), "tls_key": str(own.key), "tls_client_ca": str(client.cert)}
        await cluster.open(**tls, admin_port=0)

        async def said(*argv: str) -> tuple[int, str]:
            status = await asyncio.to_thread(main, [*argv])
            captured = capsys.readouterr()
            return status, captured.out + captured.err

        ask, nodes = ("generate", "hello", "--address", cluster.address), ("nodes", "--address", cluster.admin_address)
        keys = ("--tls-cert", str(client.cert), "--tls-key", str(client.key))
        trust = ("--tls-ca", str(own.cert))
        assert (await said(*ask, *trust, *keys)) == (0, "well met\n")
        assert (await said(*nodes, *trust, *keys))[0] == 0
        assert (await said(*ask, *trust, *keys, "--tls-server-name", "localhost"))[0] == 0
        for wrong in ((), trust, keys, (*trust, *keys, "--tls-server-name", "elsewhere")):
            for command in (ask, nodes):
                status, words = await said(*command, *wrong)
                assert status == 1 and "UNAVAILABLE" in words
        assert (await said(*ask, *trust, "--tls-cert", "x"))[1] == (
            "baton: error: --tls-cert and --tls-key go together\n"
        )
        assert "nowhere: No such file" in (await said(*ask, "--tls-ca", "nowhere"))[1]
