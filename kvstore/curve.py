"""Who may read from a store over the network: holders of the cluster's wire key, and nobody else.

The wire key is one secret. Two CURVE key pairs are derived from it, one for all stores and one for all readers, so a
holder can authenticate the other side, and anyone else can neither ask, answer nor eavesdrop. Sockets within a machine
need none of this: they are protected by the mode of their folder.
"""

from __future__ import annotations

import hashlib
import ipaddress
import secrets
from collections.abc import Sequence
from typing import Any

import zmq
import zmq.asyncio
from zmq.utils import z85

CURVE_BYTES = 64  # encryption makes a frame longer by less than this

_KEY_BYTES = 32
_ZAP_ADDRESS = "inproc://zeromq.zap.01"  # of RFC 27: where ZeroMQ itself asks
_ZAP_VERSION = b"1.0"
_ZAP_FRAMES = 7  # version, request id, domain, address, identity, mechanism, the client's public key
_DOMAIN = b"baton"


def new_wire_key() -> str:
    """A secret for one cluster, as hex digits."""
    return secrets.token_hex(_KEY_BYTES)


class Curve:
    """Both ends of a cluster's encrypted connections. Raises ValueError for an invalid wire key."""

    def __init__(self, wire_key: str) -> None:
        try:
            secret = bytes.fromhex(wire_key)
        except ValueError:
            secret = b""
        if len(secret) != _KEY_BYTES:
            raise ValueError(f"wire_key: must be {2 * _KEY_BYTES} hex digits")  # and is never shown
        self._store = _pair(b"store", secret)
        self._reader = _pair(b"reader", secret)

    def guard(self, socket: zmq.Socket[Any]) -> None:
        """Makes a store's socket ask its context's `Doorkeeper` about each peer. To be called before it is bound."""
        socket.setsockopt(zmq.CURVE_SERVER, 1)
        socket.setsockopt(zmq.CURVE_SECRETKEY, self._store[1])
        socket.setsockopt(zmq.ZAP_DOMAIN, _DOMAIN)
        socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)  # without it, a missing ZAP handler would admit everybody

    def identify(self, socket: zmq.Socket[Any]) -> None:
        """Makes a reader's socket authenticate itself and the store. To be called before it connects."""
        socket.setsockopt(zmq.CURVE_SERVERKEY, self._store[0])
        socket.setsockopt(zmq.CURVE_PUBLICKEY, self._reader[0])
        socket.setsockopt(zmq.CURVE_SECRETKEY, self._reader[1])

    def is_reader(self, public_key: bytes) -> bool:
        return secrets.compare_digest(public_key, z85.decode(self._reader[0]))


class Doorkeeper:
    """Authenticates the peers of all guarded sockets of a context. Create it before they are bound."""

    def __init__(self, context: zmq.asyncio.Context, curve: Curve) -> None:
        self._curve = curve
        self._socket = context.socket(zmq.REP)
        self._socket.bind(_ZAP_ADDRESS)

    async def run(self) -> None:
        """Runs until cancelled."""
        while True:
            question = await self._socket.recv_multipart()
            await self._socket.send_multipart(zap_answer(question, self._curve))


def zap_answer(question: Sequence[bytes], curve: Curve) -> list[bytes]:
    """Version, request id, status, reason, user, metadata. Anything that is not understood is refused."""
    request_id = question[1] if len(question) > 1 else b""
    is_welcome = (
        len(question) == _ZAP_FRAMES
        and question[0] == _ZAP_VERSION
        and question[2] == _DOMAIN
        and question[5] == b"CURVE"
        and curve.is_reader(question[6])
    )
    status, reason = (b"200", b"OK") if is_welcome else (b"400", b"unknown key")
    return [_ZAP_VERSION, request_id, status, reason, b"", b""]


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`. False for names other than localhost, which may mean anything."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def _pair(name: bytes, wire_key: bytes) -> tuple[bytes, bytes]:
    """Public and secret key, in ZeroMQ's text form. Any 32 bytes are a valid secret key of Curve25519."""
    secret_key = z85.encode(hashlib.sha256(b"baton-wire\0" + name + b"\0" + wire_key).digest())
    return zmq.curve_public(secret_key), secret_key
