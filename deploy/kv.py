"""`baton kv`: what the stores of the running cluster hold, and what an operator may do about it.

A store on this machine is asked over its control socket, others over their data sockets, with the wire key from the
state folder.
"""

from __future__ import annotations

import argparse
import asyncio
import re
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from deploy import kv_tables
from deploy.config import DeployError
from deploy.kv_stores import Store, Stores
from deploy.state import add_state_argument
from deploy.terminal import say
from kvstore.blocks import HASH_BYTES, BlockHash
from kvstore.directory import ON_DISK
from kvstore.errors import KVStoreError

HASH_DIGITS = 2 * HASH_BYTES
DEFAULT_ROWS = 50
FAILED = 1

T = TypeVar("T")
Run = Callable[[argparse.Namespace, Stores], Awaitable[kv_tables.Report]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run: Run, words: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=words, description=words[0].upper() + words[1:] + ".")
        add_state_argument(sub)
        sub.add_argument("--json", action="store_true", help="print JSON")
        sub.set_defaults(run=run)
        return sub

    def add_arena(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--arena", type=_arena, metavar="ID", help="this one alone; its first digits do")

    add_arena(add("stats", _stats, "show what the stores hold and have done, by tier"))
    ls = add("ls", _ls, "list blocks")
    add_arena(ls)
    ls.add_argument("--prefix", type=_prefix, default="", metavar="HEX", help="blocks whose names begin so")
    ls.add_argument("--limit", type=_count, default=DEFAULT_ROWS, metavar="N", help="rows (default %(default)s)")
    inspect = add("inspect", _inspect, "show all that is known of a block, and whether its bytes verify")
    inspect.add_argument("hash", type=_hash, metavar="HASH", help=f"{HASH_DIGITS} hex digits")
    evict = add("evict", _evict, "drop blocks from memory and disk")
    add_arena(evict)
    evict.add_argument("hash", type=_hash, metavar="HASH", nargs="*", help=f"{HASH_DIGITS} hex digits")
    evict.add_argument("--all", action="store_true", help="drop all blocks")
    drain = add("drain", _drain, "make a store take no new blocks; those that it holds can be read")
    drain.add_argument("arena", type=_arena, metavar="ARENA", help="its id, or the first digits of it")
    drain.add_argument("--undo", action="store_true", help="make it take blocks again")


def run(args: argparse.Namespace) -> int:
    """Prints what was found. A store that did not answer is a line on standard error, and exit status 1."""
    report = asyncio.run(_run(args))
    report.show(args.json)
    for problem in report.problems:
        say(problem)
    return FAILED if report.problems else 0


async def _run(args: argparse.Namespace) -> kv_tables.Report:
    async with Stores.of(args.state_dir) as stores:
        report: kv_tables.Report = await args.run(args, stores)
        return report


async def _stats(args: argparse.Namespace, stores: Stores) -> kv_tables.Report:
    answers, problems = await _each(stores.matching(args.arena or ""), lambda store: store.operator().stats())
    return kv_tables.stats(answers, problems)


async def _ls(args: argparse.Namespace, stores: Stores) -> kv_tables.Report:
    found = stores.matching(args.arena or "")
    answers, problems = await _each(found, lambda store: store.operator().blocks(args.prefix, args.limit))
    return kv_tables.blocks(answers, args.limit, problems)


async def _inspect(args: argparse.Namespace, stores: Stores) -> kv_tables.Report:
    announced = await stores.announced(args.hash)
    answers, problems = await _each(stores.matching(""), lambda store: store.operator().inspect(args.hash))
    details = {store.record.arena_id: found for store, found in answers}
    places = []
    for store in stores.matching(""):
        arena_id = store.record.arena_id
        told, found = announced.get(arena_id), details.get(arena_id)
        if told is not None or found:
            where = "" if told is None else "disk" if told == ON_DISK else f"slot {told}"
            places.append((store, where, found))
    return kv_tables.places(args.hash, places, problems)


async def _evict(args: argparse.Namespace, stores: Stores) -> kv_tables.Report:
    if bool(args.hash) is args.all:
        raise DeployError("evict: name blocks, or give --all")
    hashes = None if args.all else args.hash
    answers, problems = await _each(stores.matching(args.arena or ""), lambda store: store.operator().evict(hashes))
    return kv_tables.evicted(answers, problems)


async def _drain(args: argparse.Namespace, stores: Stores) -> kv_tables.Report:
    found = stores.matching(args.arena)
    if len(found) != 1:
        raise DeployError(f"drain: {args.arena!r} begins the ids of {len(found)} arenas; give more digits")
    answers, problems = await _each(found, lambda store: store.operator().drain(args.undo))
    return kv_tables.drained([store for store, _ in answers], not args.undo, problems)


async def _each(
    stores: Sequence[Store], ask: Callable[[Store], Awaitable[T]]
) -> tuple[list[tuple[Store, T]], list[str]]:
    """Asks all at once; returns the answers, and the problems of the others, as text."""

    async def one(store: Store) -> T | str:
        try:
            return await ask(store)
        except (KVStoreError, DeployError) as error:
            return f"arena {store.name} on {store.record.host}: {error}"

    results = await asyncio.gather(*(one(store) for store in stores))
    answers = [(store, result) for store, result in zip(stores, results, strict=True) if not isinstance(result, str)]
    return answers, [result for result in results if isinstance(result, str)]


def _hash(text: str) -> BlockHash:
    if re.fullmatch(rf"[0-9a-fA-F]{{{HASH_DIGITS}}}", text) is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no block's name, which has {HASH_DIGITS} hex digits")
    return BlockHash(bytes.fromhex(text))


def _prefix(text: str) -> str:
    if re.fullmatch(rf"[0-9a-fA-F]{{0,{HASH_DIGITS}}}", text) is None:
        raise argparse.ArgumentTypeError(f"{text!r} begins no block's name, which has {HASH_DIGITS} hex digits")
    return text.lower()


def _arena(text: str) -> str:
    if re.fullmatch(r"[0-9a-fA-F]{1,32}", text) is None:
        raise argparse.ArgumentTypeError(f"{text!r} begins no arena's id, which has 32 hex digits")
    return text.lower()


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= len(text) <= 9 or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of rows between 1 and 999999999")
    return int(text)
