"""The configuration of a run of `baton bench`, made from its flags; and which flags exclude each other."""

from __future__ import annotations

import argparse
import math
import secrets
from dataclasses import dataclass
from pathlib import Path

from loadtest.arrival import Ramp
from loadtest.exchange import Sampling, Target, Tls
from loadtest.runner import Traits
from loadtest.slo import Slo

BACKENDS = ("grpc", "openai", "openai-chat")
DATASETS = ("random", "shared-prefix", "multi-turn", "sharegpt", "trace")
CLOSED_LOOP_DEFAULT = 8


class BenchError(Exception):
    """The run cannot be made; the message says why."""


@dataclass(frozen=True)
class Load:
    """When requests are sent. `rate` per second, may be infinite; `max_in_flight` None is no cap."""

    rate: float | Ramp
    burstiness: float
    constant: bool
    max_in_flight: int | None


@dataclass(frozen=True)
class Data:
    """What prompts contain. Lengths in tokens."""

    kind: str  # of `DATASETS`
    num_prompts: int
    input_len: int
    output_len: int
    prefix_len: int
    num_prefixes: int
    turns: int
    think_s: float
    file: Path | None
    tokenizer: Path | None
    time_scale: float
    trace_grain_s: float
    trace_block_tokens: int


@dataclass(frozen=True)
class SweepConfig:
    """How the highest rate is searched for."""

    start_per_s: float
    max_per_s: float
    share: float
    precision: float
    seconds: float  # that each step lasts at least, unless it has more requests than that anyway


@dataclass(frozen=True)
class BenchConfig:
    """A whole run. The API key is only in `target`, and so in no file."""

    backend: str
    model: str
    target: Target
    load: Load
    data: Data
    sampling: Sampling
    slo: Slo | None
    sweep: SweepConfig | None
    cancel_rate: float
    bad_clients: float
    traits: Traits
    seed: int
    nonce: str
    warmup: int
    max_client_lag_ms: float
    client_processes: int
    percentiles: tuple[float, ...]

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> BenchConfig:
        """Draws a seed if none is given. Raises `BenchError` for flags that exclude each other."""
        if not args.address:
            raise BenchError("--address HOST:PORT of the router (or a URL, for --backend openai) is needed")
        try:
            slo = Slo.parse(args.goodput) if args.goodput else None
        except ValueError as error:
            raise BenchError(str(error)) from error
        _check(args, slo)
        seed = secrets.randbits(32) if args.seed is None else args.seed
        return cls(
            backend=args.backend,
            model=args.model,
            target=Target(args.address, args.timeout, args.api_key, _tls(args)),
            load=_load(args),
            data=_data(args),
            sampling=Sampling(args.temperature, args.ignore_eos, args.ttft_slo_ms, args.tpot_slo_ms),
            slo=slo,
            sweep=_sweep(args) if args.sweep else None,
            cancel_rate=args.cancel_rate,
            bad_clients=args.bad_clients,
            traits=Traits(args.cancel_after, args.oversized_bytes),
            seed=seed,
            nonce="" if args.reuse_prompts else secrets.token_hex(8),
            warmup=args.warmup,
            max_client_lag_ms=args.max_client_lag_ms,
            client_processes=args.client_processes,
            percentiles=args.metric_percentiles,
        )


def _check(args: argparse.Namespace, slo: Slo | None) -> None:
    is_paced = not math.isinf(args.request_rate) or args.ramp_up_strategy
    problems = {
        "--sweep needs --goodput: what must be met?": args.sweep and slo is None,
        "--sweep chooses the rate: give no --request-rate, no ramp and no trace": args.sweep
        and (is_paced or args.dataset == "trace"),
        "a trace has its own times: change them with --time-scale, not with a rate": args.dataset == "trace"
        and is_paced,
        "--ramp-up-strategy goes with --ramp-up-start-rps and --ramp-up-end-rps, and without --request-rate": (
            args.ramp_up_strategy is not None
        )
        and (args.ramp_up_start_rps is None or args.ramp_up_end_rps is None or not math.isinf(args.request_rate)),
        "--ramp-up-start-rps and --ramp-up-end-rps need --ramp-up-strategy": args.ramp_up_strategy is None
        and not (args.ramp_up_start_rps is None and args.ramp_up_end_rps is None),
        "--ttft-slo-ms and --tpot-slo-ms go over gRPC only; --goodput is what a client can judge": args.backend
        != "grpc"
        and not (args.ttft_slo_ms is None and args.tpot_slo_ms is None),
        "--turns is for --dataset multi-turn and sharegpt": args.turns is not None
        and args.dataset not in ("multi-turn", "sharegpt"),
        "--cancel-rate and --bad-clients must be 1 at most together": args.cancel_rate + args.bad_clients > 1,
        "--tls-cert and --tls-key go together": (args.tls_cert is None) != (args.tls_key is None),
    }
    files = {"--tls-ca": args.tls_ca, "--tls-cert": args.tls_cert, "--tls-key": args.tls_key}
    problems |= {f"{flag} names no file": file is not None and not file.is_file() for flag, file in files.items()}
    for words, is_so in problems.items():
        if is_so:
            raise BenchError(words)


def _tls(args: argparse.Namespace) -> Tls | None:
    """The TLS options; None: no TLS, unless the URL is https://."""
    if not (args.tls or args.tls_ca or args.tls_cert or args.tls_server_name):
        return None
    return Tls(args.tls_ca, args.tls_cert, args.tls_key, args.tls_server_name)


def _load(args: argparse.Namespace) -> Load:
    rate: float | Ramp = args.request_rate
    if args.ramp_up_strategy:
        rate = Ramp(args.ramp_up_start_rps, args.ramp_up_end_rps, args.ramp_up_strategy)
    lid: int | None = args.max_concurrency
    is_closed = rate == math.inf and args.dataset != "trace" and not args.sweep
    if lid is None and is_closed:
        lid = CLOSED_LOOP_DEFAULT
    return Load(rate, args.burstiness, args.constant_rate, lid or None)


def _data(args: argparse.Namespace) -> Data:
    return Data(
        kind=args.dataset,
        num_prompts=args.num_prompts,
        input_len=args.input_len,
        output_len=args.output_len,
        prefix_len=args.input_len // 2 if args.prefix_len is None else args.prefix_len,
        num_prefixes=args.num_prefixes,
        turns=args.turns or (4 if args.dataset == "multi-turn" else 1),
        think_s=args.think_time,
        file=args.dataset_path,
        tokenizer=args.tokenizer,
        time_scale=args.time_scale,
        trace_grain_s=args.trace_grain,
        trace_block_tokens=args.trace_block_tokens,
    )


def _sweep(args: argparse.Namespace) -> SweepConfig:
    if args.sweep_start > args.sweep_max:
        raise BenchError(f"--sweep-start {args.sweep_start:g} is above --sweep-max {args.sweep_max:g}")
    return SweepConfig(args.sweep_start, args.sweep_max, args.sweep_share, args.sweep_precision, args.sweep_seconds)
