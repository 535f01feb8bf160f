"""The models of benchmarks/engine.py: two published shapes, with random weights made on the fly."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Shape:
    """A decoder-only transformer of the Llama family, with tied embeddings, in bf16."""

    name: str
    family: str  # "llama", or "qwen2": with biases of query, key and value
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int = 64

    def write(self, folder: Path) -> None:
        """A Hugging Face folder of this shape. Its weights are random but the same each time."""
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.for_model(
            self.family,
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            max_position_embeddings=8192,
            tie_word_embeddings=True,
        )
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


SHAPES = {
    "135m": Shape("SmolLM-135M", "llama", 49152, 576, 1536, num_layers=30, num_heads=9, num_kv_heads=3),
    "0.5b": Shape("Qwen2.5-0.5B", "qwen2", 151936, 896, 4864, num_layers=24, num_heads=14, num_kv_heads=2),
}
