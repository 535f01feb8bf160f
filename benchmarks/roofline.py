"""The least time that a machine could take for a model's work: its bytes over the memory's rate, or its FLOPs over
the cores', whichever is longer.

Counted: the linears, the vocabulary's product for each token that is sampled, causal attention, and the weights and
KV that a step has to read once. Not counted: activations, norms, rotations, biases, embeddings looked up; so nothing
reaches 1. Both rates are measured, by numpy and torch (see `Meter`): they are what these reach on these cores, not
what is printed on the box, and a kernel better than theirs may come out above 1.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.engine_shapes import Shape

ITEM_BYTES = 2  # bf16
BUFFER_BYTES = 1 << 30  # far more than any L3 cache holds
MATRIX_SIZES = (512, 1024, 2048, 3072)
REPEATS = 5


@dataclass(frozen=True)
class Work:
    """What has to be read and computed."""

    read_bytes: float
    flops: float

    def __add__(self, other: Work) -> Work:
        return Work(self.read_bytes + other.read_bytes, self.flops + other.flops)


@dataclass(frozen=True)
class Machine:
    """What some cores can do at best."""

    read_bytes_per_s: float
    flops_per_s: float

    def seconds(self, work: Work) -> float:
        return max(work.read_bytes / self.read_bytes_per_s, work.flops / self.flops_per_s)

    def bound(self, work: Work) -> str:
        """What the time is spent on."""
        return "memory" if work.read_bytes / self.read_bytes_per_s > work.flops / self.flops_per_s else "FLOPs"


def layer_weights(shape: Shape) -> int:
    """Parameters of the linears of all layers."""
    attention = 2 * (shape.num_heads + shape.num_kv_heads) * shape.head_dim * shape.hidden_size
    return shape.num_layers * (attention + 3 * shape.hidden_size * shape.intermediate_size)


def head_weights(shape: Shape) -> int:
    """Parameters of the product with the vocabulary."""
    return shape.vocab_size * shape.hidden_size


def kv_token_bytes(shape: Shape) -> int:
    """Of one token in all layers."""
    return shape.num_layers * 2 * shape.num_kv_heads * shape.head_dim * ITEM_BYTES


def attention_flops(shape: Shape, contexts: float) -> float:
    """Scores and values of queries that see `contexts` tokens in all."""
    return 4.0 * shape.num_layers * shape.num_heads * shape.head_dim * contexts


def prefill(shape: Shape, count: int, length: int) -> Work:
    """`count` prompts of `length` tokens, each with its first output token, the weights read once for all."""
    flops = 2.0 * count * (length * layer_weights(shape) + head_weights(shape))
    flops += attention_flops(shape, count * length * (length + 1) / 2)
    read_bytes = ITEM_BYTES * (layer_weights(shape) + head_weights(shape)) + count * length * kv_token_bytes(shape)
    return Work(read_bytes, flops)


def decode(shape: Shape, batch: int, context: float) -> Work:
    """One step of `batch` requests that have `context` tokens each."""
    weights = layer_weights(shape) + head_weights(shape)
    read_bytes = ITEM_BYTES * weights + batch * context * kv_token_bytes(shape)
    return Work(read_bytes, 2.0 * batch * weights + attention_flops(shape, batch * context))


class Meter:
    """Measures the machine again and again between rows, on the process's cores; the best is what it can do."""

    MEASURED_BY = "torch sum of float32 and float64, numpy bitwise_or of slices; torch bf16 product of squares"

    def __init__(self, threads: int) -> None:
        torch.set_num_threads(threads)
        self._threads = threads
        self._buffer = np.ones(BUFFER_BYTES // 8, np.int64)
        self._squares = [torch.randn(size, size).bfloat16() for size in MATRIX_SIZES]
        self.samples: list[Machine] = []

    def measure(self) -> None:
        """About a second; nothing else is to compute meanwhile."""
        read_s = min(_best_s(way) for way in self._read_ways())
        rates = [
            2.0 * len(square) ** 3 / _best_s(functools.partial(torch.mm, square, square)) for square in self._squares
        ]
        self.samples.append(Machine(self._buffer.nbytes / read_s, max(rates)))

    def best(self) -> Machine:
        return Machine(
            max(sample.read_bytes_per_s for sample in self.samples), max(sample.flops_per_s for sample in self.samples)
        )

    def _read_ways(self) -> Sequence[Callable[[], object]]:
        """Which is the fastest hangs on the processor and on how many threads read."""
        floats = torch.from_numpy(self._buffer)
        slices = np.array_split(self._buffer, self._threads)

        def or_slices() -> None:
            with ThreadPoolExecutor(self._threads) as pool:
                list(pool.map(np.bitwise_or.reduce, slices))

        return floats.view(torch.float32).sum, floats.view(torch.float64).sum, or_slices


def _best_s(run: Callable[[], object]) -> float:
    times_s = []
    for _ in range(REPEATS):
        start_s = time.perf_counter()
        run()
        times_s.append(time.perf_counter() - start_s)
    return min(times_s)
