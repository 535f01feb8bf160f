"""The options of `baton serve`: flags, each of them a key of a config file, too, and the `ClusterConfig` they make."""

from __future__ import annotations

import argparse
from pathlib import Path

from deploy import logs
from deploy.config import ClusterConfig, ConfigError, DeployError, parse_bytes
from deploy.config_file import add_config_argument
from deploy.locks import add_lock_arguments, locks_from
from deploy.ports import clash, given_ports, metrics_ports
from deploy.redis_url import redis_url_from
from deploy.state import add_state_argument
from kvstore.eviction import ADMISSIONS, POLICIES
from router.config import PAGES
from router.policy import DEFAULT as DEFAULT_ROUTING
from router.policy import POLICIES as ROUTING

PARALLEL_SIZES = tuple(
    f"{role}{kind}_parallel_size" for kind in ("tensor", "pipeline") for role in ("", "prefill_", "decode_")
)


def add_serve_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", type=Path, nargs="?", help="a Hugging Face model folder")
    add_config_argument(parser)
    add = parser.add_argument_group("nodes").add_argument
    add("--prefill", type=int, metavar="N", help="prefill nodes (default 1, or 0 with --both)")
    add("--decode", type=int, metavar="N", help="decode nodes (default 1, or 0 with --both)")
    add("--both", type=int, default=0, metavar="N", help="nodes for both legs")
    for option, letter, what in (("tensor", "TP", "ranks, on one machine"), ("pipeline", "PP", "stages")):
        add(f"--{option}-parallel-size", type=int, default=1, metavar=letter, help=f"{what}, of each node (default 1)")
        for role in ("prefill", "decode"):
            name = f"--{role}-{option}-parallel-size"
            add(name, type=int, default=0, metavar=letter, help=f"likewise, of {role} nodes where theirs differ")
    add("--dtype", default="auto", help="float32, bfloat16 or float16; default: float32 on CPUs, else the model's")
    add("--block-size", type=int, default=16, metavar="TOKENS", help="of KV that travel together (default 16)")
    add("--kv-memory", type=_bytes, default="256M", metavar="BYTES", help="KV cache of each rank (default 256M)")
    add("--store-memory", type=_bytes, default="256M", metavar="BYTES", help="arena of each machine (default 256M)")
    add("--store-dir", type=Path, default=Path("/dev/shm"), metavar="DIR", help="where arenas lie (default /dev/shm)")
    add(
        "--store-encryption",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="stores answer this cluster's nodes alone, and blocks go encrypted between machines (default); without,"
        " whoever reaches a store's port reads blocks",
    )
    add(
        "--store-tcp",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="with --no-store-encryption, blocks go over plain TCP (default), which is faster than ZeroMQ",
    )
    add("--store-eviction", choices=sorted(POLICIES), default="s3fifo", help="of arenas (default %(default)s)")
    add(
        "--store-disk-bytes", type=_bytes, default="0", metavar="BYTES", help="disk behind each arena (default 0: none)"
    )
    add(
        "--store-disk-admission",
        choices=sorted(ADMISSIONS),
        default="all",
        help="blocks that go to disk when they are evicted: all (default), or those that were asked for again after a"
        " while, which spares the disk and hits less",
    )
    add("--store-disk-dir", type=Path, metavar="DIR", help="where blocks on disk lie, also after the cluster stops")
    add("--max-model-len", type=int, default=0, metavar="TOKENS", help="default: the model's")
    add("--max-batched-tokens", type=int, default=512, metavar="TOKENS", help="in one step of a node (default 512)")
    add("--max-requests", type=int, default=64, metavar="N", help="in a node's step; more go by turns (default 64)")
    add("--num-threads", type=int, default=0, metavar="N", help="of each node; default: cores / nodes of its machine")
    add(
        "--pin-cores",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="each node computes on cores of its own (default, where a machine has a core for each thread)",
    )
    add("--served-model-name", default="", metavar="NAME", help="default: the folder's name")
    add = parser.add_argument_group("addresses").add_argument
    add("--host", default="127.0.0.1", help="that the router listens on (default 127.0.0.1)")
    add("--port", type=int, default=0, help="that the router listens on (default: the kernel chooses)")
    add(
        "--http",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="routers speak OpenAI's HTTP API, too (default), at a port of its own",
    )
    add("--http-port", type=int, default=0, metavar="PORT", help="of that API (default: the kernel chooses)")
    add(
        "--tenants",
        type=Path,
        metavar="FILE",
        help="TOML: who may use the router, by which key, and how much of each arena they get; without, everybody"
        " may, and all share one cache",
    )
    add(
        "--policy",
        choices=sorted(ROUTING),
        default=DEFAULT_ROUTING,
        help="how routers choose nodes (default %(default)s, by predicted seconds; the others are to compare with)",
    )
    add("--routers", type=int, default=1, metavar="N", help="the first one takes the ports given, the next one more")
    add("--redis-url", default="", metavar="URL", help="default: BATON_REDIS_URL, or an embedded Redis")
    add("--cluster", default="default", metavar="NAME", help="keeps clusters in one Redis apart")
    add("--ray-address", default="", metavar="HOST:PORT", help="a Ray that runs already; default: an own one")
    words = "Ray machines for prefill nodes, each by its address, name or custom resource; default: all"
    add("--prefill-hosts", type=_names, default=(), metavar="A,B", help=words)
    add("--decode-hosts", type=_names, default=(), metavar="A,B", help="Ray machines for decode nodes; default: all")
    add_lock_arguments(parser)
    add("--router-hosts", type=_names, default=(), metavar="A,B", help="Ray machines for routers; default: this one")
    add("--min-machines", type=int, default=0, metavar="N", help="wait at the start until so many may be used")
    _add_running_arguments(parser)
    add_state_argument(parser)


def _add_running_arguments(parser: argparse.ArgumentParser) -> None:
    """What shows how it is doing."""
    add = parser.add_argument_group("running").add_argument
    add(
        "--metrics",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="each store, node and router shows /metrics to Prometheus at a port of its own (default; see `baton"
        " status`)",
    )
    add(
        "--metrics-port",
        type=int,
        default=0,
        metavar="PORT",
        help="of each machine's first server, its next ones take the next ports (default: the kernel chooses)",
    )
    add(
        "--metrics-targets",
        type=Path,
        metavar="FILE",
        help="kept up to date with all these addresses, for Prometheus' file_sd_configs",
    )
    add("--start-timeout", type=float, default=300.0, metavar="SECONDS", help="until all is up (default 300)")
    levels = ["debug", "info", "warning", "error"]
    add("--log-level", default="warning", choices=levels, help="from which on all processes log (default warning)")
    add("--log-format", default="text", choices=logs.FORMATS, help="json: one object a line (default text)")
    add(
        "--status-page",
        default="auto",
        choices=PAGES,
        help="the live page at / of the HTTP door, which asks for no key; auto (default): where there are no tenants",
    )
    add(
        "--otlp-endpoint",
        default="",
        metavar="URL",
        help="OpenTelemetry's receiver (OTLP over HTTP, as http://localhost:4318) for traces; needs baton[otel]."
        " Default: its own variables, OTEL_EXPORTER_OTLP_ENDPOINT and so on",
    )


def config_from(args: argparse.Namespace) -> ClusterConfig:
    """Raises `ConfigError`."""
    if args.model is None:
        raise ConfigError("no MODEL: name its folder on the command line, or as `model` in the --config file")
    default = 0 if args.both else 1
    config = ClusterConfig(
        model_dir=args.model,
        prefill=default if args.prefill is None else args.prefill,
        decode=default if args.decode is None else args.decode,
        both=args.both,
        **{name: getattr(args, name) for name in PARALLEL_SIZES},
        routers=args.routers,
        policy=args.policy,
        host=args.host,
        port=args.port,
        http=args.http,
        http_port=args.http_port,
        cluster=args.cluster,
        redis_url=_redis_url(args),
        ray_address=args.ray_address,
        served_model_name=args.served_model_name,
        tenants_file=args.tenants,
        locks=locks_from(args),
        dtype=args.dtype,
        block_size=args.block_size,
        kv_bytes=args.kv_memory,
        store_bytes=args.store_memory,
        store_base=args.store_dir.absolute(),
        store_encryption=args.store_encryption,
        store_tcp=args.store_tcp,
        store_eviction=args.store_eviction,
        store_disk_bytes=args.store_disk_bytes,
        store_disk_admission=args.store_disk_admission,
        store_disk_dir=args.store_disk_dir,
        max_model_len=args.max_model_len,
        max_num_batched_tokens=args.max_batched_tokens,
        max_num_requests=args.max_requests,
        num_threads=args.num_threads,
        pin_cores=args.pin_cores,
        metrics=args.metrics,
        metrics_port=args.metrics_port,
        prefill_hosts=args.prefill_hosts,
        decode_hosts=args.decode_hosts,
        router_hosts=args.router_hosts,
        min_machines=args.min_machines,
        start_timeout_s=args.start_timeout,
        log_level=args.log_level,
        log_format=args.log_format,
        status_page=args.status_page,
        otlp_endpoint=args.otlp_endpoint,
    )
    if problem := clash([*given_ports(config), *metrics_ports(config)]):  # nodes that are added later can do without
        raise ConfigError(problem)
    return config


def _redis_url(args: argparse.Namespace) -> str:
    """Raises `ConfigError`."""
    try:
        return redis_url_from(args.redis_url, "--redis-url")
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _bytes(text: str) -> int:
    try:
        return parse_bytes(text)
    except DeployError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(",") if name)
