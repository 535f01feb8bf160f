"""Which part of a model a rank holds: heads by tensor parallelism, layers by pipeline parallelism. Pure.

Ranks are numbered stage by stage, and within a stage by tensor-parallel rank; rank 0 leads. Column and row parallel
products as in Megatron-LM (Shoeybi et al., 2019): the output of a rank's heads and of its share of the MLP is one part
of a sum over all ranks of its stage.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from engine.config import ModelConfig
from engine.errors import UnsupportedModel


@dataclass(frozen=True)
class Shard:
    """One rank's part of a model; with sizes of 1, the whole model."""

    tp_rank: int = 0
    tp_size: int = 1
    pp_rank: int = 0
    pp_size: int = 1

    @classmethod
    def of_rank(cls, rank: int, tp_size: int, pp_size: int) -> Shard:
        return cls(rank % tp_size, tp_size, rank // tp_size, pp_size)

    @property
    def rank(self) -> int:
        return self.pp_rank * self.tp_size + self.tp_rank

    @property
    def num_ranks(self) -> int:
        return self.tp_size * self.pp_size

    @property
    def is_first(self) -> bool:
        """Whether this rank's stage embeds tokens."""
        return self.pp_rank == 0

    @property
    def is_last(self) -> bool:
        """Whether this rank's stage computes logits."""
        return self.pp_rank == self.pp_size - 1

    def check(self, config: ModelConfig) -> None:
        """Raises `UnsupportedModel` for a model that cannot be sharded this way; names what does not divide."""
        tp, pp, kv_heads = self.tp_size, self.pp_size, config.num_kv_heads
        for name, size in (("num_attention_heads", config.num_heads), ("intermediate_size", config.intermediate_size)):
            if size % tp:
                raise UnsupportedModel(f"tensor_parallel_size {tp} does not divide {name} ({size})")
        if kv_heads % tp and tp % kv_heads:
            limit = "must divide num_key_value_heads, or be a multiple of it"
            raise UnsupportedModel(f"tensor_parallel_size {tp} {limit} ({kv_heads})")
        if config.num_layers % pp:
            raise UnsupportedModel(
                f"pipeline_parallel_size {pp} does not divide num_hidden_layers ({config.num_layers})"
            )

    def part(self, config: ModelConfig) -> ModelConfig:
        """The config with the sizes of this rank's part. The vocabulary stays whole: see `vocab_rows`."""
        self.check(config)
        layers = self.layers(config)
        return dataclasses.replace(
            config,
            num_layers=len(layers),
            num_heads=config.num_heads // self.tp_size,
            num_kv_heads=len(self.kv_heads(config)),
            intermediate_size=config.intermediate_size // self.tp_size,
            sliding_windows=config.sliding_windows[layers.start : layers.stop],
        )

    def layers(self, config: ModelConfig) -> range:
        size = config.num_layers // self.pp_size
        return range(self.pp_rank * size, (self.pp_rank + 1) * size)

    def heads(self, config: ModelConfig) -> range:
        size = config.num_heads // self.tp_size
        return range(self.tp_rank * size, (self.tp_rank + 1) * size)

    def kv_heads(self, config: ModelConfig) -> range:
        """This rank's KV heads. If there are fewer KV heads than ranks, several ranks hold the same one."""
        size = max(1, config.num_kv_heads // self.tp_size)
        first = self.tp_rank * config.num_kv_heads // self.tp_size
        return range(first, first + size)

    def vocab_rows(self, config: ModelConfig) -> range:
        """This rank's rows, equally many for each rank; the last ones may lie beyond the vocabulary."""
        size = -(-config.vocab_size // self.tp_size)
        return range(self.tp_rank * size, (self.tp_rank + 1) * size)
