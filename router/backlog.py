"""When a node will have computed all that it was given: what it reported, and what was sent since. Pure.

The moment is absolute, so what is left shrinks by itself while the node works.
"""

from __future__ import annotations


class Backlog:
    """The prefill work of one node, in seconds of its own time."""

    def __init__(self) -> None:
        self._reported_free_at_s = 0.0
        self._sent: dict[object, tuple[float, float]] = {}  # leg -> (when, seconds), those that no report counts yet

    def reported(self, now_s: float, queued_s: float) -> None:
        """The node's own word: at `now_s` it had so much to do, whatever `sent` it had heard of included."""
        self._reported_free_at_s = now_s + queued_s

    def sent(self, leg: object, now_s: float, seconds: float) -> None:
        """A leg was sent that will compute for so long."""
        self._sent[leg] = (now_s, seconds)

    def counted(self, leg: object) -> None:
        """A report counts the leg, or it is over without having computed. Idempotent."""
        self._sent.pop(leg, None)

    def computed(self, leg: object, now_s: float) -> None:
        """The leg is done: until now the node was at work, and what was sent after it has not been begun before."""
        if self._sent.pop(leg, None) is not None:
            self._reported_free_at_s = max(self._reported_free_at_s, now_s)

    def free_at_s(self) -> float:
        """When all of it is computed. In the past where there is nothing."""
        free_at_s = self._reported_free_at_s
        for sent_s, seconds in self._sent.values():  # in the order of sending
            free_at_s = max(free_at_s, sent_s) + seconds
        return free_at_s
