"""The configuration of a simulated cluster. Pure data."""

from __future__ import annotations

from dataclasses import dataclass

from loadtest.machines import Machine
from loadtest.sim_faults import Fault


@dataclass(frozen=True)
class SimConfig:
    """One simulated cluster. Nodes are named by role and number: prefill-0, decode-0, both-0."""

    machine: Machine
    prefill: int = 8
    decode: int = 8
    both: int = 0  # colocated: chunks of prompts ride in the steps of a batch
    policy: str = "predict"
    arena_blocks: int = 5860
    eviction: str = "lru"
    queue: str = "fcfs"
    chunk_tokens: int = 512  # a step of a node that decodes takes so many
    ttft_limit_s: float | None = None
    tpot_limit_s: float | None = None
    faults: tuple[Fault, ...] = ()
    seed: int = 0
    is_one_host: bool = False  # all nodes share one arena, and decode nodes publish too
