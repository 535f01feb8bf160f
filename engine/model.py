"""The decoder-only transformer of the Llama family: Llama, Mistral, Qwen2, Qwen3. Knows neither requests nor files.

Query, key and value are one matrix, and so are gate and up: fewer and larger products. Normalisation and rotary
embedding round where transformers rounds, so that half precision agrees with it too.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from engine.attention import AttentionPlan, ForwardBatch, attend, plan_attention
from engine.config import ModelConfig
from engine.parallel import Alone, Parallel
from engine.rope import inverse_frequencies, rotate, rotation

Model = Callable[[ForwardBatch, Tensor], Tensor]  # as `Transformer.forward`


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """`x` is `[..., size]`; computed in float32 whatever its dtype."""
        normed = functional.rms_norm(x.float(), self.weight.shape, eps=self.eps)
        return self.weight * normed.to(x.dtype)


class Attention(nn.Module):
    """A rank's heads; `config` has their numbers. Their output is one part of a sum over the ranks."""

    def __init__(self, config: ModelConfig, parallel: Parallel) -> None:
        super().__init__()
        self._parallel = parallel
        heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.sizes = [heads, kv_heads, kv_heads]
        self.head_dim = dim
        self.qkv_proj = nn.Linear(config.hidden_size, sum(self.sizes) * dim, bias=config.qkv_bias)
        self.o_proj = nn.Linear(heads * dim, config.hidden_size, bias=config.o_bias)
        self.q_norm = RMSNorm(dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(dim, config.rms_norm_eps) if config.qk_norm else None

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor], cache: Tensor, plan: AttentionPlan) -> Tensor:
        qkv = self.qkv_proj(x).view(x.shape[0], -1, self.head_dim)  # [N, H + 2 Hkv, D]
        q, k, v = qkv.split(self.sizes, dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, *turn), rotate(k, *turn)
        out: Tensor = self.o_proj(attend(q, k, v, cache, plan).flatten(1))
        return self._parallel.reduce(out)


class MLP(nn.Module):
    def __init__(self, config: ModelConfig, parallel: Parallel) -> None:
        super().__init__()
        self._parallel = parallel
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        out: Tensor = self.down_proj(functional.silu(gate) * up)
        return self._parallel.reduce(out)


class VocabEmbedding(nn.Module):
    """A rank's rows of the vocabulary; other ranks' tokens give zeros."""

    def __init__(self, rows: range, size: int, parallel: Parallel) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(len(rows), size))
        self._rows, self._parallel = rows, parallel

    def forward(self, token_ids: Tensor) -> Tensor:
        """int64 `[N]` to `[N, size]`."""
        if self._parallel.shard.tp_size == 1:
            return functional.embedding(token_ids, self.weight)
        local = token_ids - self._rows.start
        is_ours = (local >= 0) & (local < len(self._rows))
        x = functional.embedding(local.where(is_ours, 0), self.weight)
        return self._parallel.reduce(x * is_ours.unsqueeze(1))


class Layer(nn.Module):
    def __init__(self, config: ModelConfig, parallel: Parallel) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, parallel)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config, parallel)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor], cache: Tensor, plan: AttentionPlan) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), turn, cache, plan)
        x = x + self.mlp(self.post_attention_layernorm(x))
        return x


class Transformer(nn.Module):
    """A rank's part of the model. Weights come from `engine.weights.load_model` and are uninitialised before that.
    `config` is the whole model's."""

    frequencies: Tensor

    def __init__(self, config: ModelConfig, parallel: Parallel | None = None) -> None:
        super().__init__()
        self.parallel = parallel = parallel or Alone()
        shard = parallel.shard
        self.config = part = shard.part(config)
        rows = shard.vocab_rows(config)
        self.embed_tokens = VocabEmbedding(rows, config.hidden_size, parallel) if shard.is_first else None
        self.layers = nn.ModuleList(Layer(part, parallel) for _ in range(part.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps) if shard.is_last else None
        self.lm_head = nn.Linear(config.hidden_size, len(rows), bias=False) if shard.is_last else None
        if config.tie_word_embeddings and self.embed_tokens is not None and self.lm_head is not None:
            self.lm_head.weight = self.embed_tokens.weight
        frequencies, self.rope_scale = inverse_frequencies(config.rope, config.head_dim)
        self.register_buffer("frequencies", frequencies, persistent=False)

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch, cache: Tensor) -> Tensor:
        """Logits float32 `[R, vocab]` of `batch.logits_indices`; `[0, vocab]` for a stage that is not the last.

        `cache` is `[num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim]` of this rank's layers and heads, in
        the model's dtype; the step's keys and values are written to it.
        """
        windows = self.config.sliding_windows
        plans = {window: plan_attention(batch, cache, window) for window in set(windows)}
        x = self._input(batch, cache.dtype)  # [N, hidden]
        turn = rotation(batch.positions, self.frequencies, self.rope_scale, x.dtype)
        for index, layer in enumerate(self.layers):
            x = layer(x, turn, cache[:, index], plans[windows[index]])
        if self.norm is None or self.lm_head is None:
            self.parallel.pass_on(x)
            return x.new_empty(0, self.config.vocab_size, dtype=torch.float32)
        logits: Tensor = self.lm_head(self.norm(x[batch.logits_indices]))
        return self.parallel.gather(logits)[:, : self.config.vocab_size].float()

    def _input(self, batch: ForwardBatch, dtype: torch.dtype) -> Tensor:
        if self.embed_tokens is not None:
            x: Tensor = self.embed_tokens(batch.token_ids)
            return x
        shape = (len(batch.token_ids), self.config.hidden_size)
        return self.parallel.take_over(torch.empty(shape, dtype=dtype, device=self.frequencies.device))
