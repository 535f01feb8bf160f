"""The options of `baton serve` about access and concurrency. Checked before anything is started."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from router.admin_keys import read_admin_keys
from router.config import RouterConfig, is_loopback
from router.errors import RouterError
from router.tls import read_certificates, tls_files


@dataclass(frozen=True)
class Locks:
    """The access options of all routers of a cluster. None and -1 mean: not set."""

    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None
    admin_port: int = -1
    admin_host: str = "127.0.0.1"
    admin_key_file: Path | None = None
    max_concurrent_requests: int = RouterConfig.max_concurrent_requests

    def problem(self) -> str:
        """The problem with them, naming the option; "" if there is none."""
        try:
            files = tls_files(_text(self.tls_cert), _text(self.tls_key), _text(self.tls_client_ca))
        except RouterError as error:
            return f"--tls-cert, --tls-key and --tls-client-ca: {error}"
        try:
            if files is not None:
                read_certificates(files)
        except RouterError as error:
            return f"TLS: {error}"
        try:
            if self.admin_key_file is not None:
                read_admin_keys(self.admin_key_file)
        except RouterError as error:
            return f"--admin-key-file: {error}"
        if not -1 <= self.admin_port <= 65535:
            return f"--admin-port must be between 0 and 65535, got {self.admin_port}"
        if self.admin_port >= 0 and self.admin_key_file is None and not is_loopback(self.admin_host):
            return "--admin-host must be a loopback address where there is no --admin-key-file"
        if self.max_concurrent_requests < 0:
            return f"--max-concurrent-requests must be 0 or more, got {self.max_concurrent_requests}"
        return ""

    def router_options(self, index: int) -> dict[str, Any]:
        """Fields of the config of router `index`. Its admin port follows the first one's."""
        return {
            "tls_cert": _text(self.tls_cert),
            "tls_key": _text(self.tls_key),
            "tls_client_ca": _text(self.tls_client_ca),
            "admin_port": self.admin_port + index if self.admin_port > 0 else self.admin_port,
            "admin_host": self.admin_host,
            "admin_key_file": _text(self.admin_key_file),
            "max_concurrent_requests": self.max_concurrent_requests,
        }


def add_lock_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("locks (docs/security.md)").add_argument
    add("--tls-cert", type=Path, metavar="FILE", help="the routers' certificate and its chain, PEM; default: no TLS")
    add("--tls-key", type=Path, metavar="FILE", help="its key, PEM")
    add("--tls-client-ca", type=Path, metavar="FILE", help="let in only clients with a certificate of this authority")
    add(
        "--admin-port",
        type=int,
        default=-1,
        metavar="PORT",
        help="of a door for `baton nodes` and `baton drain`; 0: the kernel chooses (default: no such door)",
    )
    add("--admin-host", default="127.0.0.1", metavar="HOST", help="that it listens on; others need --admin-key-file")
    add(
        "--admin-key-file",
        type=Path,
        metavar="FILE",
        help="the SHA-256 of a key a line, see `baton key`; who has none of these keys stays outside",
    )
    add(
        "--max-concurrent-requests",
        type=int,
        default=RouterConfig.max_concurrent_requests,
        metavar="N",
        help="at a time on one router (default %(default)s; 0: no bound)",
    )


def locks_from(args: argparse.Namespace) -> Locks:
    return Locks(
        tls_cert=args.tls_cert,
        tls_key=args.tls_key,
        tls_client_ca=args.tls_client_ca,
        admin_port=args.admin_port,
        admin_host=args.admin_host,
        admin_key_file=args.admin_key_file,
        max_concurrent_requests=args.max_concurrent_requests,
    )


def _text(path: Path | None) -> str:
    return "" if path is None else str(path.resolve())
