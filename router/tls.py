"""TLS of a router's ports, all with one certificate: read and checked here, once, and again when its files change.

TLS 1.2 or newer. With an authority for clients, only clients with a certificate from it are admitted (mutual TLS).
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc

from router.errors import UnusableTls

_ROUND_TRIPS = 8  # a handshake takes fewer


@dataclass(frozen=True)
class TlsFiles:
    """Paths of PEM files. In the certificate's file, intermediate certificates follow."""

    cert: str
    key: str
    client_ca: str = ""  # "": clients need no certificate

    @property
    def paths(self) -> list[Path]:
        return [Path(name) for name in (self.cert, self.key, self.client_ca) if name]


@dataclass(frozen=True)
class Certificates:
    """The contents of the files, which match and are currently valid."""

    cert: bytes
    key: bytes
    client_ca: bytes | None


def tls_files(cert: str, key: str, client_ca: str) -> TlsFiles | None:
    """None if no TLS is requested. Raises `UnusableTls` if the files given are incomplete."""
    if bool(cert) != bool(key):
        raise UnusableTls("a TLS certificate and its key are needed, or neither of them")
    if client_ca and not cert:
        raise UnusableTls("an authority for clients' certificates needs a certificate of the router's own")
    return TlsFiles(cert, key, client_ca) if cert else None


def read_certificates(files: TlsFiles) -> Certificates:
    """Raises `UnusableTls`, which names the file and never shows its contents."""
    found = Certificates(_bytes(files.cert), _bytes(files.key), _bytes(files.client_ca) if files.client_ca else None)
    _check_authority(files.cert, "certificate")
    if files.client_ca:
        _check_authority(files.client_ca, "authority's certificate")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _load(context, files)
    problem = _shake_hands(context, files.cert)
    if problem:
        raise UnusableTls(f"{files.cert}: {problem}")
    return found


class DoorTls:
    """TLS for gRPC and HTTP. Open connections are not affected by new certificates."""

    def __init__(self, files: TlsFiles) -> None:
        """Raises `UnusableTls`."""
        self.files = files
        self._now = self._given = read_certificates(files)
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)  # for HTTP
        self.context.minimum_version = ssl.TLSVersion.TLSv1_2
        self.context.set_alpn_protocols(["http/1.1"])
        if files.client_ca:
            self.context.verify_mode = ssl.CERT_REQUIRED
        self._load_context()

    def grpc_credentials(self) -> grpc.ServerCredentials:
        """The credentials for gRPC, which asks for changes at each handshake."""
        is_mutual = self._now.client_ca is not None
        return grpc.dynamic_ssl_server_credentials(_configuration(self._now), self._news, is_mutual)

    def read(self) -> Certificates:
        return read_certificates(self.files)

    def swap(self, found: Certificates) -> None:
        """Applies to new connections. Over HTTP, a client authority that was removed is accepted until a restart."""
        self._load_context()
        self._now = found

    def _load_context(self) -> None:
        _load(self.context, self.files)
        if self.files.client_ca:
            self.context.load_verify_locations(self.files.client_ca)

    def _news(self) -> grpc.ServerCertificateConfiguration | None:
        """The new configuration, if any; None: unchanged. Called on gRPC's threads."""
        now = self._now
        if now is self._given:
            return None
        self._given = now
        return _configuration(now)


def _configuration(found: Certificates) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(found.key, found.cert)], found.client_ca)


def _bytes(name: str) -> bytes:
    try:
        return Path(name).read_bytes()
    except OSError as error:
        raise UnusableTls(f"{name}: {error.strerror}") from None


def _check_authority(name: str, what: str) -> None:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(name)
    except (ssl.SSLError, OSError):
        raise UnusableTls(f"{name}: is no {what} in PEM") from None


def _load(context: ssl.SSLContext, files: TlsFiles) -> None:
    try:
        context.load_cert_chain(files.cert, files.key, password="")  # which keeps OpenSSL from asking the terminal
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise UnusableTls(f"{files.key}: is not the key of {files.cert}") from None
        raise UnusableTls(f"{files.key}: is no private key in PEM without a password") from None
    except OSError as error:
        raise UnusableTls(f"{files.key}: {error.strerror}") from None


def _shake_hands(server_context: ssl.SSLContext, cert: str) -> str:
    """A handshake in memory with a client that trusts this certificate: it can only object to its dates or use."""
    client_context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client_context.check_hostname = False
    client_context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    client_context.load_verify_locations(cert)
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = client_context.wrap_bio(to_client, to_server)
    server = server_context.wrap_bio(to_server, to_client, server_side=True)
    for _ in range(_ROUND_TRIPS):
        try:
            for side in (client, server):
                try:
                    side.do_handshake()
                except ssl.SSLWantReadError:
                    continue
        except ssl.SSLCertVerificationError as error:
            return error.verify_message
        except ssl.SSLError as error:
            return str(error.reason)
    return ""
