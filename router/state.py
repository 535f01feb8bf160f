"""The live page's view of a router, as plain data: nodes, stores, the last answers, recent figures. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvstore.directory import ArenaRecord
from router.nodes import Node
from router.recent import BIN_S, NUM_BINS, Bin, Ended, Recent, quantile
from router.spans import spans
from router.tally import Tally

Json = dict[str, Any]
SHORT_ID = 8  # characters of an incarnation or an arena's id that tell it apart


def node_state(node: Node, now_s: float) -> Json:
    """One node. `now_s` is on the registry's clock."""
    record = node.record
    used = 1.0 - record.free_blocks / record.total_blocks if record.total_blocks else 0.0
    return {
        "id": record.node_id,
        "role": record.role,
        "state": node.state,
        "host": record.host,
        "incarnation": record.incarnation[:SHORT_ID],
        "running": record.num_running,
        "waiting": record.num_waiting,
        "queued_tokens": record.queued_prefill_tokens,
        "legs": len(node.legs),
        "cache_use": _rounded(used),
        "total_blocks": record.total_blocks,
        "prefill_tokens_per_s": _rounded(record.prefill_tokens_per_s),
        "decode_step_s": _rounded(record.decode_step_s),
        "seen_s": _rounded(max(0.0, now_s - node.seen_s)),
    }


def store_state(arena: ArenaRecord) -> Json:
    return {
        "id": arena.arena_id[:SHORT_ID],
        "host": arena.host,
        "used_slots": arena.num_slots - arena.free_slots,
        "num_slots": arena.num_slots,
        "bytes": arena.num_slots * arena.slot_bytes,
        "draining": arena.draining,
    }


def answer_state(ended: Ended, shows_id: bool) -> Json:
    """One answer, without any of its text."""
    usage, timeline = ended.usage, ended.timeline
    return {
        "id": ended.request_id if shows_id else "",
        "at_s": _rounded(ended.at_s),
        "reason": ended.reason,
        "prompt_tokens": usage.prompt_tokens,
        "local_hit_tokens": usage.local_hit_tokens,
        "store_hit_tokens": usage.store_hit_tokens,
        "output_tokens": usage.output_tokens,
        "prefill_node": timeline.prefill_node,
        "decode_node": timeline.decode_node,
        "migrations": timeline.migrations,
        "ttft_s": _rounded(timeline.first_token_s),
        "tpot_s": _rounded(timeline.tpot_s),
        "total_s": _rounded(timeline.finished_s),
        "legs": [[span.name, _rounded(span.start_s), _rounded(span.end_s)] for span in spans(timeline)],
    }


def totals(tally: Tally) -> Json:
    return {
        "in_flight": tally.num_in_flight,
        "finished": sum(tally.finished.values()),
        "failed": sum(tally.failed.values()),
        "prompt_tokens": tally.num_prompt_tokens,
        "output_tokens": tally.num_output_tokens,
        "local_hit_tokens": tally.num_local_hit_tokens,
        "store_hit_tokens": tally.num_store_hit_tokens,
    }


def series(recent: Recent, now_s: float) -> Json:
    """Figures of the last minutes; times in seconds since the epoch."""
    points = [_point(one) for one in recent.since(now_s)]
    return {"bin_s": BIN_S, "span_s": BIN_S * NUM_BINS, "points": points}


def last_answers(answers: Sequence[Ended], shows_ids: bool) -> list[Json]:
    """The last answers, newest first."""
    return [answer_state(ended, shows_ids) for ended in reversed(answers)]


def _point(one: Bin) -> Json:
    quantiles = {
        f"{name}_{label}": _rounded(quantile(values, part))
        for name, values in (("ttft", one.ttft_s), ("tpot", one.tpot_s))
        for label, part in (("p50", 0.5), ("p95", 0.95))
    }
    hit = one.num_cached_tokens / one.num_prompt_tokens if one.num_prompt_tokens else None
    counts = {"t": one.index * BIN_S, "count": one.count, "output_tokens": one.num_output_tokens}
    return counts | {"hit": _rounded(hit)} | quantiles


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)
