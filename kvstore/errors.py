"""What can go wrong in the store. A block that is not there is a miss, not an error.

KVStoreError
├── DirectoryUnavailable   Redis does not answer; callers go on as if nothing were cached
├── OtherScheme            the cluster names blocks differently; this process must not join
├── ArenaUnavailable       the store process does not answer
├── ArenaFull              every slot is being written; nothing can be evicted
│   └── ArenaDraining      the store takes no new blocks, because an operator said so
├── AskFailed              a store could not do what its operator asked for
└── BadFrame               a message breaks the wire format or a limit; it is refused, and nothing else happens
"""

from __future__ import annotations


class KVStoreError(Exception):
    """Root of this package's errors."""


class DirectoryUnavailable(KVStoreError):
    """Redis does not answer within its time-out."""


class OtherScheme(KVStoreError):
    """The cluster's members and this process derive different names from the same tokens."""


class ArenaUnavailable(KVStoreError):
    """A store process does not answer within its time-out."""


class ArenaFull(KVStoreError):
    """No slot is free and none can be evicted."""


class ArenaDraining(ArenaFull):
    """The store takes no new blocks until an operator ends it; those it holds can be read."""


class AskFailed(KVStoreError):
    """A store refused what its operator asked for."""


class BadFrame(KVStoreError):
    """A message breaks the wire format, or a length or count is over its limit."""
