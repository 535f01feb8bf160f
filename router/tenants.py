"""Who may use this router: tenants, their API keys, and what each of them gets. Pure, except for `read_tenants`.

A tenant's name determines the salt of its blocks' names, so the caches of two tenants have no block in common, neither
in engines nor in arenas. Keys are never kept, only their SHA-256; keys are long and random, so it cannot be guessed.

    [[tenant]]
    name = "search"
    key_sha256 = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
    kv_memory = "2GiB"  # of each machine's arena; without it there is no bound
    requests_per_minute = 600  # and so on, see `router.limits.Allowance`; without them there is no bound
    least_priority = -5  # of his requests, the smaller one is computed first; without it 0

`key_sha256` may be a list: while keys are rotated, both the old and the new one are valid.
"""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from router.amounts import parse_bytes
from router.errors import Unauthenticated, UnusableTenants
from router.limits import MAX_PRIORITY, Allowance

AUTHORIZATION = "authorization"  # of a call's metadata or headers: "Bearer KEY"
ALLOWANCES = tuple(field.name for field in dataclasses.fields(Allowance))
FIELDS = ("name", "key_sha256", "kv_memory", "least_priority", *ALLOWANCES)
MAX_KEYS = 16  # of one tenant
MAX_ALLOWANCE = 10**12
UNBOUNDED = Allowance()
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_DIGEST = re.compile(r"[0-9a-fA-F]{64}")
_HEAD = re.compile(r"\s*\[\[\s*tenant\s*\]\]")
_FIELD = re.compile(r"""\s*["']?([A-Za-z0-9_-]+)["']?\s*=""")


@dataclass(frozen=True)
class Tenant:
    """The tenant of a request, and what it gets. The one without a name is everybody, if there are no tenants."""

    name: str = ""
    kv_quota_bytes: int = 0  # in each machine's arena; 0: no bound
    allowance: Allowance = UNBOUNDED
    least_priority: int = 0  # that his requests may have; the smaller one is computed first

    @property
    def salt(self) -> bytes:
        """Separates its blocks' names from others'. Depends on its name only, so it survives restarts and new keys."""
        return hashlib.sha256(b"baton-tenant\0" + self.name.encode()).digest() if self.name else b""


EVERYBODY = Tenant(least_priority=-MAX_PRIORITY)


class Tenants:
    """The tenants by the digests of their keys. `replace` swaps all of them at once, between two calls."""

    def __init__(self, by_digest: Mapping[bytes, Tenant]) -> None:
        self._by_digest = dict(by_digest)

    def __len__(self) -> int:
        return len({tenant.name for tenant in self._by_digest.values()})

    def replace(self, others: Tenants) -> None:
        """Swaps the tenants, from the next call on. Running calls go on."""
        self._by_digest = others._by_digest

    def authenticate(self, values: Sequence[str | bytes]) -> Tenant:
        """The tenant whose key a call's authorization has. Raises `Unauthenticated`, which never repeats the key."""
        tenant = self._of_digest(hashlib.sha256(key_of(values).encode()).digest())
        if tenant is None:
            raise Unauthenticated(f"{AUTHORIZATION}: the key is no tenant's")
        return tenant

    def _of_digest(self, digest: bytes) -> Tenant | None:
        """Compares all of them, each in constant time, so that the duration reveals nothing about the keys."""
        found = None
        for known, tenant in self._by_digest.items():
            if hmac.compare_digest(known, digest):
                found = tenant
        return found


def key_of(values: Sequence[str | bytes]) -> str:
    """The key in a call's authorization. Raises `Unauthenticated`."""
    if not values:
        raise Unauthenticated(f"{AUTHORIZATION}: Bearer KEY is needed")
    scheme, _, key = (values[0] if isinstance(values[0], str) else "").partition(" ")
    key = key.strip()
    if len(values) > 1 or scheme.lower() != "bearer" or not key:
        raise Unauthenticated(f"{AUTHORIZATION}: must be Bearer KEY, once")
    return key


def read_tenants(path: Path) -> Tenants:
    """The tenants of a file. Raises `UnusableTenants`."""
    try:
        return parse_tenants(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UnusableTenants(f"{path}: {error}") from None
    except UnusableTenants as error:
        raise UnusableTenants(f"{path}: {error}") from None


def parse_tenants(text: str) -> Tenants:
    """The tenants of a file's text. Raises `UnusableTenants`, which names the field and its line."""
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UnusableTenants(f"is no TOML: {error}") from None
    lines = _Lines(text)
    for name in document:
        if name != "tenant":
            raise UnusableTenants(f"{lines.of_field(-1, name)}{name}: only [[tenant]] is known")
    tables = document.get("tenant")
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise UnusableTenants("tenant: must be [[tenant]], once or more")
    by_digest: dict[bytes, Tenant] = {}
    for index, table in enumerate(tables):
        try:
            _add(by_digest, table)
        except _BadField as bad:
            raise UnusableTenants(f"{lines.of_field(index, bad.field)}tenant.{bad.field}: {bad}") from None
    return Tenants(by_digest)


class _BadField(Exception):
    def __init__(self, field: str, problem: str) -> None:
        super().__init__(problem)
        self.field = field


def _add(by_digest: dict[bytes, Tenant], table: Mapping[str, Any]) -> None:
    for name in table:
        if name not in FIELDS:
            raise _BadField(name, f"is no field; there are {', '.join(FIELDS)}")
    name = _text(table, "name")
    if not _NAME.fullmatch(name):
        raise _BadField("name", f"must be 1 to 64 letters, digits, '.', '_' or '-', got {name!r}")
    if any(tenant.name == name for tenant in by_digest.values()):
        raise _BadField("name", f"{name!r} is there twice")
    digests = [_digest(text) for text in _digest_texts(table)]
    allowance = Allowance(**{field: _whole(table, field, 1, MAX_ALLOWANCE) for field in ALLOWANCES if field in table})
    tenant = Tenant(name, _quota_bytes(table), allowance, _least_priority(table))
    for digest in digests:
        if digest in by_digest:
            raise _BadField("key_sha256", f"is that of {by_digest[digest].name!r}, too")
        by_digest[digest] = tenant


def _digest_texts(table: Mapping[str, Any]) -> list[str]:
    texts = table.get("key_sha256")
    if not isinstance(texts, list):
        return [_text(table, "key_sha256")]
    if not 1 <= len(texts) <= MAX_KEYS or not all(isinstance(text, str) for text in texts):
        raise _BadField("key_sha256", f"must be one text in quotes, or a list of 1 to {MAX_KEYS} of them")
    return texts


def _digest(text: str) -> bytes:
    if not _DIGEST.fullmatch(text):  # which may be a key itself, so it is not shown
        raise _BadField("key_sha256", f"must be 64 hex digits, the SHA-256 of a key; got {len(text)} characters")
    return bytes.fromhex(text)


def _least_priority(table: Mapping[str, Any]) -> int:
    field = "least_priority"
    return _whole(table, field, -MAX_PRIORITY, 0) if field in table else 0


def _whole(table: Mapping[str, Any], field: str, least: int, most: int) -> int:
    value = table[field]
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise _BadField(field, f"must be a whole number from {least} to {most}, got {value!r}")
    return value


def _text(table: Mapping[str, Any], field: str) -> str:
    value = table.get(field)
    if not isinstance(value, str):
        raise _BadField(field, "must be set" if value is None else "must be a text in quotes")
    return value


def _quota_bytes(table: Mapping[str, Any]) -> int:
    if "kv_memory" not in table:
        return 0
    try:
        quota_bytes = parse_bytes(_text(table, "kv_memory"))
    except ValueError as error:
        raise _BadField("kv_memory", str(error)) from None
    if not 0 < quota_bytes < 2**63:
        raise _BadField("kv_memory", "must be more than 0, and less than 8388608T")
    return quota_bytes


class _Lines:
    """Line numbers of a file's fields, which `tomllib` does not give. Good enough for messages."""

    def __init__(self, text: str) -> None:
        self._heads: list[int] = []
        self._fields: dict[tuple[int, str], int] = {}
        for number, line in enumerate(text.splitlines(), 1):
            if _HEAD.match(line):
                self._heads.append(number)
            elif match := _FIELD.match(line):
                self._fields.setdefault((len(self._heads) - 1, match[1]), number)

    def of_field(self, index: int, field: str) -> str:
        """ "line N: " for the field of a table, or for the table's header if it has no such field."""
        number = self._fields.get((index, field))
        if number is None and 0 <= index < len(self._heads):
            number = self._heads[index]
        return "" if number is None else f"line {number}: "
