"""Attention kernels for CUDA devices, and which of them to use. Not yet run on a GPU: a kernel that is not torch's own
SDPA is used only after it has given SDPA's result on this very device (`choose_backend`).

- `varlen`: torch's `varlen_attn` with `block_table`. The kernels that torch itself brings (FlashAttention 2) refuse
  block tables; those that it can activate take them: FA3 on compute capability 9, FA4 on 10, each where its package
  (`flash_attn_interface`, `flash_attn.cute`) is installed. They read strides, so that keys and values may lie side by
  side in a block, and take pages of any size; dtypes are float16 and bfloat16.
- `flashinfer`: FlashInfer's paged prefill, where it is installed; the same dtypes, any page size and strides.
- `padded`: plain torch, any dtype and device. Decode steps gather blocks, padded to the widest table, and mask; other
  steps have no kernel here, each span is gathered by `engine.attention`.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import attention
from torch.nn.functional import scaled_dot_product_attention

from engine.attention import ForwardBatch, Kernel, SequenceSpan, attend, plan_attention
from engine.config import ModelConfig
from engine.device_batch import BatchShape, PagedTables, pack, unpack

logger = logging.getLogger(__name__)

Backend = Literal["varlen", "flashinfer", "padded"]
HALF_DTYPES = (torch.float16, torch.bfloat16)
FLASH_IMPLS = {9: "FA3", 10: "FA4"}  # by the major compute capability: those that take block tables there
WORKSPACE_BYTES = 128 * 1024 * 1024  # what FlashInfer recommends
PROBE_TOLERANCE = 2e-2  # in half precision


class VarlenKernel:
    """Needs only tables, so it can be part of a graph whose tables change."""

    def __init__(self, tables: PagedTables, window: int | None) -> None:
        # Imported late: it brings torch's compiler with it, which takes seconds and which CPUs do not need.
        self._attend = importlib.import_module("torch.nn.attention.varlen").varlen_attn_out
        self._tables = tables
        self._window = (-1 if window is None else window - 1, 0)  # keys before a query's own, behind it

    def attend(self, q: Tensor, cache: Tensor, out: Tensor) -> None:
        tables = self._tables
        self._attend(
            out,
            q,
            cache[:, 0],
            cache[:, 1],
            tables.query_starts,
            None,  # with block tables, `seqused_k` says how many keys there are
            tables.max_query_len,
            tables.max_context_len,
            window_size=self._window,
            enable_gqa=q.shape[1] != cache.shape[3],
            seqused_k=tables.context_lens,
            block_table=tables.block_tables,
        )


class PaddedKernel:
    """Decode steps in plain torch: each row gathers its whole table. Needs only tables, like `VarlenKernel`."""

    def __init__(self, tables: PagedTables, window: int | None, block_size: int) -> None:
        self._tables = tables.block_tables
        contexts = tables.context_lens[:, None]
        positions = torch.arange(tables.block_tables.shape[1] * block_size, device=contexts.device)[None]
        self._is_seen = positions < contexts  # [S, width * block_size]
        if window is not None:
            self._is_seen &= positions >= contexts - window

    def attend(self, q: Tensor, cache: Tensor, out: Tensor) -> None:
        keys, values = (self._gather(cache[:, part]) for part in (0, 1))  # [S, Hkv, width * block_size, D]
        grouped = q.view(q.shape[0], keys.shape[1], -1, q.shape[2])  # the heads that share a KV head become its queries
        attended = scaled_dot_product_attention(grouped, keys, values, attn_mask=self._is_seen[:, None, None])
        out.copy_(attended.reshape(q.shape))

    def _gather(self, pages: Tensor) -> Tensor:
        """Masked values become 0, because an attention weight of 0 would not remove a NaN there."""
        gathered = pages[self._tables].flatten(1, 2)
        return gathered.masked_fill_(~self._is_seen[:, :, None, None], 0.0).transpose(1, 2)


class FlashInferKernel:
    """Planned on the host for each step; with `shape` it is part of a graph, and planned again before each replay."""

    def __init__(
        self, config: ModelConfig, window: int | None, like: Tensor, block_size: int, shape: BatchShape | None = None
    ) -> None:
        """`like` is a tensor with the dtype and device of the cache."""
        self._config, self._window, self._dtype, self._block_size = config, window, like.dtype, block_size
        buffers: dict[str, Any] = {}
        if shape is not None:
            sizes = {
                "qo_indptr_buf": shape.num_sequences + 1,
                "paged_kv_indptr_buf": shape.num_sequences + 1,
                "paged_kv_indices_buf": shape.num_sequences * shape.width,
                "paged_kv_last_page_len_buf": shape.num_sequences,
            }
            buffers = {name: torch.zeros(size, dtype=torch.int32, device=like.device) for name, size in sizes.items()}
        wrapper = importlib.import_module("flashinfer").BatchPrefillWithPagedKVCacheWrapper
        self._wrapper = wrapper(_workspace(like.device), "NHD", use_cuda_graph=shape is not None, **buffers)

    def plan(self, spans: Sequence[SequenceSpan]) -> None:
        """Plans the next step. The block tables of `spans` are on the host."""
        size = self._block_size
        blocks = [-(-span.context_len // size) for span in spans]
        used = [span.block_table[:count] for span, count in zip(spans, blocks, strict=True)]
        self._wrapper.plan(
            _int32([0, *itertools.accumulate(span.query_len for span in spans)]),
            _int32([0, *itertools.accumulate(blocks)]),
            torch.cat(used).int(),
            _int32([span.context_len - (count - 1) * size for span, count in zip(spans, blocks, strict=True)]),
            self._config.num_heads,
            self._config.num_kv_heads,
            self._config.head_dim,
            size,
            causal=True,
            window_left=-1 if self._window is None else self._window - 1,
            q_data_type=self._dtype,
        )

    def attend(self, q: Tensor, cache: Tensor, out: Tensor) -> None:
        self._wrapper.run(q.contiguous(), cache, out=out)


def _int32(numbers: Sequence[int]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


@functools.cache
def _workspace(device: torch.device) -> Tensor:
    """FlashInfer's scratch memory, shared by all kernels: those of one stream run one after the other."""
    return torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)


def table_kernels(
    backend: Backend, tables: PagedTables, windows: Sequence[int | None], block_size: int
) -> Mapping[int | None, Kernel]:
    """The kernel of each window; empty if `backend` needs more than tables."""
    if backend == "varlen":
        return {window: VarlenKernel(tables, window) for window in set(windows)}
    if backend == "padded" and tables.max_query_len == 1:
        return {window: PaddedKernel(tables, window, block_size) for window in set(windows)}
    return {}


def planned_kernels(
    config: ModelConfig, like: Tensor, block_size: int, shape: BatchShape | None = None
) -> dict[int | None, FlashInferKernel]:
    """The FlashInfer kernel of each window, not planned yet."""
    windows = set(config.sliding_windows)
    return {window: FlashInferKernel(config, window, like, block_size, shape) for window in windows}


# --- which one ---


def choose_backend(config: ModelConfig, cache: Tensor) -> Backend:
    """The first backend that supports this model's attention here and gives SDPA's result; `cache` has all layers."""
    if cache.dtype in HALF_DTYPES and cache.is_cuda:
        for backend, is_there in CANDIDATES:
            if is_there(cache.device) and _is_right(backend, config, cache):
                logger.info("event=attention_backend backend=%s", backend)
                return backend
            if backend == "varlen" and attention.current_flash_attention_impl() is not None:
                attention.restore_flash_attention_impl()  # else SDPA would use it, too
    logger.info("event=attention_backend backend=padded")
    return "padded"


def _has_varlen(device: torch.device) -> bool:
    """Whether torch's flash attention accepts block tables, after activating the implementation that does."""
    impl = FLASH_IMPLS.get(torch.cuda.get_device_capability(device)[0])
    if impl is None:
        return False
    try:
        if attention.current_flash_attention_impl() != impl:
            attention.activate_flash_attention_impl(impl)
    except Exception as error:  # the package is missing, or not the one that torch expects
        logger.info("event=no_flash_attention impl=%s reason=%r", impl, error)
        return False
    return True


def _has_flashinfer(device: torch.device) -> bool:
    try:
        importlib.import_module("flashinfer")
    except Exception as error:
        logger.info("event=no_flashinfer reason=%r", error)
        return False
    return True


CANDIDATES: tuple[tuple[Backend, Callable[[torch.device], bool]], ...] = (
    ("varlen", _has_varlen),
    ("flashinfer", _has_flashinfer),
)


def _is_right(backend: Backend, config: ModelConfig, cache: Tensor) -> bool:
    """Whether a prompt's chunk and a decode step in one batch give SDPA's result, for each window."""
    try:
        worst = probe(backend, config, cache)
    except Exception as error:
        logger.warning("event=attention_refused backend=%s reason=%r", backend, error)
        return False
    if not worst <= PROBE_TOLERANCE:
        logger.warning("event=attention_wrong backend=%s error=%.3g", backend, worst)
    return worst <= PROBE_TOLERANCE


@torch.inference_mode()
def probe(backend: Backend, config: ModelConfig, cache: Tensor) -> float:
    """The largest error against SDPA over random numbers, in a cache of three blocks like `cache`.

    Relative for values above 1, where half precision has fewer digits after the point. NaN if any value is.
    """
    size = cache.shape[3]

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=cache.dtype, device=cache.device)

    spans = (SequenceSpan(0, 2, size + 2, torch.tensor([2, 0])), SequenceSpan(2, 1, size, torch.tensor([1])))
    ids = torch.tensor([size, size + 1, size - 1])
    host = ForwardBatch(ids, ids, torch.tensor([0, 1, 2 * size - 1]), spans, ids[:0])
    shape = BatchShape.of(host, size)
    batch, tables = unpack(pack(host, shape, size).to(cache.device), shape, spans, size)
    small = noise(3, 1, *cache.shape[2:])
    q, k, v = noise(3, config.num_heads, config.head_dim), noise(3, *cache.shape[4:]), noise(3, *cache.shape[4:])
    planned = planned_kernels(config, cache, size) if backend == "flashinfer" else {}
    kernels = planned or table_kernels(backend, tables, config.sliding_windows, size)
    errors = [torch.zeros(())]
    for window, kernel in kernels.items():
        if isinstance(kernel, FlashInferKernel):
            kernel.plan(spans)
        expected = attend(q, k, v, small[:, 0], plan_attention(batch, small, window))
        actual = torch.empty_like(expected)
        kernel.attend(q, small[:, 0], actual)
        errors.append(((actual - expected).abs() / expected.abs().clamp(min=1.0)).max().float().cpu())
    return float(torch.stack(errors).max())  # which, unlike Python's, propagates NaN
