"""Which of this machine's network interfaces an address belongs to. The kernel's answer, by ioctl: Linux, IPv4."""

from __future__ import annotations

import fcntl
import os
import socket
import struct

SIOCGIFADDR = 0x8915
# Gloo and NCCL listen where the machine's name leads to unless they are told otherwise; in a network namespace, in a
# container, or with several networks, that is some other interface or none.
VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def interface_of(address: str) -> str:
    """The interface's name; "" if no interface has that address."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                found = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:
                continue  # it has none
            if socket.inet_ntoa(found[20:24]) == address:
                return name
    return ""


def talk_through(address: str) -> None:
    """Makes Gloo and NCCL in this process use that address's interface; existing settings are kept."""
    name = interface_of(address)
    for variable in VARIABLES if name else ():
        os.environ.setdefault(variable, name)
