"""Nodes for the router's tests: real gRPC servers and real records in Redis, but tokens by arithmetic.

The next token depends on all tokens so far and on the seed, as an engine's does, so a failover that loses, repeats or
reorders anything changes the text. Each node stands behind a wire that can be cut or frozen, as a machine's can.
"""

from __future__ import annotations

import asyncio
import hashlib
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import grpc
from conftest import POCKET
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from batonpb import common_pb2, inference_pb2, inference_pb2_grpc, node_pb2, node_pb2_grpc
from kvstore.directory import Directory, NodeRecord
from router.config import RouterConfig
from router.server import RouterServer

EOS = 257
BLOCK = 16
ROOT = bytes(range(16))
CLUSTER = "router-test"
NextToken = Callable[[Sequence[int], Sequence[int], int], int]  # (prompt, output so far, seed)


def letters(prompt_ids: Sequence[int], output_ids: Sequence[int], seed: int) -> int:
    """A small letter that depends on everything."""
    digest = hashlib.sha256(repr(([*prompt_ids, *output_ids], seed)).encode()).digest()
    return ord("a") + digest[0] % 26


def saying(text: str) -> NextToken:
    """A model that puts out `text`, byte by byte, and then its end token."""
    script = [*text.encode(), EOS]
    return lambda prompt_ids, output_ids, seed: script[min(len(output_ids), len(script) - 1)]


def expected(prompt_ids: Sequence[int], count: int, seed: int, next_token: NextToken = letters) -> list[int]:
    output_ids: list[int] = []
    while len(output_ids) < count:
        output_ids.append(next_token(prompt_ids, output_ids, seed))
    return output_ids


def scores_of(request: node_pb2.NodeRequest) -> common_pb2.PromptLogprobs | None:
    """Token i of the prompt has the logprob -i / 8 and the rank i; the next ids are its alternatives: -1, -2 and on."""
    if not request.HasField("prompt_logprobs"):
        return None
    prompt, num_top = request.token_ids[: request.num_prompt_tokens], request.prompt_logprobs
    places = range(1, len(prompt))
    return common_pb2.PromptLogprobs(
        token_ids=prompt,
        logprobs=[-place / 8 for place in places],
        ranks=places,
        num_top=num_top,
        top_token_ids=[(prompt[place] + rank) % 258 for place in places for rank in range(1, num_top + 1)],
        top_logprobs=[-float(rank) for _ in places for rank in range(1, num_top + 1)],
    )


class Wire:
    """A TCP relay before a server. `cut` is what kill -9 looks like from outside, `freeze` what SIGSTOP does."""

    async def open(self, target_port: int) -> int:
        self._target_port = target_port
        self._writers: set[asyncio.StreamWriter] = set()
        self._flows = asyncio.Event()
        self._flows.set()
        self._server = await asyncio.start_server(self._relay, "127.0.0.1", 0)
        return int(self._server.sockets[0].getsockname()[1])

    def cut(self) -> None:
        self._server.close()
        for writer in list(self._writers):
            writer.transport.abort()

    def freeze(self) -> None:
        self._flows.clear()

    def thaw(self) -> None:
        self._flows.set()

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        to_reader, to_writer = await asyncio.open_connection("127.0.0.1", self._target_port)
        self._writers |= {writer, to_writer}
        try:
            await asyncio.gather(self._pump(reader, to_writer), self._pump(to_reader, writer))
        finally:
            for one in (writer, to_writer):
                one.close()
                self._writers.discard(one)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(1 << 16):
                await self._flows.wait()
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            pass
        writer.close()


@dataclass
class Seen:
    """What a node was asked, and what it still works at."""

    prefills: list[node_pb2.NodeRequest] = field(default_factory=list)
    admits: list[node_pb2.NodeRequest] = field(default_factory=list)
    starts: list[list[int]] = field(default_factory=list)
    active: int = 0


class FakeNode:
    """One node. `faults[moment]` is what happens there: moments are admit, admitted, prefill, prefilled, start,
    token N (of this leg) and finished; a fault is a status to fail with, or a function (sync or async) to call."""

    def __init__(
        self, node_id: str, role: str, redis_url: str, next_token: NextToken = letters, **record: object
    ) -> None:
        self.node_id = node_id
        self.next_token = next_token
        self.faults: dict[str, object] = {}
        self.seen = Seen()
        self.tokens_per_message = 1
        self.step_s = 0.0
        self.scores_of = scores_of
        self.hits = (0, 0)  # (local, store) tokens that each leg reports
        self.compute_s = self.queue_s = self.fetch_s = 0.0  # likewise
        self.metadata: list[dict[str, str]] = []  # of each call, as it came
        self.num_decode_calls = self.num_open_calls = 0
        self.keeps_calls = True  # a Decode call may have several legs
        self.health = health.aio.HealthServicer()
        self._directory = Directory(redis_url, CLUSTER)
        self._role = role
        self._fields = record

    async def start(self) -> FakeNode:
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        node_pb2_grpc.add_PrefillServicer_to_server(self, self._server)
        node_pb2_grpc.add_DecodeServicer_to_server(self, self._server)
        node_pb2_grpc.add_NodeControlServicer_to_server(self, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self._server)
        port = self._server.add_insecure_port("127.0.0.1:0")
        await self._server.start()
        self.wire = Wire()
        defaults: dict[str, object] = {
            "address": f"127.0.0.1:{await self.wire.open(port)}",
            "incarnation": uuid.uuid4().hex,
            "model": "pocket",
            "kv_root": ROOT.hex(),
            "block_size": BLOCK,
            "block_bytes": 1 << 16,
            "vocab_size": 258,
            "max_model_len": 4096,
            "free_blocks": 1000,
            "total_blocks": 1000,
            "prefill_tokens_per_s": 1000.0,
            "decode_step_s": 0.01,
        }
        self.record = NodeRecord(node_id=self.node_id, role=self._role, **(defaults | self._fields))
        await self.beat()
        self._beating = asyncio.create_task(self._beat_on())
        return self

    async def beat(self, **news: object) -> None:
        self.record = replace(self.record, **news)
        await self._directory.heartbeat_node(self.record, 1.0)

    async def _beat_on(self) -> None:
        while True:
            await asyncio.sleep(0.2)
            try:
                await self.beat()
            except Exception:  # Redis is away in some tests
                continue

    async def kill(self) -> None:
        """As kill -9: its connections break, its record stays until its time to live is over."""
        self._beating.cancel()
        self.wire.cut()

    def hang(self) -> None:
        self._beating.cancel()
        self.wire.freeze()

    async def stop(self) -> None:
        self._beating.cancel()
        self.wire.thaw()
        self.wire.cut()
        await self._server.stop(0)
        await self._directory.close()

    async def Prefill(
        self, message: node_pb2.PrefillRequest, context: grpc.aio.ServicerContext
    ) -> node_pb2.PrefillResponse:
        self.seen.prefills.append(message.request)
        self.metadata.append(dict(context.invocation_metadata() or ()))
        with self._working():
            await self._moment("prefill", context)
            token, reason = self._next(message.request, [])
            await self._moment("prefilled", context)
        local, store = self.hits
        return node_pb2.PrefillResponse(
            token=token,
            finish_reason=reason,
            local_hit_tokens=local,
            store_hit_tokens=store,
            compute_s=self.compute_s,
            queue_s=self.queue_s,
            fetch_s=self.fetch_s,
            prompt_logprobs=self.scores_of(message.request),
        )

    async def Decode(self, _requests: object, context: grpc.aio.ServicerContext) -> None:
        self.num_decode_calls += 1
        self.num_open_calls += 1
        try:
            while (message := await context.read()) is not grpc.aio.EOF:
                await self._decode(message.admit, context)
                if not self.keeps_calls:
                    return
        finally:
            self.num_open_calls -= 1

    async def _decode(self, admit: node_pb2.Admit, context: grpc.aio.ServicerContext) -> None:
        request = admit.request
        self.metadata.append(dict(context.invocation_metadata() or ()))
        self.seen.admits.append(request)
        with self._working():
            await self._moment("admit", context)
            await context.write(node_pb2.DecodeResponse(admitted=node_pb2.Admitted(free_blocks=1)))
            await self._moment("admitted", context)
            start = node_pb2.DecodeRequest() if admit.runs_alone else await context.read()
            if start is grpc.aio.EOF:
                return
            token_ids = [token.token_id for token in start.start.tokens]
            self.seen.starts.append(token_ids)
            await self._moment("start", context)
            reason = common_pb2.FINISH_REASON_UNSPECIFIED
            tells_last = "finished" not in self.faults  # as nodes do, unless a fault wants to come between the two
            count, tokens = 0, []
            while not reason:
                await asyncio.sleep(self.step_s)
                token, reason = self._next(request, token_ids)
                token_ids.append(token.token_id)
                tokens.append(token)
                if reason or len(tokens) == self.tokens_per_message:
                    local, store = self.hits
                    hits = {"local_hit_tokens": local, "store_hit_tokens": store}
                    message = node_pb2.Tokens(tokens=tokens, queue_s=self.queue_s, fetch_s=self.fetch_s, **hits)
                    if count < self.tokens_per_message and (scores := self.scores_of(request)) is not None:
                        message.prompt_logprobs.CopyFrom(scores)
                    if tells_last:
                        message.finish_reason = reason
                    await context.write(node_pb2.DecodeResponse(tokens=message))
                    tokens = []
                count += 1
                await self._moment(f"token {count}", context)
            if not tells_last:
                await self._moment("finished", context)
                finished = node_pb2.Finished(finish_reason=reason)
                await context.write(node_pb2.DecodeResponse(finished=finished))

    async def GetLoad(self, _message: node_pb2.GetLoadRequest, context: grpc.aio.ServicerContext) -> node_pb2.Load:
        return node_pb2.Load(node_id=self.node_id, draining=self.record.draining)

    async def Drain(self, message: node_pb2.DrainRequest, context: grpc.aio.ServicerContext) -> node_pb2.Load:
        await self.beat(draining=not message.undo)
        return node_pb2.Load(node_id=self.node_id, draining=not message.undo)

    def _next(self, request: node_pb2.NodeRequest, more: Sequence[int]) -> tuple[common_pb2.Token, int]:
        prompt_ids = list(request.token_ids[: request.num_prompt_tokens])
        output_ids = [*request.token_ids[request.num_prompt_tokens :], *more]
        token_id = self.next_token(prompt_ids, output_ids, request.sampling.seed)
        sampling, count = request.sampling, len(output_ids) + 1
        is_end = token_id in sampling.stop_token_ids or (token_id == EOS and not sampling.ignore_eos)
        reason = common_pb2.FINISH_REASON_UNSPECIFIED
        if is_end and count >= sampling.min_tokens:
            reason = common_pb2.FINISH_REASON_STOP
        elif count >= sampling.max_tokens:
            reason = common_pb2.FINISH_REASON_LENGTH
        return common_pb2.Token(token_id=token_id), reason

    async def _moment(self, name: str, context: grpc.aio.ServicerContext) -> None:
        fault = self.faults.get(name)
        if isinstance(fault, grpc.StatusCode):
            await context.abort(fault, "temperature: injected")
        elif callable(fault):
            result = fault()
            if asyncio.iscoroutine(result):
                await result

    def _working(self) -> _Working:
        return _Working(self.seen)


@dataclass
class _Working:
    seen: Seen

    def __enter__(self) -> None:
        self.seen.active += 1

    def __exit__(self, *_: object) -> None:
        self.seen.active -= 1


@dataclass
class Answer:
    """What a client saw."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: int = 0
    usage: inference_pb2.Usage | None = None
    timeline: inference_pb2.Timeline | None = None
    messages: list[inference_pb2.GenerateResponse] = field(default_factory=list)


class FakeCluster:
    """Fake nodes and a real router over one Redis."""

    def __init__(self, redis_url: str) -> None:
        self.redis_url = redis_url
        self.nodes: dict[str, FakeNode] = {}

    async def add(self, node_id: str, next_token: NextToken = letters, **record: object) -> FakeNode:
        """The role is what comes before the number: prefill0, decode1, both2."""
        node = FakeNode(node_id, node_id.rstrip("0123456789"), self.redis_url, next_token, **record)
        self.nodes[node_id] = await node.start()
        return node

    async def open(self, model: Path = POCKET, **options: object) -> None:
        """Starts the router, impatient by default, with the tokenizer of `model`."""
        fast = {"poll_s": 0.05, "node_ttl_s": 1.0, "cool_down_s": 0.3, "stall_s": 0.4, "probe_timeout_s": 0.4}
        config = RouterConfig(str(model), self.redis_url, cluster=CLUSTER, **(fast | options))
        self.router = RouterServer(config)
        record = await self.router.start()
        self.address, self.metrics_address = str(record["address"]), str(record["metrics_address"])
        self.admin_address = str(record["admin_address"])
        self.http_url = f"http://{record['http_address']}"
        self.channel = grpc.aio.insecure_channel(self.address)
        self.stub = inference_pb2_grpc.InferenceStub(self.channel)

    async def close(self) -> None:
        if hasattr(self, "channel"):
            await self.channel.close()
            await self.router.stop()
        for node in self.nodes.values():
            await node.stop()

    @property
    def active(self) -> int:
        """Legs that nodes are working at."""
        return sum(node.seen.active for node in self.nodes.values())

    async def ask(
        self,
        prompt: str | list[int],
        on_message: Callable[[Answer], None] | None = None,
        timeout: float | None = 30.0,
        **sampling: object,
    ) -> Answer:
        message = request(prompt, **sampling)
        answer = Answer()
        async for response in self.stub.Generate(message, timeout=timeout):
            answer.messages.append(response)
            answer.text += response.text
            answer.token_ids += [token.token_id for token in response.tokens]
            if response.finish_reason:
                answer.finish_reason, answer.usage = response.finish_reason, response.usage
                answer.timeline = response.timeline
            if on_message is not None:
                on_message(answer)
        return answer


def request(prompt: str | list[int], **sampling: object) -> inference_pb2.GenerateRequest:
    message = inference_pb2.GenerateRequest(sampling=common_pb2.SamplingParams(**sampling))
    if isinstance(prompt, str):
        message.text = prompt
    else:
        message.tokens.token_ids.extend(prompt)
    return message


@asynccontextmanager
async def running(cluster: FakeCluster) -> AsyncIterator[FakeCluster]:
    try:
        yield cluster
    finally:
        await cluster.close()


async def set_health(node: FakeNode, is_well: bool) -> None:
    status = health_pb2.HealthCheckResponse
    await node.health.set("", status.SERVING if is_well else status.NOT_SERVING)
