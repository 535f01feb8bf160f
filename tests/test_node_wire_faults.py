"""Nodes of two machines with a bad wire between their stores: the tokens are those of one engine, and nothing leaks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
from conftest import eventually
from node_harness import BLOCK_SIZE, Machine, Node, decode, journey, node_request, prompt_of, running_machine
from wire_faults import Fault, Wire, block_address, flip, hang, hang_up, lose, nothing

import node.intake
from engine.loans import Loan
from engine.speed import SpeedMeter
from kvstore.curve import new_wire_key

KEY = new_wire_key()
NUM_TOKENS = 200
NUM_FULL = 192  # tokens of the prompt that lie in full blocks


def flip_all(offset: int, data: bytes) -> bytes:
    """A bit of each piece that passes, but for a handshake's."""
    return flip(offset + len(data) // 2, 3)(offset, data) if len(data) > 400 else data


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
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """However busy this machine is, nobody gives up blocks that are on their way, or computes them as that is faster.

    Nodes that are to know no speed know that of tails once they have computed one.
    """
    for name in ("PATIENCE_S", "MAX_PATIENCE_S"):
        monkeypatch.setattr(node.intake, name, 30.0)
    monkeypatch.setattr(SpeedMeter, "long_prefill_tokens_per_s", 0.0)


@pytest.fixture(params=["encrypted", "tcp"])
def key(request: pytest.FixtureRequest) -> str:
    return KEY if request.param == "encrypted" else ""


@pytest.fixture
async def wire(machines: tuple[Machine, Machine], key: str) -> AsyncIterator[Wire]:
    """In front of the first machine's store, for everybody who finds that in the directory."""
    here, there = machines
    store = await here.store(wire_key=key, heartbeat_s=0.1)
    wire = Wire(block_address(store.record()))
    address = await wire.start()
    store._address, store._tcp_address = (address, "") if key else (store._address, address)
    await there.store(host="there", wire_key=key)
    await eventually(lambda: _is_announced(here, address))
    yield wire
    await wire.stop()


async def _is_announced(machine: Machine, address: str) -> bool:
    return address in {block_address(arena) for arena in await machine.directory.arenas()}


@pytest.mark.parametrize("name", FAULTS)
async def test_a_bad_wire_costs_time_only(machines: tuple[Machine, Machine], wire: Wire, name: str, key: str) -> None:
    here, there = machines
    first, second = await here.node(wire_key=key), await there.node(node_id="far", wire_key=key)
    wire.answers = FAULTS[name]
    prompts = [prompt_of(NUM_TOKENS, seed) for seed in range(3)]
    runs = await asyncio.gather(*(journey(first, second, node_request(prompt)) for prompt in prompts))
    for prompt, (tokens, decoded) in zip(prompts, runs, strict=True):
        assert tokens == here.expected(prompt)
        assert decoded.finished is not None
    assert wire.num_connections > 0
    assert sum(decoded.store_hit_tokens for _, decoded in runs) < 3 * NUM_FULL


@pytest.mark.usefixtures("patient")
async def test_a_good_wire_is_used(machines: tuple[Machine, Machine], wire: Wire, key: str) -> None:
    here, there = machines
    first, second = await here.node(wire_key=key), await there.node(node_id="far", wire_key=key)
    wire.answers = nothing
    tokens, decoded = await journey(first, second, node_request(prompt_of(NUM_TOKENS)))
    assert tokens == here.expected(prompt_of(NUM_TOKENS))
    assert decoded.store_hit_tokens == NUM_FULL


@pytest.mark.parametrize("key", ["encrypted"], indirect=True)
async def test_a_stranger_hits_nothing_and_still_answers(machines: tuple[Machine, Machine], wire: Wire) -> None:
    here, there = machines
    first, stranger = await here.node(wire_key=KEY), await there.node(node_id="far", wire_key=new_wire_key())
    tokens, decoded = await journey(first, stranger, node_request(prompt_of(NUM_TOKENS)))
    assert tokens == here.expected(prompt_of(NUM_TOKENS))
    assert decoded.store_hit_tokens == 0 and wire.num_connections > 0


@pytest.mark.parametrize("key", ["tcp"], indirect=True)
async def test_blocks_of_a_leg_that_is_cancelled_are_not_written_for_the_next_one(
    machines: tuple[Machine, Machine], wire: Wire
) -> None:
    """They come down in the engine's own memory; the pool is small, so the next leg gets the same blocks at once."""
    here, there = machines
    first = await here.node()
    second = await there.node(node_id="far", engine={"num_blocks": 16, "max_model_len": 240})
    for seed in range(4):
        await first.prefill(node_request(prompt_of(NUM_TOKENS, seed)))
    prompt = prompt_of(NUM_TOKENS, seed=9)
    for seed in range(4):
        before = second.server.intake.store.links.remote.num_blocks
        wire.answers = hang(10_000 + wire.num_connections)  # in the middle of a block
        call = await second.admit(node_request(prompt_of(NUM_TOKENS, seed)))
        await asyncio.sleep(0.02 * seed)
        call.cancel()
        wire.answers = nothing
        await eventually(second.is_clean)
        decoded = await decode(second, node_request(prompt))
        assert decoded.token_ids == here.expected(prompt)
        assert second.server.intake.store.links.remote.num_blocks - before <= NUM_FULL // BLOCK_SIZE
        await eventually(second.is_clean)  # what decoding filled is pinned until it is published
        prompt = prompt_of(NUM_TOKENS, seed=10 + seed)


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("key", ["tcp"], indirect=True)
async def test_what_came_down_in_the_engine_is_replicated_from_there(
    machines: tuple[Machine, Machine], wire: Wire
) -> None:
    """With nothing copied in between, and no pin left."""
    here, there = machines
    first, second = await here.node(), await there.node(node_id="far")
    wire.answers = nothing
    landed = spy_on_landings(second)
    (far_store,) = there.stores
    for seed in range(3):
        tokens, decoded = await journey(first, second, node_request(prompt_of(NUM_TOKENS, seed)))
        assert tokens == here.expected(prompt_of(NUM_TOKENS, seed)) and decoded.store_hit_tokens == NUM_FULL
    await eventually(lambda: sum(landed) == 3 * NUM_FULL // BLOCK_SIZE, what="all have landed in the engine")
    await eventually(lambda: len(far_store.arena.blocks()) >= 3 * NUM_FULL // BLOCK_SIZE, what="all are replicated")
    third = await there.node(node_id="far-2")
    again = await third.prefill(node_request(prompt_of(NUM_TOKENS, 1)))
    assert again.token.token_id == here.expected(prompt_of(NUM_TOKENS, 1))[0]
    assert again.store_hit_tokens == NUM_FULL and (await third.load()).fetches.remote.num_blocks == 0
    second.server.loop.engine.check_integrity()


def spy_on_landings(node: Node) -> list[int]:
    """Grows with each end of a loan, by how many of its blocks somebody else went on reading."""
    engine, kept = node.server.loop.engine, list[int]()
    end_loan = engine.end_loan

    def end(loan: Loan, kept_ids: Sequence[int] = ()) -> None:
        kept.append(len(kept_ids))
        end_loan(loan, kept_ids)

    engine.end_loan = end  # type: ignore[method-assign]
    return kept
