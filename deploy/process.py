"""One server in one process, without Ray: `python -m deploy.process node|rank|store|router '<json config>'`.

Prints `READY {json record}` when it serves, and runs until SIGTERM or SIGINT. What keeps it from starting is one line
on stderr and exit status 1. Only a node imports torch.

Everybody on the machine can read a process's arguments, so secrets come in the environment: BATON_WIRE_KEY of stores
and nodes (64 hex digits), BATON_CLUSTER_TOKEN of nodes and routers (32 characters or more), both the same for the whole
cluster, and BATON_REDIS_URL where the URL has a password in it.
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
from typing import TYPE_CHECKING, Any, TypeVar

from deploy import logs
from deploy.actors import Server, as_dict
from deploy.redis_url import redis_url_from

if TYPE_CHECKING:
    from deploy.node_config import NodeConfig
    from kvstore.server import StoreConfig
    from router.config import RouterConfig

ConfigT = TypeVar("ConfigT", "NodeConfig", "StoreConfig", "RouterConfig")

SECRETS = {"wire_key": "BATON_WIRE_KEY", "cluster_token": "BATON_CLUSTER_TOKEN"}  # fields, and where they come from


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="deploy.process", description=__doc__)
    parser.add_argument("kind", choices=("node", "rank", "store", "router"))
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
    text = _with_redis_url(text)
    if kind == "node":
        from deploy.node import NodeConfig, NodeServer

        return NodeServer(_with_secrets(NodeConfig.from_json(text)))
    if kind == "rank":
        from deploy.node_config import NodeConfig
        from deploy.rank import RankServer

        return RankServer(_with_secrets(NodeConfig.from_json(text)))
    if kind == "store":
        from kvstore.server import StoreConfig, StoreServer

        return StoreServer(_with_secrets(StoreConfig(**json.loads(text))))
    from router.config import RouterConfig
    from router.server import RouterServer

    return RouterServer(_with_secrets(RouterConfig.from_json(text)))


def _with_secrets(config: ConfigT) -> ConfigT:
    """Those that its kind of server has. A variable that is not set is no secret."""
    secrets: dict[str, Any] = {}
    for name in {field.name for field in dataclasses.fields(config)} & SECRETS.keys():
        if getattr(config, name):
            raise ValueError(f"{name}: goes into the variable {SECRETS[name]}; arguments show in ps")
        secrets[name] = os.environ.get(SECRETS[name], "")
    return dataclasses.replace(config, **secrets)


def _with_redis_url(text: str) -> str:
    fields = json.loads(text)
    return json.dumps(fields | {"redis_url": redis_url_from(fields.get("redis_url", ""), "redis_url")})


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
        logging.shutdown()
        os._exit(0)  # a thread that loads a model cannot be told to stop, and would be waited for
    print(f"READY {json.dumps(as_dict(starting.result()))}", flush=True)
    await waiting
    await server.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
