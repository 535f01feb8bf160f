"""Certificates for the tests, made by the command `openssl`; each is an authority of its own."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the command openssl")


@dataclass(frozen=True)
class Identity:
    """A certificate and its key, in files."""

    cert: Path
    key: Path

    def copy_to(self, other: Identity) -> None:
        other.key.write_bytes(self.key.read_bytes())
        other.cert.write_bytes(self.cert.read_bytes())


def make(folder: Path, name: str, days: int = 2) -> Identity:
    """For localhost and 127.0.0.1, signed by itself; out of date where `days` are less than 0."""
    made = Identity(folder / f"{name}.pem", folder / f"{name}.key")
    names = "subjectAltName=DNS:localhost,IP:127.0.0.1"
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", str(made.key)]
    if days > 0:
        _openssl(
            "req", "-x509", *curve, "-days", str(days), "-subj", f"/CN={name}", "-addext", names, "-out", made.cert
        )
        return made
    request = folder / f"{name}.csr"
    _openssl("req", "-new", *curve, "-subj", f"/CN={name}", "-out", request)
    _openssl("x509", "-req", "-in", request, "-signkey", made.key, "-days", str(days), "-out", made.cert)
    return made


def lock(key: Path, locked: Path) -> None:
    """Writes the same key with a password."""
    _openssl("pkcs8", "-topk8", "-in", key, "-out", locked, "-passout", "pass:secret")


def credentials(trusted: Identity, own: Identity | None = None) -> grpc.ChannelCredentials:
    """Of a client that trusts one certificate, and perhaps has one."""
    pair = (own.key.read_bytes(), own.cert.read_bytes()) if own is not None else (None, None)
    return grpc.ssl_channel_credentials(trusted.cert.read_bytes(), *pair)


def _openssl(*argv: str | Path) -> None:
    subprocess.run(["openssl", *map(str, argv)], check=True, capture_output=True)
