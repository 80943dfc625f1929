"""One write on its way to the primary of its shard, and to nobody else.

It is never hedged and never sent to another replica. It is sent again, with the same key, which
makes both one effect,

- once, when the connection breaks after it was sent, to the primary of then;
- when the replica says that it is not the primary, and a newer table has come.

It does not cross to another generation, whose shards are others: ``GenerationChanged`` tells who
sent it to split it anew.

While a shard has no primary, or none that can be reached, the write waits for one a moment; and for
its turn, while as much is under way to the shard as that takes on one connection. One that was
sent, and is given up before it is acknowledged, is an error that says that it may have been
applied.
"""

import asyncio
from collections.abc import Callable
from dataclasses import replace

from shardline.router.fanout.clock import Clock, Deadline
from shardline.router.fanout.connection import ShardConnection
from shardline.router.fanout.fanout import Fanout
from shardline.router.fanout.snapshot import TableSnapshot
from shardline.router.fanout.write_room import bytes_of
from shardline.shards.core.errors import (
    DeadlineExceeded,
    InvalidInput,
    NotPrimary,
    Overloaded,
    ProtocolError,
    ShardlineError,
    Unavailable,
    error_of,
)
from shardline.shards.core.messages import DeleteRequest, ErrorReply, UpsertRequest, WriteReply
from shardline.shards.wire.frames import decode_payload, encode_frame
from shardline.shards.wire.readers import Payload

# For a primary: a killed one is missed within a second or two, and another replica elected in a
# fraction of one. A process that restarts takes longer than a caller should be held.
PRIMARY_WAIT_S = 4.0
LOOK_S = 0.05  # between two looks at the table and the connection, while a write waits for them


class GenerationChanged(Unavailable):
    """Another generation is live. may_be_applied: the write was sent, and not answered."""

    def __init__(self, *, may_be_applied: bool) -> None:
        super().__init__("another generation went live meanwhile")
        self.may_be_applied = may_be_applied

    def as_failure(self) -> Unavailable:
        """For a write that fails for another reason as well, and is not sent again."""
        if self.may_be_applied:
            return DeadlineExceeded(f"{self.message}: it may have been applied")
        return Unavailable(self.message)


class Delivery:
    """One part of a write. ``table`` and connections are looked at anew for each attempt; the
    generation is that of the table which the write was split by."""

    def __init__(
        self,
        fanout: Fanout,
        generation: int,
        shard: int,
        deadline: float,
        *,
        in_loop: bool,
        may_be_applied: bool = False,
    ) -> None:
        """deadline: on the event loop's clock. in_loop: the frame is small enough to be encoded in
        the event loop; else it is in a thread. may_be_applied: to another generation, before."""
        self._fanout = fanout
        self._generation = generation
        self._shard = shard
        self._deadline = deadline
        self._in_loop = in_loop
        self._waits_until = 0.0
        self._is_in_doubt = False  # it was sent, and the connection broke before the answer
        self._may_be_applied = may_be_applied
        self._refused_by = 0  # version of the table whose primary said that it is none

    async def send(self, message: UpsertRequest | DeleteRequest) -> WriteReply:
        """The primary's acknowledgement. The time in ``message`` is replaced by what is left.

        Raises:
            InvalidInput: the shard says that the write is wrong.
            DeadlineExceeded: no answer in time; or it was sent, the connection broke, and it could
                not be sent again: it may have been applied.
            GenerationChanged: another generation is live, so it was not acknowledged.
            Unavailable: and its subclasses: as the shard says; or there is no primary, or none
                that can be reached, or the connection broke twice.
        """
        self._waits_until = min(self._deadline, self._clock.time() + PRIMARY_WAIT_S)
        while True:
            with self._fanout.pin() as snapshot:
                reply = await self._attempt(snapshot, message)
            if isinstance(reply, WriteReply):
                return reply
            left = self._waits_until - self._clock.time()
            if left <= 0:
                raise self._given_up(reply)
            await asyncio.sleep(min(LOOK_S, left))

    async def _attempt(
        self, snapshot: TableSnapshot, message: UpsertRequest | DeleteRequest
    ) -> WriteReply | Unavailable:
        """The acknowledgement, or why another attempt is worth while."""
        version = snapshot.table.version
        if snapshot.table.generation != self._generation:
            raise GenerationChanged(may_be_applied=self._is_in_doubt or self._may_be_applied)
        if version == self._refused_by:
            return NotPrimary("no replica takes writes now")
        connection, epoch = primary_of(snapshot, self._shard)
        if connection is None:
            return NotPrimary("no replica takes writes now")
        # a replica that leads anew takes nothing by an older table: what that says may be over
        message = replace(message, epoch=epoch)
        size = bytes_of(message)
        if not await connection.write_room.enter(size, self._clock, self._deadline):
            raise self._given_up(DeadlineExceeded("other writes took all the time"))
        try:
            reply = await self._ask(connection, message)
        finally:
            connection.write_room.leave(size)
        if isinstance(reply, WriteReply | Unavailable):
            return reply
        error = _error_of(reply)
        if isinstance(error, Overloaded):  # it was not looked at: an earlier one may be applied
            raise self._given_up(error)
        if not isinstance(error, NotPrimary):
            raise error
        self._refused_by = version
        return NotPrimary("the replica that took writes no longer does")

    async def _ask(
        self, connection: ShardConnection, message: UpsertRequest | DeleteRequest
    ) -> WriteReply | ErrorReply | Unavailable:
        """What the replica says; Unavailable where it may be asked again."""
        request_id = self._fanout.next_request_id()
        answer: asyncio.Future[Payload | Unavailable] = asyncio.get_running_loop().create_future()
        try:
            connection.usable_link()  # a frame of megabytes is not encoded in vain at each look
            frame = await self._encoded(request_id, message)
            self._left_s()  # a thread may have been long in coming
            link = connection.request(request_id, frame, _settling(answer))
        except DeadlineExceeded:
            raise
        except Overloaded as error:
            if not self._is_in_doubt:
                raise
            return error
        except Unavailable as error:
            return error
        late = DeadlineExceeded("no answer in time: it may have been applied")
        timer = Deadline(self._clock, self._deadline, lambda: _settling(answer)(late))
        try:
            reply = await answer
        finally:
            timer.cancel()
            connection.abandon(request_id)
        if reply is late:
            raise late
        if isinstance(reply, Unavailable):
            return self._lost(reply)
        answered = _read(reply, message, self._generation)
        if isinstance(answered, Unavailable):
            link.close(answered.message)
            return self._lost(answered)
        return answered

    async def _encoded(self, request_id: int, message: UpsertRequest | DeleteRequest) -> bytes:
        """The frame, with the time that is left. Raises DeadlineExceeded: none is."""
        timed = replace(message, timeout_ms=self._left_s() * 1000)
        if self._in_loop:
            return encode_frame(request_id, timed)
        return await asyncio.to_thread(encode_frame, request_id, timed)

    def _left_s(self) -> float:
        left = self._deadline - self._clock.time()
        if left <= 0:
            raise self._given_up(DeadlineExceeded("no answer in time"))
        return left

    def _lost(self, reason: Unavailable) -> Unavailable:
        """Of a write that was sent: whether it was applied is not known."""
        if self._is_in_doubt:
            raise Unavailable(f"{reason.message}, twice: it may have been applied")
        self._is_in_doubt = True
        self._waits_until = self._deadline
        return reason

    def _given_up(self, reason: Unavailable) -> Unavailable:
        """The error of a write that is not tried again."""
        if not (self._is_in_doubt or self._may_be_applied):
            return reason
        return DeadlineExceeded(f"{reason.message}: it may have been applied")

    @property
    def _clock(self) -> Clock:
        return self._fanout.clock


def primary_of(snapshot: TableSnapshot, shard: int) -> tuple[ShardConnection | None, int]:
    """The connection to the replica that takes a shard's writes, and its epoch; None: none does,
    or it is served by no process."""
    for route, connections in zip(snapshot.table.shards, snapshot.shards, strict=True):
        if route.shard == shard:
            for replica, connection in zip(route.replicas, connections, strict=True):
                if replica.key.replica == route.primary:
                    return connection, route.primary_epoch
    return None, 0


def _settling(
    answer: asyncio.Future[Payload | Unavailable],
) -> Callable[[Payload | Unavailable], None]:
    return lambda reply: None if answer.done() else answer.set_result(reply)


def _read(
    payload: Payload, message: UpsertRequest | DeleteRequest, generation: int
) -> WriteReply | ErrorReply | Unavailable:
    """A reply, decoded; Unavailable: it is none to this write."""
    try:
        reply = decode_payload(payload)
    except ProtocolError as error:
        return Unavailable(f"broke the protocol ({error.message})")
    if isinstance(reply, ErrorReply):
        return reply
    if (
        isinstance(reply, WriteReply)
        and reply.generation == generation
        and 0 <= reply.existed <= reply.rows == len(message.item_ids)
        and reply.seq > 0
    ):
        return reply
    return Unavailable("broke the protocol (wrong reply)")


def _error_of(reply: ErrorReply) -> ShardlineError:
    """What a shard refuses a write with; an error of its own making is no caller's business."""
    error = error_of(reply.code, reply.message)
    if isinstance(error, InvalidInput):
        error.field = reply.field
        return error
    return error if isinstance(error, Unavailable) else Unavailable(f"failed ({reply.code})")
