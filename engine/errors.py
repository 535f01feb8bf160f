"""What can go wrong in the engine.

EngineError
├── UnsupportedModel   the folder asks for an architecture or option that is not supported; lists what is
├── InvalidRequest     a field is out of its range; names field and limit
├── NoRoom             not enough free blocks right now
├── UnknownRequest     no such request: finished, aborted, or never added
└── RanksDisagree      the ranks of a wide node do not hold parts of the same model
"""

from __future__ import annotations


class EngineError(Exception):
    """Root of this package's errors."""


class UnsupportedModel(EngineError):
    """The model's architecture, or an option of its config, is not supported."""


class InvalidRequest(EngineError):
    """A request's field is out of range."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field


class NoRoom(EngineError):
    """There are not enough free blocks to hold the request now; later there may be."""


class UnknownRequest(EngineError):
    """The engine does not hold a request of that id."""


class RanksDisagree(EngineError):
    """The ranks of one node have different weights, or shard them differently: their sum would be meaningless."""
