"""A node without an engine: it answers at once, always with the same tokens, and registers like any other.

`python -m benchmarks.fake_node REDIS_URL CLUSTER ROLE...` prints `READY ip:port` and serves until its stdin ends. One
process plays a node of each role that it is given, so that what it costs is not spread over several processes.
"""

from __future__ import annotations

import asyncio
import sys
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress

import grpc

from batonpb import common_pb2, node_pb2, node_pb2_grpc
from kvstore.directory import Directory, NodeRecord
from kvstore.errors import DirectoryUnavailable

TOKEN_ID = ord("a")
LENGTH = common_pb2.FINISH_REASON_LENGTH
_HEARTBEAT_S, _TTL_S = 0.5, 3.0


class FakeNode(node_pb2_grpc.PrefillServicer, node_pb2_grpc.DecodeServicer):
    """Constant answers: `TOKEN_ID`, as often as `max_tokens` says, one a message."""

    async def Prefill(self, request: node_pb2.PrefillRequest, context: object) -> node_pb2.PrefillResponse:
        return node_pb2.PrefillResponse(token=common_pb2.Token(token_id=TOKEN_ID))

    async def Decode(
        self, messages: AsyncIterator[node_pb2.DecodeRequest], context: object
    ) -> AsyncIterator[node_pb2.DecodeResponse]:
        left = 0
        async for message in messages:
            if message.WhichOneof("message") == "admit":
                left = message.admit.request.sampling.max_tokens
                yield node_pb2.DecodeResponse(admitted=node_pb2.Admitted(free_blocks=10_000))
                if not message.admit.runs_alone:
                    continue
            left -= len(message.start.tokens)
            for index in range(left):
                reason = LENGTH if index == left - 1 else common_pb2.FINISH_REASON_UNSPECIFIED
                tokens = node_pb2.Tokens(tokens=[common_pb2.Token(token_id=TOKEN_ID)], finish_reason=reason)
                yield node_pb2.DecodeResponse(tokens=tokens)
            if not left:
                yield node_pb2.DecodeResponse(finished=node_pb2.Finished(finish_reason=LENGTH))


def _record(role: str, address: str) -> NodeRecord:
    """Speeds that make a router use both legs where it has a prefill node: the decode node computes prompts slowly."""
    return NodeRecord(
        node_id=f"fake-{role}",
        incarnation=uuid.uuid4().hex,
        role=role,
        address=address,
        model="fake",
        kv_root="00" * 16,
        block_size=16,
        block_bytes=16,
        vocab_size=258,
        max_model_len=4096,
        free_blocks=10_000,
        total_blocks=10_000,
        prefill_tokens_per_s=1e3 if role == "decode" else 1e6,
        decode_step_s=0.001,
    )


async def _serve(redis_url: str, cluster: str, roles: Sequence[str]) -> None:
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    node = FakeNode()
    node_pb2_grpc.add_PrefillServicer_to_server(node, server)  # type: ignore[no-untyped-call]
    node_pb2_grpc.add_DecodeServicer_to_server(node, server)  # type: ignore[no-untyped-call]
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    directory = Directory(redis_url, cluster)
    records = [_record(role, address) for role in roles]
    stop = asyncio.Event()
    asyncio.get_running_loop().add_reader(sys.stdin, stop.set)
    ready = False
    while not stop.is_set():
        with suppress(DirectoryUnavailable):  # on a machine that is too busy; the next one is soon
            for record in records:
                await directory.heartbeat_node(record, _TTL_S)
        if not ready:
            print(f"READY {address}", flush=True)
            ready = True
        try:
            await asyncio.wait_for(stop.wait(), _HEARTBEAT_S)
        except TimeoutError:
            continue
    await directory.close()
    await server.stop(None)


@asynccontextmanager
async def fake_node(redis_url: str, cluster: str, roles: Sequence[str]) -> AsyncIterator[str]:
    """Runs one in a process of its own; gives its address."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "benchmarks.fake_node",
        redis_url,
        cluster,
        *roles,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        line = await asyncio.wait_for(process.stdout.readline(), 30)
        if not line.startswith(b"READY "):
            raise RuntimeError("the fake node did not start")
        yield line.decode().split()[1]
    finally:
        process.stdin.close()
        await process.wait()


if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1], sys.argv[2], sys.argv[3:]))
