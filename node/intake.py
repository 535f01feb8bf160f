"""What comes into this node from the store: fetch or compute for each hit, and the sums of both predictions.

One per node, shared by its fetchers, on the event loop.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from batonpb import node_pb2
from kvstore.blocks import Payload
from kvstore.client import KVClient, Match
from kvstore.directory import ON_DISK
from kvstore.links import Traffic
from kvstore.quotas import Owner
from kvstore.wire import ReceivedPayload
from node.choice import Choice, choose
from node.ranks import Ranks
from node.replicator import Replica, Replicator, nothing

PATIENCE_S = 0.5  # for announced blocks, while it is unknown how long computing them takes
MIN_WIRE_LIMIT_S = 0.25  # a busy store answers late, and a store that timed out is avoided for seconds
# Where a block came from: this machine's arena; another machine's; any machine's disk.
TIERS = ("memory", "remote", "disk")
MIN_PATIENCE_S, MAX_PATIENCE_S = 0.05, 2.0  # publishing takes round trips even if blocks are small


@dataclass
class Choices:
    """Sums over all choices; predictions only over those for which all speeds were known."""

    num_fetched_blocks: int = 0  # chosen to be fetched
    num_computed_blocks: int = 0  # chosen to be computed, though they could have been fetched
    num_informed: int = 0
    predicted_fetch_s: float = 0.0
    predicted_compute_s: float = 0.0

    def count(self, choice: Choice, num_blocks: int) -> None:
        self.num_fetched_blocks += choice.num_blocks
        self.num_computed_blocks += num_blocks - choice.num_blocks
        if choice.is_informed:
            self.num_informed += 1
            self.predicted_fetch_s += choice.fetch_s
            self.predicted_compute_s += choice.compute_s


@dataclass
class Intake:
    """`prefill_tokens_per_s` is the engine's speed on long prompts: the newest measurement that was set here, at first
    that of its warm-up; 0.0: unknown. A `Match` here consists of `pieces` of blocks, equally many for each block; a
    node whose blocks travel whole has one piece, 0.
    """

    store: KVClient
    block_size: int  # tokens
    block_bytes: int  # of a piece, as the store's slots have them
    prefill_tokens_per_s: float = 0.0
    choices: Choices = field(default_factory=Choices)
    hits: Counter[str] = field(default_factory=Counter)  # blocks that came, by `TIERS`
    replicator: Replicator | None = None  # None: blocks from other machines are not published on this one
    pieces: Sequence[int] = (0,)  # this rank's pieces, by number within a block
    ranks: Ranks | None = None  # that follow

    def whole(self, match: Match) -> Match:
        """The leading part of `match` that consists of whole blocks."""
        num_pieces = len(self.pieces)
        return match.head(match.num_blocks // num_pieces * num_pieces) if num_pieces > 1 else match

    def choose(self, match: Match) -> Match:
        """The leading part of `match` that is better fetched than computed."""
        stretches = self.store.links.stretches(match.places)
        num_pieces = len(self.pieces)
        choice = choose(stretches, self.block_bytes, self._compute_s(1) / num_pieces)
        choice = replace(choice, num_blocks=choice.num_blocks // num_pieces)
        self.choices.count(choice, match.num_blocks // num_pieces)
        return match.head(choice.num_blocks * num_pieces)

    def arrived(self, match: Match, num_blocks: int) -> None:
        """The first `num_blocks` blocks of `match` are in the engine; each counts for the tier of its first piece."""
        here, num_pieces = self.store.local_arena_id, len(self.pieces)
        for arena_id, slot in match.places[: num_blocks * num_pieces : num_pieces]:
            self.hits["disk" if slot == ON_DISK else "memory" if arena_id == here else "remote"] += 1

    def keep(
        self, match: Match, payloads: Sequence[Payload], owner: Owner, let_go: Mapping[int, Callable[[], object]]
    ) -> list[int]:
        """Publishes blocks that came from other machines on this one too; `payloads` is the leading run of `match`.

        The blocks belong to `owner`. `let_go` has, by index, a function for payloads in borrowed memory, to be called
        once when the payload has been copied; returns the indices for which it will be called.
        """
        if self.replicator is None:
            return []
        here = self.store.local_arena_id
        replicas = {
            index: Replica(match.hashes[index], payload, owner, let_go.get(index, nothing))
            for index, payload in enumerate(payloads)
            if match.places[index][0] != here and isinstance(payload, ReceivedPayload)
        }
        taken = {replica.block_hash for replica in self.replicator.replicate(replicas.values())}
        return [index for index in let_go if index in replicas and match.hashes[index] in taken]

    def patience_s(self, num_blocks: int) -> float:
        """How long to wait for this many announced blocks: no longer than it takes to compute them."""
        return min(max(self._compute_s(num_blocks) or PATIENCE_S, MIN_PATIENCE_S), MAX_PATIENCE_S)

    def wire_limit_s(self, num_blocks: int) -> float:
        """How long other machines may take to send this many, so that a hanging wire costs no more than computing them.

        Infinite without a measurement; then the store's client sets the limit.
        """
        return max(self._compute_s(num_blocks), MIN_WIRE_LIMIT_S) if self.prefill_tokens_per_s else math.inf

    def message(self) -> node_pb2.Fetches:
        links, choices = self.store.links, self.choices
        return node_pb2.Fetches(
            local=_traffic(links.local),
            remote=_traffic(links.remote),
            chosen_fetch_blocks=choices.num_fetched_blocks,
            chosen_compute_blocks=choices.num_computed_blocks,
            num_predictions=choices.num_informed,
            predicted_fetch_s=choices.predicted_fetch_s,
            predicted_compute_s=choices.predicted_compute_s,
        )

    def _compute_s(self, num_blocks: int) -> float:
        return num_blocks * self.block_size / self.prefill_tokens_per_s if self.prefill_tokens_per_s else 0.0


def _traffic(traffic: Traffic) -> node_pb2.Traffic:
    return node_pb2.Traffic(num_blocks=traffic.num_blocks, num_bytes=traffic.num_bytes, seconds=traffic.seconds)
