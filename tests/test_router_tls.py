"""TLS of the router's doors: which files are refused and how, who gets in, and certificates that change."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from certificates import Identity, credentials, lock, make, needs_openssl
from conftest import eventually
from router_fakes import CLUSTER, POCKET, FakeCluster, request, running

from batonpb import inference_pb2_grpc
from router import file_watch
from router.config import RouterConfig
from router.errors import UnusableTls
from router.server import RouterServer
from router.tls import DoorTls, TlsFiles, tls_files

pytestmark = needs_openssl


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Identity]:
    folder = tmp_path_factory.mktemp("tls")
    return {name: make(folder, name, days) for name, days in (("red", 2), ("blue", 2), ("late", -1))}


@pytest.fixture
def own(made: dict[str, Identity], tmp_path: Path) -> Identity:
    """A copy of "red" that a test may write to."""
    copy = Identity(tmp_path / "own.pem", tmp_path / "own.key")
    made["red"].copy_to(copy)
    return copy


# --- files ---


def test_half_of_it_is_none() -> None:
    assert tls_files("", "", "") is None
    for names in (("a", "", ""), ("", "b", ""), ("", "", "c")):
        with pytest.raises(UnusableTls, match="need"):
            tls_files(*names)


@pytest.mark.parametrize(
    ("cert", "key", "authority", "message"),
    [
        ("late.pem", "late.key", "", "late.pem: certificate has expired"),
        ("red.pem", "blue.key", "", "blue.key: is not the key of .*red.pem"),
        ("red.key", "red.key", "", "red.key: is no certificate in PEM"),
        ("red.pem", "red.pem", "", "red.pem: is no private key in PEM without a password"),
        ("red.pem", "locked.key", "", "locked.key: is no private key in PEM without a password"),
        ("nowhere.pem", "red.key", "", "nowhere.pem: No such file"),
        ("red.pem", "nowhere.key", "", "nowhere.key: No such file"),
        ("red.pem", "red.key", "nowhere.pem", "nowhere.pem: No such file"),
        ("red.pem", "red.key", "blue.key", "blue.key: is no authority's certificate in PEM"),
    ],
)
def test_what_is_wrong_is_refused_by_file(
    made: dict[str, Identity], cert: str, key: str, authority: str, message: str
) -> None:
    folder = made["red"].cert.parent
    lock(made["red"].key, folder / "locked.key")
    names = [str(folder / name) if name else "" for name in (cert, key, authority)]
    with pytest.raises(UnusableTls, match=message) as error:
        DoorTls(TlsFiles(*names))
    assert "BEGIN" not in str(error.value)


async def test_a_router_with_a_bad_certificate_does_not_start(redis_url: str, made: dict[str, Identity]) -> None:
    late = made["late"]
    with pytest.raises(UnusableTls, match="expired"):
        await RouterServer(RouterConfig(str(POCKET), redis_url, tls_cert=str(late.cert), tls_key=str(late.key))).start()


# --- who gets in ---


async def is_let_in(cluster: FakeCluster, how: grpc.ChannelCredentials | None) -> bool:
    """Whether a client of its own gets an answer."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    if how is None:
        channel = grpc.aio.insecure_channel(cluster.address, options=options)
    else:
        channel = grpc.aio.secure_channel(cluster.address, how, options=options)
    async with channel:
        try:
            call = inference_pb2_grpc.InferenceStub(channel).Generate(request("x", max_tokens=2), timeout=20)
            return bool([message async for message in call])
        except grpc.aio.AioRpcError as error:
            assert error.code() == grpc.StatusCode.UNAVAILABLE
            return False


@pytest.fixture
async def cluster(redis_url: str) -> AsyncIterator[FakeCluster]:
    async with running(FakeCluster(redis_url)) as cluster:
        await cluster.add("both0")
        yield cluster


async def test_who_trusts_the_certificate_gets_in_and_nobody_in_the_clear(
    cluster: FakeCluster, made: dict[str, Identity]
) -> None:
    red, blue = made["red"], made["blue"]
    await cluster.open(tls_cert=str(red.cert), tls_key=str(red.key))
    assert await is_let_in(cluster, credentials(red))
    assert not await is_let_in(cluster, credentials(blue))
    assert not await is_let_in(cluster, None)


async def test_mutual_tls_asks_clients_for_a_certificate_of_the_authority(
    cluster: FakeCluster, made: dict[str, Identity]
) -> None:
    red, blue = made["red"], made["blue"]
    await cluster.open(tls_cert=str(red.cert), tls_key=str(red.key), tls_client_ca=str(blue.cert))
    assert await is_let_in(cluster, credentials(red, own=blue))
    assert not await is_let_in(cluster, credentials(red))
    assert not await is_let_in(cluster, credentials(red, own=red))


async def test_a_new_certificate_needs_no_restart(
    cluster: FakeCluster, made: dict[str, Identity], own: Identity, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    monkeypatch.setattr(file_watch, "POLL_S", 0.05)
    await cluster.open(tls_cert=str(own.cert), tls_key=str(own.key))
    assert await is_let_in(cluster, credentials(made["red"]))
    own.cert.write_bytes(made["blue"].cert.read_bytes())  # and not its key yet
    await eventually(lambda: "event=reload_failed" in caplog.text, 10, "a bad pair is refused")
    assert await is_let_in(cluster, credentials(made["red"])), "the old one stays"
    made["blue"].copy_to(own)

    async def is_new() -> bool:
        return await is_let_in(cluster, credentials(made["blue"]))

    await eventually(is_new, 20, "the new certificate")
    assert not await is_let_in(cluster, credentials(made["red"]))


# --- the same for HTTP ---


@pytest.mark.parametrize(
    ("version", "client", "is_welcome"),
    [
        (ssl.TLSVersion.TLSv1_3, "blue", True),
        (ssl.TLSVersion.TLSv1_2, "blue", True),
        (ssl.TLSVersion.TLSv1_2, "red", False),
        (ssl.TLSVersion.TLSv1_2, "", False),
    ],
)
async def test_the_context_of_the_http_door(
    made: dict[str, Identity], version: ssl.TLSVersion, client: str, is_welcome: bool
) -> None:
    red, blue = made["red"], made["blue"]
    tls = DoorTls(TlsFiles(str(red.cert), str(red.key), str(blue.cert)))
    assert tls.context.minimum_version == ssl.TLSVersion.TLSv1_2

    async def greet(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"hello")
        writer.close()

    server = await asyncio.start_server(greet, "127.0.0.1", 0, ssl=tls.context)
    port = server.sockets[0].getsockname()[1]
    context = ssl.create_default_context(cafile=red.cert)
    context.minimum_version = context.maximum_version = version
    if client:
        context.load_cert_chain(made[client].cert, made[client].key)

    async def hello() -> bytes:
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
            said = await reader.read(5)
            writer.close()
        except OSError:  # ssl.SSLError is one
            return b""
        return said

    assert (await hello() == b"hello") is is_welcome
    server.close()
    await server.wait_closed()


def test_a_config_survives_json_with_its_locks() -> None:
    one = RouterConfig("m", "redis://r", cluster=CLUSTER, tls_cert="a", admin_port=0, cluster_token="t" * 32)
    assert RouterConfig.from_json(one.to_json()) == one and "t" * 32 not in repr(one)
