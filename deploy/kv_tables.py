"""What `baton kv` prints: each answer as a table for people and as plain data for programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import RenderableType
from rich.table import Table

from deploy.kv_stores import Store
from deploy.terminal import console
from kvstore.blocks import BlockHash
from kvstore.told import UNKNOWN, BlockDetail, BlockRow, StoreStats, TierStats

STALE, UNANNOUNCED, DAMAGED, WRITING, UNKNOWN_STATE = "stale entry", "not announced", "damaged", "writing", "no answer"


@dataclass(frozen=True)
class Report:
    """`parts` are shown one below the other; `problems` tell of stores that did not answer."""

    data: dict[str, Any]
    parts: Sequence[RenderableType]
    problems: list[str] = field(default_factory=list)

    def show(self, as_json: bool) -> None:
        if as_json:
            print(json.dumps(self.data | {"problems": self.problems}))
            return
        out = console()
        for part in self.parts:
            out.print(part)


def stats(answers: Sequence[tuple[Store, tuple[StoreStats, list[TierStats]]]], problems: list[str]) -> Report:
    tiers = _table("tiers", "arena", "tier")
    _add_numbers(tiers, "blocks", "size", "writing", "hits", "misses", "evicted", "removed")
    stores = _table("stores", "arena", "machine")
    _add_numbers(stores, "up", "committed", "demoted", "promoted", "mapped reads seen")
    refusals = _table("writers, and what was refused", "arena")
    _add_numbers(refusals, "writers", "reaped", "full", "draining", "frames: control", "data")
    for store, (sums, tier_sums) in answers:
        name = store.name + (" (draining)" if sums.draining else "")
        for tier in tier_sums:
            numbers = (tier.num_writing, tier.num_hits, tier.num_misses, tier.num_evicted, tier.num_removed)
            blocks = f"{tier.num_blocks}/{tier.capacity_blocks}"
            tiers.add_row(name, tier.tier, blocks, size(tier.num_bytes), *map(str, numbers))
        moved = (sums.num_committed, sums.num_demoted, sums.num_promoted, sums.num_mapped_reads)
        stores.add_row(store.name, store.record.host, age(sums.uptime_s), *map(str, moved))
        frames = (sums.num_refused_control, sums.num_refused_data)
        writers = (sums.num_writers, sums.num_reaped, sums.num_full, sums.num_draining)
        refusals.add_row(store.name, *map(str, writers), *map(str, frames))
    data = [
        asdict(sums) | {"host": store.record.host, "tiers": [*map(asdict, tier_sums)]}
        for store, (sums, tier_sums) in answers
    ]
    return Report({"arenas": data}, [tiers, stores, refusals], problems)


def blocks(answers: Sequence[tuple[Store, tuple[list[BlockRow], int]]], limit: int, problems: list[str]) -> Report:
    found = [(store, row) for store, (rows, _) in answers for row in rows][:limit]
    total = sum(total for _, (_, total) in answers)
    table = _table("", "block", "arena", "tier", "where")
    _add_numbers(table, "size", "last use", "reads")
    for store, row in found:
        uses = (age(row.age_s), reads(row.num_reads))
        table.add_row(row.hash, store.name, row.tier, _place(row), size(row.num_bytes), *uses)
    data = [{"arena_id": store.record.arena_id} | asdict(row) for store, row in found]
    return Report({"blocks": data, "num_blocks": total}, [table, f"{len(found)} of {total}"], problems)


def places(
    block_hash: BlockHash, found: Sequence[tuple[Store, str, list[BlockDetail] | None]], problems: list[str]
) -> Report:
    """`found` has what the directory says of each store, and what the store itself says; None where it says nothing."""
    table = _table(f"block {block_hash.hex()}", "arena", "directory", "store", "state")
    _add_numbers(table, "generation", "size", "checksum", "last use", "reads")
    data = []
    for store, announced, details in found:
        rows: Sequence[BlockDetail | None] = details or [None]
        for detail in rows:
            verdict = _verdict(announced, detail, details)
            row = (store.name, announced or "-")
            data.append(
                {"arena_id": store.record.arena_id, "directory": announced, "verdict": verdict}
                | {"store": None if detail is None else asdict(detail)}
            )
            if detail is None:
                table.add_row(*row, "-", verdict)
                continue
            uses = (age(detail.age_s), reads(detail.num_reads))
            generation = str(detail.generation) if detail.generation else "-"
            table.add_row(*row, _place(detail), verdict, generation, size(detail.length), detail.checksum, *uses)
    parts: list[RenderableType] = [table] if data else [f"no arena holds {block_hash.hex()}"]
    return Report({"hash": block_hash.hex(), "places": data}, parts, problems)


def _verdict(announced: str, detail: BlockDetail | None, details: list[BlockDetail] | None) -> str:
    if details is None:
        return UNKNOWN_STATE
    if detail is None:
        return STALE
    if detail.state != "ready":
        return WRITING
    if not detail.verifies:
        return DAMAGED
    if not announced:
        return UNANNOUNCED
    is_named = announced == "disk" or detail.tier == "disk" or announced == f"slot {detail.place}"
    return "ok" if is_named else STALE


def evicted(answers: Sequence[tuple[Store, tuple[int, int]]], problems: list[str]) -> Report:
    table = _table("evicted", "arena")
    _add_numbers(table, "from memory", "from disk")
    for store, numbers in answers:
        table.add_row(store.name, *map(str, numbers))
    data = [
        {"arena_id": store.record.arena_id, "num_memory_blocks": in_memory, "num_disk_blocks": on_disk}
        for store, (in_memory, on_disk) in answers
    ]
    return Report({"evicted": data}, [table], problems)


def drained(stores: Sequence[Store], is_draining: bool, problems: list[str]) -> Report:
    words = "takes no new blocks; those that it holds can be read" if is_draining else "takes blocks again"
    data = [{"arena_id": store.record.arena_id, "draining": is_draining} for store in stores]
    return Report({"arenas": data}, [f"arena {store.name} {words}" for store in stores], problems)


def size(num_bytes: int) -> str:
    """`1536` -> `1.5 KiB`."""
    number, units = float(num_bytes), ["GiB", "MiB", "KiB", "B"]
    while number >= 1024 and len(units) > 1:
        number /= 1024
        units.pop()
    return f"{number:.0f} {units[-1]}" if number.is_integer() else f"{number:.1f} {units[-1]}"


def age(seconds: float) -> str:
    """`90` -> `1.5 min`."""
    if seconds == UNKNOWN:
        return "?"
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


def reads(count: int) -> str:
    return "?" if count == UNKNOWN else str(count)


def _place(row: BlockRow | BlockDetail) -> str:
    return f"{'slot' if row.tier == 'memory' else 'disk record'} {row.place}"


def _table(title: str, *names: str) -> Table:
    table = Table(title=title or None, title_justify="left", box=SIMPLE_HEAD)
    for name in names:
        table.add_column(name, no_wrap=True)
    return table


def _add_numbers(table: Table, *names: str) -> None:
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
