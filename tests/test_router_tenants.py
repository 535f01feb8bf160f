"""Tenants: their file, their keys, and the door that asks for one."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import aiohttp
import grpc
import pytest
from conftest import POCKET, eventually
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hypothesis import given
from hypothesis import strategies as st
from router_fakes import BLOCK, CLUSTER, ROOT, FakeCluster, request, running

from batonpb import inference_pb2
from kvstore.blocks import BlockHash, hash_blocks, salted
from kvstore.directory import ArenaRecord, Directory
from router import file_watch
from router.config import RouterConfig
from router.dispatch import Dispatcher
from router.errors import Unauthenticated, UnusableTenants
from router.hits import Hit
from router.journey import Journey
from router.limits import Allowance
from router.locks import open_locks
from router.server import RouterServer
from router.tenants import EVERYBODY, Tenant, parse_tenants, read_tenants

KEYS = {"red": "key-of-red", "blue": "key-of-blue"}
DIGESTS = {name: hashlib.sha256(key.encode()).hexdigest() for name, key in KEYS.items()}
FILE = f"""# who may come in
[[tenant]]
name = "red"
key_sha256 = "{DIGESTS["red"]}"
kv_memory = "2GiB"

[[tenant]]
name = "blue"
key_sha256 = "{DIGESTS["blue"].upper()}"
"""


def bearer(key: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {key}"),)


# --- the file ---


def test_a_file_names_tenants_by_their_keys() -> None:
    tenants = parse_tenants(FILE)
    assert len(tenants) == 2
    assert tenants.authenticate([f"Bearer {KEYS['red']}"]) == Tenant("red", 2 << 30)
    assert tenants.authenticate([f"Bearer {KEYS['blue']}"]) == Tenant("blue", 0)


def test_a_salt_follows_from_the_name_and_nothing_else() -> None:
    assert Tenant("red", 5).salt == Tenant("red").salt == hashlib.sha256(b"baton-tenant\0red").digest()
    assert len({Tenant("red").salt, Tenant("blue").salt, Tenant("red ").salt, EVERYBODY.salt}) == 4
    assert EVERYBODY.salt == b""


RED = f'name = "red"\nkey_sha256 = "{DIGESTS["red"]}"\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "tenant: must be [[tenant]], once or more"),
        ("tenant = 5", "tenant: must be [[tenant]], once or more"),
        ("[tenant]\n" + RED, "tenant: must be [[tenant]], once or more"),
        ("[[tenant]]\nname = ", "is no TOML: Invalid value (at end of document)"),
        ("\n[[tenant]\n", "is no TOML: Expected ']]' at the end of an array declaration (at line 2, "),
        ("limit = 5\n[[tenant]]\n" + RED, "line 1: limit: only [[tenant]] is known"),
        ("[[tenant]]\n" + RED + 'quota = "2G"', "line 4: tenant.quota: is no field; there are name, key_sha256, kv_m"),
        ("\n\n[[tenant]]\n", "line 3: tenant.name: must be set"),
        ('[[tenant]]\nname = "a"', "line 1: tenant.key_sha256: must be set"),
        ("[[tenant]]\nname = 5", "line 2: tenant.name: must be a text in quotes"),
        ('[[tenant]]\n"name" = ""\nkey_sha256 = ""', "line 2: tenant.name: must be 1 to 64 letters, digits"),
        ('[[tenant]]\nname = "a b"\nkey_sha256 = ""', "got 'a b'"),
        ('[[tenant]]\nname = "a"\nkey_sha256 = "0123"', "line 3: tenant.key_sha256: must be 64 hex digits"),
        (f'[[tenant]]\nname = "a"\nkey_sha256 = "{"g" * 64}"', "got 64 characters"),
        (f"[[tenant]]\n{RED}\n[[tenant]]\n{RED}", "line 6: tenant.name: 'red' is there twice"),
        (f"[[tenant]]\n{RED}[[tenant]]\n{RED.replace('red', 'two')}", "line 6: tenant.key_sha256: is that of 'red'"),
        (f"[[tenant]]\n{RED}kv_memory = 5", "line 4: tenant.kv_memory: must be a text in quotes"),
        (f'[[tenant]]\n{RED}kv_memory = "lots"', "line 4: tenant.kv_memory: 'lots' is no amount of memory"),
        (f'[[tenant]]\n{RED}kv_memory = "0.1"', "line 4: tenant.kv_memory: must be more than 0"),
        (f'[[tenant]]\n{RED}kv_memory = "{"9" * 400}"', "is no amount of memory"),
        (f'[[tenant]]\n{RED}kv_memory = "9000000T"', "less than 8388608T"),
        (f"[[tenant]]\n{RED}max_concurrent = 0", "line 4: tenant.max_concurrent: must be a whole number from 1 to"),
        (
            f'[[tenant]]\n{RED}tokens_per_minute = "5"',
            "line 4: tenant.tokens_per_minute: must be a whole number from 1",
        ),
        (f"[[tenant]]\n{RED}requests_per_minute = true", "line 4: tenant.requests_per_minute: must be a whole number"),
        (f"[[tenant]]\n{RED}least_priority = 1", "line 4: tenant.least_priority: must be a whole number from -100"),
        ('[[tenant]]\nname = "a"\nkey_sha256 = []', "line 3: tenant.key_sha256: must be one text in quotes, or a list"),
        (
            '[[tenant]]\nname = "a"\nkey_sha256 = [5]',
            "line 3: tenant.key_sha256: must be one text in quotes, or a list",
        ),
        ('[[tenant]]\nname = "a"\nkey_sha256 = ["secret"]', "must be 64 hex digits, the SHA-256 of a key; got 6 chara"),
        (f'tenant = [{{name = "a b", key_sha256 = "{DIGESTS["red"]}"}}]', "tenant.name: must be 1 to 64"),
    ],
    ids=range(29),
)
def test_what_is_wrong_is_refused_by_field_and_line(text: str, message: str) -> None:
    with pytest.raises(UnusableTenants) as error:
        parse_tenants(text)
    assert message in str(error.value)


def test_a_tenant_may_have_several_keys_and_limits() -> None:
    text = f"""[[tenant]]
name = "red"
key_sha256 = ["{DIGESTS["red"]}", "{DIGESTS["blue"]}"]
requests_per_minute = 6
tokens_per_minute = 700
max_concurrent = 8
max_prompt_tokens = 90
least_priority = -3
"""
    tenants = parse_tenants(text)
    assert len(tenants) == 1
    expected = Tenant("red", 0, Allowance(6, 700, 8, 90), -3)
    assert [tenants.authenticate([f"Bearer {key}"]) for key in KEYS.values()] == [expected, expected]


def test_a_key_in_place_of_its_hash_is_not_shown() -> None:
    with pytest.raises(UnusableTenants) as error:
        parse_tenants('[[tenant]]\nname = "a"\nkey_sha256 = "my-secret-key"')
    assert "secret" not in str(error.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnusableTenants, match=r"tenants\.toml.*No such file"):
        read_tenants(tmp_path / "tenants.toml")
    (tmp_path / "tenants.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(UnusableTenants, match=r"tenants\.toml.*utf-8"):
        read_tenants(tmp_path / "tenants.toml")
    (tmp_path / "tenants.toml").write_text("[[tenant]]\n")
    with pytest.raises(UnusableTenants, match=r"tenants\.toml: line 1: tenant\.name: must be set"):
        read_tenants(tmp_path / "tenants.toml")


# --- keys ---


@pytest.mark.parametrize(
    "values",
    [
        [],
        [KEYS["red"]],
        [f"Basic {KEYS['red']}"],
        ["Bearer "],
        ["Bearer"],
        [""],
        [b"Bearer key-of-red"],
        [f"Bearer {KEYS['red']}x"],
        [f"Bearer {KEYS['red'][:-1]}"],
        [f"Bearer {DIGESTS['red']}"],
        [f"Bearer {KEYS['red']}", f"Bearer {KEYS['blue']}"],
        ["Bearer wrong", f"Bearer {KEYS['red']}"],
    ],
    ids=range(12),
)
def test_no_key_or_a_wrong_one(values: list[str | bytes]) -> None:
    with pytest.raises(Unauthenticated, match=r"^authorization: ") as error:
        parse_tenants(FILE).authenticate(values)
    assert not any(str(value).removeprefix("Bearer ") in str(error.value) for value in values if len(value) > 7)


@given(st.text(max_size=40).filter(lambda text: text.strip() not in KEYS.values()))
def test_no_other_key_opens(key: str) -> None:
    with pytest.raises(Unauthenticated):
        parse_tenants(FILE).authenticate([f"Bearer {key}"])


def test_the_scheme_is_not_case_sensitive_the_key_is() -> None:
    tenants = parse_tenants(FILE)
    assert tenants.authenticate([f"bearer  {KEYS['red']}"]).name == "red"
    with pytest.raises(Unauthenticated):
        tenants.authenticate([f"Bearer {KEYS['red'].upper()}"])


# --- the door ---


@pytest.fixture
async def cluster(redis_url: str, tmp_path: Path) -> AsyncIterator[FakeCluster]:
    file = tmp_path / "tenants.toml"
    file.write_text(FILE)
    async with running(FakeCluster(redis_url)) as cluster:
        for node_id in ("prefill0", "decode0"):
            await cluster.add(node_id)
        await cluster.open(tenants_file=str(file))
        yield cluster


async def ask(
    cluster: FakeCluster, metadata: tuple[tuple[str, str], ...], message: inference_pb2.GenerateRequest | None = None
) -> list[int]:
    call = cluster.stub.Generate(message or request([256, *range(100)], max_tokens=4, seed=1), metadata=metadata)
    return [token.token_id async for response in call for token in response.tokens]


@pytest.mark.parametrize(
    "metadata", [(), (("x-api-key", KEYS["red"]),), bearer("wrong"), bearer(KEYS["red"]) * 2], ids=range(4)
)
async def test_strangers_get_no_further_than_the_door(
    cluster: FakeCluster, metadata: tuple[tuple[str, str], ...], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "router")
    for call in (
        ask(cluster, metadata),
        ask(cluster, metadata, request("")),  # no word on what else is wrong
        cluster.stub.GetModel(inference_pb2.GetModelRequest(), metadata=metadata),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await call
        assert error.value.code() == grpc.StatusCode.UNAUTHENTICATED
        assert "authorization" in error.value.details()
    assert not any(node.seen.admits or node.seen.prefills for node in cluster.nodes.values())
    assert not any(key in caplog.text for key in ("wrong", *KEYS.values()))


async def test_health_needs_no_key(cluster: FakeCluster) -> None:
    async def is_served() -> bool:
        check = health_pb2.HealthCheckRequest(service="baton.v1.Inference")
        answer = await health_pb2_grpc.HealthStub(cluster.channel).Check(check)
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    await eventually(is_served, 5, "served")


async def test_nodes_get_the_tenants_salt_and_quota_in_both_legs(
    cluster: FakeCluster, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    red, blue = [await ask(cluster, bearer(key)) for key in KEYS.values()]
    assert red == blue, "the cache is a tenant's own, the text is not"
    seen = [*cluster.nodes["decode0"].seen.admits, *cluster.nodes["prefill0"].seen.prefills]
    expected = [(Tenant(name).salt, quota) for name, quota in (("red", 2 << 30), ("blue", 0))]
    assert [(message.salt, message.kv_quota_bytes) for message in seen] == expected * 2
    assert not any(key in caplog.text for key in KEYS.values())
    model = await cluster.stub.GetModel(inference_pb2.GetModelRequest(), metadata=bearer(KEYS["red"]))
    assert model.model == "pocket"


async def test_nothing_that_a_client_sends_makes_a_salt(cluster: FakeCluster) -> None:
    """Metadata of many names, and fields that the message does not have."""
    pretended = Tenant("blue").salt
    metadata = bearer(KEYS["red"]) + tuple(
        (name, value)
        for name in ("salt", "x-salt", "tenant", "x-baton-tenant", "x-baton-salt")
        for value in ("blue", pretended.hex())
    )
    metadata += (("salt-bin", pretended),)
    wire = request([256, *range(100)], max_tokens=4, seed=1).SerializeToString()
    for number in (*range(7, 16), 100):
        wire += _field(number, pretended)
    wire += bytes([6 << 3]) + b"\x05"  # field 6 as NodeRequest has it; in place of sampling, whose type it is not
    call = cluster.channel.unary_stream("/baton.v1.Inference/Generate")(wire, metadata=metadata)
    assert [message async for message in call]
    legs = [*cluster.nodes["decode0"].seen.admits, *cluster.nodes["prefill0"].seen.prefills]
    assert [leg.salt for leg in legs] == [Tenant("red").salt] * 2
    assert all(pretended not in leg.SerializeToString() for leg in legs)


def _field(number: int, value: bytes) -> bytes:
    """A length-delimited field in protobuf's wire format."""
    tag = number << 3 | 2
    head = bytes([tag]) if tag < 0x80 else bytes([tag & 0x7F | 0x80, tag >> 7])
    return head + bytes([len(value)]) + value


async def test_the_plan_sees_the_tenants_own_blocks_alone(
    cluster: FakeCluster, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = [256, *range(100)]
    directory = Directory(redis_url, CLUSTER)
    address = "tcp://127.0.0.1:1"
    arena = ArenaRecord(arena_id="ab" * 16, address=address, host="here", slot_bytes=1 << 16, num_slots=9)
    hashes = hash_blocks(salted(BlockHash(ROOT), Tenant("red").salt), prompt, BLOCK)
    await directory.heartbeat_arena(arena, 30.0)
    await directory.announce_all(arena.arena_id, list(zip(hashes, range(6), strict=True)), 30.0)
    hits: list[dict[str, int]] = []
    locate = Dispatcher._locate

    async def watch(dispatcher: Dispatcher, journey: Journey) -> dict[str, Hit]:
        found = await locate(dispatcher, journey)
        hits.append({arena_id: hit.num_blocks for arena_id, hit in found.items()})
        return found

    monkeypatch.setattr(Dispatcher, "_locate", watch)
    for key in (KEYS["red"], KEYS["blue"]):
        await ask(cluster, bearer(key), request(prompt, max_tokens=2))
    await directory.close()
    assert hits == [{arena.arena_id: 6}, {}]


async def test_a_new_file_needs_no_restart_and_a_bad_one_changes_nothing(
    cluster: FakeCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(file_watch, "POLL_S", 0.05)
    file, new = tmp_path / "tenants.toml", "key-of-green"
    assert await ask(cluster, bearer(KEYS["red"]))
    file.write_text(FILE + "[[tenant]]\n")
    await eventually(lambda: "event=reload_failed" in caplog.text, 10, "the bad file is seen")
    assert "line 10: tenant.name: must be set" in caplog.text
    assert await ask(cluster, bearer(KEYS["red"]))
    digest = hashlib.sha256(new.encode()).hexdigest()
    file.write_text(f'[[tenant]]\nname = "red"\nkey_sha256 = ["{digest}"]')

    async def is_known() -> bool:
        try:
            return bool(await ask(cluster, bearer(new)))
        except grpc.aio.AioRpcError:
            return False

    await eventually(is_known, 10, "the new key")
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await ask(cluster, bearer(KEYS["red"]))
    assert error.value.code() == grpc.StatusCode.UNAUTHENTICATED
    assert cluster.nodes["decode0"].seen.admits[-1].salt == Tenant("red").salt, "a new key keeps the cache"


async def test_more_than_is_allowed_is_told_when_to_come_again(redis_url: str, tmp_path: Path) -> None:
    file = tmp_path / "tenants.toml"
    file.write_text(f"[[tenant]]\n{RED}tokens_per_minute = 120\nmax_prompt_tokens = 110\nmax_concurrent = 3\n")
    async with running(FakeCluster(redis_url)) as cluster:
        await cluster.add("both0")
        await cluster.open(tenants_file=str(file), max_concurrent_requests=50)
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await ask(cluster, bearer(KEYS["red"]), request([256] * 111))
        assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert "110 tokens at most for this tenant, got 111" in error.value.details()
        assert len(await ask(cluster, bearer(KEYS["red"]))) == 4  # with a prompt of 101 tokens
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await ask(cluster, bearer(KEYS["red"]), request([256] * 90, max_tokens=1))
        assert error.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "tokens_per_minute: 120 at most" in error.value.details()
        wait_ms = int(dict(error.value.trailing_metadata())["retry-after-ms"])
        assert 0 < wait_ms <= 1000 * (90 - 15) * 60 / 120
        assert len(cluster.nodes["both0"].seen.admits) == 1


async def test_a_tenant_goes_before_others_only_as_far_as_his_file_says(redis_url: str, tmp_path: Path) -> None:
    file = tmp_path / "tenants.toml"
    file.write_text(FILE + "least_priority = -5\n")
    async with running(FakeCluster(redis_url)) as cluster, aiohttp.ClientSession() as session:
        await cluster.add("both0")
        await cluster.open(tenants_file=str(file))
        for name, least in (("red", 0), ("blue", -5)):
            for priority in (least, 100):
                message = request([256, 97], max_tokens=1)
                message.priority = priority
                assert await ask(cluster, bearer(KEYS[name]), message)
            message.priority = least - 1
            problem = f"priority: must be at least {least} for this tenant, got {least - 1}"
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await ask(cluster, bearer(KEYS[name]), message)
            assert (error.value.code(), error.value.details()) == (grpc.StatusCode.INVALID_ARGUMENT, problem)
            headers = {"Authorization": f"Bearer {KEYS[name]}"}
            for priority, status in ((least, 200), (least - 1, 400)):
                body = {"prompt": "x", "max_tokens": 1, "model": "pocket", "priority": priority}
                async with session.post(f"{cluster.http_url}/v1/completions", json=body, headers=headers) as response:
                    assert response.status == status
                    told = await response.json()
            assert (told["error"]["message"], told["error"]["param"]) == (problem, "priority")
        assert [leg.priority for leg in cluster.nodes["both0"].seen.admits] == [0, 100, 0, -5, 100, -5]


async def test_a_router_bounds_all_requests(redis_url: str) -> None:
    async with running(FakeCluster(redis_url)) as cluster:
        node = await cluster.add("both0")
        let_go = asyncio.Event()
        node.faults["token 1"] = let_go.wait
        await cluster.open(max_concurrent_requests=2)
        running_calls = [asyncio.create_task(ask(cluster, ())) for _ in range(2)]
        await eventually(lambda: node.seen.active == 2, 10, "both run")
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await ask(cluster, ())
        assert error.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "max_concurrent_requests of this router: 2 at most" in error.value.details()
        let_go.set()
        assert all(await asyncio.gather(*running_calls))
        assert await ask(cluster, ())


@pytest.mark.parametrize(("host", "is_told"), [("0.0.0.0", True), ("127.0.0.1", False), ("::1", False)])
async def test_keys_in_the_clear_are_told_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, host: str, is_told: bool
) -> None:
    (tmp_path / "tenants.toml").write_text(FILE)
    async with AsyncExitStack() as stack:
        await open_locks(RouterConfig("m", "r", host=host, tenants_file=str(tmp_path / "tenants.toml")), stack)
    assert ("event=keys_in_the_clear" in caplog.text) is is_told


async def test_without_a_file_everybody_may_and_keys_are_not_looked_at(redis_url: str) -> None:
    async with running(FakeCluster(redis_url)) as cluster:
        await cluster.add("both0")
        await cluster.open()
        for metadata in ((), bearer("whatever")):
            assert await ask(cluster, metadata)
        assert [leg.salt for leg in cluster.nodes["both0"].seen.admits] == [b"", b""]


async def test_a_router_with_a_bad_file_does_not_start(redis_url: str, tmp_path: Path) -> None:
    file = tmp_path / "tenants.toml"
    file.write_text(FILE + "kv_memory = 5\n")
    with pytest.raises(UnusableTenants, match=r"line 10: tenant\.kv_memory"):
        await RouterServer(RouterConfig(str(POCKET), redis_url, tenants_file=str(file))).start()


async def test_over_http_the_same_limits_are_429_with_retry_after(redis_url: str, tmp_path: Path) -> None:
    file = tmp_path / "tenants.toml"
    file.write_text(f"[[tenant]]\n{RED}requests_per_minute = 1\n")
    async with running(FakeCluster(redis_url)) as cluster, aiohttp.ClientSession() as session:
        await cluster.add("both0")
        await cluster.open(tenants_file=str(file))
        headers = {"Authorization": f"Bearer {KEYS['red']}"}
        body = {"prompt": "x", "max_tokens": 1, "model": "pocket"}

        async def post() -> aiohttp.ClientResponse:
            async with session.post(f"{cluster.http_url}/v1/completions", json=body, headers=headers) as response:
                await response.read()
                return response

        assert (await post()).status == 200
        refused = await post()
        assert refused.status == 429 and 1 <= int(refused.headers["Retry-After"]) <= 60
        assert (await refused.json())["error"]["code"] == "rate_limited"
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await ask(cluster, bearer(KEYS["red"]))
        assert "requests_per_minute: 1 at most" in error.value.details(), "both doors count together"


async def test_tokenizing_counts_as_a_request_both_ways(redis_url: str, tmp_path: Path) -> None:
    file = tmp_path / "tenants.toml"
    file.write_text(f"[[tenant]]\n{RED}requests_per_minute = 4\n")
    async with running(FakeCluster(redis_url)) as cluster, aiohttp.ClientSession() as session:
        await cluster.add("both0")
        await cluster.open(tenants_file=str(file))
        key = bearer(KEYS["red"])
        await cluster.stub.Tokenize(inference_pb2.TokenizeRequest(text="x"), metadata=key)
        await cluster.stub.Detokenize(inference_pb2.DetokenizeRequest(token_ids=[72]), metadata=key)
        headers = {"Authorization": f"Bearer {KEYS['red']}"}
        for status in (200, 429):
            for path, body in (("tokenize", {"prompt": "x"}), ("detokenize", {"tokens": [72]})):
                async with session.post(f"{cluster.http_url}/{path}", json=body, headers=headers) as response:
                    assert response.status == status, path
        with pytest.raises(grpc.aio.AioRpcError, match="requests_per_minute: 4 at most"):
            await cluster.stub.Detokenize(inference_pb2.DetokenizeRequest(token_ids=[72]), metadata=key)
