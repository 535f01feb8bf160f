"""A leader and the ranks that follow it, over gRPC: what waits for what, who agrees, and how long blocks are pinned."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
from conftest import eventually
from node_harness import BLOCK_SIZE, ENGINE, prompt_of

from batonpb import rank_pb2, rank_pb2_grpc
from engine.engine import Engine
from engine.errors import UnknownRequest
from engine.loop import EngineLoop
from engine.rank_meter import RankWork
from engine.request import FullBlock, Request, SamplingParams
from kvstore.blocks import BlockHash, piece_hash
from kvstore.client import Match
from kvstore.quotas import SHARED, Owner
from node.intake import Intake
from node.rank_service import RankService
from node.ranks import Ranks

NUM_BLOCKS = 4


@dataclass
class Follower:
    """A rank with two pieces of each block, whose copies are noted."""

    num_steps: int = 0
    num_good: int = NUM_BLOCKS
    num_blocks: int = 64
    is_writer: bool = True
    pieces: tuple[int, ...] = (1, 3)
    stage: int = 0
    work: RankWork = field(default_factory=RankWork)
    imported: list[list[int]] = field(default_factory=list)
    exported: list[list[int]] = field(default_factory=list)

    @property
    def max_told_steps(self) -> int:
        return self.num_steps + 3

    def wait_for_steps(self, num_steps: int, timeout_s: float) -> bool:
        return self.num_steps >= num_steps

    def import_blocks(self, block_ids: Sequence[int], payloads: Sequence[Any]) -> int:
        self.imported.append(list(block_ids))
        return min(self.num_good, len(payloads) // 2)

    def export_pieces(self, piece_ids: Sequence[int], views: Sequence[memoryview]) -> list[int]:
        self.exported.append(list(piece_ids))
        return [0] * len(piece_ids)


class Store:
    """Has whatever is asked for, once its gate is open."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.gate.set()
        self.published: list[BlockHash] = []
        self.owners: list[Owner] = []

    async def match(self, hashes: Sequence[BlockHash]) -> Match:
        return Match(tuple(hashes), tuple(("a", slot) for slot in range(len(hashes))))

    async def fetch(self, match: Match, limit_s: float) -> list[object]:
        await self.gate.wait()
        return [object()] * match.num_blocks

    async def publish(self, hashes: Sequence[BlockHash], write: Any, owner: Owner) -> int:
        write(range(len(hashes)), [memoryview(b"")] * len(hashes))
        self.published += hashes
        self.owners.append(owner)
        return len(hashes)


@dataclass
class Rig:
    loop: EngineLoop
    ranks: Ranks
    followers: list[Follower]
    stores: list[Store]
    servers: list[grpc.aio.Server]
    channels: list[grpc.aio.Channel]
    lost: list[BaseException]

    async def hold(self, num_blocks: int = NUM_BLOCKS) -> Request:
        prompt = prompt_of(num_blocks * BLOCK_SIZE + 1)
        root = self.loop.engine.layout.root()
        request = Request("r", prompt, len(prompt), SamplingParams(max_tokens=2), root, BLOCK_SIZE)
        await self.loop.call(lambda engine: engine.add(request, hold=True))
        return request

    async def num_used(self) -> int:
        load = await self.loop.call(Engine.load)
        return load.total_blocks - load.free_blocks


@pytest.fixture
async def rig(tiny_model_dir: Any) -> AsyncIterator[Rig]:
    loop = EngineLoop(Engine.from_pretrained(tiny_model_dir, ENGINE), lambda error: None)
    loop.start()
    followers, stores, servers, channels = [Follower(), Follower()], [Store(), Store()], [], []
    for follower, store in zip(followers, stores, strict=True):
        intake: Any = Intake(store, BLOCK_SIZE, 64, pieces=follower.pieces)
        server = grpc.aio.server()
        port = server.add_insecure_port("127.0.0.1:0")
        rank_pb2_grpc.add_RankServicer_to_server(RankService(follower, store, intake), server)
        await server.start()
        servers.append(server)
        channels.append(grpc.aio.insecure_channel(f"127.0.0.1:{port}"))
    lost: list[BaseException] = []
    ranks = Ranks(loop, channels, lost.append)
    yield Rig(loop, ranks, followers, stores, servers, channels, lost)
    await ranks.close()
    for server in servers:
        await server.stop(None)
    await loop.call(Engine.check_integrity)
    await loop.stop()


async def test_all_agree_on_the_shortest_good_run(rig: Rig) -> None:
    request = await rig.hold()
    rig.followers[1].num_good = 2
    assert await rig.ranks.fetch(request, request.block_hashes[:NUM_BLOCKS], SHARED, math.inf) == 2
    assert [follower.imported for follower in rig.followers] == [[request.block_table[:NUM_BLOCKS]]] * 2
    rig.loop.abort(request.request_id)
    assert await rig.num_used() == 0


async def test_blocks_are_nobody_elses_until_all_ranks_have_answered(rig: Rig) -> None:
    """The request is aborted, and its fetch cancelled, while a rank is still about to write."""
    request = await rig.hold()
    rig.stores[0].gate.clear()
    fetching = asyncio.create_task(rig.ranks.fetch(request, request.block_hashes[:NUM_BLOCKS], SHARED, math.inf))
    await eventually(lambda: rig.followers[1].imported)
    fetching.cancel()
    rig.loop.abort(request.request_id)
    assert await rig.num_used() == NUM_BLOCKS
    rig.stores[0].gate.set()

    async def is_free() -> bool:
        return await rig.num_used() == 0

    await eventually(is_free, what="the blocks are given back")
    assert rig.followers[0].imported


async def test_a_request_that_is_gone_is_not_fetched_for(rig: Rig) -> None:
    request = await rig.hold()
    rig.loop.abort(request.request_id)
    with pytest.raises(UnknownRequest):
        await rig.ranks.fetch(request, request.block_hashes[:1], SHARED, 1.0)
    assert not rig.followers[0].imported


async def test_a_rank_publishes_its_own_pieces(rig: Rig) -> None:
    blocks = [FullBlock(BlockHash(bytes([n]) * 16), 7 + n) for n in range(2)]
    rig.followers[1].is_writer = False
    owner = Owner(b"t" * 16, 5)
    await rig.ranks.publish(blocks, owner)
    assert rig.stores[0].published == [piece_hash(block.block_hash, piece) for block in blocks for piece in (1, 3)]
    assert rig.followers[0].exported == [[14, 15, 16, 17]]
    assert rig.stores[0].owners == [owner]
    assert not rig.stores[1].published, "another rank has the same heads"


async def test_nothing_is_copied_before_the_steps_that_the_leader_told(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(rig.loop.engine), "num_told_steps", property(lambda engine: 3))
    told = asyncio.Event()

    def wait_for_steps(num_steps: int, timeout_s: float) -> bool:
        if timeout_s == 0.0:
            rig.loop._loop.call_soon_threadsafe(told.set)
            return False
        while rig.followers[0].num_steps < num_steps:
            time.sleep(0.01)
        return True

    rig.followers[0].wait_for_steps = wait_for_steps  # type: ignore[method-assign]
    rig.followers[1].num_steps = 3
    publishing = asyncio.create_task(rig.ranks.publish([FullBlock(BlockHash(bytes(16)), 1)], SHARED))
    await told.wait()
    await eventually(lambda: rig.stores[1].published)
    assert not rig.stores[0].published
    rig.followers[0].num_steps = 3
    await publishing
    assert rig.stores[0].published


async def test_a_rank_that_breaks_off_is_lost_and_its_blocks_stay_pinned(rig: Rig) -> None:
    request = await rig.hold()
    rig.stores[0].gate.clear()
    fetching = asyncio.create_task(rig.ranks.fetch(request, request.block_hashes[:NUM_BLOCKS], SHARED, math.inf))
    await eventually(lambda: rig.followers[1].imported)
    await rig.servers[0].stop(None)
    with pytest.raises(grpc.aio.AioRpcError):
        await fetching
    assert len(rig.lost) == 1
    rig.loop.abort(request.request_id)
    assert await rig.num_used() == NUM_BLOCKS, "the rank may still write"


@pytest.mark.parametrize(
    ("blocks", "field_name"),
    [
        (rank_pb2.Blocks(hashes=[bytes(16)], block_ids=[]), "blocks"),
        (rank_pb2.Blocks(hashes=[bytes(15)], block_ids=[1]), "blocks"),
        (rank_pb2.Blocks(hashes=[bytes(16)], block_ids=[64]), "block_ids"),
        (rank_pb2.Blocks(hashes=[bytes(16)] * 65, block_ids=range(65)), "must be 64 at most"),
        (rank_pb2.Blocks(after_steps=4), "after_steps: must be 3 at most now"),
        (rank_pb2.Blocks(after_steps=2**64 - 1), "after_steps"),
        (rank_pb2.Blocks(tenant=b"x"), "tenant"),
    ],
)
async def test_a_message_that_makes_no_sense_is_refused(rig: Rig, blocks: rank_pb2.Blocks, field_name: str) -> None:
    stub = rank_pb2_grpc.RankStub(rig.channels[0])
    with pytest.raises(grpc.aio.AioRpcError, match=field_name) as error:
        await stub.Fetch(rank_pb2.FetchRequest(blocks=blocks))
    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert not rig.followers[0].imported


@pytest.mark.parametrize("limit_s", [-1.0, math.nan, -math.inf])
async def test_a_limit_that_is_none_is_refused(rig: Rig, limit_s: float) -> None:
    with pytest.raises(grpc.aio.AioRpcError, match="limit_s"):
        await rank_pb2_grpc.RankStub(rig.channels[0]).Fetch(rank_pb2.FetchRequest(limit_s=limit_s))


async def test_ranks_tell_what_they_did(rig: Rig) -> None:
    rig.followers[1].stage, rig.followers[1].work = 1, RankWork(num_steps=7, compute_s=0.5, pipeline_bytes=9)
    await rig.ranks.publish([FullBlock(BlockHash(bytes(16)), 1)], SHARED)
    rig.ranks.watch(5.0)
    await eventually(lambda: all(work.published_bytes for work in rig.ranks.work.values()))
    work = rig.ranks.work[2]
    assert (work.stage, work.num_steps, work.compute_s, work.pipeline_bytes) == (1, 7, 0.5, 9)
    assert work.published_bytes == 2 * 64 and work.fetched_bytes == 0
    assert not rig.lost


class Silent(rank_pb2_grpc.RankServicer):
    """Answers until it is told to stop: its connection lives on."""

    def __init__(self) -> None:
        self.is_silent = False

    async def GetWork(self, _message: Any, _context: Any) -> rank_pb2.Work:
        if self.is_silent:
            await asyncio.Event().wait()
        return rank_pb2.Work(num_steps=1)


async def test_a_rank_that_says_nothing_is_lost(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing else would end the calls that wait for it."""
    monkeypatch.setattr("node.ranks.ASK_S", 0.01)
    rank, server = Silent(), grpc.aio.server()
    rank_pb2_grpc.add_RankServicer_to_server(rank, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    lost: list[Any] = []
    ranks = Ranks(rig.loop, [grpc.aio.insecure_channel(f"127.0.0.1:{port}")], lost.append)
    ranks.watch(0.5)
    await eventually(lambda: ranks.work[1].num_steps)
    assert not lost
    rank.is_silent = True
    await eventually(lambda: lost)
    assert lost[0].code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await ranks.close()
    await server.stop(None)
