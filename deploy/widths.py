"""How wide the nodes of a role are, and the pieces in which blocks travel so that all of them fit. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from engine.config import ModelConfig
from engine.shard import Shard


@dataclass(frozen=True)
class Width:
    """Ranks of a node: `pp` stages of `tp` ranks each. The ranks of a stage share a machine."""

    tp: int = 1
    pp: int = 1

    @property
    def num_ranks(self) -> int:
        return self.tp * self.pp


def kv_pieces(widths: Iterable[Width], model: ModelConfig) -> tuple[int, int]:
    """(Pieces by layers, pieces by heads) of a block: as few as suit all `widths`.

    Raises `UnsupportedModel` for a model that cannot be sharded this way.
    """
    layer_pieces, head_pieces = 1, 1
    for width in widths:
        Shard(tp_size=width.tp, pp_size=width.pp).check(model)
        layer_pieces = math.lcm(layer_pieces, width.pp)
        head_pieces = math.lcm(head_pieces, min(width.tp, model.num_kv_heads))
    return layer_pieces, head_pieces
