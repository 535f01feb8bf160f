"""The flags of `baton bench`."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

from loadtest.arrival import RAMPS
from loadtest.config import BACKENDS, CLOSED_LOOP_DEFAULT, DATASETS
from loadtest.report_text import PERCENTILES
from loadtest.trace import BLOCK_TOKENS, GRAIN_S


def _number(kind: type[int] | type[float], low: float, high: float = math.inf) -> Callable[[str], float]:
    def parse(text: str) -> float:
        value = kind(text)
        if not low <= value <= high:
            bound = f"at least {low}" if math.isinf(high) else f"{low} to {high}"
            raise argparse.ArgumentTypeError(f"must be {bound}, got {text}")
        return value

    parse.__name__ = kind.__name__  # argparse names it in "invalid int value"
    return parse


def _rate(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be positive or inf, got {text}")
    return value


def _finite_rate(text: str) -> float:
    if math.isinf(value := _rate(text)):
        raise argparse.ArgumentTypeError("must be finite")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"must be between 0 and 1, got {text}")
    return value


def _percentiles(text: str) -> tuple[float, ...]:
    values = tuple(float(word) for word in text.split(","))
    if not all(0 < value < 100 for value in values):
        raise argparse.ArgumentTypeError(f"must be numbers between 0 and 100, got {text}")
    return values


_count, _natural, _seconds = _number(int, 1), _number(int, 0), _number(float, 0)
_part = _number(float, 0, 1)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds all flags, grouped by topic."""
    _add_server_arguments(parser.add_argument_group("the server"))
    _add_load_arguments(parser.add_argument_group("when requests go out"))
    _add_data_arguments(parser.add_argument_group("what they say"))
    _add_client_arguments(parser.add_argument_group("clients that leave or misbehave, each counted apart"))
    _add_goodput_arguments(parser.add_argument_group("objectives"))
    _add_output_arguments(parser.add_argument_group("figures"))


def _add_server_arguments(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--address", "--base-url", metavar="HOST:PORT", help="of the router; a URL for the openai backends")
    add("--backend", choices=BACKENDS, default="grpc", help="Baton's gRPC door (default), or any OpenAI server's HTTP")
    add("--model", default="", metavar="NAME", help="openai: which one (default: the first that the server names)")
    add("--api-key", default="", metavar="KEY", help="of a tenant; default: the variable BATON_API_KEY")
    add("--tls", action="store_true", help="the server has TLS, with a certificate of a well-known authority")
    add("--tls-ca", type=Path, metavar="FILE", help="the server has TLS, with a certificate of this authority (PEM)")
    add("--tls-cert", type=Path, metavar="FILE", help="of the client, where the server asks for one (PEM)")
    add("--tls-key", type=Path, metavar="FILE", help="its key (PEM)")
    add("--tls-server-name", default="", metavar="NAME", help="in the server's certificate; default: of its address")
    add("--timeout", type=_seconds, default=600.0, metavar="S", help="deadline of each request (default 600)")
    add("--temperature", type=_seconds, default=0.0, metavar="T", help="of sampling (default 0 = greedy)")
    end = "go on behind an end token, so that each answer has its full length (default on)"
    add("--ignore-eos", action=argparse.BooleanOptionalAction, default=True, help=end)
    slo = "gRPC: the router refuses what it predicts to be later (default none)"
    add("--ttft-slo-ms", type=_count, metavar="MS", help=slo)
    add("--tpot-slo-ms", type=_count, metavar="MS", help="likewise, of each token behind the first")


def _add_load_arguments(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--num-prompts", type=_count, default=100, metavar="N", help="requests (or conversations) to send (default 100)"
    )
    add("--request-rate", type=_rate, default=math.inf, metavar="R", help="arrivals per second (default inf)")
    add("--burstiness", type=_rate, default=1.0, metavar="B", help="shape of gamma gaps; 1 = Poisson (default)")
    add("--constant-rate", action="store_true", help="no chance in the gaps at all")
    add("--ramp-up-strategy", choices=RAMPS, help="the rate changes while requests go out")
    add("--ramp-up-start-rps", type=_finite_rate, metavar="R", help="from so many per second")
    add("--ramp-up-end-rps", type=_finite_rate, metavar="R", help="to so many")
    lid = f"most in flight; 0 = no limit (default {CLOSED_LOOP_DEFAULT} with an infinite rate, else no limit)"
    add("--max-concurrency", type=_natural, metavar="N", help=lid)
    add("--client-processes", type=_count, default=1, metavar="N", help="share the sending out (default 1)")
    add("--warmup", type=_natural, default=0, metavar="N", help="requests before the run, not counted (default 0)")
    add("--time-scale", type=_finite_rate, default=1.0, metavar="X", help="trace: so many times as fast (default 1)")


def _add_data_arguments(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--dataset", choices=DATASETS, default="random", help="kind of prompts (default random)")
    path = "sharegpt: its JSON (default: lengths like its); trace: Mooncake's JSON lines (default: a made trace)"
    add("--dataset-path", type=Path, metavar="FILE", help=path)
    add("--input-len", type=_count, default=256, metavar="TOKENS", help="of each prompt or turn (default 256)")
    add("--output-len", type=_count, default=64, metavar="TOKENS", help="of each answer (default 64)")
    add("--prefix-len", type=_count, metavar="TOKENS", help="shared-prefix: of the input (default: half of it)")
    add("--num-prefixes", type=_count, default=4, metavar="N", help="shared-prefix: different prefixes (default 4)")
    add("--turns", type=_count, metavar="N", help="multi-turn: of each conversation (default 4); sharegpt: at most (1)")
    add(
        "--think-time", type=_seconds, default=0.0, metavar="S", help="multi-turn: mean pause between turns (default 0)"
    )
    add("--trace-grain", type=_seconds, default=GRAIN_S, metavar="S", help="trace: its clock's grain (default 3)")
    block = f"trace: of a block, in place of {BLOCK_TOKENS}; lengths shrink with it (default {BLOCK_TOKENS})"
    add("--trace-block-tokens", type=_number(int, 1, BLOCK_TOKENS), default=BLOCK_TOKENS, metavar="N", help=block)
    add("--tokenizer", type=Path, metavar="FILE", help="the model's tokenizer.json, where prompts must be text")
    add("--seed", type=_natural, metavar="S", help="repeat a run's arrivals, lengths and samples (default: fresh ones)")
    reuse = "with --seed: what prompts say is repeated too, so a cache may have it (default: fresh in each run)"
    add("--reuse-prompts", action="store_true", help=reuse)


def _add_client_arguments(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--cancel-rate", type=_part, default=0.0, metavar="P", help="a share of clients that leave in mid-answer")
    add(
        "--cancel-after", type=_count, default=4, metavar="N", help="when so many messages with tokens came (default 4)"
    )
    bad = "a share that sends nonsense, sends megabytes, reads slowly, or loses its connection, each as often"
    add("--bad-clients", type=_part, default=0.0, metavar="P", help=bad)
    add("--oversized-bytes", type=_count, default=16 << 20, metavar="N", help="of such a prompt (default 16 MiB)")


def _add_goodput_arguments(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--goodput", nargs="+", default=[], metavar="NAME:MS", help="objectives: ttft:500 tpot:50 e2el:10000")
    add("--sweep", action="store_true", help="find the highest rate that meets them: doubling, then bisection")
    add("--sweep-share", type=_share, default=0.9, metavar="P", help="of requests that must (default 0.9)")
    add("--sweep-start", type=_finite_rate, default=1.0, metavar="R", help="the first rate (default 1)")
    add("--sweep-max", type=_rate, default=math.inf, metavar="R", help="the last rate (default inf)")
    add("--sweep-precision", type=_share, default=0.1, metavar="P", help="how near (default 0.1: within 10 %%)")
    add("--sweep-seconds", type=_seconds, default=30.0, metavar="S", help="each step sends for so long (default 30)")


def _add_output_arguments(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--metric-percentiles", type=_percentiles, default=PERCENTILES, metavar="P,P", help="printed (default 99)")
    add("--result-json", type=Path, metavar="FILE", help="write the figures there")
    add("--save-detailed", action="store_true", help="and every request")
    add("--json", type=Path, metavar="FILE", help="both in one: figures and every request")
    add("--report", type=Path, metavar="FILE", help="write a page with plots there, HTML that needs no network")
    lag = "print no figures where the client's own P99 lag is above (default 100; 0 = print them anyway)"
    add("--max-client-lag-ms", type=_seconds, default=100.0, metavar="MS", help=lag)
