"""A command's connection to a router, with or without TLS."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import grpc

from deploy.config import DeployError


@dataclass(frozen=True)
class ClientTls:
    """PEM files. Without `ca`, the authorities that gRPC ships with are trusted."""

    ca: Path | None = None
    cert: Path | None = None  # of the client itself, where the router asks for one
    key: Path | None = None
    server_name: str = ""  # that the router's certificate is to have; "": its address


def open_channel(address: str, tls: ClientTls | None) -> grpc.Channel:
    """Raises `DeployError` for files that cannot be read; whether they match shows only at the first call."""
    if tls is None:
        return grpc.insecure_channel(address)
    credentials = grpc.ssl_channel_credentials(
        _bytes("--tls-ca", tls.ca), _bytes("--tls-key", tls.key), _bytes("--tls-cert", tls.cert)
    )
    options = [("grpc.ssl_target_name_override", tls.server_name)] if tls.server_name else []
    return grpc.secure_channel(address, credentials, options=options)


def add_tls_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--tls", action="store_true", help="the router has TLS, with a certificate of a well-known authority")
    add("--tls-ca", type=Path, metavar="FILE", help="the router has TLS, with a certificate of this authority (PEM)")
    add("--tls-cert", type=Path, metavar="FILE", help="of the client, where the router asks for one (PEM)")
    add("--tls-key", type=Path, metavar="FILE", help="its key (PEM)")
    add("--tls-server-name", default="", metavar="NAME", help="in the router's certificate; default: of its address")


def tls_from(args: argparse.Namespace) -> ClientTls | None:
    """The TLS options; None: no TLS. Raises `DeployError`."""
    if (args.tls_cert is None) != (args.tls_key is None):
        raise DeployError("--tls-cert and --tls-key go together")
    if not (args.tls or args.tls_ca or args.tls_cert or args.tls_server_name):
        return None
    return ClientTls(args.tls_ca, args.tls_cert, args.tls_key, args.tls_server_name)


def _bytes(option: str, file: Path | None) -> bytes | None:
    try:
        return None if file is None else file.read_bytes()
    except OSError as error:
        raise DeployError(f"{option}: {file}: {error.strerror}") from None
