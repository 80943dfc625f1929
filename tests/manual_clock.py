"""A clock that stands until a test moves it: deadlines and pauses without waiting for them."""

import asyncio
import heapq
import itertools
from collections.abc import Callable
from typing import Any


class Timer:
    """Stands for ``asyncio.TimerHandle``."""

    def __init__(self, callback: Callable[..., Any], args: tuple[Any, ...]) -> None:
        self._call: Callable[[], Any] | None = lambda: callback(*args)

    def cancel(self) -> None:
        self._call = None

    def fire(self) -> None:
        call, self._call = self._call, None
        if call is not None:
            call()


class ManualClock:
    """Seconds. As an event loop's, its callbacks run in order of their times."""

    def __init__(self, start: float = 1000.0) -> None:
        self._now = start
        self._timers: list[tuple[float, int, Timer]] = []
        self._order = itertools.count()

    def time(self) -> float:
        return self._now

    def call_at(self, when: float, callback: Callable[..., Any], *args: Any) -> Timer:
        timer = Timer(callback, args)
        heapq.heappush(self._timers, (when, next(self._order), timer))
        return timer

    def hold_up(self, seconds: float) -> None:
        """Time passes while nothing runs; what was due meanwhile is late."""
        self._now += seconds

    async def sleep(self, seconds: float) -> None:
        woken = asyncio.get_running_loop().create_future()
        timer = self.call_at(self._now + seconds, woken.set_result, None)
        try:
            await woken
        finally:
            timer.cancel()

    async def advance(self, seconds: float) -> None:
        """Moves on; whoever was woken on the way has run when this returns."""
        until = self._now + seconds
        await asyncio.sleep(0)
        while self._timers and self._timers[0][0] <= until:
            when, _, timer = heapq.heappop(self._timers)
            self._now = max(self._now, when)
            timer.fire()
            await asyncio.sleep(0)
        self._now = until
        await asyncio.sleep(0)
