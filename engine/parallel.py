"""What the ranks of one model say to each other while they compute. `Alone` is a model on one rank, which says nothing.

`RankGroup` is torch.distributed: NCCL between GPUs, Gloo between CPUs and for the leader's word. One a process.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from engine.shard import Shard

logger = logging.getLogger(__name__)

PING_S = 1.0  # how soon an idle leader finds out that a rank is gone
TIMEOUT_S = 60.0  # a rank that says nothing for so long is as good as gone
JOIN_S = 300.0  # for all ranks to come
FORM_S = 60.0  # for those that have come to find each other


class Parallel(Protocol):
    """A rank's place among its model's ranks. All ranks call the same methods in the same order."""

    shard: Shard

    def reduce(self, x: Tensor) -> Tensor:
        """The sum over the ranks of this stage, in the place of `x`."""
        ...

    def gather(self, x: Tensor) -> Tensor:
        """`[..., n]` of each rank of this stage, side by side: `[..., n * tp_size]`."""
        ...

    def pass_on(self, x: Tensor) -> None:
        """Hands a step's activations to the next stage, without waiting for it."""
        ...

    def take_over(self, x: Tensor) -> Tensor:
        """Fills `x` with the activations of the stage before."""
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
    """A TCPStore, where the ranks of a group meet: rank 0 listens at "ip:port" (0: any port), the others call there.

    Raises `RuntimeError` where nobody listens.
    """
    host, _, port = address.rpartition(":")
    timeout = timedelta(seconds=JOIN_S)
    return dist.TCPStore(  # type: ignore[attr-defined]
        host, int(port), is_master=leads, wait_for_workers=False, timeout=timeout
    )


class RankGroup:
    """This process's rank. Everything raises `RuntimeError` once another rank is gone: the model is of no use then."""

    def __init__(self, shard: Shard, meeting: Any, device: torch.device) -> None:
        """Waits for all ranks."""
        self.shard = shard
        self._meeting = meeting
        self._outgoing: list[tuple[dist.Work, Tensor]] = []
        self._word = threading.Lock()  # a message is a head and a body, with nothing in between
        self._closing = threading.Event()
        dist.init_process_group(
            "gloo",
            store=meeting,
            rank=shard.rank,
            world_size=shard.num_ranks,
            timeout=timedelta(seconds=FORM_S),
        )
        backend, timeout = "nccl" if device.type == "cuda" else "gloo", timedelta(seconds=TIMEOUT_S)
        everyone = range(shard.num_ranks)
        self._control = dist.new_group(
            list(everyone), timedelta(seconds=JOIN_S), "gloo"
        )  # ranks load at their own pace
        self._data = dist.new_group(list(everyone), timeout, backend)
        stages = [[rank for rank in everyone if rank // shard.tp_size == stage] for stage in range(shard.pp_size)]
        groups = [dist.new_group(stage, timeout, backend) for stage in stages]
        self._stage = groups[shard.pp_rank]
        logger.info("event=rank_joined rank=%d of=%d backend=%s", shard.rank, shard.num_ranks, backend)

    # --- before the first step ---

    def post(self, address: str) -> None:
        """Tells the leader where this rank serves."""
        self._meeting.set(f"address/{self.shard.rank}", address)

    def addresses(self) -> list[str]:
        """Where the others serve; waits until they have said so."""
        return [str(self._meeting.get(f"address/{rank}"), "utf-8") for rank in range(1, self.shard.num_ranks)]

    # --- within a step ---

    def reduce(self, x: Tensor) -> Tensor:
        if self.shard.tp_size > 1:
            dist.all_reduce(x, group=self._stage)
        return x

    def gather(self, x: Tensor) -> Tensor:
        if self.shard.tp_size == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(self.shard.tp_size)]
        dist.all_gather(parts, x.contiguous(), group=self._stage)
        return torch.cat(parts, dim=-1)

    def pass_on(self, x: Tensor) -> None:
        self._send(x.contiguous(), self.shard.rank + self.shard.tp_size)

    def take_over(self, x: Tensor) -> Tensor:
        dist.recv(x, self.shard.rank - self.shard.tp_size, group=self._data)
        return x

    # --- between leader and followers ---

    def send_logits(self, logits: Tensor) -> None:
        """The last stage's first rank tells the leader what came out."""
        self._send(logits.contiguous(), 0)

    def receive_logits(self, logits: Tensor) -> Tensor:
        """The leader's side: fills `logits`."""
        dist.recv(logits, (self.shard.pp_size - 1) * self.shard.tp_size, group=self._data)
        return logits

    def tell(self, head: Tensor, body: Tensor) -> None:
        """The leader's word to all others, in int64; an empty body is not sent."""
        messages = [part for part in (head, body) if part.numel()]
        with self._word:
            for message in messages:
                for rank in range(1, self.shard.num_ranks):
                    self._outgoing.append((_sent(message, rank, self._control), message))
            self._forget_sent()

    def hear(self, message: Tensor) -> Tensor:
        """Fills `message` with the leader's next word."""
        dist.recv(message, 0, group=self._control)
        return message

    def least(self, number: int) -> int:
        """The smallest of what all ranks say."""
        agreed = torch.tensor([number])
        dist.all_reduce(agreed, dist.ReduceOp.MIN, group=self._control)
        return int(agreed)

    def watch(self, ping: Tensor, on_failure: Callable[[BaseException], None]) -> None:
        """Says `ping` now and then from now on, so that an idle leader, too, notices that a rank is gone."""

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
        """Lets what was said arrive, then leaves."""
        self._closing.set()
        with self._word:
            for work, _ in self._outgoing:
                work.wait()
            self._outgoing.clear()
        dist.destroy_process_group()

    def _send(self, x: Tensor, rank: int) -> None:
        with self._word:
            self._outgoing.append((_sent(x, rank, self._data), x))
            self._forget_sent()

    def _forget_sent(self) -> None:
        """Drops what has arrived. Raises `RuntimeError` for what never will."""
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
