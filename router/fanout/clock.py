"""The clock of deadlines and timers: an asyncio event loop, or one that a test moves by hand."""

import asyncio
from collections.abc import Callable
from typing import Any, Protocol


class Clock(Protocol):
    """Seconds, of no particular origin; what ``asyncio.AbstractEventLoop`` offers of itself."""

    def time(self) -> float: ...

    def call_at(self, when: float, callback: Callable[..., Any], *args: Any) -> asyncio.Handle:
        """Calls back once at that time, at once if it has passed; the handle cancels it."""


def running_clock() -> Clock:
    """The event loop that runs."""
    return asyncio.get_running_loop()
