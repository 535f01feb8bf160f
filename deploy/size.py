"""`baton size`: how much of a GPU a model takes, before anything is bought or started."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from pathlib import Path

from deploy.config import ConfigError, parse_bytes
from deploy.sizing import ITEM_BYTES, Count, Plan, Shape, count, problem
from engine.checkpoint import read_json
from engine.errors import UnsupportedModel

GIB = 2**30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", type=Path, help="a model folder, or a config.json")
    add("--gpu-memory", required=True, metavar="BYTES", help="of one GPU, as nvidia-smi has it, such as 80G")
    add("--reserve", default="3G", metavar="BYTES", help="of it, for CUDA's context, graphs and NCCL (default 3G)")
    add("--tensor-parallel-size", type=int, default=1, metavar="TP", help="GPUs a stage of a node (default 1)")
    add("--pipeline-parallel-size", type=int, default=1, metavar="PP", help="stages of a node (default 1)")
    add("--dtype", choices=["auto", *ITEM_BYTES], default="auto", help="default: the model's")
    add("--max-batched-tokens", type=int, default=512, metavar="TOKENS", help="in one step (default 512)")
    add("--max-requests", type=int, default=64, metavar="N", help="in a node's step; more go by turns (default 64)")
    add("--max-model-len", type=int, default=0, metavar="TOKENS", help="default: the model's")
    add("--prefill-tokens-per-s", type=float, metavar="X", help="of all prefill nodes: also count arena and network")
    add("--arena-seconds", type=float, default=60.0, metavar="S", help="of it that arenas are to hold (default 60)")
    add("--json", action="store_true", help="print the count as JSON")


def size(args: argparse.Namespace) -> int:
    """Prints the count; returns 1 if the model does not fit. Raises `ConfigError`."""
    file = args.model / "config.json" if args.model.is_dir() else args.model
    try:
        shape = Shape.from_json(read_json(file))
    except UnsupportedModel as error:
        raise ConfigError(str(error)) from None
    dtype = shape.dtype if args.dtype == "auto" else args.dtype
    if dtype not in ITEM_BYTES:
        raise ConfigError(f"dtype {dtype!r} is not supported; supported: {', '.join(ITEM_BYTES)}")
    plan = Plan(
        tensor_parallel_size=args.tensor_parallel_size,
        pipeline_parallel_size=args.pipeline_parallel_size,
        dtype=dtype,
        max_batched_tokens=args.max_batched_tokens,
        max_requests=args.max_requests,
        max_model_len=args.max_model_len or shape.max_positions,
    )
    if min(plan.max_batched_tokens, plan.max_requests, plan.max_model_len) < 1:
        raise ConfigError("--max-batched-tokens, --max-requests and --max-model-len must be 1 or more")
    if words := problem(shape, plan):
        raise ConfigError(words)
    if not (args.prefill_tokens_per_s is None or 0.0 <= args.prefill_tokens_per_s < math.inf):
        raise ConfigError(f"--prefill-tokens-per-s must be 0 or more, got {args.prefill_tokens_per_s:g}")
    if not 0.0 <= args.arena_seconds < math.inf:
        raise ConfigError(f"--arena-seconds must be 0 or more, got {args.arena_seconds:g}")
    counted = count(shape, plan, parse_bytes(args.gpu_memory), parse_bytes(args.reserve))
    if args.json:
        print(json.dumps(dataclasses.asdict(plan) | dataclasses.asdict(counted)))
    else:
        print("\n".join(lines(plan, counted, parse_bytes(args.gpu_memory), parse_bytes(args.reserve))))
        if args.prefill_tokens_per_s is not None:
            print("\n".join(traffic(counted, args.prefill_tokens_per_s, args.arena_seconds)))
    return 0 if counted.kv_tokens >= plan.max_model_len else 1


def lines(plan: Plan, counted: Count, gpu_bytes: int, reserve_bytes: int) -> list[str]:
    ranks = plan.tensor_parallel_size * plan.pipeline_parallel_size
    table = [
        f"{counted.parameters / 1e9:.2f} billion parameters in {plan.dtype}, a node of {ranks} GPUs; of each GPU:",
        f"  memory       {gpu_bytes / GIB:8.1f} GiB",
        f"  reserve      {reserve_bytes / GIB:8.1f} GiB",
        f"  weights      {counted.weight_bytes / GIB:8.1f} GiB",
        f"  activations  {counted.activation_bytes / GIB:8.1f} GiB",
        f"  KV           {counted.kv_bytes / GIB:8.1f} GiB, {counted.kv_bytes_a_token:,} bytes a token",
    ]
    if counted.kv_tokens < plan.max_model_len:
        return [*table, f"does not fit: the longest request has {plan.max_model_len:,} tokens; there is room for"
                f" {counted.kv_tokens:,}"]  # fmt: skip
    longest = counted.kv_tokens // plan.max_model_len
    return [
        *table,
        f"--kv-memory {counted.kv_bytes // 2**20}M: a node holds {counted.kv_tokens:,} tokens, {longest} requests of"
        f" {plan.max_model_len:,}",
    ]


def traffic(counted: Count, tokens_per_s: float, arena_s: float) -> list[str]:
    """The traffic from prefill to decode, and the arena that keeps it for `arena_s`."""
    bytes_s = tokens_per_s * counted.model_kv_bytes_a_token
    return [
        f"{tokens_per_s:,.0f} prompt tokens/s are {bytes_s / 1e9:.2f} GB/s of KV ({bytes_s * 8 / 1e9:.1f} Gbit/s):"
        f" {counted.model_kv_bytes_a_token:,} bytes a token",
        f"--store-memory {-(-int(bytes_s * arena_s) // GIB)}G in all prefill machines together keeps {arena_s:.0f} s",
    ]
