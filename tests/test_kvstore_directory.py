"""The directory over a real Redis: runs, membership, and what happens when Redis hangs, dies or comes back empty."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
from collections.abc import AsyncIterator
from dataclasses import asdict, replace

import pytest
import redis
from conftest import RedisProcess, eventually
from hypothesis import given
from hypothesis import strategies as st

from kvstore.blocks import BlockHash, hash_blocks
from kvstore.cover import stitch
from kvstore.directory import ON_DISK, ArenaRecord, Directory, NodeRecord, Run
from kvstore.errors import DirectoryUnavailable
from kvstore.records import parse_record

CHAIN = hash_blocks(BlockHash(bytes(16)), list(range(1000)), 1)
TTL_S = 30.0

NODE = NodeRecord(
    node_id="p0",
    incarnation="one",
    role="prefill",
    address="127.0.0.1:1",
    model="pocket",
    kv_root="00" * 16,
    block_size=16,
    block_bytes=4096,
    vocab_size=258,
    max_model_len=1024,
    prefill_tokens_per_s=3.5,
)


def arena(number: int) -> ArenaRecord:
    address = f"tcp://127.0.0.1:{number}"
    return ArenaRecord(arena_id=f"{number:032x}", address=address, host="here", slot_bytes=4096, num_slots=2000)


@pytest.fixture
async def directory(redis_url: str) -> AsyncIterator[Directory]:
    directory = Directory(redis_url, "test")
    yield directory
    await directory.close()


async def hold(directory: Directory, number: int, indices: list[int], ttl_s: float = TTL_S) -> str:
    """An arena that holds some blocks of CHAIN, in slots of ten times their number."""
    record = arena(number)
    await directory.heartbeat_arena(record, ttl_s)
    await directory.announce_all(record.arena_id, [(CHAIN[index], 10 * index) for index in indices], ttl_s)
    return record.arena_id


async def test_locate_leading_runs(directory: Directory) -> None:
    a = await hold(directory, 1, [0, 1, 2])
    b = await hold(directory, 2, [0, 2, 3])
    c = await hold(directory, 3, [1, 2, 3])
    assert await directory.locate(CHAIN[:5]) == {a: [0, 10, 20], b: [0]}
    assert await directory.locate(CHAIN[:5], [b, c]) == {b: [0]}
    assert await directory.locate(CHAIN[1:5]) == {a: [10, 20], c: [10, 20, 30]}
    assert await directory.locate([]) == {} and await directory.locate(CHAIN[:5], []) == {}
    assert await directory.locate(CHAIN[500:505]) == {}


async def test_runs_count_what_locate_finds(directory: Directory) -> None:
    a = await hold(directory, 1, [0, 1, 2])
    b = await hold(directory, 2, [0, 2, 3])
    c = await hold(directory, 3, [1, 2, 3])
    assert await directory.announce(c, [(CHAIN[2], ON_DISK), (CHAIN[4], ON_DISK)])
    assert await directory.runs(CHAIN[:5]) == {a: Run(3, 0), b: Run(1, 0)}
    assert await directory.runs(CHAIN[1:5]) == {a: Run(2, 0), c: Run(4, 2)}
    assert await directory.locate(CHAIN[1:5]) == {a: [10, 20], c: [10, ON_DISK, 30, ON_DISK]}
    assert await directory.runs([]) == {} and await directory.runs(CHAIN[500:505]) == {}


async def test_long_runs_are_counted_to_their_end(directory: Directory) -> None:
    lengths = {
        await hold(directory, number, list(range(number))): number for number in (1, 64, 65, 319, 320, 321, 1000)
    }
    assert await directory.runs(CHAIN) == {arena_id: Run(length, 0) for arena_id, length in lengths.items()}
    assert await directory.runs(CHAIN[:64]) == {arena_id: Run(min(64, n), 0) for arena_id, n in lengths.items()}


async def test_answers_are_those_of_a_plain_dictionary(directory: Directory) -> None:
    rng = random.Random(7)
    held: dict[str, dict[BlockHash, int]] = {await hold(directory, number, []): {} for number in range(5)}
    for _ in range(60):
        arena_id, blocks = rng.choice(list(held.items()))
        came = {block: rng.choice([rng.randrange(1 << 16), ON_DISK]) for block in rng.sample(CHAIN[:40], 12)}
        gone = rng.sample(CHAIN[:40], 6)
        if rng.random() < 0.1:
            await directory.announce_all(arena_id, list(came.items()), TTL_S)
            blocks.clear()
        else:
            assert await directory.announce(arena_id, list(came.items()), gone)
            for block in gone:
                blocks.pop(block, None)
        blocks.update(came)
        asked = CHAIN[rng.randrange(30) : 40]
        runs = {name: [blocks.get(block) for block in asked] for name, blocks in held.items()}
        heads = {name: run[: run.index(None)] if None in run else run for name, run in runs.items()}
        expected = {name: head for name, head in heads.items() if head}
        assert await directory.locate(asked) == expected
        assert await directory.runs(asked) == {n: Run(len(head), head.count(ON_DISK)) for n, head in expected.items()}
        cover = await directory.cover(asked)
        assert list(cover.places) == stitch(runs) or len(cover.places) == len(stitch(runs)), "ties are anybody's"
        assert all(held[name][block] == slot for block, (name, slot) in zip(asked, cover.places, strict=False))


async def test_what_dead_arenas_held_is_swept_away(directory: Directory, redis_url: str) -> None:
    living = await hold(directory, 1, list(range(600)))
    dead = await hold(directory, 2, list(range(300, 900)))
    await directory.announce_all(living, [(block, 7) for block in CHAIN[:600]], TTL_S)  # under another number
    await directory.remove_arena(dead)
    expected = {living: [7] * 600}
    assert await directory.locate(CHAIN) == expected
    client = redis.Redis.from_url(redis_url)

    async def is_swept() -> bool:
        assert await directory.heartbeat_arena(arena(1), TTL_S)
        return client.hlen("baton:test:blocks") == 600 + 2  # its marker, and the last number

    await eventually(is_swept)
    await eventually(lambda: _all_of_one_holder(directory, client))
    assert await directory.locate(CHAIN) == expected
    assert not await directory.announce(dead, [(CHAIN[0], 1)]), "its marker went with what it held"
    client.close()


async def _all_of_one_holder(directory: Directory, client: redis.Redis) -> bool:
    await directory.heartbeat_arena(arena(1), TTL_S)
    return all(client.hstrlen("baton:test:blocks", bytes(block)) == 10 for block in CHAIN[:600])


async def test_values_that_nobody_wrote_are_overwritten_and_swept(directory: Directory, redis_url: str) -> None:
    a = await hold(directory, 1, [0, 1, 2])
    client, key = redis.Redis.from_url(redis_url), "baton:test:blocks"
    for value in (b"", b"x", b"\0\3abc", b"\xff" * 11, b"\0\0"):
        client.hset(key, mapping={bytes(CHAIN[1]): value, bytes(CHAIN[9]): value})
        await directory.runs(CHAIN[:3])
        assert len((await directory.locate(CHAIN[:3]))[a]) <= 3
        assert await directory.announce(a, [(CHAIN[1], 10)], gone=[CHAIN[8]])
        assert await directory.locate(CHAIN[:3]) == {a: [0, 10, 20]}
        await directory.heartbeat_arena(arena(1), TTL_S)
        assert not client.hexists(key, bytes(CHAIN[9]))
    client.close()


async def test_an_arena_that_was_taken_for_dead_announces_again(directory: Directory) -> None:
    a = await hold(directory, 1, [0, 1], ttl_s=0.2)
    await hold(directory, 2, [0])
    await eventually(lambda: _is_gone(directory, a))
    assert not await directory.heartbeat_arena(arena(1), TTL_S)
    assert a not in await directory.runs(CHAIN[:2]) and not await directory.announce(a, [(CHAIN[2], 2)])
    await directory.announce_all(a, [(CHAIN[0], 3)], TTL_S)
    assert await directory.heartbeat_arena(arena(1), TTL_S) and (await directory.locate(CHAIN[:2]))[a] == [3]


async def test_an_inventory_that_is_lost_while_it_is_announced(directory: Directory, redis_url: str) -> None:
    a = await hold(directory, 1, [0])
    client = redis.Redis.from_url(redis_url)
    await directory._begin(args=[directory._prefix, a, 30_000])
    assert await directory.locate(CHAIN[:1]) == {}, "not before all of it is there"
    client.flushall()
    assert not await directory._update(args=[directory._prefix, a, "?", b"", b""])
    client.close()


async def test_the_inventory_lives_as_long_as_any_arena(directory: Directory, redis_url: str) -> None:
    await hold(directory, 1, [0], ttl_s=TTL_S)
    await hold(directory, 2, [0], ttl_s=0.2)
    client = redis.Redis.from_url(redis_url)
    assert 0 < client.pttl("baton:test:blocks") <= 1000 * TTL_S
    assert client.pttl("baton:test:blocks") > 1000, "the one who lives shortest does not end it"
    client.close()


async def test_long_chains_in_one_round_trip(directory: Directory, redis_url: str) -> None:
    a = await hold(directory, 1, list(range(1000)))
    b = await hold(directory, 2, list(range(700)))
    await directory.locate(CHAIN[:1])
    client = redis.Redis.from_url(redis_url)
    client.config_resetstat()
    found = await directory.locate(CHAIN)
    stats = client.info("commandstats")
    client.close()
    assert found == {a: [10 * i for i in range(1000)], b: [10 * i for i in range(700)]}
    assert stats["cmdstat_evalsha"]["calls"] == 1
    assert {"cmdstat_smembers", "cmdstat_mget", "cmdstat_hmget"} >= set(stats) - {
        "cmdstat_evalsha",
        "cmdstat_info",
        "cmdstat_config",
        "cmdstat_client",
        "cmdstat_config|resetstat",
    }


async def test_cover_puts_runs_together(directory: Directory) -> None:
    a = await hold(directory, 1, [0, 1, 2, 600])
    b = await hold(directory, 2, list(range(2, 600)))
    cover = await directory.cover(CHAIN)
    assert [place[0] for place in cover.places] == [a] * 3 + [b] * 597 + [a]
    assert [place[1] for place in cover.places] == [10 * i for i in range(601)]
    assert cover.arenas == {a: arena(1), b: arena(2)}
    assert (await directory.cover(CHAIN[:4], prefer=b)).places == ((a, 0), (a, 10), (b, 20), (b, 30))
    cover = await directory.cover(CHAIN, avoid=[b])
    assert len(cover.places) == 3 and set(cover.arenas) == {a}
    assert (await directory.cover(CHAIN, avoid=[a])).places == ()


runs = st.dictionaries(
    st.sampled_from("abcd"), st.lists(st.none() | st.integers(0, 9), min_size=6, max_size=6), max_size=4
)


@given(runs, st.sampled_from("abcde"))
def test_stitch_is_longest_and_true(runs: dict[str, list[int | None]], prefer: str) -> None:
    places = stitch(runs, prefer)
    covered = [any(run[i] is not None for run in runs.values()) for i in range(6)]
    assert len(places) == (covered.index(False) if False in covered else 6)
    for index, (arena_id, slot) in enumerate(places):
        assert runs[arena_id][index] == slot
        assert arena_id == prefer or prefer not in runs or runs[prefer][index] is None


async def test_announce_and_retract(directory: Directory) -> None:
    a = await hold(directory, 1, [0])
    assert await directory.announce(a, [(CHAIN[1], 5), (CHAIN[2], 6)])
    assert await directory.locate(CHAIN[:4]) == {a: [0, 5, 6]}
    assert await directory.announce(a, [(CHAIN[3], 6)], gone=[CHAIN[1]])
    assert await directory.locate(CHAIN[:4]) == {a: [0]}
    assert await directory.locate(CHAIN[3:4]) == {a: [6]}
    await directory.announce_all(a, [(CHAIN[0], 1)], TTL_S)
    assert await directory.locate(CHAIN[3:4]) == {}


async def test_emptied_redis_is_noticed_by_both_heartbeat_and_announce(directory: Directory, redis_url: str) -> None:
    record = arena(1)
    assert not await directory.heartbeat_arena(record, TTL_S), "nothing announced yet"
    await hold(directory, 1, [0])
    assert await directory.heartbeat_arena(record, TTL_S)
    client = redis.Redis.from_url(redis_url)
    client.flushall()
    assert not await directory.announce(record.arena_id, [(CHAIN[1], 1)])
    assert client.keys() == [], "a lost inventory is not begun again by one block"
    assert not await directory.heartbeat_arena(record, TTL_S)
    client.close()


async def test_dead_arena_takes_its_inventory_along(directory: Directory, redis_url: str) -> None:
    a = await hold(directory, 1, [0, 1], ttl_s=0.3)
    b = await hold(directory, 2, [0])
    await eventually(lambda: _is_gone(directory, a))
    assert await directory.locate(CHAIN[:2]) == {b: [0]}
    await directory.arenas()  # whoever looks, cleans up
    client = redis.Redis.from_url(redis_url)
    await eventually(lambda: not [key for key in client.keys() if a.encode() in key])
    assert client.smembers("baton:test:arenas") == {b.encode()}
    client.close()
    await directory.remove_arena(b)
    assert await directory.arenas() == [] and await directory.locate(CHAIN[:2]) == {}


async def _is_gone(directory: Directory, arena_id: str) -> bool:
    return arena_id not in {record.arena_id for record in await directory.arenas()}


async def test_nodes_live_as_long_as_they_beat(directory: Directory) -> None:
    other = replace(NODE, node_id="d0", role="decode")
    await directory.heartbeat_node(NODE, 0.3)
    await directory.heartbeat_node(other, TTL_S)
    assert await directory.nodes() == [other, NODE]
    newer = replace(other, incarnation="two", num_running=3)
    await directory.heartbeat_node(newer, TTL_S)

    async def only_newer() -> bool:
        return await directory.nodes() == [newer]

    await eventually(only_newer)
    await directory.remove_node("d0", incarnation="one")
    assert await directory.nodes() == [newer], "an old incarnation does not remove its successor"
    await directory.remove_node("d0", incarnation="two")
    await directory.remove_node("nobody")
    assert await directory.nodes() == []


async def test_clusters_do_not_see_each_other(directory: Directory, redis_url: str) -> None:
    await directory.heartbeat_node(NODE, TTL_S)
    await hold(directory, 1, [0])
    other = Directory(redis_url, "other")
    assert await other.nodes() == [] and await other.locate(CHAIN[:1]) == {}
    await other.close()


BAD_RECORDS = [b"", b"[]", b"{", b"null", b"\xff", b'{"node_id": "p0"}', b"7"]


@pytest.mark.parametrize("text", BAD_RECORDS)
async def test_records_that_cannot_be_read_are_left_out(directory: Directory, redis_url: str, text: bytes) -> None:
    await directory.heartbeat_node(NODE, TTL_S)
    await hold(directory, 1, [0])
    client = redis.Redis.from_url(redis_url)
    for kind in ("node", "arena"):
        client.set(f"baton:test:{kind}:bad", text)
        client.sadd(f"baton:test:{kind}s", "bad", b"\xff\xfe")
    client.close()
    assert await directory.nodes() == [NODE]
    assert await directory.arenas() == [arena(1)]
    assert await directory.locate(CHAIN[:1]) == {arena(1).arena_id: [0]}


def test_record_types() -> None:
    data = asdict(NODE)
    assert parse_record(NodeRecord, json.dumps({**data, "from_the_future": 1}).encode()) == NODE
    assert parse_record(NodeRecord, json.dumps({**data, "decode_step_s": 1}).encode()) == replace(
        NODE, decode_step_s=1.0
    )
    for change in ({"block_size": "16"}, {"block_size": True}, {"draining": 0}, {"role": None}, {"free_blocks": 1.5}):
        assert parse_record(NodeRecord, json.dumps({**data, **change}).encode()) is None


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999", "1" + "0" * 400, "[" * 100_000])
def test_numbers_that_are_none(value: str) -> None:
    for name in ("decode_step_s", "free_blocks"):
        data = {key: item for key, item in asdict(NODE).items() if key != name}
        assert parse_record(NodeRecord, f'{{"{name}": {value}, {json.dumps(data)[1:]}') is None


def test_texts_that_are_none() -> None:
    assert parse_record(NodeRecord, json.dumps({**asdict(NODE), "address": "\ud800:1"})) is None
    assert parse_record(NodeRecord, json.dumps({**asdict(NODE), "host": "日本"})) == replace(NODE, host="日本")


async def test_redis_killed_and_restarted(redis_process: RedisProcess) -> None:
    directory = Directory(redis_process.url, "test")
    await directory.heartbeat_node(NODE, TTL_S)
    redis_process.kill()
    calls = [
        directory.ping,
        directory.nodes,
        directory.arenas,
        lambda: directory.locate(CHAIN[:3]),
        lambda: directory.cover(CHAIN[:3]),
        lambda: directory.announce("a", [(CHAIN[0], 1)]),
        lambda: directory.announce_all("a", [(CHAIN[0], 1)], TTL_S),
        lambda: directory.heartbeat_arena(arena(1), TTL_S),
        lambda: directory.heartbeat_node(NODE, TTL_S),
        lambda: directory.remove_node("p0", "one"),
        lambda: directory.remove_arena("a"),
    ]
    for call in calls:
        with pytest.raises(DirectoryUnavailable):
            await call()
    redis_process.start()
    await asyncio.gather(*(directory.ping() for _ in range(20)))
    assert await directory.nodes() == []
    assert await hold(directory, 1, [0]) in await directory.locate(CHAIN[:1])
    await directory.close()


async def test_redis_that_hangs_costs_one_time_out_not_one_a_request(redis_process: RedisProcess) -> None:
    directory = Directory(redis_process.url, "test", timeout_s=0.3)
    await hold(directory, 1, [0])
    os.kill(redis_process._process.pid, signal.SIGSTOP)
    try:
        with pytest.raises(DirectoryUnavailable, match="did not answer"):
            await directory.locate(CHAIN[:1])
        with pytest.raises(DirectoryUnavailable, match="a moment ago"):
            await directory.cover(CHAIN[:1])
    finally:
        os.kill(redis_process._process.pid, signal.SIGCONT)
    await eventually(lambda: _locates(directory))
    await directory.close()


async def _locates(directory: Directory) -> bool:
    try:
        return bool(await directory.locate(CHAIN[:1]))
    except DirectoryUnavailable:
        return False


async def test_cancelled_call_does_not_spoil_the_connection(directory: Directory) -> None:
    await hold(directory, 1, [0, 1])
    for delay_s in (0.0, 0.0001, 0.0005, 0.001):
        tasks = [asyncio.create_task(directory.locate(CHAIN[:2])) for _ in range(20)]
        await asyncio.sleep(delay_s)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    assert await directory.locate(CHAIN[:2]) == {arena(1).arena_id: [0, 10]}
    assert [record.arena_id for record in await directory.arenas()] == [arena(1).arena_id]
