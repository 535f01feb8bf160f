"""How the ranks of a wide node find each other at each start: through Redis.

The leader opens a port that the kernel chooses and keeps its address in Redis until all ranks have joined, with a name
that no other meeting has; the others look it up, and ask for that name. Each rank is a process that is restarted when
it ends, and when one ends they all do, so nothing else is needed to bring a group back.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import redis.asyncio
import redis.exceptions
import torch

from deploy.interfaces import talk_through
from deploy.node_config import NodeConfig
from engine.parallel import JOIN_S, RankGroup, open_meeting

logger = logging.getLogger(__name__)

POLL_S = 0.1
TTL_S = int(JOIN_S)
ANSWER_S = 1.0
SPOILED = "spoiled"


class NobodyMet(RuntimeError):
    """The ranks of a node did not come together."""


async def join(config: NodeConfig) -> RankGroup | None:
    """This process's place in its node's group, once all are there; None for a node of one rank. Raises `NobodyMet`."""
    if config.shard.num_ranks == 1:
        return None
    talk_through(config.advertise_host)
    try:
        async with asyncio.timeout(JOIN_S), _redis(config.redis_url) as client:
            key = f"baton:{config.cluster}:meeting:{config.node_id}"
            return await (_follow if config.rank else _lead)(config, client, key)
    except (TimeoutError, RuntimeError) as error:
        raise NobodyMet(f"rank {config.rank} of {config.shard.num_ranks}: {str(error) or 'nobody came'}") from error


async def _lead(config: NodeConfig, client: Any, key: str) -> RankGroup:
    meeting, name = open_meeting(f"{config.bind_host}:0", leads=True), uuid.uuid4().hex
    others = [_came(rank) for rank in range(1, config.shard.num_ranks)]
    door = await asyncio.start_server(_say(f"{name} {meeting.port}\n"), config.bind_host.strip("[]"))
    place = f"{config.advertise_host}:{door.sockets[0].getsockname()[1]} {name}"
    try:
        while not await asyncio.to_thread(meeting.check, others):
            if await asyncio.to_thread(meeting.check, [SPOILED]):
                raise NobodyMet("a rank ended while others were still to come")
            with contextlib.suppress(redis.exceptions.RedisError, OSError):
                await client.set(key, place, ex=TTL_S)
            await asyncio.sleep(POLL_S)
        return await _enter(config, meeting)
    finally:
        door.close()
        with contextlib.suppress(redis.exceptions.RedisError, OSError):  # or a rank that comes back would call here
            await client.delete(key)


async def _follow(config: NodeConfig, client: Any, key: str) -> RankGroup:
    while True:
        with contextlib.suppress(redis.exceptions.RedisError, OSError):
            place = str(await client.get(key) or b"", "utf-8")
            if address := await _asked(place):
                meeting = await asyncio.to_thread(open_meeting, address, False)
                if meeting.add(_came(config.rank), 1) > 1:
                    meeting.set(SPOILED, "")  # nobody would find whom this one comes after: all begin again
                    raise NobodyMet("this rank ended while others were still to come")
                return await _enter(config, meeting)
        await asyncio.sleep(POLL_S)


async def _enter(config: NodeConfig, meeting: Any) -> RankGroup:
    began_s = time.monotonic()
    group = await asyncio.to_thread(
        RankGroup, config.shard, meeting, torch.device(config.engine.device), config.rank_timeout_s
    )
    logger.info("event=ranks_met node=%s rank=%d s=%.2f", config.node_id, config.rank, time.monotonic() - began_s)
    return group


async def _asked(place: str) -> str:
    """The address where this node's ranks meet, if its leader is still there, else "". The leader may have died since,
    and its port may now belong to another leader, whose ranks' places must not be taken."""
    address, _, name = place.partition(" ")
    host, _, port = address.rpartition(":")
    try:
        async with asyncio.timeout(ANSWER_S):
            reader, writer = await asyncio.open_connection(host, int(port))
            with contextlib.closing(writer):
                said = str(await reader.readline(), "ascii").split()
    except (OSError, ValueError, TimeoutError):  # ValueError: a line without an end, too
        return ""
    return f"{host}:{int(said[1])}" if len(said) == 2 and said[0] == name and said[1].isdecimal() else ""


def _say(line: str) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]:
    async def answer(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(line.encode())
        writer.close()

    return answer


def _came(rank: int) -> str:
    return f"came/{rank}"


@contextlib.asynccontextmanager
async def _redis(url: str) -> AsyncIterator[Any]:
    client = redis.asyncio.Redis.from_url(url, socket_timeout=2.0, socket_connect_timeout=2.0)
    try:
        yield client
    finally:
        await client.aclose()
