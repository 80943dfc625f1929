"""When a call is tried again, and when it is given up: decided here, without a socket.

Calls read, or write with an idempotency key, so each may be repeated. Repeated are failures of the
connection (refused, reset, no connection within ``CONNECT_TIMEOUT_S``) and the statuses of
``RETRIED``. An answer that does not come within the call's time is not waited for again: the time
is used up.
"""

from collections.abc import Callable
from dataclasses import dataclass

from shardline.router.client.http1 import Response
from shardline.shards.core.errors import InvalidInput

# overloaded; the router ended before it had answered (said by the load balancer); unavailable
RETRIED = (429, 502, 503)
CONNECT_TIMEOUT_S = 5.0  # a host that drops packets must not use up the whole call's time

Outcome = Response | OSError


@dataclass(frozen=True, slots=True, kw_only=True)
class Retry:
    """How often a call is made, and how long the pauses are.

    attempts: the first one included; 1 repeats nothing. The pause before attempt n + 1 is random
    between 0 and ``first_pause_s`` * 2**(n - 1), at most ``longest_pause_s``, and a Retry-After of
    the server comes on top. A call whose next pause would end after its timeout is given up.
    """

    attempts: int = 4
    first_pause_s: float = 0.1
    longest_pause_s: float = 2.0

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise InvalidInput(
                "no attempt at all", field="attempts", expected=">= 1", got=str(self.attempts)
            )


class Attempts:
    """One call's attempts. timeout_s bounds all of them together, with their pauses."""

    def __init__(
        self,
        retry: Retry,
        timeout_s: float,
        clock: Callable[[], float],
        uniform: Callable[[float, float], float],
    ) -> None:
        self._retry = retry
        self._clock = clock
        self._uniform = uniform
        self._made = 0
        self._deadline = clock() + timeout_s

    def remaining(self) -> float:
        """Seconds, > 0. Raises TimeoutError: there are none left."""
        left = self._deadline - self._clock()
        if left <= 0:
            raise TimeoutError
        return left

    def pause_after(self, outcome: Outcome) -> float | None:
        """Seconds to wait before the next attempt; None: this outcome is the last."""
        if isinstance(outcome, Response):
            if outcome.status not in RETRIED:
                return None
        elif isinstance(outcome, TimeoutError):
            return None
        self._made += 1
        if self._made >= self._retry.attempts:
            return None
        longest = self._retry.first_pause_s * 2.0 ** (self._made - 1)
        pause = self._uniform(0.0, min(longest, self._retry.longest_pause_s))
        pause += _retry_after_s(outcome)
        return pause if self._clock() + pause < self._deadline else None


def _retry_after_s(outcome: Outcome) -> float:
    """The whole seconds of a Retry-After; 0 without one, or where it is a date."""
    value = outcome.headers.get(b"retry-after", b"") if isinstance(outcome, Response) else b""
    return float(value) if value.isdigit() else 0.0
