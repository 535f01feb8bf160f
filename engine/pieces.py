"""The pieces in which blocks travel, and which of them a rank holds. Pure.

A block of the whole model is cut into `num_layer_pieces` x `num_head_pieces` pieces of equally many layers and KV heads
each, as fine as the widest nodes of a cluster need. A piece has a name, a slot and a checksum of its own, so nodes
of any width read what any other has written, and no rank moves more than its share. Piece `l * num_head_pieces + h` has
the layers and heads of that row and column; routers look up piece 0, the leader's first one.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.config import EngineConfig, ModelConfig
from engine.errors import UnsupportedModel
from engine.shard import Shard


@dataclass(frozen=True)
class Pieces:
    """A rank's pieces: rows of layers and columns of heads."""

    rows: range
    columns: range
    num_head_pieces: int  # of the whole model

    def __len__(self) -> int:
        return len(self.rows) * len(self.columns)

    @property
    def numbers(self) -> tuple[int, ...]:
        """The numbers, within the whole model, of this rank's pieces, in the order of its cache."""
        return tuple(row * self.num_head_pieces + column for row in self.rows for column in self.columns)


def pieces_of(config: ModelConfig, engine: EngineConfig, shard: Shard) -> Pieces:
    """`config` is the whole model's. Raises `UnsupportedModel` if a rank's part is not a whole number of pieces."""
    shard.check(config)
    rows = _cut("kv_layer_pieces", engine.kv_layer_pieces, config.num_layers, shard.layers(config))
    columns = _cut("kv_head_pieces", engine.kv_head_pieces, config.num_kv_heads, shard.kv_heads(config))
    return Pieces(rows, columns, engine.kv_head_pieces)


def _cut(name: str, num_pieces: int, total: int, part: range) -> range:
    if total % num_pieces:
        raise UnsupportedModel(f"{name} must divide {total}, got {num_pieces}")
    size = total // num_pieces
    if part.start % size or part.stop % size:
        raise UnsupportedModel(f"{name} of {num_pieces} is too coarse: a rank has {len(part)} of {total}")
    return range(part.start // size, part.stop // size)


def is_writer(config: ModelConfig, shard: Shard) -> bool:
    """Whether a rank is the first of those that hold the same heads, and so the one that publishes them."""
    return shard.tp_rank % max(1, shard.tp_size // config.num_kv_heads) == 0
