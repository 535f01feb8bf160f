"""Two tenants of one cluster: neither can tell by a hit or by what is computed that the other one sent the same prompt.

Real nodes, a real store and a real router. Time is not measured but counted: the tokens that a first leg computes and
those that it reads from its cache are all that its duration depends on.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest
from node_harness import BLOCK_SIZE, Machine, Node, prompt_of, running_machine, sampling

from batonpb import inference_pb2, inference_pb2_grpc
from kvstore.blocks import BlockHash, hash_blocks, salted
from kvstore.quotas import Owner
from router.config import RouterConfig
from router.plan import RequestView
from router.policy import POLICIES
from router.server import RouterServer
from router.tenants import Tenant

PROMPT = prompt_of(400)
MAX_TOKENS = 40
QUOTA_BLOCKS = 30
Work = tuple[int, int]  # tokens computed in prefill chunks, and those read from the cache for them


@dataclass
class Answer:
    """What a client saw, and what it cost."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    usage: inference_pb2.Usage | None = None
    work: Work = (0, 0)  # of the node that ran the first leg
    hit_blocks: dict[str, int] = field(default_factory=dict)  # as the router's plan saw them

    @property
    def hits(self) -> tuple[int, int, int]:
        assert self.usage is not None
        return self.usage.cached_tokens, self.usage.local_hit_tokens, self.usage.store_hit_tokens


class Cluster:
    """A machine with a store and nodes, and a router that knows two tenants: "red", and "blue", who has a quota."""

    def __init__(self, machine: Machine, stub: inference_pb2_grpc.InferenceStub, views: list[dict[str, int]]) -> None:
        self.machine = machine
        self.arena = machine.stores[0].arena
        self._stub = stub
        self._views = views

    async def ask(
        self, tenant: str, prompt: Sequence[int] = PROMPT, metadata: Sequence[tuple[str, str | bytes]] = ()
    ) -> Answer:
        """A whole request, when all blocks that it makes are in the arena."""
        before = {node.record.node_id: await work(node) for node in self.machine.nodes}
        message = inference_pb2.GenerateRequest(sampling=sampling(max_tokens=MAX_TOKENS))
        message.tokens.token_ids.extend(prompt)
        answer = Answer()
        call = self._stub.Generate(message, metadata=[("authorization", f"Bearer key-{tenant}"), *metadata], timeout=60)
        async for response in call:
            answer.text += response.text
            answer.token_ids += [token.token_id for token in response.tokens]
            answer.usage, timeline = response.usage, response.timeline
        for node in self.machine.nodes:
            await node.server.publisher.flush()
            if node.record.node_id == (timeline.prefill_node or timeline.decode_node):
                now, then = await work(node), before[node.record.node_id]
                answer.work = (now[0] - then[0], now[1] - then[1])
        answer.hit_blocks = self._views[-1]
        self.arena.check_integrity()
        return answer

    def names(self, tenant: str, tokens: Sequence[int]) -> list[BlockHash]:
        return hash_blocks(salted(self.machine.layout.root(), Tenant(tenant).salt), tokens, BLOCK_SIZE)

    async def num_located(self, tenant: str) -> int:
        """How many leading blocks of the prompt the directory has, under a tenant's names; "" is nobody's."""
        found = await self.machine.directory.locate(self.names(tenant, PROMPT))
        return max((len(slots) for slots in found.values()), default=0)


async def work(node: Node) -> Work:
    steps = (await node.load()).steps
    return steps.num_prefill_tokens, steps.num_prefill_context_tokens


@asynccontextmanager
async def serving(machine: Machine, roles: Sequence[str], file: Path) -> AsyncIterator[Cluster]:
    await machine.store()
    for role in roles:
        await machine.node(role=role)
    quota_bytes = (QUOTA_BLOCKS + 1) * machine.layout.block_bytes - 1
    for name, more in (("red", ""), ("blue", f'kv_memory = "{quota_bytes}"\n')):
        digest = hashlib.sha256(f"key-{name}".encode()).hexdigest()
        with file.open("a") as out:
            out.write(f'[[tenant]]\nname = "{name}"\nkey_sha256 = "{digest}"\n{more}')
    views: list[dict[str, int]] = []
    plan = POLICIES["predict"]()

    def watch(view: RequestView, *rest: object) -> object:
        views.append({arena_id: hit.num_blocks for arena_id, hit in view.hits.items()})
        return plan(view, *rest)  # type: ignore[arg-type]

    router = RouterServer(RouterConfig(str(machine.model_dir), machine.redis_url, tenants_file=str(file)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(POLICIES, "predict", lambda: watch)
        record = await router.start()
        try:
            async with grpc.aio.insecure_channel(str(record["address"])) as channel:
                yield Cluster(machine, inference_pb2_grpc.InferenceStub(channel), views)
        finally:
            await router.stop()


@pytest.fixture(params=["both", "prefill decode"])
async def cluster(
    request: pytest.FixtureRequest, tiny_model_dir: Path, redis_url: str, short_dir: Path, tmp_path: Path
) -> AsyncIterator[Cluster]:
    async with running_machine(tiny_model_dir, redis_url, short_dir) as machine:
        async with serving(machine, request.param.split(), tmp_path / "tenants.toml") as cluster:
            yield cluster


async def test_nobody_learns_what_another_tenant_has_sent(cluster: Cluster) -> None:
    first, second = await cluster.ask("red"), await cluster.ask("blue")
    assert first.token_ids == second.token_ids == cluster.machine.expected(PROMPT, sampling(max_tokens=MAX_TOKENS))
    assert first.text == second.text
    # 1) No hit, in the engine, in the store, or in what the router plans with.
    assert first.hits == second.hits == (0, 0, 0)
    assert first.hit_blocks == second.hit_blocks == {}
    # 2) The first leg computes the same work: that of a prompt which nobody has ever sent.
    assert first.work == second.work
    assert first.work[0] == len(PROMPT)
    # 3) The directory and the arena have each tenant's blocks under his own names, and none under nobody's.
    num_blocks = len(PROMPT) // BLOCK_SIZE
    assert [await cluster.num_located(tenant) for tenant in ("red", "blue", "")] == [num_blocks, num_blocks, 0]
    tokens = [*PROMPT, *first.token_ids]
    red, blue = set(cluster.names("red", tokens)), set(cluster.names("blue", tokens))
    held = {block_hash for block_hash, _ in cluster.arena.blocks()}
    assert not red & blue and held <= red | blue
    assert len(held & red) == len(held & blue) >= num_blocks
    # 4) The same tenant hits.
    again = await cluster.ask("red")
    num_hit_tokens = (len(PROMPT) - 1) // BLOCK_SIZE * BLOCK_SIZE
    assert again.hits[0] == num_hit_tokens and list(again.hit_blocks.values()) == [num_blocks]
    assert again.work[0] == len(PROMPT) - num_hit_tokens
    assert again.token_ids == first.token_ids


async def test_a_client_that_claims_a_salt_is_who_his_key_says(cluster: Cluster) -> None:
    await cluster.ask("blue")
    salt = Tenant("blue").salt
    claims = [(name, salt.hex()) for name in ("salt", "x-baton-salt")] + [("tenant", "blue"), ("salt-bin", salt)]
    claimed = await cluster.ask("red", metadata=claims)
    assert claimed.hits == (0, 0, 0) and claimed.hit_blocks == {} and claimed.work[0] == len(PROMPT)
    assert await cluster.num_located("red") == len(PROMPT) // BLOCK_SIZE


async def test_a_tenant_over_his_quota_harms_nobody(cluster: Cluster) -> None:
    await cluster.ask("red")
    theirs = {block_hash for block_hash, _ in cluster.arena.blocks()}
    owner = Owner.of_salt(Tenant("blue").salt)
    for seed in range(1, 5):
        prompt = prompt_of(250, seed)
        answer = await cluster.ask("blue", prompt)
        assert answer.token_ids == cluster.machine.expected(prompt, sampling(max_tokens=MAX_TOKENS))
        assert cluster.arena.num_blocks_of(owner.tenant) <= QUOTA_BLOCKS
    assert cluster.arena.num_blocks_of(owner.tenant) == QUOTA_BLOCKS
    assert cluster.arena.num_free > 0
    assert theirs <= {block_hash for block_hash, _ in cluster.arena.blocks()}
    assert (await cluster.ask("blue", prompt)).hits[0] == 240, "the last one is still there"
    assert list((await cluster.ask("red")).hit_blocks.values()) == [len(PROMPT) // BLOCK_SIZE]
