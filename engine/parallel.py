"""Communication between the ranks of one model while they compute. `Alone` is a model on one rank, without any.

`RankGroup` uses torch.distributed: NCCL between GPUs, Gloo between CPUs and for the leader's messages. One per process.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from engine.errors import RanksDisagree
from engine.rank_meter import RankMeter
from engine.shard import Shard
from kvstore.blocks import KVLayout

logger = logging.getLogger(__name__)

PING_S = 1.0  # how soon an idle leader notices that a rank is lost
TIMEOUT_S = 60.0  # a rank that is silent for this long counts as lost
JOIN_S = 300.0  # for all ranks to arrive
FORM_S = 60.0  # for ranks that have arrived to connect to each other


class Parallel(Protocol):
    """A rank's place among its model's ranks. All ranks call the same methods in the same order."""

    shard: Shard

    def reduce(self, x: Tensor) -> Tensor:
        """All-reduce: the sum over the ranks of this stage, in place of `x`."""
        ...

    def gather(self, x: Tensor) -> Tensor:
        """All-gather: `[..., n]` of each rank of this stage, concatenated: `[..., n * tp_size]`."""
        ...

    def pass_on(self, x: Tensor) -> None:
        """Sends a step's activations to the next stage, without waiting for it."""
        ...

    def take_over(self, x: Tensor) -> Tensor:
        """Fills `x` with the activations of the previous stage."""
        ...


class Alone:
    """A whole model on one rank."""

    shard = Shard()

    def reduce(self, x: Tensor) -> Tensor:
        return x

    def gather(self, x: Tensor) -> Tensor:
        return x

    def pass_on(self, x: Tensor) -> None:
        raise AssertionError("there is no other stage")

    def take_over(self, x: Tensor) -> Tensor:
        raise AssertionError("there is no other stage")


def open_meeting(address: str, leads: bool) -> Any:
    """A TCPStore, the rendezvous of a group: rank 0 listens at "ip:port" (0: any port), the others connect there.

    Raises `RuntimeError` if nobody listens.
    """
    host, _, port = address.rpartition(":")
    timeout = timedelta(seconds=JOIN_S)
    return dist.TCPStore(  # type: ignore[attr-defined]
        host, int(port), is_master=leads, wait_for_workers=False, timeout=timeout
    )


class RankGroup:
    """This process's rank. All methods raise `RuntimeError` once another rank is lost: the model is unusable then."""

    def __init__(self, shard: Shard, meeting: Any, device: torch.device, timeout_s: float = TIMEOUT_S) -> None:
        """Waits for all ranks. A rank that is due to send and is silent for `timeout_s` counts as lost."""
        self.shard = shard
        self.meter = RankMeter()
        self._meeting = meeting
        self._timeout = timedelta(seconds=timeout_s)
        self._outgoing: list[tuple[dist.Work, Tensor]] = []
        self._under_way: deque[dist.Work] = deque()  # parts of steps that the last stage has not acknowledged
        self._word = threading.Lock()  # a message is a head and a body, which must not be separated
        self._has_heard = False
        self._closing = threading.Event()
        dist.init_process_group(
            "gloo",
            store=meeting,
            rank=shard.rank,
            world_size=shard.num_ranks,
            timeout=timedelta(seconds=FORM_S),
        )
        backend = "nccl" if device.type == "cuda" else "gloo"
        everyone = range(shard.num_ranks)
        self._control = dist.new_group(
            list(everyone), timedelta(seconds=JOIN_S), "gloo"
        )  # ranks load at their own pace
        self._data = dist.new_group(list(everyone), self._timeout, backend)
        stages = [[rank for rank in everyone if rank // shard.tp_size == stage] for stage in range(shard.pp_size)]
        groups = [dist.new_group(stage, self._timeout, backend) for stage in stages]
        self._stage = groups[shard.pp_rank]
        # NCCL orders everything that two ranks send each other, in both directions: logits on their way back, which the
        # leader receives last, would block activations that it sends first.
        self._back = dist.new_group([0, self._teller], self._timeout, backend) if shard.pp_size > 1 else self._data
        logger.info("event=rank_joined rank=%d of=%d backend=%s", shard.rank, shard.num_ranks, backend)

    # --- before the first step ---

    def post(self, address: str) -> None:
        """Tells the leader this rank's address."""
        self._meeting.set(f"address/{self.shard.rank}", address)

    def addresses(self) -> list[str]:
        """The other ranks' addresses; waits until they have posted them."""
        return [str(self._meeting.get(f"address/{rank}"), "utf-8") for rank in range(1, self.shard.num_ranks)]

    def agree(self, layout: KVLayout) -> None:
        """Raises `RanksDisagree`, on all ranks, unless they have the same weights, sharding and block layout."""
        text = f"{layout.root().hex()} {self.shard.tp_size} {self.shard.pp_size}"
        mine = torch.frombuffer(bytearray(hashlib.sha256(text.encode()).digest()), dtype=torch.int64)
        all_ = [torch.empty_like(mine) for _ in range(self.shard.num_ranks)]
        dist.all_gather(all_, mine, group=self._control)
        others = [rank for rank, one in enumerate(all_) if not torch.equal(one, all_[0])]
        if others:
            raise RanksDisagree(f"ranks {others} have other weights than rank 0, another dtype, or another cut of them")

    # --- within a step ---

    def reduce(self, x: Tensor) -> Tensor:
        if self.shard.tp_size > 1:
            self.meter.collective_bytes += x.nbytes
            with self.meter.collective:
                dist.all_reduce(x, group=self._stage)
        return x

    def gather(self, x: Tensor) -> Tensor:
        if self.shard.tp_size == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(self.shard.tp_size)]
        self.meter.collective_bytes += x.nbytes
        with self.meter.collective:
            dist.all_gather(parts, x.contiguous(), group=self._stage)
        return torch.cat(parts, dim=-1)

    def pass_on(self, x: Tensor) -> None:
        self._hand_on(x.contiguous(), self.shard.rank + self.shard.tp_size, self._data)

    def take_over(self, x: Tensor) -> Tensor:
        with self.meter.pipeline:
            dist.recv(x, self.shard.rank - self.shard.tp_size, group=self._data)
        return x

    # --- between leader and followers ---

    @property
    def tells_back(self) -> bool:
        """Whether this rank of the last of several stages sends the results to the leader."""
        return self.shard.pp_size > 1 and self.shard.rank == self._teller

    def send_logits(self, logits: Tensor) -> None:
        """Called on the rank that `tells_back`."""
        self._hand_on(logits.contiguous(), 0, self._back)

    def receive_logits(self, logits: Tensor) -> Tensor:
        """The leader's side: fills `logits`."""
        with self.meter.pipeline:
            dist.recv(logits, self._teller, group=self._back)
        return logits

    def acknowledge(self) -> None:
        """The rank that `tells_back` has finished a part of a step."""
        self._send(torch.zeros(1, dtype=torch.int64), 0, self._control)

    def begin_part(self, max_parts: int) -> None:
        """The leader is about to send a part of a step: waits until fewer than `max_parts` are in flight."""
        while self._under_way and (len(self._under_way) >= max_parts or self._under_way[0].is_completed()):
            with self.meter.pipeline:
                self._under_way.popleft().wait(self._timeout)
        self._under_way.append(_coming(torch.empty(1, dtype=torch.int64), self._teller, self._control))

    def tell(self, head: Tensor, body: Tensor) -> None:
        """The leader's message to all others, in int64; an empty body is not sent."""
        messages = [part for part in (head, body) if part.numel()]
        with self._word:
            for message in messages:
                for rank in range(1, self.shard.num_ranks):
                    self._outgoing.append((_sent(message, rank, self._control), message))
            self._forget_sent()

    def hear(self, message: Tensor) -> Tensor:
        """Fills `message` with the leader's next message. The leader sends pings, too, when it is idle (`watch`)."""
        coming = _coming(message, 0, self._control)
        coming.wait(self._timeout) if self._has_heard else coming.wait()
        self._has_heard = True
        return message

    def least(self, number: int) -> int:
        """The smallest of all ranks' numbers."""
        agreed = torch.tensor([number])
        dist.all_reduce(agreed, dist.ReduceOp.MIN, group=self._control)
        return int(agreed)

    def watch(self, ping: Tensor, on_failure: Callable[[BaseException], None]) -> None:
        """Sends `ping` periodically from now on, so that even an idle leader notices that a rank is lost."""

        def run() -> None:
            while not self._closing.wait(PING_S):
                try:
                    self.tell(ping, ping[:0])
                except RuntimeError as error:
                    if not self._closing.is_set():
                        on_failure(error)
                    return

        threading.Thread(target=run, name="rank-watch", daemon=True).start()

    def close(self) -> None:
        """Waits until what was sent has arrived, then leaves the group."""
        self._closing.set()
        with self._word:
            for work in (*self._under_way, *(work for work, _ in self._outgoing)):
                work.wait(self._timeout)
            self._outgoing.clear()
        dist.destroy_process_group()

    @property
    def _teller(self) -> int:
        """The first rank of the last stage."""
        return (self.shard.pp_size - 1) * self.shard.tp_size

    def _hand_on(self, x: Tensor, rank: int, group: dist.ProcessGroup) -> None:
        self.meter.pipeline_bytes += x.nbytes
        self._send(x, rank, group)

    def _send(self, x: Tensor, rank: int, group: dist.ProcessGroup) -> None:
        with self._word:
            self._outgoing.append((_sent(x, rank, group), x))
            self._forget_sent()

    def _forget_sent(self) -> None:
        """Drops messages that have arrived. Raises `RuntimeError` for one that never will."""
        waiting: list[tuple[dist.Work, Tensor]] = []
        for work, tensor in self._outgoing:
            if work.is_completed():
                work.wait()
            else:
                waiting.append((work, tensor))
        self._outgoing = waiting


def _sent(x: Tensor, rank: int, group: dist.ProcessGroup) -> dist.Work:
    work = dist.isend(x, rank, group=group)
    assert work is not None
    return work


def _coming(x: Tensor, rank: int, group: dist.ProcessGroup) -> dist.Work:
    work = dist.irecv(x, rank, group=group)
    assert work is not None
    return work
