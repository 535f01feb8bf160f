"""A model's whole step as one call of the compiled kernels (`engine/csrc/step.inc`), for CPUs in float32 and bfloat16.

`engine.model.Transformer` is its reference, and what runs where this cannot. Weights are packed once, when the model is
loaded, and replace the plain ones. The step runs without Python's lock, so the threads that serve requests continue
meanwhile. Rounds to bfloat16 where transformers does, except for two products in the MLP.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor, nn

from engine.attention import ForwardBatch
from engine.config import ModelConfig
from engine.model import Layer, Model, Transformer, VocabEmbedding
from engine.native import (
    DTYPES,
    MAX_INT64,
    PANEL,
    ROWS_BEHIND,
    AttentionArgs,
    AttentionBatch,
    Linear,
    can_attend,
    isa,
    library,
    packed,
)
from engine.rope import rotation

GATES = PANEL // 2  # of an MLP's panel; the other half are what they let through


class _LayerArgs(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("input_norm", "post_norm", "q_norm", "k_norm")),
        *((name, Linear) for name in ("qkv", "o", "gate_up", "down")),
        ("window", ctypes.c_int64),
    )


class _StepArgs(ctypes.Structure):
    """As in csrc/native.cpp, field by field."""

    _fields_ = (
        ("attention", AttentionArgs),
        ("layers", ctypes.c_void_p),
        ("head", Linear),
        *((name, ctypes.c_void_p) for name in ("embedding", "norm", "token_ids", "slots", "logits_rows")),
        *((name, ctypes.c_void_p) for name in ("cos", "sin", "workspace", "logits")),
        *((name, ctypes.c_int64) for name in ("num_layers", "num_tokens", "num_logits", "hidden", "layer_stride")),
        ("eps", ctypes.c_float),
    )


def can_run(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `NativeTransformer` supports this model here."""
    sizes = (config.hidden_size, config.intermediate_size)
    return can_attend(config.head_dim, dtype, device) and all(size % GATES == 0 for size in sizes)


def fastest(model: Transformer) -> Model:
    """The fastest form of the model on this machine; `model` itself is unusable afterwards unless it is returned."""
    if model.parallel.shard.num_ranks > 1 or model.norm is None:
        return model  # a compiled step has no point at which ranks could all-reduce
    weight = model.norm.weight
    return NativeTransformer(model) if can_run(model.config, weight.dtype, weight.device) else model


class NativeTransformer:
    """Called like a `Transformer`."""

    def __init__(self, model: Transformer) -> None:
        """Takes the weights out of `model`, which is unusable afterwards."""
        self.config = config = model.config
        assert model.norm is not None and model.embed_tokens is not None and model.lm_head is not None
        self._dtype = model.norm.weight.dtype
        self._frequencies, self._rope_scale = model.frequencies, model.rope_scale
        self._kept: list[Tensor] = []  # the arguments point into them
        self._args = args = _StepArgs()
        self._layers = (_LayerArgs * config.num_layers)()
        for index, layer in enumerate(model.layers):
            assert isinstance(layer, Layer)
            self._take_layer(layer, self._layers[index], config.sliding_windows[index])
        args.layers = ctypes.addressof(self._layers)
        args.num_layers, args.hidden, args.eps = config.num_layers, config.hidden_size, config.rms_norm_eps
        args.norm = self._keep(model.norm.weight)
        is_tied = model.lm_head.weight is model.embed_tokens.weight
        args.embedding = self._keep(packed(_taken(model.embed_tokens)))
        weight = args.embedding if is_tied else self._keep(packed(_taken(model.lm_head)))
        args.head = Linear(weight, None, config.hidden_size, config.vocab_size)
        self._workspace = torch.empty(0, dtype=self._dtype)
        first = self._layers[0]
        self._activations = 3 * config.hidden_size + first.qkv.outputs + 2 * first.o.inputs + config.intermediate_size

    @torch.inference_mode()
    def __call__(self, batch: ForwardBatch, cache: Tensor) -> Tensor:
        """Logits float32 `[R, vocab]` of `batch.logits_indices`; see `Transformer.forward`."""
        args, kernels, num_tokens = self._args, library(), len(batch.token_ids)
        assert kernels is not None
        spans = [(span.query_start, span.query_len, span.context_len) for span in batch.spans]
        attention = AttentionBatch(spans, [span.block_table for span in batch.spans], None)
        attention.point_to(cache[:, 0], self.config.num_heads)
        args.attention, args.layer_stride = attention.args, cache.stride(1)
        cos, sin = rotation(batch.positions, self._frequencies, self._rope_scale, self._dtype)
        logits = torch.empty(len(batch.logits_indices), self.config.vocab_size)
        args.token_ids, args.slots = batch.token_ids.data_ptr(), batch.slot_mapping.data_ptr()
        args.logits_rows, args.logits = batch.logits_indices.data_ptr(), logits.data_ptr()
        args.cos, args.sin, args.workspace = cos.data_ptr(), sin.data_ptr(), self._room(num_tokens)
        args.num_tokens, args.num_logits = num_tokens, len(logits)
        kernels.baton_step(ctypes.byref(args), DTYPES[self._dtype], isa())
        return logits

    def _room(self, num_tokens: int) -> int:
        """The address of a workspace for `num_tokens`; it is kept, because fresh memory costs more than its use."""
        size = (num_tokens + ROWS_BEHIND) * self._activations
        if len(self._workspace) < size:
            self._workspace = torch.empty(size, dtype=self._dtype)
        return self._workspace.data_ptr()

    def _keep(self, tensor: Tensor) -> int:
        self._kept.append(tensor.contiguous())
        return self._kept[-1].data_ptr()

    def _linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        """`weight` is `[outputs, inputs]`."""
        outputs, inputs = weight.shape
        bias_at = None
        if bias is not None:
            bias_at = self._keep(nn.functional.pad(bias.float(), (0, -outputs % PANEL)))
        return Linear(self._keep(packed(weight)), bias_at, inputs, outputs)

    def _take_layer(self, layer: Layer, args: _LayerArgs, window: int | None) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        args.input_norm = self._keep(layer.input_layernorm.weight)
        args.post_norm = self._keep(layer.post_attention_layernorm.weight)
        if attention.q_norm is not None and attention.k_norm is not None:
            args.q_norm, args.k_norm = self._keep(attention.q_norm.weight), self._keep(attention.k_norm.weight)
        args.qkv = self._linear(_taken(attention.qkv_proj), attention.qkv_proj.bias)
        args.o = self._linear(_taken(attention.o_proj), attention.o_proj.bias)
        bias = mlp.gate_up_proj.bias
        args.gate_up = self._linear(_dealt(_taken(mlp.gate_up_proj)), None if bias is None else _dealt(bias))
        args.down = self._linear(_taken(mlp.down_proj), mlp.down_proj.bias)
        args.window = MAX_INT64 if window is None else window


def _dealt(gate_up: Tensor) -> Tensor:
    """Interleaves `[2 * intermediate, ...]`, all gates first, into gates and their values by half panels."""
    return gate_up.view(2, -1, GATES, *gate_up.shape[1:]).transpose(0, 1).reshape(gate_up.shape)


def _taken(module: nn.Linear | VocabEmbedding) -> Tensor:
    """The weight, removed from the module: two copies of all weights would be too much."""
    weight = module.weight.detach()
    module.weight = nn.Parameter(torch.empty(0, dtype=weight.dtype), requires_grad=False)
    return weight
