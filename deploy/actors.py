"""What runs inside a Ray actor: one server, which brings itself up whenever its process starts. Knows no Ray.

After a crash Ray runs `__init__` again and nothing else, so that is where the start begins. A server that keeps dying
is started ever more slowly: its start times are kept in a file of its machine's folder, which outlives the process.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from deploy import logs
from deploy.leftovers import hold, sweep

if TYPE_CHECKING:  # each process imports its own kind's packages only: this is most of what a start costs
    from deploy.node_config import NodeConfig
    from kvstore.server import StoreConfig
    from router.config import RouterConfig

logger = logging.getLogger(__name__)

STABLE_S = 60.0  # who lived longer than this did not crash at once
FREE_RESTARTS = 2  # in a row, before the first wait
MAX_BACKOFF_S = 30.0
PORTS = {"port": ("address", "port"), "http-port": ("http_address", "http_port")}  # files: of the record, the option


class Server(Protocol):
    """What `NodeServer`, `StoreServer` and `RouterServer` have in common."""

    async def start(self) -> Any: ...

    async def stop(self) -> None: ...


@dataclass(frozen=True)
class ServerSpec:
    """One server to run. `folder` is its machine's own; it is made when it is not there.

    `environment` is for the libraries that the server loads; what the machine itself has set goes before it.
    """

    kind: Literal["store", "node", "rank", "router"]
    name: str
    config: StoreConfig | NodeConfig | RouterConfig
    folder: Path
    log_level: str = "warning"
    log_format: str = "text"
    environment: Mapping[str, str] = field(default_factory=dict)
    life: str = ""  # of one actor: the next of this name begins anew, without this one's earlier starts


@dataclass(frozen=True)
class Started:
    """A server's answer to `ready`: what it registered, or in `error` why it could not start."""

    name: str
    pid: int
    record: Mapping[str, Any]
    error: str = ""


def backoff_s(starts: Sequence[float], now: float) -> float:
    """How long to wait before the next start, given the times of earlier ones, oldest first: 0, 0, 0.5, 1, 2 ... 30 s.

    Counts the starts that followed each other within `STABLE_S`, back from `now`.
    """
    in_a_row = 0
    for start in reversed(starts):
        if now - start > STABLE_S:
            break
        in_a_row, now = in_a_row + 1, start
    if in_a_row <= FREE_RESTARTS:
        return 0.0
    return min(MAX_BACKOFF_S, 0.5 * 2.0 ** (in_a_row - FREE_RESTARTS - 1))


class StartLog:
    """When a server was started before, in a file: one time (seconds since the epoch) a line.

    Never fails: a full file system must not keep a server from coming back, only from waiting before it does.
    """

    def __init__(self, file: Path) -> None:
        self._file = file

    def read(self) -> list[float]:
        try:
            return [float(line) for line in self._file.read_text().splitlines()] if self._file.exists() else []
        except (OSError, ValueError) as error:
            logger.warning("start times unreadable file=%s error=%s", self._file, error)
            return []

    def add(self, now: float) -> None:
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with self._file.open("a") as file:
                file.write(f"{now}\n")
        except OSError as error:
            logger.warning("start time not kept file=%s error=%s", self._file, error)


class ServerActor:
    """An async actor around one server. Its first start may fail and says so in `ready`; a restart that fails ends
    the process, and Ray tries again."""

    def __init__(self, spec: ServerSpec) -> None:
        logs.configure(spec.log_level, spec.log_format)
        self._spec = spec
        self._server: Server | None = None
        self._part = 0.0
        self._starts = StartLog(spec.folder / f"{spec.name}.{spec.life}.starts")
        self._held = hold(spec.folder, spec.name)
        self._started = asyncio.get_running_loop().create_task(self._start())

    def __repr__(self) -> str:
        """Ray sets it before each line that this process logs."""
        return self._spec.name

    async def ready(self) -> Started:
        return await asyncio.shield(self._started)

    async def part(self) -> float:
        """Of the start, what is done; only a node tells. Answers late while the process imports its libraries."""
        return self._part

    async def is_ready(self) -> bool:
        """Whether a router has nodes to serve with; others are, once they are up."""
        return self._server is not None and bool(getattr(self._server, "is_ready", True))

    async def stop(self) -> None:
        """Drains and closes. Idempotent; the process is left to whoever made the actor."""
        self._started.cancel()  # of a start under way; one that is over is not changed by it
        server, self._server = self._server, None
        if server is not None:
            await server.stop()

    async def remove_folder(self) -> None:
        self._started.cancel()
        shutil.rmtree(self._spec.folder, ignore_errors=True)

    async def _start(self) -> Started:
        earlier, now = self._starts.read(), time.time()
        self._starts.add(now)
        await asyncio.sleep(backoff_s(earlier, now))
        try:
            if self._spec.kind == "store":
                await asyncio.to_thread(sweep, self._spec.folder.parent, self._spec.folder)  # who may have its room
            self._server = build(self._spec, self._report)
            record = as_dict(await self._server.start())
        except Exception as error:
            if earlier:
                logger.exception("restart failed name=%s", self._spec.name)
                os._exit(1)
            logger.info("start failed name=%s", self._spec.name, exc_info=True)
            return Started(self._spec.name, os.getpid(), {}, f"{type(error).__name__}: {error}")
        self._keep_port(record)
        return Started(self._spec.name, os.getpid(), record)

    def _report(self, part: float) -> None:
        self._part = part

    def _keep_port(self, record: Mapping[str, Any]) -> None:
        """Clients know a router by its ports, so those that the kernel chose are asked for again after a restart."""
        if self._spec.kind == "router":
            for name, (record_field, _) in PORTS.items():
                if record.get(record_field):
                    write_port(port_file(self._spec, name), str(record[record_field]).rsplit(":", 1)[1])


def build(spec: ServerSpec, report: Callable[[float], object] = lambda part: None) -> Server:
    """The server that a config is for. Torch comes with a node, and with nothing else.

    A node tells `report` which part of its start is done.
    """
    for name, value in spec.environment.items():
        os.environ.setdefault(name, value)
    config: Any = spec.config
    if spec.kind == "node":
        from deploy.node import NodeServer

        return NodeServer(config, report)
    if spec.kind == "rank":
        from deploy.rank import RankServer

        return RankServer(config, report)
    if spec.kind == "store":
        from kvstore.server import StoreServer

        return StoreServer(config)
    from router.server import RouterServer

    for name, (_, option) in PORTS.items():
        if port_file(spec, name).exists():
            config = dataclasses.replace(config, **{option: int(port_file(spec, name).read_text())})
    return RouterServer(config)


def port_file(spec: ServerSpec, name: str = "port") -> Path:
    return spec.folder / f"{spec.name}.{name}"


def write_port(file: Path, port: str) -> None:
    """In one go, and only where it is news: half a file would keep each later start from succeeding."""
    try:
        if not file.exists() or file.read_text() != port:
            part = file.with_suffix(".part")
            part.write_text(port)
            part.replace(file)
    except OSError as error:
        logger.warning("port not kept file=%s error=%s", file, error)


def as_dict(record: Any) -> dict[str, Any]:
    """A server's record, be it a dataclass or a mapping, as plain data that needs no import on the other side."""
    if dataclasses.is_dataclass(record) and not isinstance(record, type):
        return dataclasses.asdict(record)
    return dict(record)
