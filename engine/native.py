"""The compiled kernels, where this installation has them: `engine/csrc`, called through ctypes.

If they are missing (no compiler at installation) or do not support a case (a dtype, an odd head size), the caller uses
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
from torch.nn.functional import pad

logger = logging.getLogger(__name__)

CHUNK_BYTES = 64  # a head is a whole number of them
MAX_HEAD_DIM = 256
PANEL = 32  # outputs whose weights are packed together; kPanel in csrc/rows.inc
MAX_INT64 = 2**63 - 1
DTYPES = {torch.float32: 0, torch.bfloat16: 1}
ISA_NAMES = ("portable code", "AVX2", "AVX-512", "AVX-512 BF16", "AMX")
AMX = ISA_NAMES.index("AMX")
ROWS_BEHIND = 31  # that AMX may read after the last row of a linear layer's input


class Linear(ctypes.Structure):
    """As in csrc/native.cpp, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "bias")),
        *((name, ctypes.c_int64) for name in ("inputs", "outputs")),
    )


class _LinearArgs(ctypes.Structure):
    _fields_ = (
        ("linear", Linear),
        *((name, ctypes.c_void_p) for name in ("x", "y")),
        ("rows", ctypes.c_int64),
        ("num_threads", ctypes.c_int32),
    )


class AttentionArgs(ctypes.Structure):
    """As in csrc/native.cpp, field by field."""

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
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None if the installation has none."""
    spec = importlib.util.find_spec("engine._native")
    if spec is None or spec.origin is None:
        logger.warning("event=no_compiled_kernels models run in plain torch, which is slower")
        return None
    kernels = ctypes.CDLL(spec.origin)
    for function in (kernels.baton_attention, kernels.baton_linear, kernels.baton_step):
        function.argtypes = [ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32]
        function.restype = None
    return kernels


@functools.cache
def isa() -> int:
    """The instruction set that the kernels use here, an index of `ISA_NAMES`; -1 without kernels."""
    kernels = library()
    widest = -1 if kernels is None else int(kernels.baton_isa())
    if widest == AMX and not _agrees(AMX, AMX - 1):
        logger.warning("event=isa_refused isa=AMX its sums are not those of AVX-512")
        return AMX - 1
    return widest


def _agrees(isa: int, with_isa: int) -> bool:
    """Whether two instruction sets give the same result up to rounding; checked before AMX is used."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(100, 96, generator=generator), torch.randn(72, 96, generator=generator)
    mine, theirs = (linear(x.bfloat16(), packed(weight.bfloat16()), 72, use) for use in (isa, with_isa))
    return bool(torch.allclose(mine, theirs, rtol=1e-3, atol=1e-3))


def packed(weight: Tensor) -> Tensor:
    """`[outputs, inputs]` as the kernels read it: int32 `[panels, units, PANEL]`, outputs padded with zeros.

    A unit is 4 bytes of a row: one float32, or two bfloat16.
    """
    units = pad(weight, (0, 0, 0, -weight.shape[0] % PANEL)).view(torch.int32)
    return units.view(-1, PANEL, units.shape[1]).transpose(1, 2).contiguous()


def linear(x: Tensor, packed_weight: Tensor, outputs: int, use_isa: int | None = None) -> Tensor:
    """`x . weight^T` in float32, `[N, outputs]`, for x `[N, inputs]`."""
    kernels, room = library(), pad(x, (0, 0, 0, ROWS_BEHIND))
    assert kernels is not None
    y = torch.empty(len(x), outputs)
    layer = Linear(packed_weight.data_ptr(), None, x.shape[1], outputs)
    args = _LinearArgs(layer, room.data_ptr(), y.data_ptr(), len(x), torch.get_num_threads())
    kernels.baton_linear(ctypes.byref(args), DTYPES[x.dtype], isa() if use_isa is None else use_isa)
    return y


def can_attend(head_dim: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `AttentionBatch.attend` supports this case."""
    return (
        library() is not None
        and device.type == "cpu"
        and dtype in DTYPES
        and head_dim * dtype.itemsize % CHUNK_BYTES == 0
        and head_dim <= MAX_HEAD_DIM
    )


class AttentionBatch:
    """The sequences of a step: their rows and their blocks. The same for all layers of one window."""

    def __init__(self, spans: Sequence[tuple[int, int, int]], tables: Sequence[Tensor], window: int | None) -> None:
        """`spans`: each sequence's first row of q, number of queries, and tokens in KV after this step; `tables`: its
        block ids (int64); `window` in tokens."""
        starts = itertools.accumulate((len(table) for table in tables[:-1]), initial=0)
        ids = torch.tensor([*zip(*spans, strict=True), list(starts)], dtype=torch.int64)
        self._kept = ids, torch.cat(list(tables))  # the arguments point into them
        self.args = args = AttentionArgs()
        args.query_starts, args.query_lens, args.context_lens, args.table_starts = (row.data_ptr() for row in ids)
        args.block_tables = self._kept[1].data_ptr()
        args.num_sequences = len(spans)
        args.window = MAX_INT64 if window is None else window

    def point_to(self, layer: Tensor, num_heads: int) -> None:
        """Sets what depends on one layer of a cache, `[blocks, 2, block_size, Hkv, D]`, each block contiguous."""
        args = self.args
        args.cache = layer.data_ptr()
        args.block_stride, args.value_offset, args.block_size = layer.stride(0), layer.stride(1), layer.shape[2]
        args.num_heads, args.num_kv_heads, args.head_dim = num_heads, layer.shape[3], layer.shape[4]
        args.num_threads, args.scale = torch.get_num_threads(), 1.0 / math.sqrt(layer.shape[4])

    def attend(self, q: Tensor, layer: Tensor, out: Tensor, use_isa: int | None = None) -> None:
        """Fills this batch's rows of `out`. Scores are scaled by 1/sqrt(D).

        q and out are `[N, H, D]` with rows contiguous; `layer` is one layer of the cache, `[blocks, 2, block_size, Hkv,
        D]`, with this step's keys and values already in it. Only for what `can_attend`.
        """
        args, kernels = self.args, library()
        assert kernels is not None
        self.point_to(layer, q.shape[1])
        args.q, args.out, args.q_stride, args.out_stride = q.data_ptr(), out.data_ptr(), q.stride(0), out.stride(0)
        kernels.baton_attention(ctypes.byref(args), DTYPES[q.dtype], isa() if use_isa is None else use_isa)
