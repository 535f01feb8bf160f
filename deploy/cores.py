"""Which cores a node computes on: an even share of those that its machine allows, apart from its neighbours' shares.

Only the computing threads are pinned. Those that serve gRPC and ZeroMQ run wherever there is room: they need little
time, but at once, and on a core filled by a step they would wait for the scheduler. Two clusters on one machine know
nothing of each other, and choose the same cores.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger(__name__)

CPUS = Path("/sys/devices/system/cpu")
CGROUP = Path("/sys/fs/cgroup")


def allowed_cores() -> list[int]:
    """The CPUs that the calling thread may run on, neighbours adjacent, so shares have whole cores and near memory."""
    return sorted(os.sched_getaffinity(0), key=_place)


def num_usable_cores(cgroup: Path = CGROUP) -> int:
    """How many threads can run at a time: the allowed cores, or fewer by a container's CPU quota."""
    return max(1, int(min(len(os.sched_getaffinity(0)), _quota(cgroup))))


def share(cores: Sequence[int], index: int, count: int) -> tuple[int, ...]:
    """The `index`-th of `count` adjacent shares; if they cannot be equal, the first ones have one more."""
    small, larger = divmod(len(cores), count)
    first = index * small + min(index, larger)
    return tuple(cores[first : first + small + (index < larger)])


@contextmanager
def running_on(cores: Sequence[int]) -> Iterator[None]:
    """Pins the calling thread, and threads it creates meanwhile, to `cores`; (): does nothing."""
    before = os.sched_getaffinity(0)
    hold_to(cores)
    try:
        yield
    finally:
        if cores:
            hold_to(sorted(before))


def hold_to(cores: Sequence[int]) -> None:
    """Like `running_on`, permanently. Does not fail if cores were taken from this process meanwhile."""
    if not cores:
        return
    try:
        os.sched_setaffinity(0, cores)
    except OSError as error:
        logger.warning("event=not_pinned cores=%s error=%s", cores, error)


def _place(cpu: int) -> tuple[int, int, int]:
    """Sort key of a CPU: package, core, thread of the core."""
    return _number(cpu, "physical_package_id"), _number(cpu, "core_id"), cpu


def _number(cpu: int, name: str) -> int:
    try:
        return int((CPUS / f"cpu{cpu}" / "topology" / name).read_text())
    except (OSError, ValueError):
        return 0


def _quota(cgroup: Path) -> float:
    """This container's CPU quota in CPUs, from cgroup v2 or v1; infinite if there is none."""
    try:
        if (cgroup / "cpu.max").exists():
            quota, period = (cgroup / "cpu.max").read_text().split()
        else:
            quota, period = ((cgroup / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return float(quota) / float(period) if float(quota) > 0 else float("inf")
    except (OSError, ValueError):  # "max" is no number
        return float("inf")
