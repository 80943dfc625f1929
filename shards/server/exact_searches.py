"""Exact searches of a shard: one at a time, in a thread of their own, behind all other work.

They read every row, for seconds in a large shard. So they share neither queue nor thread with other
searches, and their thread has a lower priority than the others. Few may wait: they are for
measuring, and whoever asks for more than that is refused.
"""

import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace

from shardline.shards.core.errors import DeadlineExceeded, Overloaded, ShardlineError
from shardline.shards.core.messages import SearchRequest
from shardline.shards.index.main_index import set_search_threads
from shardline.shards.server.answering import INTERNAL_ERROR, ServerStats, error_reply
from shardline.shards.server.handlers import Work
from shardline.shards.server.shard import Shard
from shardline.shards.wire.frames import Message

logger = logging.getLogger(__name__)

MAX_EXACT = 4  # waiting, or under way
MAX_EXACT_ROWS = 1024  # queries of these; a single request may have more
# As compactions. Not the lowest: the thread holds the GIL now and then, and must get a core then.
NICENESS = 10
STOP_TIMEOUT_S = 10.0


def is_exact(work: Work) -> bool:
    return isinstance(work.request, SearchRequest) and work.request.options.exact


class ExactSearches:
    """``submit``, ``take_back`` and ``requests`` are the loop thread's.

    deliver: called in the thread of these searches, with what it has answered, for ``take_back``.
    """

    def __init__(
        self, shard: Shard, stats: ServerStats, deliver: Callable[[Work, Message], None]
    ) -> None:
        self.requests = 0  # waiting, or under way
        self._rows = 0  # of these
        self._shard = shard
        self._stats = stats
        self._deliver = deliver
        self._queue: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None  # begins with the first: most shards have none
        self._stopped = False

    def submit(self, work: Work) -> None:
        """Queues a search, or answers it at once with an error."""
        if self.requests >= MAX_EXACT or (
            self.requests and self._rows + work.rows > MAX_EXACT_ROWS
        ):
            self._stats.overloaded += 1
            got = f"{self.requests} of {self._rows} queries"
            error = Overloaded("other exact searches wait already", got=got)
            work.asker.reply(work.request_id, error_reply(error), work.taken)
            return
        self.requests += 1
        self._rows += work.rows
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="shard-exact", daemon=True)
            self._thread.start()
        self._queue.put(work)

    def take_back(self, work: Work, message: Message) -> None:
        """What has been answered."""
        self.requests -= 1
        self._rows -= work.rows
        work.asker.reply(work.request_id, message, work.taken)

    def stop(self) -> None:
        """Ends the search under way within a block of rows, and drops those that wait; any thread,
        while the loop thread submits nothing."""
        self._stopped = True
        self._queue.put(None)
        if self._thread is not None:
            self._thread.join(STOP_TIMEOUT_S)

    # Thread of its own

    def _run(self) -> None:
        set_search_threads(1)
        _step_back()
        while (work := self._queue.get()) is not None and not self._stopped:
            self._deliver(work, self._answer(work))

    def _answer(self, work: Work) -> Message:
        def look() -> None:
            if self._stopped or time.monotonic() > work.deadline:
                raise DeadlineExceeded("the request's time ran out during the exact search")

        self._stats.requests += 1
        remaining_ms = (work.deadline - time.monotonic()) * 1e3
        try:
            reply = self._shard.search_exactly(replace(work.request, timeout_ms=remaining_ms), look)
        except Exception:  # a bug of ours must cost this answer, not the thread
            logger.exception("an exact search failed")
            self._stats.failed += 1
            return INTERNAL_ERROR
        if isinstance(reply, DeadlineExceeded):
            self._stats.expired += 1
        return error_reply(reply) if isinstance(reply, ShardlineError) else reply


def _step_back() -> None:
    """Lets all other threads of the host have the cores first; only Linux has priorities of
    threads, elsewhere it would be that of the process."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
