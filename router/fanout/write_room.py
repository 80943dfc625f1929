"""Room for writes on one connection: a shard refuses those beyond it, so they wait their turn here.

Without it, the parts of one large request to one shard would refuse each other. In the order they
came; the shard counts what it still works on after a deadline has passed here, so it may refuse one
nevertheless.
"""

import asyncio
from collections import deque

from shardline.router.fanout.clock import Clock, Deadline
from shardline.shards.core.messages import WRITE_ROOM_BYTES, DeleteRequest, UpsertRequest

OVERHEAD_BYTES = 512  # of a request beside its arrays, and of its reply, as the shard counts them


class WriteRoom:
    """``enter``, then ``leave``: both in the event loop."""

    def __init__(self) -> None:
        self._taken = 0
        self._waiting: deque[tuple[int, asyncio.Future[bool]]] = deque()

    async def enter(self, size: int, clock: Clock, deadline: float) -> bool:
        """Whether there was room for so many bytes by then; if so, ``leave`` is owed."""
        if not self._waiting and self._has_room(size):
            self._taken += size
            return True
        turn: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._waiting.append((size, turn))
        timer = Deadline(clock, deadline, lambda: None if turn.done() else turn.set_result(False))
        try:
            return await turn
        except asyncio.CancelledError:
            if not turn.cancelled() and turn.result():
                self._taken -= size
            raise
        finally:
            timer.cancel()
            self._admit()  # those behind one that has given up

    def leave(self, size: int) -> None:
        self._taken -= size
        self._admit()

    def _has_room(self, size: int) -> bool:
        return not self._taken or self._taken + size <= WRITE_ROOM_BYTES

    def _admit(self) -> None:
        while self._waiting:
            size, turn = self._waiting[0]
            if not turn.done():
                if not self._has_room(size):
                    return
                self._taken += size
                turn.set_result(True)
            self._waiting.popleft()


def bytes_of(message: UpsertRequest | DeleteRequest) -> int:
    """At least what the shard counts for it."""
    size = OVERHEAD_BYTES + message.item_ids.nbytes + len(message.key)
    if isinstance(message, UpsertRequest):
        size += message.vectors.nbytes + len(message.attributes) + len(message.features)
    return size
