"""The decoder-only transformer of the Llama family. Knows tensors; knows neither requests nor files."""

from __future__ import annotations

from torch import Tensor, nn

from engine.attention import ForwardBatch
from engine.config import ModelConfig


class Transformer(nn.Module):
    """Built on the meta device; `engine.weights.load_model` gives it its weights."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, batch: ForwardBatch, cache: Tensor) -> Tensor:
        """Logits float32 `[R, vocab]` of `batch.logits_indices`.

        `cache` is `[num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim]` in the model's dtype; the step's
        keys and values are written to it.
        """
        raise NotImplementedError
