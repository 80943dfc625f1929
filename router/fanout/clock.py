"""The clock of deadlines and timers: an asyncio event loop, or one that a test moves by hand.

An event loop that was held up, by other work or because the whole process stood still, finds more
time passed than it has seen: what peers sent meanwhile lies unread in its sockets, and a loop may
run its timers before it looks there. Nobody is to be judged by such time: ``Attention`` leaves it
out of the silence of shards, and ``Deadline`` reads once what has come before it ends a wait.
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
    """Calls back at ``when``; where the loop was held up beyond it, once the sockets are read."""

    __slots__ = ("_callback", "_clock", "_timer", "_when")

    def __init__(self, clock: Clock, when: float, callback: Callable[[], None]) -> None:
        self._clock = clock
        self._when = when
        self._callback = callback
        self._timer = clock.call_at(when, self._due)

    def cancel(self) -> None:
        self._timer.cancel()

    def _due(self) -> None:
        now = self._clock.time()
        if now - self._when > HELD_UP_S:
            self._timer = self._clock.call_at(now + SOCKET_READ_S, self._callback)
        else:
            self._callback()
