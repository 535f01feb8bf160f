"""The progress of a start, as a bar on standard error; without a terminal there is no bar, only lines."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn


class StartBar:
    """One bar for all nodes while they load and warm up. A context manager; lines printed meanwhile appear above it."""

    def __init__(self, num_nodes: int, console: Console | None = None) -> None:
        console = console or Console(stderr=True)
        columns = (TextColumn("baton: {task.description}"), BarColumn(), TimeElapsedColumn())
        self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._num_nodes = num_nodes
        self._parts: dict[str, float] = {}
        self._task = self._bar.add_task(self.words, total=num_nodes)

    @property
    def words(self) -> str:
        """The nodes' states, "1 starting, 2 loading, 1 warming up, 3 up"; starting ones have not reported yet."""
        parts = self._parts.values()
        counts = {
            "starting": self._num_nodes - len(parts),
            "loading": sum(part == 0.0 for part in parts),
            "warming up": sum(0.0 < part < 1.0 for part in parts),
            "up": sum(part == 1.0 for part in parts),
        }
        return ", ".join(f"{count} {what}" for what, count in counts.items() if count)

    def __enter__(self) -> StartBar:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def show(self, node_id: str, part: float) -> None:
        """`part` of this node's start is done: 0.0 while it loads, 1.0 when it is up."""
        self._parts[node_id] = part
        self._bar.update(self._task, completed=sum(self._parts.values()), description=self.words)
