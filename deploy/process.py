"""One server in one process, without Ray: `python -m deploy.process node|store|router '<json config>'`.

Prints `READY {json record}` when it serves, and runs until SIGTERM or SIGINT. What keeps it from starting is one line
on stderr and exit status 1. Only a node imports torch.

Everybody on the machine can read a process's arguments, so the wire key of stores and nodes comes in the environment,
as BATON_WIRE_KEY; 64 hex digits, the same for the whole cluster.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import logging
import os
import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

from deploy import logs
from deploy.actors import Server, as_dict

if TYPE_CHECKING:
    from deploy.node_config import NodeConfig
    from kvstore.server import StoreConfig

ConfigT = TypeVar("ConfigT", "NodeConfig", "StoreConfig")

WIRE_KEY_VARIABLE = "BATON_WIRE_KEY"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="deploy.process", description=__doc__)
    parser.add_argument("kind", choices=("node", "store", "router"))
    parser.add_argument("config", help="the server's config as JSON")
    parser.add_argument("--log-level", default="warning")
    parser.add_argument("--log-format", choices=logs.FORMATS, default="text")
    arguments = parser.parse_args(argv)
    logs.configure(arguments.log_level, arguments.log_format)
    try:
        return asyncio.run(serve(build(arguments.kind, arguments.config)))
    except Exception as error:
        logging.getLogger(__name__).debug("event=start_failed", exc_info=True)
        problem = " ".join(str(error).split())
        print(f"baton {arguments.kind}: {type(error).__name__}: {problem}", file=sys.stderr)
        return 1


def build(kind: str, text: str) -> Server:
    """The server of that kind. Raises `ValueError` or `TypeError` for a config that is none."""
    if kind == "node":
        from deploy.node import NodeConfig, NodeServer

        return NodeServer(_with_wire_key(NodeConfig.from_json(text)))
    if kind == "store":
        from kvstore.server import StoreConfig, StoreServer

        return StoreServer(_with_wire_key(StoreConfig(**json.loads(text))))
    from router.config import RouterConfig
    from router.server import RouterServer

    return RouterServer(RouterConfig.from_json(text))


def _with_wire_key(config: ConfigT) -> ConfigT:
    if config.wire_key:
        raise ValueError(f"wire_key: goes into the variable {WIRE_KEY_VARIABLE}; arguments show in ps")
    return dataclasses.replace(config, wire_key=os.environ.get(WIRE_KEY_VARIABLE, ""))


async def serve(server: Server) -> int:
    """Starts, says so, and stops at the first signal, also when it comes during the start."""
    signalled = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, signalled.set)
    starting = asyncio.create_task(server.start())
    waiting = asyncio.create_task(signalled.wait())
    await asyncio.wait((starting, waiting), return_when=asyncio.FIRST_COMPLETED)
    if not starting.done():
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        return 0
    print(f"READY {json.dumps(as_dict(starting.result()))}", flush=True)
    await waiting
    await server.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
