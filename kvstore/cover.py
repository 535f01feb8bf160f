"""The leading run of blocks that several arenas hold between them, and which arena to ask for which block. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from kvstore.records import ArenaRecord


@dataclass(frozen=True)
class Cover:
    """The leading run of blocks that all arenas hold between them: for each block, one arena and its slot there."""

    places: tuple[tuple[str, int], ...] = ()  # (arena id, slot)
    arenas: Mapping[str, ArenaRecord] = field(default_factory=dict)  # those that occur in places


def stitch(runs: Mapping[str, Sequence[int | None]], prefer: str = "") -> list[tuple[str, int]]:
    """For each block of the combined leading run, one arena and its slot.

    `runs[arena]` has a slot or None for each block. Chooses the preferred arena wherever it holds the block; else the
    one used for the previous block; else the one whose run from here is longest: few arenas, few requests.
    """
    places: list[tuple[str, int]] = []
    preferred = runs.get(prefer, ())
    while True:
        at = len(places)
        arena_id = prefer if _end(preferred, at) > at else max(runs, key=lambda name: _end(runs[name], at), default="")
        run = runs.get(arena_id, ())
        end = _end(run, at)
        if arena_id != prefer:
            end = next((i for i in range(at, min(end, len(preferred))) if preferred[i] is not None), end)
        places += [(arena_id, slot) for slot in run[at:end] if slot is not None]
        if len(places) == at:
            return places


def _end(run: Sequence[int | None], start: int) -> int:
    """Of the blocks that `run` holds from `start` on."""
    if start >= len(run):
        return start
    try:
        return run.index(None, start)
    except ValueError:
        return len(run)
