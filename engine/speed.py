"""How fast this engine has been lately, measured from its own steps. Pure: seconds are passed in."""

from __future__ import annotations

from collections.abc import Sequence

from engine.scheduler import Chunk

PREFILL_HALF_LIFE_TOKENS = 4096
DECODE_WEIGHT = 0.1  # of the newest step in the moving average


class SpeedMeter:
    """Moving averages, 0.0 before the first measurement.

    `prefill_tokens_per_s` is what prompts get, so a step that also decodes counts with all its seconds. It fades by
    tokens and not by steps: a few short tails say little about long prompts. `decode_step_s` is what a running request
    waits for its next token, so a step that also prefills counts here too.
    """

    def __init__(self) -> None:
        self.decode_step_s = 0.0
        self._prefill_tokens = 0.0
        self._prefill_s = 0.0

    @property
    def prefill_tokens_per_s(self) -> float:
        return self._prefill_tokens / self._prefill_s if self._prefill_s else 0.0

    def observe(self, chunks: Sequence[Chunk], seconds: float) -> None:
        """Counts one step; a chunk of one token is a decode step, whatever token it is."""
        if any(chunk.num_tokens == 1 for chunk in chunks):
            newest = DECODE_WEIGHT if self.decode_step_s else 1.0
            self.decode_step_s += newest * (seconds - self.decode_step_s)
        if prefilled := sum(chunk.num_tokens for chunk in chunks if chunk.num_tokens > 1):
            keep = 0.5 ** (prefilled / PREFILL_HALF_LIFE_TOKENS)
            self._prefill_tokens = self._prefill_tokens * keep + prefilled
            self._prefill_s = self._prefill_s * keep + seconds
