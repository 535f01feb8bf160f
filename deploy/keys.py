"""`baton key`: a new random key, shown once, and the line to store for it."""

from __future__ import annotations

import argparse
import hashlib
import secrets

PREFIX = "baton-"  # so that those who look for leaked secrets know one when they see it
KEY_BYTES = 32


def add_key_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what",
        choices=("new",),
        help="print a key, which is kept nowhere, and its SHA-256: for `key_sha256` in a tenants' file, or as a line of"
        " an admin key file",
    )


def key(args: argparse.Namespace) -> int:
    made = new_key()
    print(f'key:        {made}\nkey_sha256 = "{sha256_of(made)}"')
    return 0


def new_key() -> str:
    return PREFIX + secrets.token_urlsafe(KEY_BYTES)


def sha256_of(text: str) -> str:
    """As hex digits."""
    return hashlib.sha256(text.encode()).hexdigest()
