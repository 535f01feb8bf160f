"""Hosts on one Ethernet, made of network namespaces: each has an address, a loopback and a link of its own.

For tests and benchmarks. A namespace of its own is the switch between them; this process is on it too, at `address`.
Links are cut and limited at the switch's side, as a pulled cable would be. Needs root and `ip` and `tc` (iproute2).
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from deploy.processes import is_running

PREFIX = "baton"  # of the namespaces' names; then come the pid, the network's number and the host's
OWN = 254  # the last byte of this process's address; hosts begin at 1
DEVICE = "eth0"
MIN_BURST_BYTES = 128 << 10  # more than the largest packet that one machine hands on, 64 KiB
BURST_S = 0.0005
MIN_QUEUE_BYTES = 1 << 20
QUEUE_S = 0.01
_numbers = itertools.count()


def reason_to_skip() -> str:
    """Why there can be no such network here; "" where there can."""
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    if missing := [name for name in ("ip", "tc") if shutil.which(name) is None]:
        return f"needs {' and '.join(missing)} (iproute2)"
    probe = f"{PREFIX}-{os.getpid()}-probe"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True, check=False)
    if made.returncode != 0:
        return f"cannot make a network namespace: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", probe], check=True)
    return ""


def burst_bytes(bits_per_s: float) -> int:
    """What a limited link that was idle lets through at once, before its rate counts."""
    return max(MIN_BURST_BYTES, int(BURST_S * bits_per_s / 8))


def floor_s(num_bytes: float, bits_per_s: float) -> float:
    """Seconds that no transfer of so many bytes over an idle link of this rate can do without; 0.0: no limit."""
    if not bits_per_s:
        return 0.0
    return max(0.0, num_bytes - burst_bytes(bits_per_s)) / (bits_per_s / 8)


@dataclass(frozen=True)
class Host:
    """One namespace, and its port of the switch."""

    namespace: str
    address: str
    switch: str
    port: str

    def command(self, *argv: str) -> list[str]:
        """What runs `argv` on this host."""
        return ["ip", "netns", "exec", self.namespace, *argv]

    def limit(self, bits_per_s: float) -> None:
        """To so much each way; 0.0: not at all."""
        for namespace, device in ((self.namespace, DEVICE), (self.switch, self.port)):
            subprocess.run(["tc", "-n", namespace, "qdisc", "del", "dev", device, "root"], capture_output=True)
            if bits_per_s:
                queue_bytes = max(MIN_QUEUE_BYTES, int(QUEUE_S * bits_per_s / 8))
                tbf = ["rate", f"{bits_per_s:.0f}bit", "burst", f"{burst_bytes(bits_per_s)}", "limit", f"{queue_bytes}"]
                _run("tc", "-n", namespace, "qdisc", "add", "dev", device, "root", "tbf", *tbf)

    def cut(self) -> None:
        """Nothing reaches it any more, and nobody is told."""
        _run("ip", "-n", self.switch, "link", "set", self.port, "down")

    def mend(self) -> None:
        _run("ip", "-n", self.switch, "link", "set", self.port, "up")

    def received_bytes(self) -> int:
        counter = f"/sys/class/net/{DEVICE}/statistics/rx_bytes"
        return int(subprocess.run(self.command("cat", counter), check=True, capture_output=True, text=True).stdout)


class Lan:
    """Makes `num_hosts` of them as a context, and more with `join`. At its end their processes are killed, and all is
    taken away; so is at its beginning what a process left behind that was killed itself."""

    def __init__(self, num_hosts: int) -> None:
        self.hosts: list[Host] = []
        self._num_hosts = num_hosts
        pid, number = os.getpid(), next(_numbers)
        self._name = f"{PREFIX}-{pid}-{number}"
        self._own_link = f"bt{pid}-{number % 100}"
        self._switch = f"{self._name}-switch"
        # One that no other process of this machine has: pids differ in these 15 bits, most likely.
        self._net = f"10.{128 + (pid >> 8 & 127)}.{pid & 255}"

    @property
    def address(self) -> str:
        """This process's own."""
        return f"{self._net}.{OWN}"

    def __enter__(self) -> Self:
        remove_orphans()
        try:
            self._make_switch()
            for _ in range(self._num_hosts):
                self.join()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    def join(self) -> Host:
        """One more host, with an unlimited link."""
        index = len(self.hosts)
        host = Host(f"{self._name}-{index}", f"{self._net}.{index + 1}", self._switch, f"port{index}")
        _run("ip", "netns", "add", host.namespace)
        self.hosts.append(host)
        peer = ("peer", "name", DEVICE, "netns", host.namespace)
        _run("ip", "-n", self._switch, "link", "add", host.port, "type", "veth", *peer)
        _run("ip", "-n", self._switch, "link", "set", host.port, "master", "switch", "up")
        _run("ip", "-n", host.namespace, "link", "set", "lo", "up")
        _run("ip", "-n", host.namespace, "address", "add", f"{host.address}/24", "dev", DEVICE)
        _run("ip", "-n", host.namespace, "link", "set", DEVICE, "up")
        return host

    def _make_switch(self) -> None:
        _run("ip", "netns", "add", self._switch)
        _run("ip", "-n", self._switch, "link", "add", "switch", "type", "bridge")
        _run("ip", "-n", self._switch, "link", "set", "switch", "up")
        _run("ip", "link", "add", self._own_link, "type", "veth", "peer", "name", "own", "netns", self._switch)
        _run("ip", "-n", self._switch, "link", "set", "own", "master", "switch", "up")
        _run("ip", "address", "add", f"{self.address}/24", "dev", self._own_link)
        _run("ip", "link", "set", self._own_link, "up")

    def _remove(self) -> None:
        _remove([*(host.namespace for host in self.hosts), self._switch], self._own_link)


def remove_orphans() -> None:
    """Takes away the networks of processes that are no more."""
    by_network: dict[tuple[str, str], list[str]] = {}
    for line in subprocess.run(["ip", "netns", "list"], check=True, capture_output=True, text=True).stdout.splitlines():
        prefix, _, rest = line.split()[0].partition("-")
        parts = rest.split("-")
        if prefix == PREFIX and len(parts) == 3 and parts[0].isdigit() and not is_running(int(parts[0])):
            by_network.setdefault((parts[0], parts[1]), []).append(line.split()[0])
    for (pid, number), namespaces in by_network.items():
        _remove(namespaces, f"bt{pid}-{int(number) % 100}")


def _remove(namespaces: list[str], own_link: str) -> None:
    for namespace in namespaces:
        found = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True)
        for pid in map(int, found.stdout.split()):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
    subprocess.run(["ip", "link", "del", own_link], capture_output=True)
    for namespace in namespaces:
        subprocess.run(["ip", "netns", "del", namespace], capture_output=True)


def _run(*argv: str) -> None:
    made = subprocess.run(argv, capture_output=True, text=True)
    if made.returncode != 0:
        raise OSError(f"{' '.join(argv)}: {made.stderr.strip()}")
