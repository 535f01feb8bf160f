"""How long hardware takes for a model: the simulator's nodes as formulas. docs/simulator.md has their sources."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loadtest.trace import BLOCK_TOKENS
from router.fit import LinearFit
from router.speeds import PrefillSpeed, prefill_features


class BadMachine(ValueError):
    """No such machine, or an invalid file; names the field."""


@dataclass(frozen=True)
class Machine:
    """One node: a model on some GPUs.

    A step that computes `tokens` takes the launch, the longer of reading all weights and multiplying with them, the
    reading of the batch's caches, and the attention of its prompts' tokens. `prefill` is a step of a prompt alone.
    """

    prefill: PrefillSpeed  # its base is the launch of a step with prompts: kernels, all-reduces, sampling
    weights_s: float  # reading all weights once
    kv_token_s: float  # reading one cached token while decoding
    token_bytes: int  # of KV
    wire_bytes_per_s: float  # from another node's arena
    kv_blocks: int = 0  # that a node's GPUs hold; 0: without limit
    first_s: float = 0.0  # that calls and the router add to a first token; no node is busy with it
    handoff_s: float = 0.0  # that they add between the first token and the second, where two nodes make them
    chunk_tokens: int = 0  # of a prefill node's step; 0: a whole prompt, one at a time
    stall_s: float = 0.0  # a prompt of so little work is computed by the decode node itself (`Rates.max_stall_s`)
    prompts_s: float = 0.0  # of the launch, what a step that only decodes is spared

    def step_s(self, num_tokens: float, cached_tokens: float, pairs: float = 0.0) -> float:
        """A step of `num_tokens`, decoded and of prompts; the decoding requests have `cached_tokens`."""
        products_s = max(self.weights_s, num_tokens * self.prefill.token_s)
        launch_s = self.prefill.base_s - (0.0 if pairs else self.prompts_s)
        return launch_s + products_s + cached_tokens * self.kv_token_s + pairs * self.prefill.pair_s

    def chunked(self, chunk_tokens: int) -> PrefillSpeed:
        """The speed of a prompt in steps of `chunk_tokens`, on a node without other work."""
        step_s = self.prefill.base_s + max(self.weights_s, chunk_tokens * self.prefill.token_s)
        return replace(self.prefill, base_s=0.0, token_s=step_s / chunk_tokens)


def llama_70b(num_gpus: int, flops_per_s: float, mfu: float, memory: tuple[float, float], wire: float) -> Machine:
    """Llama 3 70B in bf16 on GPUs of `flops_per_s` and `memory` (bytes, bytes/s) each; `wire` bytes/s for all.

    FLOPs of a prompt of n tokens: 80 (4 d n^2 + 22 d^2 n), d = 8192 (Mooncake, FAST'25, table 1).
    """
    layers, width, attention, products = 80, 8192, 4, 22
    rate, weight_bytes, token_bytes = num_gpus * flops_per_s * mfu, 70.6e9 * 2, 80 * 8 * 128 * 2 * 2
    memory_bytes, memory_rate = num_gpus * memory[0] * 0.9, num_gpus * memory[1] * 0.6
    return Machine(
        # n^2 - p^2 = 2 u (p + u / 2) for u tokens behind p cached ones
        PrefillSpeed(0.02, layers * products * width**2 / rate, 2 * layers * attention * width / rate),
        weights_s=weight_bytes / memory_rate,
        kv_token_s=token_bytes / memory_rate,
        token_bytes=token_bytes,
        wire_bytes_per_s=wire,
        kv_blocks=int((memory_bytes - weight_bytes) / token_bytes / BLOCK_TOKENS),
    )


# 87 GB/s over 4 x 200 Gb/s and 190 GB/s over 8 x 400 Gb/s of RDMA (FAST'25, figure 12).
MACHINES = {
    "8xA100": llama_70b(8, 312e12, 0.5, (80e9, 2.0e12), 87e9),
    "8xH100": llama_70b(8, 989e12, 0.4, (80e9, 3.35e12), 190e9),
}


def find_machine(name: str) -> Machine:
    """A machine by name, or, if the name is a file, fitted to the measurements in it. Raises `BadMachine`."""
    if name in MACHINES:
        return MACHINES[name]
    if not name.endswith(".json"):
        raise BadMachine(f"machine must be one of {', '.join(MACHINES)} or a .json file of measurements, got {name!r}")
    try:
        return fitted(json.loads(Path(name).read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError) as error:
        raise error if isinstance(error, BadMachine) else BadMachine(f"machine {name}: {error}") from error


def fitted(data: Any) -> Machine:
    """A machine from measurements: `{"prefill": [[uncached, cached, seconds], ...], "step": [[requests, cached,
    seconds], ...], "token_bytes", "wire_bytes_per_s", "kv_blocks"}`, lengths in tokens; optional, 0.0 by default:
    "first_s", "handoff_s", "chunk_tokens", "stall_s". Raises `BadMachine`."""
    if not isinstance(data, dict):
        raise BadMachine("machine: must be an object")
    prefill = _fit("prefill", data.get("prefill"), 3)
    step = _fit("step", data.get("step"), 2)
    return Machine(
        PrefillSpeed(*prefill),
        weights_s=max(0.0, step[0] - prefill[0]),  # the launch is in both
        prompts_s=max(0.0, prefill[0] - step[0]),
        kv_token_s=step[1],
        token_bytes=int(_positive(data, "token_bytes")),
        wire_bytes_per_s=_positive(data, "wire_bytes_per_s"),
        kv_blocks=int(_positive(data, "kv_blocks")),
        first_s=_natural(data, "first_s"),
        handoff_s=_natural(data, "handoff_s"),
        chunk_tokens=int(_natural(data, "chunk_tokens")),
        stall_s=_natural(data, "stall_s"),
    )


def _fit(field: str, rows: Any, num_factors: int) -> tuple[float, ...]:
    """The factors of `(1, u, pairs)` for prefill, of `(1, cached)` for steps."""
    if not isinstance(rows, list) or not rows:
        raise BadMachine(f"machine: {field} must be a list of [number, number, seconds]")
    fit = LinearFit([0.0] * num_factors, [], fade=1.0)
    for row in rows:
        if not isinstance(row, list) or len(row) != 3 or not all(_is_sound(value) for value in row) or row[2] <= 0:
            raise BadMachine(f"machine: {field} must hold [number, number, seconds > 0], got {row!r}")
        features = prefill_features(row[0], row[1]) if num_factors == 3 else (1.0, float(row[1]))
        fit.observe(features, float(row[2]))
    return fit.factors


def _positive(data: dict[str, Any], field: str) -> float:
    value = data.get(field)
    if value is None or not _is_sound(value) or not 1 <= value <= 1e18:
        raise BadMachine(f"machine: {field} must be a number of at least 1, got {value!r}")
    return float(value)


def _natural(data: dict[str, Any], field: str) -> float:
    value = data.get(field, 0.0)
    if not _is_sound(value) or value > 1e9:
        raise BadMachine(f"machine: {field} must be a number of 0 to 1e9, got {value!r}")
    return float(value)


def _is_sound(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
