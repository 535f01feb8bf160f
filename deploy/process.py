"""One server in one process, without Ray: `python -m deploy.process node|store|router '<json config>'`.

Prints `READY {json record}` when it serves, and runs until SIGTERM or SIGINT. What keeps it from starting is one line
on stderr and exit status 1. Only a node imports torch.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import signal
import sys
from collections.abc import Sequence

from deploy.actors import Server, as_dict


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="deploy.process", description=__doc__)
    parser.add_argument("kind", choices=("node", "store", "router"))
    parser.add_argument("config", help="the server's config as JSON")
    parser.add_argument("--log-level", default="warning")
    arguments = parser.parse_args(argv)
    logging.basicConfig(stream=sys.stderr, level=arguments.log_level.upper(), format="%(levelname)s %(message)s")
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

        return NodeServer(NodeConfig.from_json(text))
    if kind == "store":
        from kvstore.server import StoreConfig, StoreServer

        return StoreServer(StoreConfig(**json.loads(text)))
    from router.server import RouterConfig, RouterServer

    return RouterServer(RouterConfig.from_json(text))


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
