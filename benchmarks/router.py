"""The live router's speed: what it adds to a request, requests and tokens through one process and through several, and
the look-up of a prefix.

Repeat it with `python -m benchmarks.router --peer-folder FOLDER` from the repository's root, where FOLDER is what
`benchmarks/install_peers.sh FOLDER sglang-router dynamo` has filled; `--peer none` leaves the peers out, `--quick` ends
within a minute. Routers, Redis and nodes are processes of their own; nodes have no engine and answer at once.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from pathlib import Path

from benchmarks.router_added import LAYOUTS, added
from benchmarks.router_load import IN_FLIGHT, Load, at_rate, under_load
from benchmarks.router_lookup import ARENA_BLOCKS, BATCH, NUM_ARENAS, NUM_BLOCKS, look_ups
from benchmarks.router_peers import radix_look_ups, sglang_requests
from benchmarks.router_process import MODEL
from benchmarks.rows import Peer, Row, print_beside
from deploy.redis import EmbeddedRedis
from router.tokenizer import Tokenizer

PARTS = ("added", "load", "lookup")


def loads(scale: int) -> list[Load]:
    """What the router is kept busy with; `scale` is 1 for a look."""
    requests = f"requests through one process, {IN_FLIGHT} in flight"
    return [
        Load(f"{requests}, one leg", 2000, 1, 400 * scale),
        Load(f"{requests}, two legs", 2000, 1, 400 * scale, roles=("prefill", "decode")),
        Load(f"requests through two processes, {IN_FLIGHT} in flight, one leg", 2000, 1, 400 * scale, num_routers=2),
        Load("tokens through one process", 200, 256, 32 * scale),
    ]


async def measure(redis_url: str, parts: list[str], is_quick: bool) -> list[Row]:
    repeats, rows = (2 if is_quick else 5), list[Row]()
    if "added" in parts:
        for layout in LAYOUTS:
            rows += await added(layout, redis_url, 50 if is_quick else 500, repeats)
        rows += await at_rate(200.0, redis_url, 200 if is_quick else 2000, repeats)
    if "load" in parts:
        for load in loads(1 if is_quick else 8):
            rows += await under_load(load, redis_url, repeats)
    if "lookup" in parts:
        rows += await look_ups(redis_url, repeats, Tokenizer(MODEL))
    return rows


def peers_of(folder: Path, rows: list[Row], is_quick: bool) -> list[Peer]:
    """Those that are installed."""
    repeats, found = (2 if is_quick else 5), list[Peer]()
    python = folder / "sgl" / "bin" / "python"
    if python.exists():
        figures = asyncio.run(sglang_requests(python, 1000 if is_quick else 10_000, repeats))
        values = {f"requests through one process, {IN_FLIGHT} in flight, one leg": figures["requests/s"]}
        values[f"requests through one process, {IN_FLIGHT} in flight, one leg: a request, p50"] = figures["p50 ms"]
        values["one leg: TTFT p50, added"] = figures["added ms"]
        found.append(Peer("sglang-router", [values.get(row.name, ()) for row in rows]))
    python = folder / "dynamo" / "bin" / "python"
    if python.exists():
        times = radix_look_ups(python, (NUM_ARENAS, ARENA_BLOCKS, NUM_BLOCKS, BATCH), repeats)
        is_look_up = [row.name.startswith("prefix look-up") for row in rows]
        found.append(Peer("dynamo radix tree", [times if is_it else () for is_it in is_look_up]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2 repeats of a few requests instead of 5 of many")
    parser.add_argument("--parts", default=",".join(PARTS), help="some of %(default)s")
    parser.add_argument("--peer", default="all", choices=("all", "none"))
    parser.add_argument("--peer-folder", type=Path, help="where install_peers.sh put them")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="baton-") as folder:
        server = EmbeddedRedis(Path(folder))
        server.start()
        try:
            rows = asyncio.run(measure(server.url, args.parts.split(","), args.quick))
        finally:
            server.stop()
    wants_peers = args.peer == "all" and args.peer_folder is not None
    print_beside("router", rows, peers_of(args.peer_folder, rows, args.quick) if wants_peers else [])


if __name__ == "__main__":
    main()
