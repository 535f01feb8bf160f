"""The stores of the running cluster, and how to reach each: found through the state folder and the directory."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import zmq.asyncio

from deploy.config import DeployError
from deploy.state import ServeState, StateDir, folders_of
from kvstore.blocks import BlockHash
from kvstore.channel import Channel
from kvstore.control import ControlChannel
from kvstore.curve import Curve
from kvstore.directory import ArenaRecord, Directory
from kvstore.errors import DirectoryUnavailable
from kvstore.local import Description, StorePaths
from kvstore.operate import StoreOperator


@dataclass(frozen=True)
class Store:
    """One living store."""

    record: ArenaRecord
    control: Path | None  # its control socket; None: it is on another machine
    state_dir: StateDir
    context: zmq.asyncio.Context

    @property
    def name(self) -> str:
        return self.record.arena_id[:8]

    def operator(self) -> StoreOperator:
        """A connection to it. Raises `DeployError` if there is no way to reach it."""
        if self.control is not None:
            return StoreOperator(partial(ControlChannel, self.control))
        wire_key = self.state_dir.wire_key()
        if not wire_key:
            raise DeployError("it is on another machine, where without a wire key a store hears no operator")
        return StoreOperator(partial(Channel, self.context, self.record.address, curve=Curve(wire_key)))


class Stores:
    """All living stores."""

    def __init__(self, stores: list[Store], directory: Directory) -> None:
        self._stores = sorted(stores, key=lambda store: (store.record.host, store.record.arena_id))
        self._directory = directory

    @classmethod
    @asynccontextmanager
    async def of(cls, folder: Path) -> AsyncIterator[Stores]:
        """Raises `DeployError` if no cluster is running, or its Redis does not answer."""
        state_dir = StateDir(folder)
        state = state_dir.running()
        if not state.redis_url:
            raise DeployError(f"pid {state.pid} is starting {state.model}")
        context, directory = zmq.asyncio.Context(), Directory(state.redis_url, state.cluster)
        try:
            controls = _control_sockets(state)
            records = await directory.arenas()
            stores = [Store(record, controls.get(record.arena_id), state_dir, context) for record in records]
            yield cls(stores, directory)
        except DirectoryUnavailable as error:
            raise DeployError(f"the cluster's Redis does not answer: {error}") from None
        finally:
            await directory.close()
            context.destroy(linger=0)

    def matching(self, first_digits: str) -> list[Store]:
        """The stores whose ids begin with these digits. Raises `DeployError` if there is none."""
        found = [store for store in self._stores if store.record.arena_id.startswith(first_digits)]
        if not found and first_digits:
            known = ", ".join(store.name for store in self._stores) or "none"
            raise DeployError(f"no arena's id begins with {first_digits}; there are: {known}")
        return found

    async def announced(self, block_hash: BlockHash) -> dict[str, int]:
        """The arenas that the directory says hold a block, and the slot there. Raises `DirectoryUnavailable`."""
        return {arena_id: slots[0] for arena_id, slots in (await self._directory.locate([block_hash])).items()}


def _control_sockets(state: ServeState) -> dict[str, Path]:
    """The control sockets of this machine's stores, by arena id."""
    sockets = {}
    for base in state.bases:
        for folder in folders_of(state.cluster_id, Path(base)):
            paths = StorePaths(folder)
            try:
                sockets[Description.read(paths.description).arena_id] = paths.control
            except (OSError, ValueError):  # no store, or one that is just coming up
                continue
    return sockets
