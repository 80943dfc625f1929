"""Exact searches of a shard: one at a time, in a thread of their own, behind all other work.

They read every row, for seconds in a large shard. So they share neither queue nor thread with other
searches, and their thread steps back by pauses where the host has more work than cores. Few may
wait: they are for measuring, and whoever asks for more than that is refused.

Not by a lower priority: the thread holds the GIL now and then, and one that is nice, loses its core
then, and waits for the next among many has the whole shard wait with it. With eight busy processes
on two cores that was .2 s and more of the half second that a search has.
"""

import logging
import queue
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
# A pause is so many times as long as the thread had to wait for a core, or for the GIL, since the
# last one; but no longer than leaves it a tenth of the time, as niceness 10 would on a busy core.
PAUSE_PER_WAIT = 3.0
PAUSE_PER_RUN = 9.0
LONGEST_PAUSE_S = 0.2
SWITCHES_S = 0.001  # waits that are none: some switches of threads
STOP_TIMEOUT_S = 10.0


def is_exact(work: Work) -> bool:
    return isinstance(work.request, SearchRequest) and work.request.options.exact


class Pauses:
    """Of one thread: how long it is to pause now. Seconds; now, ran: what ``time.monotonic`` and
    ``time.thread_time`` say, at first and then at each call."""

    def __init__(self, now: float, ran: float) -> None:
        self._now, self._ran = now, ran

    def due_s(self, now: float, ran: float) -> float:
        """0 while the thread has a core to itself. Begin anew after the pause, with ``over``."""
        ran_s = ran - self._ran
        waited_s = now - self._now - ran_s
        self.over(now, ran)
        if waited_s <= SWITCHES_S:
            return 0.0
        return min(PAUSE_PER_WAIT * waited_s, PAUSE_PER_RUN * ran_s, LONGEST_PAUSE_S)

    def over(self, now: float, ran: float) -> None:
        """What was until now is not looked at again."""
        self._now, self._ran = now, ran


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
        pauses = Pauses(*_clocks())
        while (work := self._queue.get()) is not None and not self._stopped:
            pauses.over(*_clocks())  # nothing was to be done
            self._deliver(work, self._answer(work, pauses))
            _step_back(pauses)  # there may be as many as somebody measures

    def _answer(self, work: Work, pauses: Pauses) -> Message:
        def look() -> None:
            _step_back(pauses)
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


def _clocks() -> tuple[float, float]:
    return time.monotonic(), time.thread_time()


def _step_back(pauses: Pauses) -> None:
    """Lets others have core and GIL, if they want them."""
    due_s = pauses.due_s(*_clocks())
    if due_s:
        time.sleep(due_s)
        pauses.over(*_clocks())
