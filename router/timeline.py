"""When things happened to one request, and what it cost: timestamps in, the proto's Timeline and Usage out.

The clock is passed in.
"""

from __future__ import annotations

from collections.abc import Callable

from batonpb import inference_pb2
from router.histogram import Histogram
from router.plan import Plan

NEVER_S = -1.0


class Timeline:
    """The timestamps of one request, in seconds since its receipt.

    Until the first token, a stamp made by a later attempt replaces that of an earlier one. `gaps` takes the seconds
    between tokens.
    """

    def __init__(self, clock: Callable[[], float], gaps: Histogram | None = None) -> None:
        self._clock = clock
        self._gaps = gaps
        self._last_token_s = 0.0
        self._received_s = clock()
        self._num_tokens = 0
        self._hits: tuple[int, int] | None = None  # (local, store) tokens of the first leg
        self._message = inference_pb2.Timeline(
            planned_s=NEVER_S,
            admitted_s=NEVER_S,
            prefill_start_s=NEVER_S,
            first_token_s=NEVER_S,
            finished_s=NEVER_S,
            second_token_s=NEVER_S,
        )

    @property
    def first_token_s(self) -> float:
        return float(self._message.first_token_s)

    def planned(self, plan: Plan) -> None:
        self._message.decode_node = plan.decode_node
        if not self._num_tokens:
            self._message.planned_s = self._now_s()
            self._message.predicted_ttft_s = plan.predicted_ttft_s
            self._message.predicted_tpot_s = plan.predicted_tpot_s
            self._message.prefill_node = plan.prefill_node or ""

    def admitted(self) -> None:
        if not self._num_tokens:
            self._message.admitted_s = self._now_s()

    def prefill_started(self) -> None:
        """The first leg was sent, to a node of its own or to the decode node."""
        if not self._num_tokens:
            self._message.prefill_start_s = self._now_s()

    def took(self, num_tokens: int) -> None:
        """`num_tokens` came together; each is taken to have come after an equal part of the gap."""
        if not num_tokens:
            return
        now_s = self._now_s()
        if not self._num_tokens:
            self._message.first_token_s = now_s
        else:
            if self._message.second_token_s < 0.0:
                self._message.second_token_s = now_s
            if self._gaps is not None:
                self._gaps.observe((now_s - self._last_token_s) / num_tokens, num_tokens)
        self._num_tokens += num_tokens
        self._last_token_s = now_s

    def hit(self, local_tokens: int, store_tokens: int) -> None:
        """What the leg that computed the first token did not have to compute. Only the first report counts."""
        if self._hits is None:
            self._hits = local_tokens, store_tokens

    def waited(self, queue_s: float, fetch_s: float) -> None:
        """How long the leg that computed the first token waited: in total, and for blocks from the store."""
        self._message.queue_s, self._message.fetch_s = max(0.0, queue_s - fetch_s), max(0.0, fetch_s)

    def transferred(self, seconds: float) -> None:
        """How long the second leg waited for the prompt's blocks."""
        self._message.transfer_s = max(0.0, seconds)

    def decode_hit(self, store_tokens: int) -> None:
        self._message.decode_store_hit_tokens = store_tokens

    def migrated(self) -> None:
        self._message.migrations += 1

    def finish(self, num_output_tokens: int) -> inference_pb2.Timeline:
        """Stamps the end. `num_output_tokens` may be fewer than came, if a stop string cut the output."""
        message, self._message.finished_s = self._message, self._now_s()
        if num_output_tokens > 1:
            message.tpot_s = (message.finished_s - message.first_token_s) / (num_output_tokens - 1)
        return message

    def usage(self, num_prompt_tokens: int, num_output_tokens: int) -> inference_pb2.Usage:
        """The usage. Hits count only within the prompt; after a failover some may be output tokens."""
        local, store = self._hits or (0, 0)
        local = min(local, num_prompt_tokens)
        store = min(store, num_prompt_tokens - local)
        return inference_pb2.Usage(
            prompt_tokens=num_prompt_tokens,
            output_tokens=num_output_tokens,
            cached_tokens=local + store,
            local_hit_tokens=local,
            store_hit_tokens=store,
        )

    def _now_s(self) -> float:
        return self._clock() - self._received_s
