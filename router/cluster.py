"""All nodes as a policy sees them: one column per quantity, so that a thousand nodes cost hardly more than one.

Plain state, updated by its owner: the registry from records and legs, the simulator from its own nodes. Rows keep their
index; a node that leaves frees its row.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from router.line import Line
from router.speeds import PrefillSpeed, StepSpeed

Column = NDArray[np.float64]
Mask = NDArray[np.bool_]

_NUMBERS = (
    *("free_at_s", "num_requests", "free_blocks", "total_blocks", "max_model_len"),
    *("prefill_base_s", "prefill_token_s", "prefill_pair_s", "step_base_s", "step_request_s"),
)
_FLAGS = ("is_there", "can_prefill", "can_decode", "is_shared", "is_known")


@dataclass(frozen=True)
class NodeView:
    """One living node: what it reported, and what this router sent it since."""

    node_id: str
    role: str  # "prefill", "decode" or "both"
    prefill: PrefillSpeed
    step: StepSpeed
    arena_id: str = ""  # "" publishes nothing
    free_at_s: float = 0.0  # when all its prefill work will be computed, on the router's clock
    line: Line | None = None  # the legs waiting there, as far as is known; None: none
    num_requests: int = 0  # running and waiting
    free_blocks: int = 0
    total_blocks: int = 0  # 0: not known
    max_model_len: int = 1 << 30  # tokens
    is_known: bool = True  # its speeds were measured recently, so a prediction may refuse a request


class Cluster:
    """The nodes of one pool. `block_size` in tokens, `block_bytes` of one block."""

    free_at_s: Column
    num_requests: Column
    free_blocks: Column
    total_blocks: Column
    max_model_len: Column
    prefill_base_s: Column
    prefill_token_s: Column
    prefill_pair_s: Column
    step_base_s: Column
    step_request_s: Column
    arena_number: NDArray[np.intp]  # 0: it maps none
    is_there: Mask
    can_prefill: Mask
    can_decode: Mask
    is_shared: Mask  # runs requests other than first legs
    is_known: Mask

    def __init__(self, block_size: int, block_bytes: int, nodes: Iterable[NodeView] = ()) -> None:
        self.block_size = block_size
        self.block_bytes = block_bytes
        self.node_ids: list[str] = []  # by row; "" for unused ones
        self.arena_ids: list[str] = []  # by row
        self._rows: dict[str, int] = {}
        self._numbers: dict[str, int] = {}  # of arenas
        self._users = [0]  # how many rows map an arena, by its number; 0 for free numbers, and for number 0
        self.lines: dict[int, Line] = {}  # by row, for rows with waiting legs
        self.arena_number = np.zeros(0, np.intp)
        self._grow(16)
        for node in nodes:
            self.put(node)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def num_prefill(self) -> int:
        """How many nodes have the prefill role, or both."""
        return int(np.count_nonzero(self.is_there & self.can_prefill))

    def row(self, node_id: str) -> int | None:
        return self._rows.get(node_id)

    def rows(self, node_ids: Iterable[str]) -> list[int]:
        """Rows of these nodes; -1 for unknown ones."""
        find = self._rows.get
        return [find(node_id, -1) for node_id in node_ids]

    def arena_numbers(self, arena_ids: Iterable[str]) -> list[int]:
        """The numbers of these arenas in `arena_number`; 0 for one that no node maps."""
        find = self._numbers.get
        return [find(arena_id, 0) for arena_id in arena_ids]

    @property
    def num_arena_numbers(self) -> int:
        """One more than the highest number ever used."""
        return len(self._users)

    def put(self, node: NodeView) -> None:
        """Adds a node, or updates it."""
        row = self._rows.get(node.node_id)
        if row is None:
            row = self._new_row(node.node_id)
        self._set_arena(row, node.arena_id)
        self.set_queue(row, node.free_at_s, node.line)
        self.num_requests[row] = node.num_requests
        self.free_blocks[row] = node.free_blocks
        self.total_blocks[row] = node.total_blocks
        self.max_model_len[row] = node.max_model_len
        self.prefill_base_s[row] = node.prefill.base_s
        self.prefill_token_s[row] = node.prefill.token_s
        self.prefill_pair_s[row] = node.prefill.pair_s
        self.step_base_s[row] = node.step.base_s
        self.step_request_s[row] = node.step.request_s
        self.is_there[row] = True
        self.can_prefill[row] = node.role != "decode"
        self.can_decode[row] = node.role != "prefill"
        self.is_shared[row] = node.role != "prefill"
        self.is_known[row] = node.is_known

    def set_queue(self, row: int, free_at_s: float, line: Line | None) -> None:
        """Sets what a node still has to compute."""
        self.free_at_s[row] = free_at_s
        if line is None:
            self.lines.pop(row, None)
        else:
            self.lines[row] = line

    def drop(self, node_id: str) -> None:
        """Removes a node, if it is known."""
        row = self._rows.pop(node_id, None)
        if row is not None:
            self.lines.pop(row, None)
            self._set_arena(row, "")
            self.node_ids[row] = ""
            self.is_there[row] = False

    def _new_row(self, node_id: str) -> int:
        if len(self._rows) == len(self.node_ids):
            self._grow(2 * len(self.node_ids))
        row = self.node_ids.index("")
        self.node_ids[row] = node_id
        self._rows[node_id] = row
        return row

    def _set_arena(self, row: int, arena_id: str) -> None:
        old = self.arena_ids[row]
        if old == arena_id:
            return
        if old:
            number = self._numbers[old]
            self._users[number] -= 1
            if not self._users[number]:
                del self._numbers[old]
        self.arena_number[row] = self._use(arena_id) if arena_id else 0
        self.arena_ids[row] = arena_id

    def _use(self, arena_id: str) -> int:
        """The number of an arena, which one more row now maps."""
        number = self._numbers.get(arena_id)
        if number is None:
            number = next((free for free, users in enumerate(self._users) if free and not users), len(self._users))
            self._numbers[arena_id] = number
            if number == len(self._users):
                self._users.append(0)
        self._users[number] += 1
        return number

    def _grow(self, size: int) -> None:
        more = size - len(self.node_ids)
        self.node_ids += [""] * more
        self.arena_ids += [""] * more
        self.arena_number = np.concatenate([self.arena_number, np.zeros(more, np.intp)])
        for name in _NUMBERS:
            setattr(self, name, np.concatenate([getattr(self, name, np.zeros(0)), np.zeros(more)]))
        for name in _FLAGS:
            setattr(self, name, np.concatenate([getattr(self, name, np.zeros(0, np.bool_)), np.zeros(more, np.bool_)]))
