"""The compiled kernels, where this installation has them: `engine/csrc`, called through ctypes.

Where they are missing (no compiler at installation) or cannot do a case (a dtype, an odd head size), the caller takes
plain torch, which gives the same tokens more slowly. Knows shapes and pointers; no model.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import itertools
import logging
import math
from collections.abc import Sequence

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

CHUNK_BYTES = 64  # a head is a whole number of them
MAX_HEAD_DIM = 256
MAX_INT64 = 2**63 - 1
DTYPES = {torch.float32: 0, torch.bfloat16: 1}
ISA_NAMES = ("portable code", "AVX2", "AVX-512", "AVX-512 BF16")


class _AttentionArgs(ctypes.Structure):
    """`AttentionArgs` of paged_attention.cpp, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "cache", "out")),
        *((name, ctypes.c_void_p) for name in ("query_starts", "query_lens", "context_lens")),
        *((name, ctypes.c_void_p) for name in ("table_starts", "block_tables")),
        *((name, ctypes.c_int64) for name in ("q_stride", "out_stride", "block_stride", "value_offset")),
        *((name, ctypes.c_int64) for name in ("block_size", "num_sequences", "window")),
        *((name, ctypes.c_int32) for name in ("num_heads", "num_kv_heads", "head_dim", "num_threads")),
        ("scale", ctypes.c_float),
    )


@functools.cache
def _library() -> ctypes.CDLL | None:
    spec = importlib.util.find_spec("engine._native")
    if spec is None or spec.origin is None:
        logger.warning("event=no_compiled_kernels attention runs in plain torch, which is slower")
        return None
    library = ctypes.CDLL(spec.origin)
    for function in (library.baton_decode_attention, library.baton_prompt_attention):
        function.argtypes = [ctypes.POINTER(_AttentionArgs), ctypes.c_int32, ctypes.c_int32]
        function.restype = None
    return library


@functools.cache
def isa() -> int:
    """The instruction set that the kernels use here, an index of `ISA_NAMES`; -1 without kernels."""
    library = _library()
    return -1 if library is None else int(library.baton_isa())


def can_attend(head_dim: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `AttentionBatch.attend` does this shape."""
    return (
        _library() is not None
        and device.type == "cpu"
        and dtype in DTYPES
        and head_dim * dtype.itemsize % CHUNK_BYTES == 0
        and head_dim <= MAX_HEAD_DIM
    )


class AttentionBatch:
    """Sequences of a step that one kernel takes together; the same for all layers of one window."""

    def __init__(self, spans: Sequence[tuple[int, int, int]], tables: Sequence[Tensor], window: int | None) -> None:
        """Of each sequence: its first row of q, its queries, its tokens in KV after this step; its blocks (int64).

        Batches of single queries go to the kernel of decode steps, all others to that of prompts.
        """
        starts = itertools.accumulate((len(table) for table in tables[:-1]), initial=0)
        ids = torch.tensor([*zip(*spans, strict=True), list(starts)], dtype=torch.int64)
        self._kept = ids, torch.cat(list(tables))  # the arguments point into them
        self._is_decode = all(length == 1 for _, length, _ in spans)
        self._args = args = _AttentionArgs()
        args.query_starts, args.query_lens, args.context_lens, args.table_starts = (row.data_ptr() for row in ids)
        args.block_tables = self._kept[1].data_ptr()
        args.num_sequences = len(spans)
        args.window = MAX_INT64 if window is None else window

    def attend(self, q: Tensor, cache: Tensor, out: Tensor, use_isa: int | None = None) -> None:
        """Fills this batch's rows of `out`. Scores are scaled by 1/sqrt(D).

        q and out are `[N, H, D]` with rows contiguous; `cache` is one layer's, `[blocks, 2, block_size, Hkv, D]`, each
        block contiguous, with this step's keys and values already in it. Only for what `can_attend`.
        """
        library, args = _library(), self._args
        assert library is not None
        args.q, args.cache, args.out = q.data_ptr(), cache.data_ptr(), out.data_ptr()
        args.q_stride, args.out_stride = q.stride(0), out.stride(0)
        args.block_stride, args.value_offset, args.block_size = cache.stride(0), cache.stride(1), cache.shape[2]
        args.num_heads, args.num_kv_heads, args.head_dim = q.shape[1], cache.shape[3], q.shape[2]
        args.num_threads, args.scale = torch.get_num_threads(), 1.0 / math.sqrt(q.shape[2])
        function = library.baton_decode_attention if self._is_decode else library.baton_prompt_attention
        function(ctypes.byref(args), DTYPES[q.dtype], isa() if use_isa is None else use_isa)
