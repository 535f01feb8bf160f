"""What can go wrong in the router. The first eight reach a client, as the status beside them; a leg's are retried.

RouterError
├── InvalidRequest      INVALID_ARGUMENT; names the field and the limit
├── Unauthenticated     UNAUTHENTICATED; no key, or one that is nobody's
├── ClusterBusy         RESOURCE_EXHAUSTED; no node that was asked has room for it, or the router for its grammar
├── TryLater            RESOURCE_EXHAUSTED; nothing was spent on it, and it says when to come again
│   ├── WouldBeLate     no node is predicted to keep the request's own limits
│   └── RateLimited     the tenant, or everybody, asks for more than is allowed
├── UnknownRequest      NOT_FOUND; no decision of that name is kept
├── ClusterUnavailable  UNAVAILABLE; no node is alive, or none could finish the request
├── DeadlinePassed      DEADLINE_EXCEEDED; the client's own
├── LegFailed           a node died, hung or broke off in the middle of a leg; the request goes on elsewhere
├── LegRefused          a node has no room for a leg now, or is draining; another one is asked
├── UnusableTokenizer   the model's folder has no tokenizer that can be read; the router does not start
├── UnusableTenants     the tenants' file cannot be read, or breaks a rule; neither router nor cluster starts
├── UnusableKeys        the same of the file of admin keys
├── UnusableTls         a certificate or key cannot be read, does not fit or is out of date; the same
└── UnusableTraces      traces are asked for, and what makes them is not installed; the router does not start
"""

from __future__ import annotations

from typing import Literal


class RouterError(Exception):
    """Root of this package's errors."""


class InvalidRequest(RouterError):
    """A field of a request is missing or out of its range."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field


class Unauthenticated(RouterError):
    """The call's metadata has no API key of a tenant."""


class ClusterBusy(RouterError):
    """There are nodes, but those that the request would go to have no room; or too many grammars wait here."""


class TryLater(RouterError):
    """Nothing was spent on the request; after `retry_after_s` it may be welcome."""

    def __init__(self, reason: str, retry_after_s: float) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s


class WouldBeLate(TryLater):
    """The request's SLO or deadline would be broken."""


class RateLimited(TryLater):
    """More requests or tokens than are allowed; names the limit."""


class UnknownRequest(RouterError):
    """The router keeps no decision on a request of that id: it is another router's, too old, or somebody else's."""


class ClusterUnavailable(RouterError):
    """There is no node that the request could go to."""


class DeadlinePassed(RouterError):
    """The client's deadline passed before the request was finished."""


class LegFailed(RouterError):
    """A leg ended before its time. `is_down`: the process does not answer at all, so nobody should call it.

    `is_unreached`: it did not even take the call, so the request is not what broke it.
    """

    def __init__(self, node_id: str, incarnation: str, problem: str, is_down: bool, is_unreached: bool = False) -> None:
        super().__init__(f"{node_id}: {problem}")
        self.node_id = node_id
        self.incarnation = incarnation
        self.is_down = is_down
        self.is_unreached = is_unreached


class LegRefused(RouterError):
    """A node would not start a leg. Nothing was spent. `is_draining`: it takes nothing new at all."""

    def __init__(self, node_id: str, problem: str, leg: Literal["prefill", "decode"], is_draining: bool) -> None:
        super().__init__(f"{node_id}: {problem}")
        self.node_id = node_id
        self.leg = leg
        self.is_draining = is_draining


class UnusableTokenizer(RouterError):
    """The model's folder lacks a tokenizer of the kind that is supported."""


class UnusableTenants(RouterError):
    """The tenants' file cannot be read, or a field of it is not what it must be; names the field and its line."""


class UnusableKeys(RouterError):
    """The file of admin keys cannot be read, or has something else in it; names the line."""


class UnusableTls(RouterError):
    """A file of a certificate, a key or an authority is not what it must be; names the file."""


class UnusableTraces(RouterError):
    """Traces are to be sent somewhere, but the packages for it are missing."""


def said(error: Exception) -> str:
    """An error's words for a log: one line, whatever of a client's they repeat."""
    return "".join(char if char.isprintable() else " " for char in str(error))
