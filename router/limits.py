"""How much of a router each tenant may use. Pure: the clock is passed in.

Each router process counts for itself: behind N routers a tenant gets up to N times as much.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from router.errors import ClusterBusy, ClusterUnavailable, InvalidRequest, RateLimited, TryLater

MINUTE_S = 60.0
CROWDED_S = 1.0  # when to retry if too many requests run: it is unknown when one will end
MAX_PRIORITY = 100  # of a request, and as much below 0; smaller values are computed first


@dataclass(frozen=True)
class Allowance:
    """What a tenant may use of one router; 0 is no bound."""

    requests_per_minute: int = 0
    tokens_per_minute: int = 0  # of prompts and answers, cached or not
    max_concurrent: int = 0
    max_prompt_tokens: int = 0


class Bucket:
    """A token bucket that refills evenly and holds a minute's worth, which an idle tenant may then take at once.

    It can be overdrawn, as the length of an answer is not known beforehand; then it gives nothing until it has
    recovered. `per_minute` 0 means no limit.
    """

    def __init__(self, per_minute: int, now_s: float) -> None:
        self._per_minute = per_minute
        self._level = float(per_minute)
        self._at_s = now_s

    def resize(self, per_minute: int, now_s: float) -> None:
        """Changes the rate. What was taken stays taken."""
        if per_minute != self._per_minute:
            self._fill(now_s)
            self._level = min(self._level, per_minute) if self._per_minute else float(per_minute)
            self._per_minute = per_minute

    def wait_s(self, amount: int, now_s: float) -> float:
        """Seconds until `amount` may be taken; an amount above a minute's worth waits until the bucket is full."""
        if not self._per_minute:
            return 0.0
        self._fill(now_s)
        missing = min(amount, self._per_minute) - self._level
        return max(0.0, missing) * MINUTE_S / self._per_minute

    def take(self, amount: int) -> None:
        """Takes `amount`; a negative amount is a refund."""
        if self._per_minute:
            self._level = min(self._level - amount, float(self._per_minute))

    def _fill(self, now_s: float) -> None:
        filled = self._level + (now_s - self._at_s) * self._per_minute / MINUTE_S
        self._level, self._at_s = min(filled, float(self._per_minute)), now_s


class Visit:
    """One request, from `Turnstile.admit` on."""

    def __init__(self, allowance: Allowance, tokens: Bucket, clock: Callable[[], float]) -> None:
        self._allowance = allowance
        self._tokens = tokens
        self._clock = clock
        self._prompt_tokens = 0

    def charge_prompt(self, num_tokens: int) -> None:
        """To be called before anything is spent on the prompt. Raises `InvalidRequest`, `RateLimited`."""
        most = self._allowance.max_prompt_tokens
        if most and num_tokens > most:
            raise InvalidRequest("prompt", f"{most} tokens at most for this tenant, got {num_tokens}")
        _check("tokens_per_minute", self._allowance.tokens_per_minute, self._tokens.wait_s(num_tokens, self._clock()))
        self._tokens.take(num_tokens)
        self._prompt_tokens = num_tokens

    def charge_output(self, num_tokens: int) -> None:
        """To be called as tokens come. An answer that has begun is never cut short; it makes the next request wait."""
        self._tokens.take(num_tokens)
        self._prompt_tokens = 0  # no longer refundable

    def refund(self) -> None:
        """The cluster refused the request before its first token."""
        self._tokens.take(-self._prompt_tokens)
        self._prompt_tokens = 0


class _Usage:
    """One tenant's current use."""

    def __init__(self, now_s: float) -> None:
        self.num_running = 0
        self.requests = Bucket(0, now_s)
        self.tokens = Bucket(0, now_s)


class Turnstile:
    """Counts the requests of one router, over either API. `max_concurrent` is for all together; 0: no bound."""

    def __init__(self, max_concurrent: int, clock: Callable[[], float]) -> None:
        self._max_concurrent = max_concurrent
        self._clock = clock
        self._num_running = 0
        self._usages: dict[str, _Usage] = {}  # by the tenant's name

    @contextmanager
    def admit(self, name: str, allowance: Allowance) -> Iterator[Visit]:
        """Counts a tenant's request until the end of the context. Raises `RateLimited` without counting it."""
        usage = self._enter(name, allowance)
        self._num_running += 1
        usage.num_running += 1
        visit = Visit(allowance, usage.tokens, self._clock)
        try:
            yield visit
        except (ClusterBusy, ClusterUnavailable, TryLater):
            visit.refund()
            raise
        finally:
            self._num_running -= 1
            usage.num_running -= 1

    def _enter(self, name: str, allowance: Allowance) -> _Usage:
        now_s = self._clock()
        usage = self._usages.setdefault(name, _Usage(now_s))
        usage.requests.resize(allowance.requests_per_minute, now_s)
        usage.tokens.resize(allowance.tokens_per_minute, now_s)
        is_full = self._max_concurrent and self._num_running >= self._max_concurrent
        _check("max_concurrent_requests of this router", self._max_concurrent, CROWDED_S if is_full else 0.0)
        is_full = allowance.max_concurrent and usage.num_running >= allowance.max_concurrent
        _check("max_concurrent", allowance.max_concurrent, CROWDED_S if is_full else 0.0)
        _check("tokens_per_minute", allowance.tokens_per_minute, usage.tokens.wait_s(0, now_s))
        _check("requests_per_minute", allowance.requests_per_minute, usage.requests.wait_s(1, now_s))
        usage.requests.take(1)
        return usage


def _check(limit: str, most: int, wait_s: float) -> None:
    if wait_s > 0.0:
        raise RateLimited(f"{limit}: {most} at most; come again in {wait_s:.1f} s", wait_s)
