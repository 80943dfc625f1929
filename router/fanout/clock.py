"""The clock of deadlines and timers: an asyncio event loop, or one that a test moves by hand.

An event loop that was held up, by other work or because the whole process stood still, finds more
time passed than it has seen: what peers sent meanwhile lies unread in its sockets, and a loop may
run its timers before it looks there. Nor need they have had that time: what held up this process,
a machine with more work than cores say, may have held up theirs, and a loop that stood still
between its look at the clock and a request has asked them only now. Nobody is to be judged by such
time: ``Attention`` leaves it out of the silence of shards, and ``Deadline`` gives it back.
"""

import asyncio
from collections.abc import Callable
from typing import Any, Protocol

TICK_S = 0.1
# What one tick may count for: a loop that is merely busy loses nothing, one that was held up does.
LONGEST_TICK_S = 2 * TICK_S
HELD_UP_S = 0.005  # a timer that is so late was: the clock of a Serve replica ticks in milliseconds
# Until the sockets have been read: less than a tick of that clock may not wait at all.
SOCKET_READ_S = 0.002
# What a wait is given at most beyond its deadline, of the time for which the loop was held up.
# Where a dozen processes share two cores a shard takes some tens of milliseconds to answer.
LONGEST_GRACE_S = 0.1


class Clock(Protocol):
    """Seconds, of no particular origin; what ``asyncio.AbstractEventLoop`` offers of itself."""

    def time(self) -> float: ...

    def call_at(self, when: float, callback: Callable[..., Any], *args: Any) -> asyncio.Handle:
        """Calls back once at that time, at once if it has passed; the handle cancels it."""


class TimeSource(Protocol):
    """The part of a clock that tells how long something takes."""

    def time(self) -> float: ...


def running_clock() -> Clock:
    """The event loop that runs."""
    return asyncio.get_running_loop()


class Attention:
    """Seconds in which the event loop could see what others send, from creation to ``stop``.

    It ticks: of the time between two ticks, at most LONGEST_TICK_S counts.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._time = clock.time
        self._counted = 0.0
        self._last = clock.time()
        self._timer = clock.call_at(self._last + TICK_S, self._tick)

    def time(self) -> float:
        passed = self._time() - self._last
        return self._counted + (passed if passed < LONGEST_TICK_S else LONGEST_TICK_S)

    def stop(self) -> None:
        self._timer.cancel()

    def _tick(self) -> None:
        self._counted = self.time()
        self._last = self._time()
        self._timer = self._clock.call_at(self._last + TICK_S, self._tick)


class Deadline:
    """Calls back at ``when``; where the loop was held up beyond it, after as much time again, from
    SOCKET_READ_S to ``longest_grace_s``."""

    __slots__ = ("_callback", "_clock", "_longest_grace_s", "_timer", "_when")

    def __init__(
        self,
        clock: Clock,
        when: float,
        callback: Callable[[], None],
        longest_grace_s: float = LONGEST_GRACE_S,
    ) -> None:
        self._clock = clock
        self._when = when
        self._callback = callback
        self._longest_grace_s = longest_grace_s
        self._timer = clock.call_at(when, self._due)

    def cancel(self) -> None:
        self._timer.cancel()

    def _due(self) -> None:
        now = self._clock.time()
        held_up_s = now - self._when
        if held_up_s > HELD_UP_S:
            grace_s = max(SOCKET_READ_S, min(held_up_s, self._longest_grace_s))
            self._timer = self._clock.call_at(now + grace_s, self._callback)
        else:
            self._callback()
