"""The set-ups of benchmarks/serving.py: which servers each has, on which cores, and how a client reaches them.

The same servers may stand behind two set-ups (two vLLM replicas, with and without a router). They are started at first
need and stay until the run ends; two at most compute at a time, each held to its core. Each set-up has 2 GiB for KV.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.serving_clients import MODEL_NAME, OneServer, PrefillThenDecode, RoundRobin
from benchmarks.worker_process import REPOSITORY
from deploy.cores import running_on
from deploy.redis import EmbeddedRedis
from engine.config import EngineConfig, ModelConfig, kv_layout
from loadtest.exchange import Client

HOST = "127.0.0.1"
START_LIMIT_S = 600.0
GIB = 2**30
DTYPE = "bfloat16"
SHM = Path("/dev/shm")
LEFT_BY_VLLM = ("psm_*", "__KMP_REGISTERED_LIB_*")
CONNECTORS = {
    "nixl": ({"kv_connector": "NixlConnector", "kv_role": "kv_both", "kv_buffer_device": "cpu"},) * 2,
    "mooncake": tuple(
        {"kv_connector": "MooncakeStoreConnector", "kv_role": role} for role in ("kv_producer", "kv_consumer")
    ),
}


@dataclass(frozen=True)
class BatonSetup:
    """Two nodes. `chunk_tokens`: in a step of a node; `held`: Redis, store and router stay on the first node's core."""

    roles: tuple[str, str]
    chunk_tokens: int = 512
    held: bool = False


BATON = {
    "baton-1p1d": BatonSetup(("prefill", "decode")),
    "baton-2both": BatonSetup(("both", "both")),
    "baton-1p1d-held": BatonSetup(("prefill", "decode"), held=True),
    "baton-2both-256": BatonSetup(("both", "both"), chunk_tokens=256),
}
PEERS = ("vllm-2cores", "vllm-2replicas", "vllm-sglang-router", "vllm-pd-mooncake", "vllm-pd-nixl")

MakeClient = Callable[[], Client]


class NotStarted(Exception):
    """A server did not come up; with the end of its log, and with the errors in it."""


class Service:
    """A server in a process group of its own, with its log."""

    def __init__(self, name: str, command: Sequence[str], extra: Mapping[str, str]) -> None:
        self.name = name
        self.address = ""  # of its HTTP door, where it has one
        self._log = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            command, stdout=self._log, stderr=self._log, cwd=REPOSITORY, env=os.environ | extra, start_new_session=True
        )
        self.pid = self._process.pid

    def wait_for_line(self, start: str) -> str:
        """The rest of the first line of its output that begins so."""
        return self._wait(lambda: next((x[len(start) :] for x in self._text().splitlines() if x.startswith(start)), ""))

    def wait_for_url(self, url: str) -> None:
        def answers() -> str:
            with suppress(OSError), urllib.request.urlopen(url, timeout=5) as response:
                return "yes" if response.status == 200 else ""
            return ""

        self._wait(answers)

    def _wait(self, found: Callable[[], str]) -> str:
        end_s = time.monotonic() + START_LIMIT_S
        while time.monotonic() < end_s and self._process.poll() is None:
            if text := found():
                return text
            time.sleep(0.1)
        errors = "\n".join(line for line in self._text().splitlines() if "Error" in line)  # the cause comes first
        raise NotStarted(f"{self._text()[-2000:]}\n{errors[:2000]}\n{self.name} did not start")

    def _text(self) -> str:
        return os.pread(self._log.fileno(), 1 << 24, 0).decode(errors="replace")

    def freeze(self) -> None:
        """Takes the cores from the whole group, which keeps all else, until `thaw`."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def stop(self) -> None:
        """Asks first, then ends all that is left of the group. Idempotent."""
        if self._log.closed:
            return
        self.thaw()  # who is frozen hears no question
        self._signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(20)
        self._signal(signal.SIGKILL)
        self._process.wait()
        self._log.close()

    def _signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.pid, number)


@contextmanager
def awake(services: Sequence[Service]) -> Iterator[None]:
    """Thaws them for a while: servers that spin while they wait would take the cores of those whose turn it is."""
    for service in services:
        service.thaw()
    try:
        yield
    finally:
        for service in services:
            service.freeze()


class Fleet:
    """All servers of a run. `with`: ends them, and removes what vLLM leaves in shared memory."""

    def __init__(self, model: Path, cache: Path, peers: Path | None, vllm_options: Sequence[str] = ()) -> None:
        """`peers` is the folder that install_peers.sh filled; `cache` keeps what vLLM compiles."""
        self._model, self._cache, self._peers, self._vllm_options = model, cache, peers, vllm_options
        self._replicas: list[str] = []  # addresses

    def __enter__(self) -> Fleet:
        self._stack = ExitStack()
        self._stack.callback(_sweep, _shared_memory())
        # Short, for unix sockets live in it; in shared memory, for arenas do.
        self._folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="baton-", dir=SHM)))
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def start(self, name: str) -> MakeClient:
        """Starts what is missing for a set-up; how to reach it."""
        if name in BATON:
            address = self._baton(name, BATON[name])
            return lambda: OneServer(address)
        if name in ("vllm-2replicas", "vllm-sglang-router"):
            self._replicas = self._replicas or [service.address for service in self._vllm([0], [1])]
            if name == "vllm-2replicas":
                return lambda: RoundRobin(self._replicas)
            router = self._sglang_router(self._replicas)
            return lambda: OneServer(router, as_text=True)
        if name == "vllm-2cores":
            [service] = self._vllm([0, 1])
            return lambda: OneServer(service.address)
        if name == "vllm-pd-nixl":
            pair = self._vllm([0], [1], connectors=CONNECTORS["nixl"], extra=_nixl_variables())
            for service in pair:
                service.freeze()
            return lambda: PrefillThenDecode([x.address for x in pair], asks=True, while_open=lambda: awake(pair))
        pair = self._vllm([0], [1], connectors=CONNECTORS["mooncake"], extra=[self._mooncake()] * 2)
        return lambda: PrefillThenDecode([x.address for x in pair], asks=False)

    # --- Baton ---

    def _baton(self, name: str, setup: BatonSetup) -> str:
        """Nodes compute on a core each; Redis, the store and the router go where there is room. The HTTP address."""
        folder = self._folder / name
        folder.mkdir()
        redis = EmbeddedRedis(folder / "redis")
        cores = sorted(os.sched_getaffinity(0))[:1] if setup.held else ()
        with running_on(cores):
            redis.start()
        self._stack.callback(redis.stop)
        layout = kv_layout(ModelConfig.from_pretrained(self._model), EngineConfig(dtype=DTYPE))
        common = {"redis_url": redis.url}
        store_dir = str(folder / "store")
        store = {"dir": store_dir, "slot_bytes": layout.block_bytes, "memory_bytes": GIB, "host": "here"}
        with running_on(cores):
            self._server("store", common | store)
        engine = {"dtype": DTYPE, "kv_cache_bytes": GIB // 2, "num_threads": 1}
        engine |= {"max_num_batched_tokens": setup.chunk_tokens}
        node: dict[str, Any] = common | {
            "model_dir": str(self._model),
            "model": MODEL_NAME,
            "engine": engine,
            "host": "here",
        }
        node |= {"num_core_shares": len(setup.roles), "store_dir": store_dir}
        nodes = [
            self._server("node", node | {"node_id": f"{role}-{i}", "role": role, "core_share": i}, wait=False)
            for i, role in enumerate(setup.roles)
        ]
        for service in nodes:
            service.wait_for_line("READY ")
        with running_on(cores):
            router = self._server("router", common | {"model_dir": str(self._model), "model": MODEL_NAME})
        address = json.loads(router.wait_for_line("READY "))["http_address"]
        router.wait_for_url(f"http://{address}/ready")
        return str(address)

    def _server(self, kind: str, config: dict[str, Any], wait: bool = True) -> Service:
        service = self._service(kind, [sys.executable, "-m", "deploy.process", kind, json.dumps(config)], {})
        if wait:
            service.wait_for_line("READY ")
        return service

    # --- the others ---

    def _vllm(
        self, *cores: Sequence[int], connectors: Sequence[dict[str, str]] = (), extra: Sequence[Mapping[str, str]] = ()
    ) -> list[Service]:
        """One server for each list of cores that its threads are bound to."""
        assert self._peers is not None
        python = self._peers / "vllm" / "bin" / "python"
        services = []
        for index, own in enumerate(cores):
            port = free_port()
            variables = vllm_variables(self._peers, self._cache, own) | dict(extra[index] if extra else {})
            command = [str(python), "-m", "vllm.entrypoints.cli.main", "serve", str(self._model)]
            command += ["--served-model-name", MODEL_NAME, "--host", HOST, "--port", str(port), "--dtype", DTYPE]
            command += ["--max-model-len", "8192", "--max-num-seqs", "64", "--enable-prompt-tokens-details"]
            command += self._vllm_options
            if connectors:
                command += ["--kv-transfer-config", json.dumps(connectors[index])]
            services.append(self._service("vllm", command, variables))
            services[-1].address = f"{HOST}:{port}"
        try:
            for service in services:
                service.wait_for_url(f"http://{service.address}/health")
        except NotStarted:
            for service in services:  # they would only be in the way of the other set-ups
                service.stop()
            raise
        return services

    def _sglang_router(self, addresses: Sequence[str]) -> str:
        assert self._peers is not None
        address = f"{HOST}:{free_port()}"
        command = [str(self._peers / "sgl" / "bin" / "sglang-router"), "launch", "--host", HOST]
        command += ["--port", address.split(":")[1], "--policy", "cache_aware", "--prometheus-port", str(free_port())]
        command += ["--worker-urls", *(f"http://{worker}" for worker in addresses)]
        self._service("sglang-router", command, {}).wait_for_url(f"http://{address}/health")
        return address

    def _mooncake(self) -> dict[str, str]:
        """Starts a master; the variables with which vLLM finds it."""
        assert self._peers is not None
        [site] = (self._peers / "mooncake" / "lib").glob("python*/site-packages")
        rpc, http, metrics = free_port(), free_port(), free_port()
        command = [str(site / "mooncake" / "mooncake_master"), f"-rpc_port={rpc}", f"-metrics_port={metrics}"]
        command += ["-enable_http_metadata_server=true", f"-http_metadata_server_port={http}"]
        command += [f"-rpc_address={HOST}", f"-http_metadata_server_host={HOST}"]
        # Debian's RDMA libraries where the system has none, and CUDA's runtime: it is linked against both.
        libraries = [*self._peers.glob("debian/**/x86_64-linux-gnu"), *site.glob("nvidia/*/lib")]
        variables = {"LD_LIBRARY_PATH": ":".join(map(str, libraries)), "MC_TCP_BIND_ADDRESS": HOST}
        self._service("mooncake_master", command, variables)
        config = self._folder / "mooncake.json"
        config.write_text(
            json.dumps(
                {
                    "metadata_server": f"http://{HOST}:{http}/metadata",
                    "master_server_address": f"{HOST}:{rpc}",
                    "protocol": "tcp",
                    "device_name": "",
                    "global_segment_size": "1gb",
                    "local_buffer_size": "512mb",
                }
            )
        )
        return variables | {
            "MOONCAKE_CONFIG_PATH": str(config),
            "VLLM_HOST_IP": HOST,
            "PYTHONHASHSEED": "0",
            "PYTHONPATH": str(_only_mooncake(site, self._folder)),
        }

    def _service(self, name: str, command: Sequence[str], extra: Mapping[str, str]) -> Service:
        service = Service(name, command, extra)
        self._stack.callback(service.stop)
        return service


def vllm_variables(peers: Path, cache: Path, cores: Sequence[int]) -> dict[str, str]:
    """As its authors advise for CPUs; KV space so that a set-up of one process or of two has 2 GiB."""
    preload = [*map(str, (peers / "tcmalloc").glob("**/libtcmalloc_minimal.so.4"))][:1]
    preload += map(str, (peers / "vllm" / "lib").glob("libiomp5.so"))
    allowed = sorted(os.sched_getaffinity(0))
    return {
        "PYTHONPATH": "",
        "VLLM_CACHE_ROOT": str(cache / "vllm"),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        "VLLM_CPU_KVCACHE_SPACE": str(len(cores)),
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(str(allowed[core]) for core in cores),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "LD_PRELOAD": ":".join(preload),
    }


def _nixl_variables() -> list[dict[str, str]]:
    common = {"UCX_TLS": "tcp,sm,self", "UCX_NET_DEVICES": "lo", "VLLM_NIXL_SIDE_CHANNEL_HOST": HOST}
    return [common | {"VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port())} for _ in range(2)]


def _only_mooncake(site: Path, folder: Path) -> Path:
    """A folder that has Mooncake's packages and none of the others of its environment."""
    path = folder / "mooncake-only"
    path.mkdir()
    for package in site.glob("mooncake*"):
        (path / package.name).symlink_to(package)
    return path


def _shared_memory() -> set[Path]:
    return {path for pattern in LEFT_BY_VLLM for path in SHM.glob(pattern)}


def _sweep(before: set[Path]) -> None:
    """Removes what is new of vLLM's kind and mapped by nobody."""
    for path in _shared_memory() - before:
        if not _is_mapped(path):
            path.unlink(missing_ok=True)


def _is_mapped(path: Path) -> bool:
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with suppress(OSError):
            if str(path) in maps.read_text():
                return True
    return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])
