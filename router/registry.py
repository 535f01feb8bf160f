"""Who is alive and how busy: nodes as their heartbeats describe them, plus what this router sent them since.

Polls the directory, which is a hint: a node that does not answer is avoided at once, whatever its record says, and
while Redis is unavailable no node is forgotten. Knows no request.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from kvstore.blocks import HASH_BYTES, BlockHash
from kvstore.directory import Directory, NodeRecord
from kvstore.errors import DirectoryUnavailable
from router.cluster import Cluster
from router.errors import LegFailed
from router.legs import Burden, DecodeLeg, Leg, PrefillLeg, Work
from router.nodes import LegT, Node
from router.speeds import in_use

logger = logging.getLogger(__name__)

ROLES = ("prefill", "decode", "both")
Ground = tuple[str, BlockHash]  # model, root


@dataclass(frozen=True)
class Patience:
    """How long the registry waits before it draws conclusions, in seconds."""

    poll_s: float = 0.25
    ttl_s: float = 3.0  # without a record
    cool_down_s: float = 2.0  # before a node that did not answer is tried again
    stall_s: float = 5.0  # after this long without an answer, the node's health is checked
    probe_s: float = 5.0  # time-out of that check
    progress_s: float = 300.0  # an answer may take no longer, however healthy its node


@dataclass(frozen=True)
class Pool:
    """What the nodes that can work together have in common. Limits are those of the smallest node."""

    model: str  # served name
    root: BlockHash
    block_size: int  # tokens
    vocab_size: int
    max_model_len: int  # tokens


class Registry:
    """All nodes of one cluster that serve `model` ("": the one that most of them serve)."""

    def __init__(
        self,
        directory: Directory,
        model: str = "",
        patience: Patience | None = None,
        clock: Callable[[], float] = time.monotonic,
        token: str = "",
    ) -> None:
        """`token` is what nodes require from their callers; "" if they require none."""
        self._token = token
        self._directory = directory
        self._model = model
        self._patience = patience or Patience()
        self._clock = clock
        self._nodes: dict[str, Node] = {}
        self._left: list[Node] = []  # gone or replaced; their connections stay open as long as they have legs
        self._pool: Pool | None = None
        self._clusters: dict[Ground, Cluster] = {}  # those of each that can be given work
        self._changed: dict[Node, None] = {}  # nodes whose rows are out of date
        self._last_poll_s = clock()
        self._is_blind = False
        self._polling: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Polls once, whether or not Redis answers, and then keeps polling."""
        await self.refresh()
        self._polling = asyncio.create_task(self._poll())

    async def stop(self) -> None:
        if self._polling is not None:
            self._polling.cancel()
        for node in [*self._nodes.values(), *self._left]:
            await node.close()

    @property
    def pool(self) -> Pool | None:
        """What most nodes that are up have in common, or most of all nodes if none is up.

        The last one known while no node is alive, None before the first.
        """
        return self._pool

    @property
    def nodes(self) -> list[Node]:
        """All known nodes, by name, including those that take no work. For reading only."""
        return [self._nodes[node_id] for node_id in sorted(self._nodes)]

    def snapshot(self, pool: Pool | None = None) -> Cluster:
        """The nodes of `pool` (None: the registry's own) that can be given work, as of now.

        It is the registry's own and keeps changing: get it, decide, and do not keep it.
        """
        for node in self._changed:
            self._put(node)
        self._changed.clear()
        pool = pool or self._pool
        cluster = self._clusters.get((pool.model, pool.root)) if pool is not None else None
        return Cluster(1, 1) if cluster is None else cluster

    def prefill_leg(self, node_id: str, burden: Burden) -> AbstractContextManager[PrefillLeg]:
        """A leg to `run` inside the context. Raises `LegFailed` if the node is gone by now."""
        node = self._find(node_id)
        return self._counted(node, node.prefill_leg(burden, self._clock))

    def decode_leg(self, node_id: str, burden: Burden) -> AbstractContextManager[DecodeLeg]:
        """A leg to `admit` and `start` inside the context. Raises `LegFailed` if the node is gone by now."""
        node = self._find(node_id)
        return self._counted(node, node.decode_leg(burden, self._clock))

    def computed(self, leg: Leg, work: Work) -> None:
        """A leg that is still open has computed its prompt."""
        node = self._nodes.get(leg.callee.node_id)
        if node is not None and leg in node.legs:
            node.computed(leg, work, self._clock())
            self._changed[node] = None

    def mark_down(self, node_id: str, incarnation: str, problem: str) -> None:
        """Stops sending to a node until it answers again, or a new incarnation takes its place."""
        node = self._nodes.get(node_id)
        if node is not None and node.record.incarnation == incarnation:
            self._set_down(node, problem)

    async def refresh(self) -> None:
        """Polls the directory once, and checks the waiting legs once."""
        started_s = self._clock()
        try:
            records = await self._directory.nodes()
        except DirectoryUnavailable as error:
            if not self._is_blind:
                logger.warning("event=directory_lost nodes=%d %s", len(self._nodes), error)
            self._is_blind = True
        else:
            self._take(records, started_s)
        self._watch()
        await self._close_left()

    async def _poll(self) -> None:
        while True:
            await asyncio.sleep(self._patience.poll_s)
            try:
                await self.refresh()
            except Exception:  # whatever it is, a router that forgets all nodes would be worse
                logger.exception("event=poll_failed")

    def _take(self, records: Sequence[NodeRecord], started_s: float) -> None:
        """Processes a poll's records: updates, new nodes, and missing ones."""
        now_s = self._clock()
        if self._is_blind:
            logger.warning("event=directory_back records=%d", len(records))
            self._is_blind = False
            for node in self._nodes.values():  # their heartbeats need a moment to find Redis, too
                node.seen_s = now_s
        for record in records:
            if _is_sound(record) and self._model in ("", record.model):
                self._take_one(record, now_s)
        for node in [node for node in self._nodes.values() if now_s - node.seen_s > self._patience.ttl_s]:
            logger.info("event=node_gone node_id=%s", node.record.node_id)
            self._left.append(self._nodes.pop(node.record.node_id))
            for cluster in self._clusters.values():
                cluster.drop(node.record.node_id)
        self._last_poll_s = started_s
        self._pool = self._served() or self._pool
        self._reckon(now_s)

    def _served(self) -> Pool | None:
        """Nodes that drain or are down have no vote where others could work: those would stand idle beside them."""
        nodes = list(self._nodes.values())
        return _common_ground([node.record for node in nodes if node.state == "up"] or [node.record for node in nodes])

    def _reckon(self, now_s: float) -> None:
        """Compares all nodes' speeds, and updates their rows."""
        groups: dict[Ground, list[Node]] = defaultdict(list)
        for node in self._nodes.values():
            node.learn()
            groups[_ground(node.record)].append(node)
        self._clusters = {ground: cluster for ground, cluster in self._clusters.items() if ground in groups}
        for nodes in groups.values():
            speeds = in_use([(node.record.role, node.speeds) for node in nodes])
            for node, (prefill, step) in zip(nodes, speeds, strict=True):
                node.reckon(prefill, step, now_s)
                self._put(node)
            self._clusters[_ground(nodes[0].record)].block_bytes = nodes[0].record.block_bytes

    def _put(self, node: Node) -> None:
        """Updates a node's row, or removes it if it can be given no work."""
        record = node.record
        if self._nodes.get(record.node_id) is not node:
            return  # another one has taken its place
        ground = _ground(record)
        for other, cluster in self._clusters.items():
            if other != ground:
                cluster.drop(record.node_id)
        if ground not in self._clusters:
            self._clusters[ground] = Cluster(record.block_size, record.block_bytes)
        if node.down_since_s is None and not record.draining:
            self._clusters[ground].put(node.view())
        else:
            self._clusters[ground].drop(record.node_id)

    @contextmanager
    def _counted(self, node: Node, kept: AbstractContextManager[LegT]) -> Iterator[LegT]:
        """Until the end of the context, later plans see the leg's load on its node."""
        try:
            with kept as leg:
                self._changed[node] = None
                yield leg
        finally:
            self._changed[node] = None

    def _take_one(self, record: NodeRecord, now_s: float) -> None:
        node = self._nodes.get(record.node_id)
        if node is not None and node.record.incarnation == record.incarnation:
            node.update(record, now_s, self._last_poll_s)
            return
        if node is not None:
            self._left.append(node)
        self._nodes[record.node_id] = Node(record, now_s, self._token)
        logger.info(
            "event=node_up node_id=%s incarnation=%s role=%s address=%s",
            *(record.node_id, record.incarnation, record.role, record.address),
        )

    def _watch(self) -> None:
        """Breaks off legs without progress; checks nodes that are slow to answer, or did not answer a while ago.

        Only that check says whether a node is down: a single answer may be slow for reasons of its own.
        """
        now_s, patience = self._clock(), self._patience
        for node in [*self._nodes.values(), *self._left]:
            waits = {leg: now_s - leg.waiting_since_s for leg in node.legs}
            for leg in (leg for leg, wait_s in waits.items() if wait_s > patience.progress_s):
                leg.break_off(f"made no progress for {patience.progress_s} s", is_down=False)
            is_slow = any(wait_s > patience.stall_s for wait_s in waits.values())
            is_cool = node.down_since_s is not None and now_s - node.down_since_s > patience.cool_down_s
            if is_cool or (is_slow and now_s - node.asked_s > patience.stall_s):
                if node.asking is None or node.asking.done():
                    node.asking = asyncio.create_task(self._ask(node))

    async def _ask(self, node: Node) -> None:
        """Checks a node's health. If it is not healthy, all legs waiting for it are broken off."""
        problem = await node.illness(self._patience.probe_s)
        node.asked_s = self._clock()
        if problem:
            self._set_down(node, problem)
            node.break_off(problem)
        elif node.down_since_s is not None:
            logger.info("event=node_back node_id=%s", node.record.node_id)
            node.down_since_s = None
            self._changed[node] = None

    def _set_down(self, node: Node, problem: str) -> None:
        if node.down_since_s is None:
            record = node.record
            logger.warning("event=node_down node_id=%s incarnation=%s %s", record.node_id, record.incarnation, problem)
        node.down_since_s = self._clock()
        self._changed[node] = None

    async def _close_left(self) -> None:
        for node in [node for node in self._left if not node.legs]:
            self._left.remove(node)
            await node.close()

    def _find(self, node_id: str) -> Node:
        if node_id not in self._nodes:
            raise LegFailed(node_id, "", "is gone", is_down=False)
        return self._nodes[node_id]


def _is_sound(record: NodeRecord) -> bool:
    """Whether a record is plausible: it comes off the wire, and a bad one must not stop the router."""
    try:
        root = bytes.fromhex(record.kv_root)
    except ValueError:
        return False
    sizes = (record.block_size, record.block_bytes, record.vocab_size, record.max_model_len)
    return len(root) == HASH_BYTES and min(sizes) > 0 and record.role in ROLES


def _ground(record: NodeRecord) -> Ground:
    """Nodes may exchange blocks if and only if this is equal. (The root covers the block size, too.)"""
    return record.model, BlockHash(bytes.fromhex(record.kv_root))


def _common_ground(records: Sequence[NodeRecord]) -> Pool | None:
    """The largest group of nodes that can work together; the same one on every router."""
    groups: dict[Ground, list[NodeRecord]] = defaultdict(list)
    for record in records:
        groups[_ground(record)].append(record)
    if not groups:
        return None
    (model, root), members = max(groups.items(), key=lambda item: (len(item[1]), item[0]))
    return Pool(
        model=model,
        root=root,
        block_size=members[0].block_size,
        vocab_size=min(record.vocab_size for record in members),
        max_model_len=min(record.max_model_len for record in members),
    )
