"""Evaluates filters that a shard does not know yet, ahead of their searches, in its own thread.

A filter may take a second over millions of texts. The search thread would keep every other search
waiting meanwhile; here only other new filters wait, those of background searches behind the rest.
A search goes on to the search thread when its filter is known, and also when that failed or its
time ran out: the answer says so then.
"""

import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable

from shardline.shards.core.errors import DeadlineExceeded, ShardlineError
from shardline.shards.server.handlers import Work
from shardline.shards.server.shard import Shard

logger = logging.getLogger(__name__)

STOP_TIMEOUT_S = 10.0


class FilterThread:
    """``submit`` is the loop thread's. go_on: called with each search, in this thread."""

    def __init__(self, shard: Shard, go_on: Callable[[Work], None]) -> None:
        self._shard = shard
        self._go_on = go_on
        # whether it is a background search, then as they came
        self._queue: queue.PriorityQueue[tuple[bool, int, Work | None]] = queue.PriorityQueue()
        self._numbers = itertools.count()
        self._thread: threading.Thread | None = None  # begins with the first: many have none
        self._stopped = False

    def submit(self, work: Work) -> None:
        """A search whose filter is not known."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="shard-filter", daemon=True)
            self._thread.start()
        self._queue.put((work.is_background, next(self._numbers), work))

    def stop(self) -> None:
        """Drops what waits; any thread, while the loop thread submits nothing."""
        self._stopped = True
        self._queue.put((False, -1, None))
        if self._thread is not None:
            self._thread.join(STOP_TIMEOUT_S)

    def _run(self) -> None:
        while (work := self._queue.get()[2]) is not None:
            self._evaluate(work)
            self._go_on(work)

    def _evaluate(self, work: Work) -> None:
        def look() -> None:
            if self._stopped or time.monotonic() > work.deadline:
                raise DeadlineExceeded("the request's time ran out before its filter was evaluated")

        try:
            look()
            if not self._shard.is_prepared(work.request):  # another had the same filter
                self._shard.prepare(work.request, look)
        except ShardlineError:
            pass  # the search finds the same, and answers with it
        except Exception:  # a bug of ours must cost this answer, not the thread
            logger.exception("a filter was not evaluated")
