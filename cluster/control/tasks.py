"""Tasks of one event loop that nobody awaits: kept, logged when they fail, cancelled together."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

logger = logging.getLogger(__name__)


class Tasks:
    """Those that are under way."""

    def __init__(self) -> None:
        self._running: set[asyncio.Task[None]] = set()

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Needs a running event loop."""
        task = asyncio.ensure_future(work)
        self._running.add(task)
        task.add_done_callback(self._finished)
        return task

    def cancel(self) -> None:
        for task in list(self._running):
            task.cancel()

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        if not task.cancelled() and task.exception() is not None:
            logger.error("controller task failed", exc_info=task.exception())


async def tried(work: Callable[[], Awaitable[None]], what: str) -> None:
    """Does what is done again soon: a failure is logged, and is no end. what: for the log, what
    could not be done."""
    try:
        await work()
    except Exception:  # a full disk, say
        logger.exception("the controller could not %s", what)
