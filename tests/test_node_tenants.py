"""Quotas as nodes pass them on: what a tenant's blocks take in an arena, and that his tokens are right all the same."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from node_harness import BLOCK_SIZE, Machine, decode, journey, node_request, prompt_of, running_machine, sampling

from batonpb import node_pb2
from kvstore.blocks import BlockHash, hash_blocks, salted
from kvstore.quotas import SHARED, Owner
from node.convert import to_owner

ONE, TWO = b"one", b"two"


@pytest.fixture
async def machine(tiny_model_dir: Path, redis_url: str, short_dir: Path) -> AsyncIterator[Machine]:
    async with running_machine(tiny_model_dir, redis_url, short_dir) as machine:
        yield machine


def names(machine: Machine, prompt: list[int], salt: bytes) -> list[BlockHash]:
    return hash_blocks(salted(machine.layout.root(), salt), prompt, BLOCK_SIZE)


@pytest.mark.parametrize(
    ("salt", "quota_bytes", "expected"),
    [
        (b"", 0, SHARED),
        (b"", 500, SHARED),
        (b"s", 0, Owner.of_salt(b"s")),
        (b"s", 99, Owner.of_salt(b"s", 0)),
        (b"s", 299, Owner.of_salt(b"s", 2)),
    ],
)
def test_a_quota_counts_whole_blocks(salt: bytes, quota_bytes: int, expected: Owner) -> None:
    assert to_owner(node_pb2.NodeRequest(salt=salt, kv_quota_bytes=quota_bytes), 100) == expected


async def test_blocks_of_both_legs_count_and_the_other_tenants_stay(machine: Machine) -> None:
    store = await machine.store()
    first, second = await machine.node(), await machine.node()
    one, two = Owner.of_salt(ONE), Owner.of_salt(TWO)
    theirs = prompt_of(80, seed=9)
    await first.prefill(node_request(theirs, salt=TWO, kv_quota_bytes=20 * machine.layout.block_bytes))
    for seed in range(6):
        prompt = prompt_of(100, seed)
        request = node_request(
            prompt, salt=ONE, kv_quota_bytes=8 * machine.layout.block_bytes, sampling=sampling(max_tokens=40)
        )
        tokens, _ = await journey(first, second, request)
        assert tokens == machine.expected(prompt, sampling(max_tokens=40))
        for node in (first, second):
            await node.server.publisher.flush()
        store.arena.check_integrity()
        assert store.arena.num_blocks_of(one.tenant) <= 8
    assert store.arena.num_blocks_of(one.tenant) == 8
    assert store.arena.num_blocks_of(two.tenant) == 5 and len(store.arena.blocks()) == 8 + 5
    assert all(store.arena.holds(block_hash) for block_hash in names(machine, theirs, TWO))
    latest = names(machine, [*prompt, *tokens], ONE)
    assert any(store.arena.holds(block_hash) for block_hash in latest[6:]), "what decoding fills is kept and counts"


@pytest.mark.parametrize("quota_blocks", [0, 3])
async def test_a_quota_below_one_prompt_costs_computing_only(machine: Machine, quota_blocks: int) -> None:
    store = await machine.store()
    first, second = await machine.node(), await machine.node()
    prompt = prompt_of(200)
    quota_bytes = quota_blocks * machine.layout.block_bytes + 1
    for _ in range(2):
        tokens, _ = await journey(first, second, node_request(prompt, salt=ONE, kv_quota_bytes=quota_bytes))
        assert tokens == machine.expected(prompt)
    alone = await decode(second, node_request(prompt_of(90, 3), salt=ONE, kv_quota_bytes=quota_bytes))
    assert alone.token_ids == machine.expected(prompt_of(90, 3))
    for node in (first, second):
        await node.server.publisher.flush()
    store.arena.check_integrity()
    assert store.arena.num_blocks_of(Owner.of_salt(ONE).tenant) == len(store.arena.blocks()) == quota_blocks
