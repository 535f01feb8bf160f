"""Why a node refuses a request; engine errors pass through a node unchanged.

NodeError
├── Draining   the node takes no new requests; another one may
└── Busy       a queue is full, or no room became free in time
"""

from __future__ import annotations


class NodeError(Exception):
    """Root of this package's errors."""


class Draining(NodeError):
    """The node takes no new requests; the request belongs elsewhere."""


class Busy(NodeError):
    """There is no room for the request, and it has waited as long as it may."""
