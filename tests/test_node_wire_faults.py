"""Nodes of two machines with a bad wire between their stores: the tokens are those of one engine, and nothing leaks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from conftest import eventually
from node_harness import Machine, journey, node_request, prompt_of, running_machine
from wire_faults import Fault, Wire, flip, hang, hang_up, lose, nothing

from kvstore.curve import new_wire_key

KEY = new_wire_key()
NUM_TOKENS = 200
NUM_FULL = 192  # tokens of the prompt that lie in full blocks


def flip_all(offset: int, data: bytes) -> bytes:
    """A bit of each piece that passes, once the connection is there."""
    return flip(offset + len(data) // 2, 3)(offset, data) if offset > 400 else data


FAULTS: dict[str, Fault] = {
    "flipped_bits": flip_all,
    "flipped_in_the_handshake": flip(80, 2),
    "lost_bytes": lose(12_000, 3),
    "hung_up": hang_up(20_000),
    "hung": hang(20_000),
}


@pytest.fixture
async def machines(tiny_model_dir: Path, redis_url: str, short_dir: Path) -> AsyncIterator[tuple[Machine, Machine]]:
    async with (
        running_machine(tiny_model_dir, redis_url, short_dir / "here") as here,
        running_machine(tiny_model_dir, redis_url, short_dir / "there") as there,
    ):
        yield here, there
        for machine in (here, there):
            for store in machine.stores:
                arena = store.arena
                await eventually(
                    lambda arena=arena: arena.num_writing == arena.num_lent, what="nothing is being written"
                )
                store.arena.check_integrity()


@pytest.fixture
async def wire(machines: tuple[Machine, Machine]) -> AsyncIterator[Wire]:
    """In front of the first machine's store, for everybody who finds that in the directory."""
    here, there = machines
    store = await here.store(wire_key=KEY, heartbeat_s=0.1)
    wire = Wire(store.record().address)
    store._address = await wire.start()
    await there.store(host="there", wire_key=KEY)
    await eventually(lambda: _is_announced(here, store._address))
    yield wire
    await wire.stop()


async def _is_announced(machine: Machine, address: str) -> bool:
    return address in {arena.address for arena in await machine.directory.arenas()}


@pytest.mark.parametrize("name", FAULTS)
async def test_a_bad_wire_costs_time_only(machines: tuple[Machine, Machine], wire: Wire, name: str) -> None:
    here, there = machines
    first, second = await here.node(wire_key=KEY), await there.node(node_id="far", wire_key=KEY)
    wire.answers = FAULTS[name]
    prompts = [prompt_of(NUM_TOKENS, seed) for seed in range(3)]
    runs = await asyncio.gather(*(journey(first, second, node_request(prompt)) for prompt in prompts))
    for prompt, (tokens, decoded) in zip(prompts, runs, strict=True):
        assert tokens == here.expected(prompt)
        assert decoded.finished is not None
    assert wire.num_connections > 0
    assert sum(decoded.store_hit_tokens for _, decoded in runs) < 3 * NUM_FULL


async def test_a_good_wire_is_used(machines: tuple[Machine, Machine], wire: Wire) -> None:
    here, there = machines
    first, second = await here.node(wire_key=KEY), await there.node(node_id="far", wire_key=KEY)
    wire.answers = nothing
    tokens, decoded = await journey(first, second, node_request(prompt_of(NUM_TOKENS)))
    assert tokens == here.expected(prompt_of(NUM_TOKENS))
    assert decoded.store_hit_tokens == NUM_FULL


async def test_a_stranger_hits_nothing_and_still_answers(machines: tuple[Machine, Machine], wire: Wire) -> None:
    here, there = machines
    first, stranger = await here.node(wire_key=KEY), await there.node(node_id="far", wire_key=new_wire_key())
    tokens, decoded = await journey(first, stranger, node_request(prompt_of(NUM_TOKENS)))
    assert tokens == here.expected(prompt_of(NUM_TOKENS))
    assert decoded.store_hit_tokens == 0 and wire.num_connections > 0
