"""The thread in which a shard is written. What waits is written as one group: one fsync for all.

While another replica is the primary, it follows that one's log instead, looking every POLL_S.
"""

import contextlib
import copy
import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any

from shardline.shards.core.errors import CorruptFile, NotPrimary, ShardlineError
from shardline.shards.live.changeover import Changeover
from shardline.shards.live.takeover import Takeover
from shardline.shards.live.writes import ShardWrites
from shardline.shards.server.answering import INTERNAL_ERROR, error_reply
from shardline.shards.server.handlers import Work
from shardline.shards.wire.frames import Message

logger = logging.getLogger(__name__)

POLL_S = 0.01  # of a follower's look at the log: two calls of stat
PAUSE_S = 1.0  # of a follower that could not read the log
IDLE_S = 1.0  # of a primary's look at what is due: a compaction, a log that can be written again
GROUP_ROWS = 16_384  # of one group: beyond that the fsync is no longer what it costs
STOP_TIMEOUT_S = 10.0

Deliver = Callable[[list[tuple[Work, Message | None]]], None]


@dataclass(slots=True)
class _Order:
    """To lead, to seal, or to take an index over."""

    carry_out: Callable[[], int]
    answer: Future[int]


class WriteThread:
    """``submit``, ``lead``, ``seal``, ``take_over`` and ``mark`` may be called by any thread;
    ``deliver`` is called in this one."""

    def __init__(
        self,
        writes: ShardWrites,
        deliver: Deliver,
        *,
        changeover: Changeover | None = None,
        on_damage: Callable[[CorruptFile], None] | None = None,
        poll_s: float = POLL_S,
    ) -> None:
        """on_damage: what is to be done if the log that is followed is damaged, or is not the one
        that was followed until then: the state would stay as it is for good."""
        self.writes = writes
        self.changeover = changeover
        self._on_damage = on_damage
        self._deliver = deliver
        self._poll_s = poll_s
        self._follows_at = 0.0
        self._queue: queue.SimpleQueue[Work | _Order | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="shard-writes", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, work: Work) -> None:
        self._queue.put(work)

    def lead(self, epoch: int) -> "Future[int]":
        """``ShardWrites.lead``, after what has been submitted before."""
        return self._ordered(partial(self.writes.lead, epoch))

    def seal(self, epoch: int) -> "Future[int]":
        """``ShardWrites.seal``, after what has been submitted before."""
        return self._ordered(partial(self.writes.seal, epoch))

    def take_over(self, takeover: Takeover) -> "Future[int]":
        """``Changeover.take_over``; the write that the new main index will have."""
        return self._ordered(partial(self._take_over, takeover))

    def mark(self) -> "Future[int]":
        """``ShardWrites.mark``'s number."""
        return self._ordered(lambda: self.writes.mark()[0])

    def _take_over(self, takeover: Takeover) -> int:
        if self.changeover is None or not self.writes.leads:
            raise NotPrimary("another replica takes the writes of this shard")
        self.changeover.take_over(takeover, self.writes.mark)
        return self.writes.seq

    def _ordered(self, carry_out: Callable[[], int]) -> "Future[int]":
        answer: Future[int] = Future()
        self._queue.put(_Order(carry_out, answer))
        return answer

    def stop(self) -> None:
        """Writes what has been submitted, then ends."""
        self._queue.put(None)
        if self._thread.is_alive():
            self._thread.join(STOP_TIMEOUT_S)
        if self.changeover is not None:
            self.changeover.stop()
        self.writes.close()

    def _run(self) -> None:
        is_open = True
        while is_open:
            works, orders, is_open = self._next()
            if works:
                self._deliver(self._written(works))
            for order in orders:
                _carry_out(order)
            # each by itself: a log that cannot be followed any more ends with a newer main index
            for step in (
                self.writes.notice_successor,
                self._follow,
                self.writes.heal,
                self._change_over,
            ):
                try:
                    step()
                except Exception as error:  # noqa: BLE001  whatever it is, searches go on
                    self._complain(error)

    def _follow(self) -> None:
        """Not again for a second after an error: reading what is damaged would hold up searches."""
        now = time.monotonic()
        if now < self._follows_at:
            return
        try:
            self.writes.catch_up()
        except Exception as error:
            self._follows_at = now + PAUSE_S
            if isinstance(error, CorruptFile) and self._on_damage is not None:
                self._on_damage(error)
            raise

    def _change_over(self) -> None:
        """Its own troubles are none of the log's."""
        change = self.changeover
        if change is None:
            return
        try:
            loaded = change.turn(self.writes.state, leads=self.writes.leads)
            if loaded is None:
                return
            if self.writes.adopt(loaded):
                change.adopted(loaded)
            else:
                change.put_off()
        except Exception as error:  # noqa: BLE001  whatever it is, the main index in use serves on
            change.put_off(error)

    def _next(self) -> tuple[list[Work], list[_Order], bool]:
        """Everything that waits, up to a bound and the first order; False to stop."""
        works: list[Work] = []
        rows = 0
        timeout_s = self._poll_s
        if self.writes.leads and not (self.changeover and self.changeover.is_busy):
            timeout_s = IDLE_S
        with contextlib.suppress(queue.Empty):
            item = self._queue.get(timeout=timeout_s)
            while True:
                if item is None:
                    return works, [], False
                if isinstance(item, _Order):
                    return works, [item], True
                works.append(item)
                rows += item.rows
                if rows >= GROUP_ROWS:
                    break
                item = self._queue.get_nowait()
        return works, [], True

    def _written(self, works: list[Work]) -> list[tuple[Work, Message | None]]:
        try:
            replies = self.writes.write([work.request for work in works])
        except Exception:  # a bug of ours must cost these answers, not the thread
            logger.exception("writes failed")
            return [(work, INTERNAL_ERROR) for work in works]
        return [
            (work, error_reply(reply) if isinstance(reply, ShardlineError) else reply)
            for work, reply in zip(works, replies, strict=True)
        ]

    def _complain(self, error: Exception) -> None:
        """Logs a trouble once."""
        if str(error) != str(self.writes.trouble):
            logger.error("the log is not followed: %s", error, exc_info=error)
        # a copy: the trace of what was raised keeps alive what its frames hold
        known: Any = copy.copy(error) if isinstance(error, ShardlineError | OSError) else None
        self.writes.trouble = known or ShardlineError(f"the log is not followed: {error!r}")


def _carry_out(order: _Order) -> None:
    try:
        order.answer.set_result(order.carry_out())
    except Exception as error:  # noqa: BLE001  whoever ordered it is told
        order.answer.set_exception(error)
