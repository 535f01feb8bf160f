"""What hardware takes for a model: the simulator's nodes as formulas. Sources beside each."""

from __future__ import annotations

from dataclasses import dataclass

from router.speeds import PrefillSpeed


@dataclass(frozen=True)
class Machine:
    """One node: a model on some GPUs. `kv_bytes_per_s` is how fast decoding reads its cache."""

    prefill: PrefillSpeed
    step_base_s: float  # weights are read, layers are launched
    step_request_s: float  # each request of the batch, its cache apart
    step_token_s: float  # each token in the cache of any of them
    token_bytes: int  # of KV
    wire_bytes_per_s: float  # from another node's cache

    def step_s(self, num_requests: float, cached_tokens: float) -> float:
        return self.step_base_s + self.step_request_s * num_requests + self.step_token_s * cached_tokens


def llama_70b(
    flops_per_s: float, memory_bytes_per_s: float, wire_bytes_per_s: float, step_base_s: float, mfu: float = 0.5
) -> Machine:
    """Llama 3 70B. FLOPs of a prompt of n tokens: 80 (4 d n^2 + 22 d^2 n), d = 8192 (Mooncake, FAST'25, table 1)."""
    layers, width, attention, products = 80, 8192, 4, 22
    rate = flops_per_s * mfu
    return Machine(
        # n^2 - p^2 = 2 u (p + u / 2) for u tokens behind p cached ones
        PrefillSpeed(0.02, layers * products * width**2 / rate, 2 * layers * attention * width / rate),
        step_base_s=step_base_s,
        step_request_s=layers * products * width**2 / rate,
        step_token_s=327_680 / memory_bytes_per_s,
        token_bytes=327_680,  # 80 layers x 8 kv heads x 128 x 2 x bf16
        wire_bytes_per_s=wire_bytes_per_s,
    )


MACHINES = {
    # 8 x 312 TFLOP/s, 8 x 2.0 TB/s at 60 %; 87 GB/s over 4 x 200 Gb/s RDMA (FAST'25, figure 12); a step of 45 ms at
    # 1,024 tokens of context was published for TP 8 by splitwise-sim (perf_model.csv), most of which is not bandwidth
    "8xA100": llama_70b(8 * 312e12, 8 * 2.0e12 * 0.6, 87e9, step_base_s=0.030),
    "8xH100": llama_70b(8 * 989e12, 8 * 3.35e12 * 0.6, 190e9, step_base_s=0.020, mfu=0.4),
}
