"""Why a node takes no request; engine errors pass through a node as they are.

NodeError
├── Draining   the node takes no new requests; another one may
└── Busy       a queue is full, or no room became free in time
"""

from __future__ import annotations


class NodeError(Exception):
    """Root of this package's errors."""


class Draining(NodeError):
    """The node is about to leave; the request belongs elsewhere."""


class Busy(NodeError):
    """There is no room for the request now, and the node will not wait for it any longer."""
