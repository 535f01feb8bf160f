"""Admin keys, of which only the SHA-256 is kept. Pure, except for `read_admin_keys`."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Sequence
from pathlib import Path

from router.errors import Unauthenticated, UnusableKeys
from router.tenants import AUTHORIZATION, key_of

_DIGEST = re.compile(r"[0-9a-fA-F]{64}")


def check_key(values: Sequence[str | bytes], digests: Sequence[bytes]) -> None:
    """Raises `Unauthenticated` unless a call's authorization has one of the keys."""
    if digests:
        given = hashlib.sha256(key_of(values).encode()).digest()
        if not sum(hmac.compare_digest(known, given) for known in digests):  # all of them: the duration reveals nothing
            raise Unauthenticated(f"{AUTHORIZATION}: the key is no admin key")


def read_admin_keys(file: Path) -> list[bytes]:
    """The digests in a file: one key's SHA-256 per line, 64 hex digits; # starts a comment. Raises `UnusableKeys`."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UnusableKeys(f"{file}: {error}") from None
    digests = []
    for number, line in enumerate(lines, 1):
        if text := line.partition("#")[0].strip():
            if not _DIGEST.fullmatch(text):  # which may be a key itself, so it is not shown
                raise UnusableKeys(f"{file}: line {number}: must be 64 hex digits, the SHA-256 of a key")
            digests.append(bytes.fromhex(text))
    if not digests:
        raise UnusableKeys(f"{file}: has no key")
    return digests
